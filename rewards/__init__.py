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
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, NamedTuple

from .redaction import redact, refuse_secrets
from .registry import Registry

if TYPE_CHECKING:
    from .adversarial import Adversarial
    from .aesthetic import Aesthetic
    from .augment import Augmented
    from .base import FunctionReward, Reward, RewardError, evaluate
    from .clip import Clip
    from .combine import Ensemble, Floor, WeightedSum
    from .composition import Composition
    from .geneval import GenEval
    from .hps import HPS
    from .hpsv3 import HPSv3
    from .imagereward import ImageReward
    from .jpeg import Jpeg, jpeg_kilobytes
    from .ocr import OCR
    from .pickscore import PickScore
    from .preprocess import clip_pixels
    from .remote import Remote
    from .similarity import Similarity
    from .vlm import VLM

__all__ = [
    "HPS",
    "OCR",
    "REGISTRY",
    "VLM",
    "Adversarial",
    "Aesthetic",
    "Augmented",
    "Clip",
    "Composition",
    "Ensemble",
    "Floor",
    "FunctionReward",
    "GenEval",
    "HPSv3",
    "ImageReward",
    "Jpeg",
    "PickScore",
    "Remote",
    "Reward",
    "RewardError",
    "Similarity",
    "WeightedSum",
    "build",
    "check",
    "check_gradient",
    "clip_pixels",
    "evaluate",
    "from_arguments",
    "gradients_of",
    "jpeg_kilobytes",
    "redact",
]

REGISTRY: Registry[Callable[..., Reward]] = Registry(
    __name__,
    {
        "adversarial": "adversarial:Adversarial",
        "aesthetic": "aesthetic:Aesthetic",
        "clip": "clip:Clip",
        "composition": "composition:Composition",
        "ensemble": "combine:Ensemble",
        "geneval": "geneval:GenEval",
        "hps": "hps:HPS",
        "hpsv3": "hpsv3:HPSv3",
        "imagereward": "imagereward:ImageReward",
        "jpeg": "jpeg:Jpeg",
        "jpeg_incompressibility": "jpeg:incompressibility",
        "ocr": "ocr:OCR",
        "pickscore": "pickscore:PickScore",
        "remote": "remote:Remote",
        "similarity": "similarity:Similarity",
        "vlm": "vlm:VLM",
    },
)

_MODULES = {
    "Adversarial": "adversarial",
    "Aesthetic": "aesthetic",
    "Augmented": "augment",
    "Clip": "clip",
    "Composition": "composition",
    "Ensemble": "combine",
    "Floor": "combine",
    "FunctionReward": "base",
    "GenEval": "geneval",
    "HPS": "hps",
    "HPSv3": "hpsv3",
    "ImageReward": "imagereward",
    "Jpeg": "jpeg",
    "OCR": "ocr",
    "PickScore": "pickscore",
    "Remote": "remote",
    "Reward": "base",
    "RewardError": "base",
    "Similarity": "similarity",
    "VLM": "vlm",
    "WeightedSum": "combine",
    "clip_pixels": "preprocess",
    "evaluate": "base",
    "jpeg_kilobytes": "jpeg",
}


def __getattr__(name: str) -> Any:
    # these modules import torch, which takes a second that listings and refusals do not need
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    if name in _MODULES.values():
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


COMMON = ("weight", "at_least", "rate", "augment")  # options of every reward

Spec = Mapping[Any, Any]  # {name or callable: weight or {"weight": ..., **options}}


def build(spec: Spec) -> WeightedSum:
    """Validate ``spec`` as ``check`` does, then load its rewards and weights.

    A key is a registered name, ``module:function``, or the name of an installed entry point of the
    group ``diffalign.rewards``. It may be any label if the value names one of these as ``type``,
    or it may be the reward, class or function itself. A value is the weight, or a mapping of
    options: the reward's own, and those that all have:

        weight    factor of its values in the sum (1); for a constraint, the initial multiplier
        at_least  makes it a constraint on its mean, see ``WeightedSum``; rate: its step size
        augment   scores that many random views of each image and averages, see ``Augmented``
    """
    from .combine import WeightedSum

    parts = _parse(spec)
    return WeightedSum(
        {part.label: _load(part) for part in parts},
        {part.label: part.weight for part in parts},
        {part.label: part.floor for part in parts if part.floor},
    )


def check(
    spec: Spec, prompts: Sequence[str] | None = None, metadata: Sequence[dict] | None = None
) -> None:
    """Raise ValueError if ``spec`` is wrong, or if a reward cannot judge one of its ``prompts``.
    Loads no model weights."""
    parts = _parse(spec)
    if prompts is None:
        return
    from .combine import applies

    rows = list(zip(prompts, metadata or [{}] * len(prompts), strict=True))
    labels = [part.label for part in parts]
    for prompt, known in rows:
        asked = known.get("rewards", labels)
        if not isinstance(asked, list) or not set(asked) <= set(labels) or not asked:
            raise ValueError(
                f"prompt {prompt!r} has rewards={asked!r} in its metadata; give a list of one or "
                f"more of {', '.join(labels)}"
            )
    for part in parts:
        own = [row for row in rows if applies(part.label, row[1])]
        judge = getattr(part.target, "func", part.target)
        if own and hasattr(judge, "check_prompts"):
            try:
                judge.check_prompts([p for p, _ in own], [m for _, m in own])
            except ValueError as error:
                raise ValueError(f"rewards.{part.label}: {error}") from error


