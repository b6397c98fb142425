"""The sections of a run's configuration, with their settings, types and defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .decoding import Count, Limit, Natural, Positive, Section, Weight

Dtype = Literal["float32", "bfloat16", "float16"]


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
    resolution: int | list[int] | None = None
    """side of the pictures in pixels, or [height, width]; null = the model's own; a prompt's own
    "resolution" goes before it"""
    lora_rank: Natural = 8
    """rank of the trained low-rank update; 0 = train all weights of the denoiser"""
    lora_alpha: float | None = None
    """the update is scaled by lora_alpha / lora_rank; null = lora_rank"""
    lora_targets: list[str] | None = None
    """linear layers that get a LoRA, by the end of their names; null = those of the model family"""
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
    resolution: int | list[int] | None = None
    """size of the pictures looked at, as model.resolution; null = that of training; what is trained
    small shows its artefacts large"""
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
