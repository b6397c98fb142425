"""Algorithms by name. To add one: a file with a dataclass, and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import decode
from ..decoding import ConfigError, suggest
from .alignprop import AlignProp
from .awm import AWM
from .base import Algorithm, Batch, GradientAlgorithm, Needs
from .ddpo import DDPO
from .dpok import DPOK
from .draft import DRaFT
from .drtune import DRTune
from .flow_grpo import FlowGRPO
from .fpo import FPO
from .grpo_guard import GRPOGuard
from .nft import DiffusionNFT
from .refl import ReFL
from .rwr import RWR

__all__ = ["ALGORITHMS", "Algorithm", "Batch", "GradientAlgorithm", "Needs", "build"]

ALGORITHMS: dict[str, type] = {
    "ddpo": DDPO,
    "dpok": DPOK,
    "flow_grpo": FlowGRPO,
    "grpo_guard": GRPOGuard,
    "awm": AWM,
    "nft": DiffusionNFT,
    "fpo": FPO,
    "rwr": RWR,
    "draft": DRaFT,
    "alignprop": AlignProp,
    "refl": ReFL,
    "drtune": DRTune,
}


def build(options: Mapping[str, Any]) -> Any:
    """The algorithm of the config section `algorithm`: its `type`, with the rest as options."""
    name = options.get("type")
    if name not in ALGORITHMS:
        raise ConfigError(f"unknown algorithm {name!r}{suggest(str(name), list(ALGORITHMS))}")
    rest = {k: v for k, v in options.items() if k != "type"}
    return decode(ALGORITHMS[name], rest, "algorithm")
