"""The configuration of a run: dataclasses, strict YAML and dotted overrides.

A run is a `TrainConfig`. A YAML file gives only the settings that differ from the defaults, and
each `--section.key value` changes one more. An unknown key or a wrong type raises a `ConfigError`
that names the key, the place and the nearest valid name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

from rewards.redaction import redact

from . import decoding
from .decoding import (
    Bounds,
    ConfigError,
    Section,
    bounds_of,
    choices_of,
    near_divisors,
    plain,
    section_keys,
    setting_types,
    suggest,
)
from .files import write_atomic
from .reading import override, pairs, read_yaml
from .sections import (
    AdvantageConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    SamplerConfig,
)
from .sections import (
    Dtype as Dtype,
)

T = TypeVar("T")

LARGEST_LR = 1e3  # far above any use, and far below where AdamW overflows


@dataclass
class TrainConfig(Section):
    """A whole run. `algorithm` and `rewards` are free mappings; their builders check them."""

    model: ModelConfig = field(default_factory=ModelConfig)
    algorithm: dict[str, Any] = field(default_factory=lambda: {"type": "ddpo"})
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    rewards: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    train: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    of_type: ClassVar[Callable[[str, Mapping[str, Any], str], dict[str, Any]]]
    """makes the section `algorithm` for another type; `diffalign.algorithms` sets it"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.algorithm = {"type": "ddpo", **self.algorithm}

    @property
    def eval_steps(self) -> int:
        """Denoising steps of the evaluations."""
        return self.sampler.steps if self.eval.steps is None else self.eval.steps

    @property
    def eval_guidance(self) -> float:
        """Guidance scale of the evaluations."""
        return self.sampler.guidance if self.eval.guidance is None else self.eval.guidance

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainConfig:
        """Reads a YAML file and applies `overrides`: ["--train.lr", "5e-4", "--data.groups=4"].

        An empty `log.dir` becomes runs/<file stem>. If `overrides` name another `algorithm.type`,
        the file's options that this type shares are kept, and a note says which are not. Raises
        `ConfigError`.
        """
        config = decode(cls, read_yaml(path), source=f" in {path}")
        if overrides:
            tree = config.to_dict()
            given = list(pairs(overrides))
            kind = dict(given).get("algorithm.type", config.algorithm["type"])
            if kind and kind != config.algorithm["type"]:
                tree["algorithm"] = cls.of_type(kind, config.algorithm, str(path))
            for key, text in given:
                override(cls, tree, key, text)
            # The file was accepted above, so any error now comes from the command line.
            config = decode(cls, tree, source=" on the command line")
        config.log.dir = config.log.dir or f"runs/{Path(path).stem}"
        return config

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> TrainConfig:
        """Decodes a nested mapping, as YAML would give it. Raises `ConfigError`."""
        return decode(cls, mapping)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts, lists and scalars; `from_dict` is the inverse."""
        return plain(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the complete configuration as YAML, atomically, without secrets."""
        text = yaml.safe_dump(redact(self.to_dict()), sort_keys=False, allow_unicode=True)
        write_atomic(path, text.encode())

    def check(self, advantages: bool = True) -> None:
        """Checks all that can be checked without files or models; `advantages=False`, for
        algorithms with needs GRADIENT, allows one image per prompt. Raises one `ConfigError` with a
        line for each problem.
        """
        self.__post_init__()
        for section in vars(self).values():
            if isinstance(section, Section):
                section.__post_init__()  # checks values set since construction
        problems: list[str] = []

        def get(name: str) -> Any:
            section, key = name.split(".")
            return getattr(getattr(self, section), key)

        def require(name: str, ok: bool, reason: str) -> None:
            if not ok:
                problems.append(f"{name}={get(name)!r} {reason}")

        for name, hint in setting_types(TrainConfig).items():
            value, choices = get(name), choices_of(hint)
            if choices:
                require(name, value in choices, f"is not known{suggest(value, choices)}")
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                bounds = bounds_of(hint) or Bounds(0, above=True)
                words = "0 or more" if 0 in bounds else "more than 0"
                require(name, value in bounds or value == math.inf, f"must be {words}")
                require(name, value in bounds or value != math.inf, "is not finite")
                large = isinstance(value, int) and value >= 2**63
                require(name, not large, "is too large; use less than 2**63")  # torch's integers
        if not isinstance(self.algorithm["type"], str):
            problems.append(f"algorithm.type={self.algorithm['type']!r} is not the name of one")

        require(
            "model.merge_lora",
            self.model.merge_lora is None or self.model.lora_rank != 0,
            "cannot be combined with model.lora_rank=0, whose reference is the model as stored; "
            "merge it with diffusers' fuse_lora and save_pretrained, and give that folder",
        )
        self._check_window(require)
        require(
            "train.lr",
            not LARGEST_LR < self.train.lr < math.inf,
            "is far too large: AdamW moves every weight by about as much a step; use e.g. 3e-4",
        )
        require("train.ema", self.train.ema < 1, "is a decay; use less than 1, such as 0.9")
        advantage = self.advantage
        if advantages and advantage.baseline == "group":
            require(
                "data.group_size",
                self.data.group_size != 1,
                "leaves nothing to compare an image with: the advantage over its group is always "
                "0; use 2 or more, or advantage.baseline=tracker",
            )
        if advantage.baseline == "tracker" and advantage.buffer_size > 0:
            require(
                "advantage.min_count",
                advantage.min_count <= advantage.buffer_size,
                "is never reached by a buffer of advantage.buffer_size="
                f"{advantage.buffer_size}; use at most that",
            )
        images = self.data.groups * self.data.group_size
        updates = self.train.updates_per_epoch
        if images > 0 and updates > 0:
            require(
                "train.updates_per_epoch",
                images % updates == 0,
                f"does not divide the {images} images of an epoch (data.groups={self.data.groups} "
                f"x data.group_size={self.data.group_size}); use {near_divisors(images, updates)}",
            )
        if problems:
            raise ConfigError("\n".join(problems))

    def _check_window(self, require: Callable[[str, bool, str], None]) -> None:
        s = self.sampler
        reach = s.window_range
        ordered = reach is None or (len(reach) == 2 and 0 <= reach[0] < reach[1] <= s.steps)
        require("sampler.window_range", ordered, f"is not [first, end) of the {s.steps} steps")
        if not ordered:
            return
        room = reach[1] - reach[0] if reach else s.steps
        if s.window is not None:
            fits = s.window <= room
            require("sampler.window", fits, f"is wider than the {room} steps it moves in")
        else:
            require("sampler.tail", s.tail is None, "follows a window; set sampler.window too")
            still = s.window_schedule not in ("progressive", "decay")
            require("sampler.window_schedule", still, "moves a window; set sampler.window too")
        if s.window_schedule == "branch":
            require("sampler.window", s.window == 1, "branches have one stochastic step; use 1")
            require("sampler.same_noise", s.same_noise, "branches share a trunk; use true")
        if self.advantage.baseline == "tracker":
            branches = s.window_schedule == "branch"
            require("advantage.baseline", not branches, "does not know branches; use group")
            plain = self.advantage.combine == "sum"
            require("advantage.combine", plain, "compares groups; use advantage.baseline=group")


def decode(cls: type[T], mapping: Mapping[str, Any], where: str = "", source: str = "") -> T:
    """`decoding.decode`, whose messages know all settings of a run."""
    return decoding.decode(cls, mapping, where, source, section_keys(TrainConfig))
