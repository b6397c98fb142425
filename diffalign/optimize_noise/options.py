"""The settings of a search on the command line; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from ..config import decoding
from ..config.reading import override, pairs
from . import METHODS


@dataclass(frozen=True)
class Budget:
    """Limits of a search, for each prompt; the search for a prompt ends with the step that reaches
    any of them.

    denoiser_calls: samples through the denoiser, with or without gradient, both branches of CFG
    counted. reward_calls: pictures scored. A backward pass is no call, but takes about as long as
    one. Raises ValueError for a limit that is not 0 or more.
    """

    denoiser_calls: float = inf
    reward_calls: float = inf
    seconds: float = inf

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise ValueError(f"budget.{name}={value} is no budget; use 0 or more")


@dataclass
class Kernel:
    """How pictures are drawn, `batch` at a time; None = what suits the method (`sampling_for`)."""

    kernel: str | None = None
    eta: float | None = None
    batch: int = 16


@dataclass
class Wanted:
    """The settings of a search on the command line, decoded as strictly as a training config."""

    rewards: dict[str, Any] = field(default_factory=dict)
    budget: Budget = field(default_factory=Budget)
    sampler: Kernel = field(default_factory=Kernel)
    options: dict[str, Any] = field(default_factory=dict)


SECTIONS = ("rewards", "budget", "sampler")


def split(arguments: Sequence[str]) -> tuple[str | None, Wanted, list[str]]:
    """The method asked for (--reno, --best-of-n ...), its settings, and all other arguments.

    Settings are --METHOD.option, --rewards.NAME (a weight, or .option), --budget.LIMIT and
    --sampler.kernel, .eta or .batch. Raises ValueError for two methods, and for settings without a
    method.
    """
    flags = {f"--{name.replace('_', '-')}": name for name in METHODS}
    asked = [flags[a] for a in arguments if a in flags]
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)} were asked for; one method at a time")
    method = asked[0] if asked else None
    left, rest = [a for a in arguments if a not in flags], list[str]()
    tree: dict[str, Any] = {section: {} for section in (*SECTIONS, "options")}
    while left:
        token = left.pop(0)
        section = token.removeprefix("--").partition(".")[0].replace("-", "_")
        known = token.startswith("--") and section in (*SECTIONS, *METHODS)
        if not known or "." not in token:
            rest.append(token)
            continue
        if method is None or (section in METHODS and section != method):
            raise ValueError(
                f"{token} belongs to a search; add one of {', '.join(sorted(flags))}"
                if method is None
                else f"{token} is not of --{method.replace('_', '-')}, the method asked for"
            )
        value = [] if "=" in token or not left else [left.pop(0)]
        for key, text in pairs([token, *value]):
            name = key.partition(".")[2]
            place = section if section in SECTIONS else "options"
            name = name if section == "rewards" else name.replace("-", "_")
            override(Wanted, tree, f"{place}.{name}", text)
    wanted = decoding.decode(Wanted, tree, source=" on the command line")
    if method is not None and not wanted.rewards:
        raise ValueError("a search needs rewards: --rewards.clip.model MODEL, or --rewards.jpeg 1")
    return method, wanted, rest
