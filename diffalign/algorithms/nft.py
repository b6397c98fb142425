"""DiffusionNFT: negative-aware fine-tuning (arXiv 2509.16117)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..config.decoding import Positive, Weight
from ..policies.base import Policy
from .base import Matches
from .matching import ADVANTAGE_MAX, Matching

Schedule = Literal["none", "slow", "late"]
SCHEDULES = {
    "none": lambda n: 0.0,
    "slow": lambda n: min(0.001 * n, 0.5),
    "late": lambda n: 0.0 if n < 75 else min(0.0075 * (n - 75), 0.999),
}


@dataclass
class DiffusionNFT(Matching):
    """Matching of good samples, mirrored matching of bad ones (arXiv 2509.16117).

        r  = clip(A / 5, -1, 1) / 2 + 1/2
        x⁺ = β x̂0_θ + (1-β) x̂0_old,   x⁻ = (1+β) x̂0_old - β x̂0_θ
        L  = (5/β) E[ r |x⁺ - x0|² / w⁺ + (1-r) |x⁻ - x0|² / w⁻ ] + kl_weight |f_θ - f_ref|²
        w± = sg[ mean_D |x± - x0| ],   |.|² a mean over D

    where the denoiser predicts x̂0 from a sample noised at `times` levels. "old" is a named copy
    that draws the rollouts and follows the policy after every epoch, old <- d old + (1-d) θ. After
    n optimizer steps d is 0 (`none`), min(n/1000, 1/2) (`slow`), or 0 until n = 75 and then
    min(0.0075 (n - 75), 0.999) (`late`). The gradient vanishes at θ = old and r = 1/2.

    Differs from the reference: noise and v models are served too, as the loss is in x̂0; float32 in
    place of float64; guidance is that of `sampler` in rollout and loss (theirs trains without). At
    high noise a noise model predicts x0 poorly, which w evens out.
    """

    sampled_by: ClassVar[str | None] = "old"

    beta: Positive = 1.0
    """β, how far the two implicit policies are from the old one"""
    old: Schedule = "slow"
    """none | slow | late: how fast the sampling policy follows"""
    kl_weight: Weight = 1e-4

    def copies(self) -> Mapping[str, Callable[[int], float]]:
        return {"old": SCHEDULES[self.old]}

    def frozen_calls(self, updates: int) -> float:
        return super().frozen_calls(updates) + 1

    def loss(self, policy: Policy, batch: Matches) -> tuple[Tensor, dict[str, Tensor]]:
        seen = batch.predict(policy)
        with torch.no_grad(), policy.adapter("old"):
            old = batch.predict(policy)
        r = (batch.advantage / ADVANTAGE_MAX).clamp(-1, 1) / 2 + 0.5
        positive = self.beta * seen.x0 + (1 - self.beta) * old.x0
        negative = (1 + self.beta) * old.x0 - self.beta * seen.x0
        parts = r * normalized(positive, batch.x0) + (1 - r) * normalized(negative, batch.x0)
        metrics = {
            "old_distance": (seen.native - old.native).detach().square().flatten(1).mean(1),
            "reward_probability": r,
        }
        loss = ADVANTAGE_MAX / self.beta * parts
        return (loss + self.anchored(policy, batch, seen, metrics)).mean(), metrics


def normalized(predicted: Tensor, x0: Tensor) -> Tensor:
    """mean_D (x - x0)² / sg[mean_D |x - x0|], (m,)."""
    error = (predicted - x0).flatten(1)
    return error.square().mean(1) / error.detach().abs().mean(1).clamp_min(1e-5)
