"""AlignProp: reward gradients through a chain cut at random (arXiv 2310.03739)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..config.decoding import Natural, Positive
from ..sampling.adjoint import Surrogate
from .base import GradientAlgorithm

Truncation = Literal["uniform", "gaussian", "fixed", "bernoulli"]


@dataclass
class AlignProp(GradientAlgorithm):
    """Back-propagate a reward through the steps after a random one (arXiv 2310.03739).

        L = E[ ℓ(R(decode(x_K), c)) ],   gradient through the steps i >= τ

    truncation of K steps, drawn anew for every update and the same on all processes:

        uniform    τ ~ U{0 … K-1}, what the paper describes
        gaussian   τ ~ N(mean K, (K/10)²), drawn again until in 1 … K-1; as in the later releases,
                   with mean 0.84
        fixed      τ = `start`; 0 is DRaFT, K-1 is DRaFT-1
        bernoulli  no τ: step i carries gradient with probability (i+1)/(K+1), each step by its own
                   draw. The first release and TRL do this in place of `uniform`: the share of
                   steps is the same, the chain nearly full-length.

    ℓ = -R, or with `target` g the authors' |R - g|. Their loss_coeff and grad_scale are left to the
    learning rate. One adjoint sweep serves all truncations (`adjoint.adjoint_sweep`).
    """

    truncation: Truncation = "uniform"
    """uniform | gaussian | fixed | bernoulli"""
    start: Natural = 0
    """τ of truncation=fixed"""
    mean: Positive = 0.84
    """mean of truncation=gaussian, as a share of the steps"""
    target: float | None = None
    """reward to reach, with loss |R - target|; null = as high as can be"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mean >= 1:
            raise ValueError(
                f"algorithm.mean={self.mean:g} is a share of the steps; use less than 1"
            )

    def surrogate(self, steps: int, generator: torch.Generator) -> Surrogate:
        if self.truncation == "bernoulli":
            chance = torch.arange(1, steps + 1) / (steps + 1)
            drawn = torch.rand(steps, generator=generator) < chance
            # an update without any gradient would be wasted
            return Surrogate(tuple(drawn.nonzero()[:, 0].tolist()) or (steps - 1,))
        if self.truncation == "fixed":
            start = self.start
            if start >= steps:
                raise ValueError(
                    f"algorithm.start={start} is not one of the sampler.steps={steps}, which "
                    f"count from 0; use at most {steps - 1}"
                )
        elif self.truncation == "uniform" or steps == 1:
            start = int(torch.randint(steps, (), generator=generator))
        else:
            start = 0
            while not 1 <= start < steps:
                draw = torch.randn((), generator=generator)
                start = int(self.mean * steps + steps / 10 * draw)
        return Surrogate(tuple(range(start, steps)))

    def reward_loss(self, rewards: Tensor) -> Tensor:
        return -rewards if self.target is None else (rewards - self.target).abs()
