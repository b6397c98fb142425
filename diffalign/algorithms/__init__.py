"""Algorithms by name. To add one: a file with a dataclass, and a line here."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rewards.registry import Registry

from ..config import TrainConfig, decode
from ..config.decoding import ConfigError, suggest
from ..config.source import Subject

if TYPE_CHECKING:
    from .base import Algorithm, Batch, GradientAlgorithm, Matches, Needs, Transitions

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Batch",
    "GradientAlgorithm",
    "Matches",
    "Needs",
    "Transitions",
    "build",
    "check",
    "name_of",
]

ALGORITHMS: Registry[type] = Registry(
    __name__,
    {
        "ddpo": "ddpo:DDPO",
        "dpok": "dpok:DPOK",
        "flow_grpo": "flow_grpo:FlowGRPO",
        "grpo_guard": "grpo_guard:GRPOGuard",
        "awm": "awm:AWM",
        "nft": "nft:DiffusionNFT",
        "fpo": "fpo:FPO",
        "rwr": "rwr:RWR",
        "draft": "draft:DRaFT",
        "alignprop": "alignprop:AlignProp",
        "refl": "refl:ReFL",
        "drtune": "drtune:DRTune",
    },
)


def __getattr__(name: str) -> Any:
    # these import torch, which takes a second that `--help` and a misspelt name need not wait for
    if name in __all__:
        return getattr(importlib.import_module(".base", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def build(options: Mapping[str, Any]) -> Any:
    """The algorithm of the config section `algorithm`: its `type`, with the rest as options.

    The type is a name of `ALGORITHMS`, or module:Class for an `Algorithm` of one's own, in the
    current directory or on PYTHONPATH. Raises ConfigError.
    """
    rest = {k: v for k, v in options.items() if k != "type"}
    return decode(_find(str(options.get("type"))), rest, "algorithm")


def of_type(kind: str, options: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The config section `algorithm` of the file `source`, turned to another type. Options that
    this type has too are kept; a note on stderr names the others. Raises ConfigError."""
    if kind in ALGORITHMS:
        known = {option.name for option in Subject(ALGORITHMS.places[kind]).options}
    else:
        known = set(getattr(_find(kind), "__dataclass_fields__", ()))
    others = {k: v for k, v in options.items() if k not in known | {"type"}}
    if others:
        print(
            f"note: {kind} has no {', '.join(others)}: left out of the options that {source} gives "
            f"{options['type']}",
            file=sys.stderr,
        )
    return {"type": kind} | {k: v for k, v in options.items() if k in known}


TrainConfig.of_type = of_type


def name_of(algorithm: Algorithm) -> str:
    """The `type` by which `build` finds the class of this algorithm."""
    own = type(algorithm)
    names = [name for name, known in ALGORITHMS.items() if known is own]
    return names[0] if names else f"{own.__module__}:{own.__qualname__}"


def check(algorithm: Any) -> None:
    """Raises ConfigError for an algorithm, a class or an instance, that the training loop cannot
    use."""
    from .base import Algorithm, GradientAlgorithm, Needs

    cls = algorithm if isinstance(algorithm, type) else type(algorithm)
    name = f"algorithm.type={cls.__module__}:{cls.__qualname__}"
    if not issubclass(cls, Algorithm):
        raise ConfigError(f"{name} is no Algorithm; derive it from diffalign.algorithms.Algorithm")
    needs = getattr(cls, "needs", None)
    if not isinstance(needs, Needs):
        raise ConfigError(
            f"{name} does not say what it needs; set needs = Needs.TRAJECTORY, FINAL or GRADIENT"
        )
    wanted = {
        Needs.TRAJECTORY: {"loss": Algorithm},
        Needs.FINAL: {"loss": Algorithm, "times": None, "levels": None, "check_levels": None},
        Needs.GRADIENT: {"surrogate": GradientAlgorithm, "reward_loss": None},
    }[needs]
    for part, base in wanted.items():
        if getattr(cls, part, None) in (None, getattr(base, part, None)):
            raise ConfigError(f"{name} needs {needs.name} and defines no {part}; write one")


def _find(name: str) -> type:
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    module, colon, path = name.partition(":")
    if not colon:
        raise ConfigError(
            f"unknown algorithm {name!r}{suggest(name, list(ALGORITHMS))}; for one of your own "
            "write module:Class"
        )
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current directory, as `python -m` has it
    try:
        found: Any = functools.reduce(getattr, path.split("."), importlib.import_module(module))
    except Exception as error:  # whatever the user's module raises
        raise ConfigError(
            f"algorithm.type={name} cannot be imported: {type(error).__name__}: {error}; it must "
            "be on PYTHONPATH or in the current directory"
        ) from error
    if not isinstance(found, type):
        raise ConfigError(f"algorithm.type={name} is {found!r}, not a class")
    check(found)
    return found
