"""DRaFT: reward gradients through the sampler (arXiv 2309.17400)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..sampling.adjoint import Surrogate
from .base import GradientAlgorithm


@dataclass
class DRaFT(GradientAlgorithm):
    """Maximise a differentiable reward by back-propagation through sampling (arXiv 2309.17400).

        max_θ E[ R(decode(x_K), c) ],   ∂L/∂θ through the last k of K steps

    k = K (`last: null`) is DRaFT, less DRaFT-K, whose earlier steps are sampled without gradient.
    `renoised` n > 0 is DRaFT-LV, for k = 1: the final latent is noised to the last level n times
    more, each copy denoised in one step, and the gradient averaged over the 1 + n rewards; the
    paper's n = 2 leaves out the original. `kl_weight` is DRaFT+ (NeMo-Aligner): the mean square
    between the outputs of policy and base model, over the steps that carry gradient. Both outputs
    are differentiated by the latent, which earlier steps have moved; the reference takes the base's
    for a constant, which differs for k > 1.

    The loop runs the adjoint sweep (`adjoint.adjoint_sweep`), equal to autograd through the chain,
    with the memory of one denoiser step, or two with `kl_weight` and k > 1. Guidance, sampler and
    its noise are those of `sampler`.
    """

    last: int | None = 1
    """k, how many of the last steps carry gradient; null = all of them"""
    renoised: int = 0
    """n, re-noised copies of the final latent (DRaFT-LV)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last is not None and self.last < 1:
            raise ValueError(
                f"algorithm.last={self.last} must be at least 1, or null for all steps"
            )
        if self.renoised < 0 or (self.renoised and self.last != 1):
            raise ValueError(
                f"algorithm.renoised={self.renoised} goes with algorithm.last=1, the step that is "
                "repeated, and must not be negative"
            )

    def surrogate(self, steps: int, generator: torch.Generator) -> Surrogate:
        if self.last is not None and self.last > steps:
            raise ValueError(
                f"algorithm.last={self.last} exceeds sampler.steps={steps}; use null for all steps"
            )
        return Surrogate(tuple(range(steps - (self.last or steps), steps)), renoised=self.renoised)
