"""ReFL: reward feedback at one random late step (arXiv 2304.05977)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.decoding import Count
from ..sampling.adjoint import Surrogate
from .base import GradientAlgorithm


@dataclass
class ReFL(GradientAlgorithm):
    """Maximise the reward of the picture predicted at one random late step (arXiv 2304.05977).

        i ~ U{K - last … K-1},   L = E[ max(0, m - R(decode(x̂0(x_i)), c)) ],   x_i without gradient

    One denoiser call carries gradient. i is drawn anew for every update and is the same on all
    processes (the reference's processes draw different steps and wait for each other). m is
    `hinge`; without it L = -R.

    Differs from the reference: sampling goes on to the end, so that rewards of final pictures are
    known, and guidance is that of `sampler` (theirs trains without). Left out, as in the released
    code: the pre-training loss of the paper.
    """

    last: Count | None = None
    """how many of the last steps i is drawn from; null = a quarter, as 10 of 40 in the reference"""
    hinge: float | None = None
    """m, reward that is enough; the reference has 2 for ImageReward"""

    def surrogate(self, steps: int, generator: torch.Generator) -> Surrogate:
        last = self.last or max(1, steps // 4)
        if last > steps:
            raise ValueError(f"algorithm.last={last} exceeds sampler.steps={steps}; use less")
        step = steps - 1 - int(torch.randint(last, (), generator=generator))
        return Surrogate((step,), at=step, detach=True)

    def reward_loss(self, rewards: Tensor) -> Tensor:
        return -rewards if self.hinge is None else (self.hinge - rewards).relu()
