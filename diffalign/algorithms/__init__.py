"""Algorithms by name. To add one: a file with a dataclass, and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ConfigError, decode, suggest
from .base import Algorithm, Batch, GradientAlgorithm, Needs
from .ddpo import DDPO
from .draft import DRaFT

__all__ = ["ALGORITHMS", "Algorithm", "Batch", "GradientAlgorithm", "Needs", "build"]

ALGORITHMS: dict[str, type] = {"ddpo": DDPO, "draft": DRaFT}


def build(options: Mapping[str, Any]) -> Algorithm | GradientAlgorithm:
    """The algorithm of the config section `algorithm`: its `type`, with the rest as options."""
    name = options.get("type")
    if name not in ALGORITHMS:
        raise ConfigError(f"unknown algorithm {name!r}{suggest(str(name), list(ALGORITHMS))}")
    rest = {k: v for k, v in options.items() if k != "type"}
    return decode(ALGORITHMS[name], rest, "algorithm")
