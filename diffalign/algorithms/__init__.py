"""Algorithms by name. To add one: a file with a dataclass, and a line here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rewards.registry import Registry

from ..config import decode
from ..decoding import ConfigError, suggest

if TYPE_CHECKING:
    from .base import Algorithm, Batch, GradientAlgorithm, Needs

__all__ = ["ALGORITHMS", "Algorithm", "Batch", "GradientAlgorithm", "Needs", "build"]

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
    # they bring torch along: a second that `--help` and a misspelt name need not wait for
    if name in __all__:
        return getattr(importlib.import_module(".base", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def build(options: Mapping[str, Any]) -> Any:
    """The algorithm of the config section `algorithm`: its `type`, with the rest as options."""
    name = str(options.get("type"))
    if name not in ALGORITHMS:
        raise ConfigError(f"unknown algorithm {name!r}{suggest(name, list(ALGORITHMS))}")
    rest = {k: v for k, v in options.items() if k != "type"}
    return decode(ALGORITHMS[name], rest, "algorithm")
