"""DRaFT: reward gradients through the sampler (arXiv 2309.17400)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Needs


@dataclass
class DRaFT:
    """Maximise a differentiable reward by back-propagation through sampling (arXiv 2309.17400).

        max_θ E[ R(decode(x_T), c) ],   ∂L/∂θ through the last K of T steps; K = T is DRaFT, else
        DRaFT-K

    The steps before are sampled without gradient and cut off, which is exact for K = T and the
    paper's truncation otherwise. The loop runs the adjoint sweep (`rollout.adjoint_sweep`), equal
    to autograd through the chain, with the memory of one denoiser step.

    Differs from the paper: CFG, sampler and its noise are those of `sampler`; no LV variant yet,
    which averages the gradient over re-noised copies of the final latent.
    """

    needs: ClassVar[Needs] = Needs.GRADIENT

    last: int | None = 1
    """K, how many of the last steps carry gradient; null = all of them"""

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 1:
            raise ValueError(
                f"algorithm.last={self.last} must be at least 1, or null for all steps"
            )

    def first_step(self, steps: int) -> int:
        if self.last is None:
            return 0
        if self.last > steps:
            raise ValueError(
                f"algorithm.last={self.last} exceeds sampler.steps={steps}; use null for all steps"
            )
        return steps - self.last

    def loss(self, rewards: Tensor) -> Tensor:
        """-R, per sample (n,)."""
        return -rewards
