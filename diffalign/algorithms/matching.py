"""What forward-matching algorithms share: the loss of a clean latent noised again, its levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..config.decoding import Count, Natural
from ..dynamics import Levels, Prediction
from ..policies.base import Policy
from ..sampling.rollout import Sampling
from .base import Algorithm, Matches, Needs

ADVANTAGE_MAX = 5.0
"""The advantage that the references scale to 1; their KL weights suit that scale."""

Time = Literal["schedule", "uniform", "logit_normal"]


@dataclass
class Matching(Algorithm):
    """Base of the algorithms that see only clean latents x0: rows are x0 noised at `times` levels.

    The levels of a sample are stratified: the k-th is the quantile (k + u) / times of `time`, with
    one u ~ U(0, 1) a sample.
    """

    needs: ClassVar[Needs] = Needs.FINAL

    times: Count = 6
    """noise levels a sample is matched at, all in one micro-batch"""
    time: Time = "schedule"
    """schedule (the sampler's own levels but the last) | uniform | logit_normal"""
    first: Natural = 0
    """first level of the schedule that is used"""

    def check_levels(self, steps: int) -> range:
        """The levels of a schedule of `steps` that are used. Raises ValueError where none is."""
        if self.first >= max(steps - 1, 1):
            raise ValueError(
                f"algorithm.first={self.first} leaves none of the sampler.steps={steps} levels, of "
                "which the last is not used; use less"
            )
        return range(self.first, max(steps - 1, 1))

    def levels(self, policy: Policy, sampling: Sampling, offsets: Tensor) -> Levels:
        """(n * times,) levels of n samples, given u (n,)."""
        quantile = (torch.arange(self.times) + offsets[:, None]).flatten() / self.times
        if self.time == "schedule":
            choice = self.check_levels(sampling.steps)
            index = (quantile * len(choice)).long().clamp_max(len(choice) - 1) + self.first
            return sampling.levels[index.to(policy.device)]
        if self.time == "logit_normal":
            quantile = torch.special.ndtri(quantile.double()).float().sigmoid()
        return policy.at(quantile.clamp(0.01, 0.999).to(policy.device))


def matching_loss(policy: Policy, batch: Matches, seen: Prediction) -> Tensor:
    """ℓ = mean_D (f_θ(x, c) - f*)² (m,), where f* is a perfect network's output for x0 and
    noise."""
    target = policy.target(batch.x0, batch.noise, batch.level)
    return (seen.native - target).square().flatten(1).mean(1)


def flow_time(level: Levels) -> Tensor:
    """sigma / (alpha + sigma): a flow's sigma, and what corresponds to it on a VP schedule."""
    return level.sigma / (level.alpha + level.sigma)
