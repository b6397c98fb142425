"""DRTune: deep reward gradients without the denoiser's Jacobians (arXiv 2405.00760)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config.decoding import Count, Weight
from ..sampling.adjoint import Surrogate
from .base import GradientAlgorithm


@dataclass
class DRTune(GradientAlgorithm):
    """Back-propagate a reward to early steps by the linear part of sampling (arXiv 2405.00760).

        x_{i+1} = a_i x_i + b_i f_θ(sg[x_i]) + noise,   L = E[ -R(decode(x̂0(x_e)), c) ]

    Every denoiser call sees a latent without gradient, so that its Jacobian does not appear, and
    gradient reaches step i with the factor b_i a_{i+1} … a_{e-1}. `active` equally spaced steps up
    to e carry gradient, the first of them at random; the other calls are constants. The reward is
    that of an early step, e = K - U{1 … stop K}. All of this is drawn anew for every update and is
    the same on all processes.

    Differs from the reference code (FlowBP's, for flows): any kernel and model family is served;
    with stop = 0 the reward is that of x_K.
    """

    active: Count = 3
    """steps that carry gradient"""
    stop: Weight = 0.4
    """share of the steps that may be left out at the end"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop >= 1:
            raise ValueError(
                f"algorithm.stop={self.stop:g} is a share of the steps; use less than 1"
            )

    def surrogate(self, steps: int, generator: torch.Generator) -> Surrogate:
        def draw(n: int) -> int:
            return int(torch.randint(n, (), generator=generator))

        most = round(self.stop * steps)
        least = steps - max(most - 1, 0)
        if self.active > least:
            raise ValueError(
                f"algorithm.active={self.active} exceeds the {least} of sampler.steps={steps} that "
                f"the earliest stop leaves; use less, or a smaller algorithm.stop"
            )
        end = steps - 1 - (draw(most) if most else 0)
        stride = (end + 1) // self.active
        first = draw(end + 1 - stride * (self.active - 1))
        active = tuple(first + stride * k for k in range(self.active))
        return Surrogate(active, at=end if most else None, detach=True)
