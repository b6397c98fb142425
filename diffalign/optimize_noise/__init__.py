"""One better picture a prompt, with the model as it is. To add a method: a file, a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, make_dataclass
from functools import partial
from inspect import signature
from typing import Any, get_args, get_type_hints

from ..decoding import decode, suggest
from ..dynamics import Levels, step_std
from ..rollout import Sampling
from .base import Bounds, Budget, Result, Step, Steps, Task, draw, search
from .critique import critique
from .dno import dno
from .flow_map import flow_map
from .gradient_free import best_of_n, paths, random_search, zero_order
from .guidance import universal_guidance
from .reno import reno
from .smc import smc

__all__ = [
    "METHODS",
    "Budget",
    "Result",
    "Step",
    "Steps",
    "Task",
    "build",
    "draw",
    "sampling_for",
    "search",
]

METHODS: dict[str, Callable[..., Steps]] = {
    "best_of_n": best_of_n,
    "random_search": random_search,
    "zero_order": zero_order,
    "paths": paths,
    "reno": reno,
    "dno": dno,
    "smc": smc,
    "flow_map": flow_map,
    "universal_guidance": universal_guidance,
    "critique": critique,
}


def build(name: str, options: Mapping[str, Any] | None = None) -> Callable[[Task], Steps]:
    """The method `name` with its options set, for `search(task, method(task), budget)`.

    Options are those of the method's function; strings become numbers where they should be. What it
    takes by keyword alone is for Python: give that to the result. Raises ValueError for an unknown
    method or option, or a value that cannot work.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}{suggest(name, METHODS)}")
    method = METHODS[name]
    hints = get_type_hints(method, include_extras=True)
    defaults = {
        k: p.default
        for k, p in signature(method).parameters.items()
        if k != "task" and p.kind is not p.KEYWORD_ONLY
    }
    fields = [(option, hints[option], default) for option, default in defaults.items()]
    values = asdict(decode(make_dataclass(name, fields), options or {}, name))
    for option, value in values.items():
        for bounds in get_args(hints[option]):
            if isinstance(bounds, Bounds) and value not in bounds:
                raise ValueError(
                    f"{name}.{option}={value!r} is out of range; use {bounds} "
                    f"(default {defaults[option]})"
                )
    return partial(method, **values)


def sampling_for(
    method: str,
    levels: Levels,
    guidance: float,
    kernel: str | None = None,
    eta: float | None = None,
) -> Sampling:
    """How a method draws along `levels`: by the ODE, or, for those that live on chance (`smc`,
    `flow_map`, `dno`), by DDIM with eta 1, on a flow by Flow-GRPO's SDE with 0.7. kernel and eta:
    others. Raises ValueError for a kernel that is unknown or does not suit the levels."""
    flow = bool((levels.alpha + levels.sigma - 1).abs().max() < 1e-4)
    if kernel is None:
        chance = "flow_sde" if flow else "ddim"
        kernel = chance if method in ("smc", "flow_map", "dno") else "ode"
    if eta is None:
        eta = {"ode": 0.0, "ddim": 1.0}.get(kernel, 0.7)
    step_std(kernel, eta, levels)
    return Sampling(levels, kernel, eta, guidance)
