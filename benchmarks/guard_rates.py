"""How often the over-optimisation guard is wrong, and how large a fall it finds, by simulation.

    python benchmarks/guard_rates.py [--runs 2000]

Judges of 112 held-out prompts, two pictures each. A picture's change from the base model has the
standard deviation 1 and the correlation 0.5 with that of the prompt's other picture. It is drawn
anew at every evaluation, or, in a random walk, added to the last. A few minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from diffalign.training.guard import Guard
from diffalign.verdict import level, t_tail

PROMPTS, PICTURES, CORRELATION, DROP = 112, 2, 0.5, 2.0
N = PROMPTS * PICTURES
START = 5  # the evaluation at which a judge falls
Draw = Callable[[int], np.ndarray]  # n values with mean 0 and variance 1


def changes(draw: Draw) -> np.ndarray:
    """Of all pictures, those of a prompt next to each other, (N,)."""
    common = np.repeat(draw(PROMPTS), PICTURES)
    return CORRELATION**0.5 * common + (1 - CORRELATION) ** 0.5 * draw(N)


def flagged_at(
    looks: int, judges: int, draw: Draw, walk: bool = False, fall: float = 0.0
) -> int | None:
    """The evaluation at which a simulated run is flagged first. The judges fall by `fall` at the
    evaluation START, and stay there."""
    names = [f"judge {j}" for j in range(judges)]
    guard, prompts = Guard(DROP, 0.0, names), [i // PICTURES for i in range(N)]
    base = {name: draw(N) for name in names}
    guard.see({"reward": np.zeros(N).tolist(), **base}, None, prompts)
    moved = {name: np.zeros(N) for name in names}
    for look in range(1, looks + 1):
        moved = {name: walk * moved[name] + changes(draw) for name in names}
        now = {name: base[name] + moved[name] - fall * (look >= START) for name in names}
        if guard.see({"reward": np.ones(N).tolist(), **now}, None, prompts):
            return look
    return None


def threshold(look: int, judges: int) -> float:
    """Standard errors that a judge must fall by to be flagged at an evaluation."""
    low, high, enough = 0.0, 100.0, level(DROP, look, look * (1 + judges))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, PROMPTS - 1) > enough else (low, middle)
    return high


def main() -> None:
    parser = argparse.ArgumentParser(description="False alarms and power of the guard.")
    parser.add_argument("--runs", type=int, default=2000, help="simulated runs a figure")
    runs, rng = parser.parse_args().runs, np.random.default_rng(0)
    draws: dict[str, Draw] = {
        "normal": rng.standard_normal,
        "skewed up": lambda n: rng.exponential(size=n) - 1,
        "skewed down": lambda n: 1 - rng.exponential(size=n),
    }
    print("| changes | judges | flagged in 1 evaluation | 10 | 30 |\n|---|---|---|---|---|")
    for name, walk, judges in (
        *((n, w, j) for n, w in (("normal", False), ("normal", True)) for j in (1, 2)),
        ("skewed up", False, 1),
        ("skewed down", False, 1),
    ):
        found = [flagged_at(30, judges, draws[name], walk) for _ in range(runs)]
        shares = [np.mean([f is not None and f <= k for f in found]) for k in (1, 10, 30)]
        kind = name + (", random walk" if walk else ", independent")
        print(f"| {kind} | {judges} | " + " | ".join(f"{s:.1%}" for s in shares) + " |", flush=True)
    print("\n| fall | found at once | within 5 evaluations | within 20 |\n|---|---|---|---|")
    for fall in (0.2, 0.3, 0.4, 0.5):
        found = [flagged_at(START + 19, 1, draws["normal"], fall=fall) for _ in range(runs)]
        late = [f - START for f in found if f is not None and f >= START]
        shares = [sum(x < k for x in late) / runs for k in (1, 5, 20)]
        print(f"| {fall} | " + " | ".join(f"{s:.0%}" for s in shares) + " |", flush=True)
    needed = ", ".join(f"{threshold(k, 1):.1f} at evaluation {k}" for k in (1, 5, 10, 30))
    print(f"\nStandard errors that one judge must fall by: {needed}.")


if __name__ == "__main__":
    main()
