"""Rewards for text-to-image models: (n, 3, H, W) images in [0, 1] and prompts to (n,) values.

import rewards
total = rewards.build({"clip": {"weight": 1.0, "model": "openai/clip-vit-base-patch32"},
                       "my_module:redness": 0.2})
total(images, prompts)               # (n,)
total.score(images, prompts)         # (n,), {"clip": (n,), "my_module:redness": (n,)}
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .base import FunctionReward, Reward, RewardError, call_parameters, callable_name, evaluate
from .clip import Clip
from .combine import WeightedSum
from .jpeg import Jpeg, jpeg_kilobytes
from .preprocess import clip_pixels

__all__ = [
    "REGISTRY",
    "Clip",
    "FunctionReward",
    "Jpeg",
    "Reward",
    "RewardError",
    "WeightedSum",
    "build",
    "check",
    "clip_pixels",
    "evaluate",
    "jpeg_kilobytes",
]

REGISTRY: dict[str, Callable[..., Reward]] = {
    "clip": Clip,
    "jpeg": Jpeg,
    "jpeg_incompressibility": functools.partial(Jpeg, incompressible=True),
}

Spec = Mapping[Any, Any]  # {name or callable: weight or {"weight": ..., **options}}


def build(spec: Spec) -> WeightedSum:
    """Load the rewards of ``spec`` and their weights, after ``check(spec)``.

    A key is a registered name, ``module:function``, any label when the value has a ``type`` (one
    of the former two), or the reward, class or function itself. A value is the weight, or a
    mapping of ``weight`` (default 1) and that reward's own options.
    """
    return WeightedSum(
        {label: (_load(label, *made), weight) for label, weight, *made in _parse(spec)}
    )


def check(spec: Spec) -> None:
    """Raise one ValueError saying what is wrong in ``spec``; no model weights are loaded."""
    _parse(spec)


def _load(label: str, target: Any, options: dict[str, Any]) -> Reward:
    if _is_factory(target):
        target, options = target(**options), {}
    reward = target if isinstance(target, Reward) else FunctionReward(target, **options)
    reward.name = label
    return reward


def _is_factory(target: Any) -> bool:
    """True when calling the target makes the reward, False when it is (or scores as) one."""
    return inspect.isclass(target) or target in REGISTRY.values()


def _parse(spec: Spec) -> list[tuple[str, float, Any, dict[str, Any]]]:
    if not spec:
        raise ValueError("no reward: give at least one, for instance rewards: {jpeg: 1.0}")
    parts = []
    for key, value in spec.items():
        options = dict(value) if isinstance(value, Mapping) else {"weight": value}
        kind = options.pop("type", key)
        label = key if isinstance(key, str) else getattr(key, "name", None) or callable_name(key)
        if any(label == part[0] for part in parts):
            raise ValueError(f"two rewards are called {label!r}; give one a label and a `type`")
        try:
            weight = _weight(options.pop("weight", 1.0))
            target = _resolve(kind) if isinstance(kind, str) else kind
            _check_options(target, options)
        except ValueError as error:
            raise ValueError(f"rewards.{label}: {error}") from error
        parts.append((label, weight, target, options))
    return parts


def _weight(value: Any) -> float:
    try:
        weight = math.nan if isinstance(value, bool) else float(value)  # YAML reads 1e-3 as text
    except (TypeError, ValueError):
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(f"weight {value!r} is not a finite number")
    return weight


def _resolve(name: str) -> Any:
    if name in REGISTRY:
        return REGISTRY[name]
    module_name, colon, path = name.partition(":")
    if not colon:
        raise ValueError(
            f"unknown reward {name!r}{_nearest(name, REGISTRY)} Known: "
            f"{', '.join(sorted(REGISTRY))}. For your own, write module:function"
        )
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current directory, as `python -m` has it
    try:
        return functools.reduce(getattr, path.split("."), importlib.import_module(module_name))
    except AttributeError as error:
        raise ValueError(f"module {module_name!r} has no {path!r} ({error})") from error
    except Exception as error:
        raise ValueError(
            f"cannot import {module_name!r}: {type(error).__name__}: {error}. It must be on "
            "PYTHONPATH or in the current directory"
        ) from error


def _check_options(target: Any, options: dict[str, Any]) -> None:
    if not callable(target):
        raise ValueError(f"{target!r} is neither a Reward nor callable")
    if _is_factory(target):
        bare = getattr(target, "__init__", None) is nn.Module.__init__  # its signature is **kwargs
        parameters = {} if bare else dict(inspect.signature(target).parameters)
    elif isinstance(target, Reward):
        parameters = {}  # already built
    else:
        parameters = dict(call_parameters(target))
        for name in (*list(parameters)[:2], "metadata"):
            parameters.pop(name, None)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {name: p for name, p in parameters.items() if p.kind not in variadic}
    if not any(p.kind is variadic[1] for p in parameters.values()):
        for option in set(options) - set(named):
            known = ", ".join(["weight", *named])
            raise ValueError(f"unknown option {option!r}{_nearest(option, named)} Known: {known}")
    missing = [n for n, p in named.items() if p.default is p.empty and n not in options]
    if missing:
        raise ValueError(f"missing required option {', '.join(missing)}")
    factory = getattr(target, "func", target)  # the class inside a functools.partial
    if inspect.isclass(factory) and issubclass(factory, Reward):
        factory.check_options(**options)


def _nearest(name: str, known) -> str:
    match = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {match[0]!r}?" if match else "."