def check_gradient(spec: Spec) -> None:
    """Raise ValueError for a reward that cannot have a gradient to the pixels, before loading it
    (``WeightedSum.require_differentiable`` checks loaded rewards). Weight 0 needs no gradient."""
    known = gradients_of(spec)
    for part in _parse(spec):
        if part.weight != 0 and known[part.label] is False:
            from .combine import no_gradient

            raise ValueError(no_gradient(part.label, getattr(part.target, "func", part.target)))


def gradients_of(spec: Spec) -> dict[str, bool | None]:
    """{label: whether the reward is differentiable, or None if only loading it can tell}. Loads
    nothing."""
    return {part.label: _has_gradient(part) for part in _parse(spec)}


def _has_gradient(part: _Part) -> bool | None:
    from .base import Reward

    target = part.target
    if not _is_factory(target):
        return bool(getattr(target, "differentiable", False))
    factory = getattr(target, "func", target)  # the class inside a functools.partial
    if not issubclass(factory, Reward):
        return getattr(factory, "differentiable", None) or None
    known = factory.has_gradient(**part.options)
    # a user's class may set it in its constructor
    return known if known or factory.__module__.startswith(f"{__name__}.") else None


def from_arguments(texts: Sequence[str]) -> dict[str, dict]:
    """Parse the arguments ``NAME`` and ``NAME={JSON options}`` into a spec; raises ValueError."""
    spec = {}
    for text in texts:
        name, _, options = text.partition("=")
        try:
            value = json.loads(options or "{}")
        except ValueError as error:
            raise ValueError(f"--reward {text}: the options are not JSON ({error})") from error
        if not isinstance(value, dict) or name in spec:
            problem = "is given twice" if name in spec else "wants its options as {...}"
            raise ValueError(f"--reward {name} {problem}")
        spec[name] = value
    return spec


class _Part(NamedTuple):
    label: str
    weight: float
    floor: Floor | None
    augment: int
    target: Any
    options: dict[str, Any]


def _load(part: _Part) -> Reward:
    from .augment import Augmented
    from .base import FunctionReward, Reward

    target, options = part.target, part.options
    if _is_factory(target):
        try:
            target, options = target(**options), {}
        except (ValueError, ImportError) as error:  # weights or a package are missing
            raise ValueError(f"rewards.{part.label}: {error}") from error
    reward = target if isinstance(target, Reward) else FunctionReward(target, **options)
    if part.augment:
        reward = Augmented(reward, part.augment)
    reward.name = part.label
    return reward


def _is_factory(target: Any) -> bool:
    """True if calling the target makes the reward, False if it is a reward or scores directly."""
    return inspect.isclass(target.func if isinstance(target, functools.partial) else target)


def _parse(spec: Spec) -> list[_Part]:
    if not isinstance(spec, Mapping) and spec is not None:
        raise ValueError(
            f"rewards={spec!r} is not a mapping of rewards to weights; write {{NAME: 1.0}}, with "
            "the name of a reward, or a function of your own, as the key"
        )
    if not spec:
        raise ValueError("no reward: give at least one, for instance rewards: {jpeg: 1.0}")
    from .files import expand_user

    parts = []
    for key, value in spec.items():
        options = expand_user(dict(value)) if isinstance(value, Mapping) else {"weight": value}
        kind = options.pop("type", key)
        label = key if isinstance(key, str) else _label(key)
        if any(label == part.label for part in parts):
            raise ValueError(f"two rewards are called {label!r}; give one a label and a `type`")
        try:
            refuse_secrets(options)
            weight, floor, augment = _common(options)
            target = _resolve(kind) if isinstance(kind, str) else kind
            _check_options(target, options)
        except ValueError as error:
            raise ValueError(f"rewards.{label}: {error}") from error
        parts.append(_Part(label, weight, floor, augment, target, options))
    if all(part.floor for part in parts):
        raise ValueError("every reward is a constraint; give one without at_least to maximise")
    return parts


def _label(reward: Any) -> str:
    from .base import callable_name

    return getattr(reward, "name", None) or callable_name(reward)


def _common(options: dict[str, Any]) -> tuple[float, Floor | None, int]:
    """Remove weight, constraint and number of views from a reward's options and return them."""
    weight = _number("weight", options.pop("weight", 1.0))
    floor, augment = None, options.pop("augment", 0)
    if "at_least" in options:
        from .combine import Floor

        bound = _number("at_least", options.pop("at_least"))
        floor = Floor(bound, _number("rate", options.pop("rate", 1.0)))
        if floor.rate <= 0 or weight < 0:
            raise ValueError(
                f"weight={weight:g} and rate={floor.rate:g} of a constraint: its multiplier is "
                "never negative, and the rate must be positive"
            )
    if isinstance(augment, bool) or not isinstance(augment, int) or augment < 0:
        raise ValueError(f"augment={augment!r} is not a number of views, 1 or more (0: none)")
    return weight, floor, augment


def _number(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # YAML reads 1e-3 as text
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} {value!r} is not a finite number")
    return number


def _resolve(name: str) -> Any:
    if name in REGISTRY:
        return REGISTRY[name]
    module_name, colon, path = name.partition(":")
    if not colon:
        for entry in entry_points(group="diffalign.rewards", name=name):
            return entry.load()
        raise ValueError(
            f"unknown reward {name!r}{_nearest(name, REGISTRY)} Known: "
            f"{', '.join(sorted(REGISTRY))}. For your own, write module:function"
        )
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current directory, as under `python -m`
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
    from torch import nn

    from .base import Reward, call_parameters

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
            known = ", ".join([*COMMON, *named])
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
