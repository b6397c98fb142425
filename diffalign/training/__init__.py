"""How a run goes: the loop, its updates, what is checked before and kept after."""
