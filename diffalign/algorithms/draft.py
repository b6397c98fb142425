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

    k = K (`last: null`) is DRaFT; a smaller k is DRaFT-K, whose earlier steps are sampled without
    gradient. `renoised` n > 0 is DRaFT-LV, for k = 1: the final latent is noised to the last level
    n more times, each copy is denoised in one step, and the gradient is averaged over the 1 + n
    rewards; the paper has n = 2 and leaves out the original. `kl_weight` > 0 is DRaFT+
    (NeMo-Aligner): the mean squared difference between the outputs of policy and base model, over
    the steps that carry gradient. Both outputs are differentiated with respect to the latent, which
    depends on earlier steps; the reference takes the base's output as a constant, which makes a
    difference for k > 1.

    The loop runs the adjoint sweep (`adjoint.adjoint_sweep`). It equals autograd through the chain,
    with the memory of one denoiser step, or of two with `kl_weight` and k > 1. Guidance, kernel and
    noise are those of the config's `sampler`.
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
