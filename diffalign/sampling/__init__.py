"""How a picture is drawn: rollouts, their windows, plain pictures."""
