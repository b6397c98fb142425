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
from typing import Any, ClassVar, Literal, TypeVar

import yaml

from rewards.redaction import redact

from . import decoding
from .decoding import (
    Bounds,
    ConfigError,
    Count,
    Limit,
    Natural,
    Positive,
    Section,
    Weight,
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

T = TypeVar("T")

Dtype = Literal["float32", "bfloat16", "float16"]

LARGEST_LR = 1e3  # far above any use, and far below where AdamW overflows


@dataclass
class ModelConfig(Section):
    name: str = "assets/emoji-sd"
    """local folder or hub id of a diffusers pipeline, or a run folder with its trained weights"""
    merge_lora: str | None = None
    """folder or hub id of a LoRA merged into the denoiser first: a Turbo, LCM or style LoRA"""
    dtype: Dtype = "float32"
    """of denoiser and text encoders; trained weights and SDE maths stay float32"""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype that the VAE decodes in; in float16 some overflow"""
    attention: Literal["auto", "sdpa", "math", "flash", "efficient", "cudnn", "xformers"] = "auto"
    """attention kernel: auto | sdpa (torch's choice) | math (plain products) | flash, efficient,
    cudnn (torch's) | xformers; auto is sdpa, but math on CPUs in half precision"""
    compile: bool = False
    """have torch compile the denoiser at its first calls: minutes once, then faster calls"""
    resolution: int | None = None
    """side of the pictures in pixels; null = the model's own"""
    lora_rank: Natural = 8
    """rank of the trained low-rank update; 0 = train all weights of the denoiser"""
    lora_alpha: float | None = None
    """the update is scaled by lora_alpha / lora_rank; null = lora_rank"""
    lora_targets: list[str] | str | None = None
    """layers with a LoRA: ends of names, or one regex for whole names; null = the family's own"""
    gradient_checkpointing: bool = False
    """save memory in denoiser and VAE for about a third more time in the backward pass"""
    free_text_encoders: bool = True
    """encode the prompts of the run first and drop the text encoders from memory"""
    max_sequence_length: int | None = None
    """tokens per prompt, not of CLIPs; null = the pipeline's default; fewer cost less"""
    decode_batch: int = 16
    """latents that the VAE decodes at a time"""
    tiny_vae: str | None = None
    """local folder or hub id of an AutoencoderTiny that decodes for the rewards in training;
    evaluation keeps the VAE"""


@dataclass
class SamplerConfig(Section):
    steps: int = 20
    """denoising steps"""
    guidance: Weight = 1.0
    """guidance scale w, also used in training; up to 1 there is no classifier-free guidance"""
    guidance_interval: list[float] | None = None
    """[low, high]: guide only where low < sigma/alpha <= high; null = at all noise levels"""
    guidance_until: Positive | None = None
    """guide only in this first share of the steps, up to 1; null = in all"""
    guidance_star: bool = False
    """scale the unconditional output first as CFG-Zero* does; for flow models"""
    guidance_reuse: Count | None = None
    """m: after 4 guided steps find a new direction at every m-th and reuse it at the others, which
    are one call; not where steps are scored or differentiated"""
    guidance_adaptive: Positive | None = None
    """stop guiding an image once that moves its clean estimate by less than this share; not where
    steps are scored or differentiated"""
    kernel: Literal["ddim", "ode", "flow_sde", "dance_sde", "cps"] = "ddim"
    """which noise a step adds; ode adds none"""
    eta: Weight = 1.0
    """stochasticity of the kernel; 0 = deterministic"""
    batch: int = 16
    """images per denoiser call while sampling; the last call of an epoch may have fewer"""
    window: int | None = None
    """stochastic steps, which a policy gradient trains; the others are ODE steps; null = all"""
    window_schedule: Literal["random", "progressive", "decay", "branch"] = "random"
    """where the window is in an epoch: random | progressive | decay (progressive, with fewer and
    fewer epochs per place in the second half) | branch (each image of a prompt has its own step)"""
    window_range: list[int] | None = None
    """[first, end) of the steps that windows may cover; null = all stochastic ones"""
    window_epochs: int = 1
    """epochs before a progressive window moves on by one step"""
    tail: int | None = None
    """DPM-Solver++ steps that replace all ODE steps after the window; null = none"""
    same_noise: bool = False
    """the images of a prompt start from the same noise"""


@dataclass
class DataConfig(Section):
    prompts: str = "assets/emoji-world/prompts/train.txt"
    """.txt (one a line) or .jsonl ({"prompt": ..., metadata})"""
    groups: int = 8
    """prompts per epoch"""
    group_size: int = 8
    """images per prompt"""


@dataclass
class AdvantageConfig(Section):
    baseline: Literal["group", "tracker"] = "group"
    """what an image is compared with: its group, or DDPO's reward buffer of its prompt (tracker)"""
    std: Literal["group", "global"] = "global"
    """which standard deviation divides a group's rewards: the group's, or the epoch's (global);
    only for baseline=group; combine=gdpo always uses the group's"""
    combine: Literal["sum", "normalized", "gdpo"] = "sum"
    """several rewards: sum (advantage of their weighted sum) | normalized (weighted mean of their
    advantages) | gdpo (normalized, divided by its standard deviation over the epoch)"""
    clip: Limit = 5.0
    """advantages are clipped to [-clip, clip]"""
    buffer_size: int = 16
    """rewards remembered per prompt (tracker)"""
    min_count: int = 16
    """with fewer remembered rewards, the statistics of the whole epoch are used (tracker)"""


@dataclass
class OptimConfig(Section):
    epochs: int = 50
    """rollouts, each followed by its updates"""
    lr: float = 3e-4
    """learning rate"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """linear and cosine go from train.lr to 0 over the run"""
    warmup: Natural = 0
    """optimizer steps over which the learning rate rises linearly, from 1/warmup of it"""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit comes from bitsandbytes and needs CUDA"""
    ema: Weight = 0.0
    """decay of a moving average of the weights, evaluated and saved in their place; 0 = none"""
    weight_decay: Weight = 1e-4
    """decoupled weight decay"""
    max_grad_norm: Limit = 1.0
    """gradients with a larger norm are scaled down to it"""
    micro_batch: int = 16
    """(sample, step) pairs per forward/backward (samples for GRADIENT algorithms)"""
    updates_per_epoch: int = 1
    """optimizer steps per rollout; must divide the groups*group_size samples"""
    inner_epochs: int = 1
    """passes over a rollout; GRADIENT algorithms draw its samples again, from the same noise"""
    gradients: Literal["sum", "normalized", "pcgrad", "min_norm"] = "sum"
    """how gradients of several rewards are merged, per picture: sum | normalized (each of equal
    length) | pcgrad (conflicting parts removed) | min_norm (no reward falls, to first order); see
    rewards.gradients"""
    seed: Natural = 0
    """random seed of prompts, noise and LoRA initialization"""
    checkpoint_every: Natural = 10
    """epochs between checkpoints; 0 = only at the end"""
    max_denoiser_calls: int | None = None
    """end after the epoch in which training reaches this many; null = end after train.epochs"""
    reward_timeout: Positive | None = 1800.0
    """seconds that one call of a reward may take; null = any"""

    @property
    def saved(self) -> str:
        """Which weights are evaluated and saved: the trained ones, or their average (ema)."""
        return "ema" if self.ema else "default"


@dataclass
class EvalConfig(Section):
    every: Natural = 20
    """epochs between evaluations; 0 = only before and after training"""
    prompts: str | None = "assets/emoji-world/prompts/held_out.txt"
    """held-out prompts, in a file like data.prompts; null = no evaluation"""
    images_per_prompt: int = 2
    """images per held-out prompt; diversity needs 2 or more"""
    steps: int | None = None
    """denoising steps; null = sampler.steps"""
    guidance: Weight | None = None
    """classifier-free guidance scale, everywhere; null = as sampler.guidance* say"""
    guidance_reuse: Count | None = None
    """as sampler.guidance_reuse, of evaluations; null = the sampler's"""
    guidance_adaptive: Positive | None = None
    """as sampler.guidance_adaptive, of evaluations; null = the sampler's"""
    rewards: dict[str, Any] = field(default_factory=dict)
    """held-out judges, never trained on; written like the section rewards"""
    guard: Literal["off", "warn", "stop"] = "warn"
    """what to do when a run is over-optimised, has collapsed or failed"""
    guard_drop: float = 2.0
    """standard errors x that count as evidence; flags Φ(-x) of unchanged runs, 2.3 % for x = 2"""
    guard_diversity: Weight = 0.7
    """share of the base model's diversity below which diversity is too low"""
    grid_prompts: Natural = 8
    """rows of the before/after grid"""


@dataclass
class LogConfig(Section):
    dir: str = ""
    """run folder; empty = runs/<config file stem>"""
    trackers: list[str] = field(default_factory=list)
    """trackers used through accelerate: tensorboard, wandb, trackio"""
    keep_checkpoints: int = 2
    """how many checkpoint-N folders stay, the newest"""


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
