"""Searches for a better picture of a prompt, without training. To add one: a file, a line here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, make_dataclass
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, get_type_hints

from rewards.registry import Registry

from ..config.decoding import bounds_of, decode, suggest

if TYPE_CHECKING:
    from ..dynamics import Levels
    from ..sampling.rollout import Sampling
    from .base import Budget, Result, Step, Steps, Task, draw, search

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

METHODS: Registry[Callable[..., Steps]] = Registry(
    __name__,
    {
        "best_of_n": "gradient_free:best_of_n",
        "random_search": "gradient_free:random_search",
        "zero_order": "gradient_free:zero_order",
        "paths": "gradient_free:paths",
        "reno": "reno:reno",
        "dno": "dno:dno",
        "smc": "smc:smc",
        "flow_map": "flow_map:flow_map",
        "universal_guidance": "guidance:universal_guidance",
        "critique": "critique:critique",
    },
)


def __getattr__(name: str) -> Any:
    # these import torch, which takes a second that a usage error need not wait for
    if name in __all__:
        return getattr(importlib.import_module(".base", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def build(name: str, options: Mapping[str, Any] | None = None) -> Callable[[Task], Steps]:
    """The method `name` with its options set, for `search(task, method(task), budget)`.

    Options are the arguments of the method's function; strings become numbers where numbers are
    expected. Keyword-only arguments are for Python: pass them to the result. Raises ValueError for
    an unknown method or option, or a value of the wrong type or out of range.
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
        bounds = bounds_of(hints[option])
        if bounds is not None and value not in bounds:
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
    """How a method draws along `levels`: by the ODE; but methods that need stochastic steps (`smc`,
    `flow_map`, `dno`) by DDIM with eta 1, or on a flow by Flow-GRPO's SDE with eta 0.7. kernel and
    eta replace these defaults. Raises ValueError for a kernel that is unknown or does not suit the
    levels."""
    from ..dynamics import step_std
    from ..sampling.rollout import Sampling

    flow = bool((levels.alpha + levels.sigma - 1).abs().max() < 1e-4)
    if kernel is None:
        chance = "flow_sde" if flow else "ddim"
        kernel = chance if method in ("smc", "flow_map", "dno") else "ode"
    if eta is None:
        eta = {"ode": 0.0, "ddim": 1.0}.get(kernel, 0.7)
    step_std(kernel, eta, levels)
    return Sampling(levels, kernel, eta, guidance)
