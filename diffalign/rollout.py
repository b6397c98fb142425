"""Sampling: trajectories without gradient, and the exact gradient of a reward through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .dynamics import KERNELS, Levels, step_std
from .policies.base import Cond, Policy


@dataclass(frozen=True)
class Sampling:
    """How trajectories are drawn: `levels` (K + 1,), a kernel of `dynamics`, eta, CFG scale."""

    levels: Levels
    kernel: str
    eta: float
    guidance: float

    @property
    def steps(self) -> int:
        return len(self.levels) - 1

    def stds(self) -> Tensor:
        """Standard deviation of every transition, (K,); 0 is a deterministic step."""
        return step_std(self.kernel, self.eta, self.levels)

    def transition(self, policy: Policy, x: Tensor, index: int | Tensor, cond: Cond):
        """p_θ(x' | x) of step `index` (an int, or one a sample (n,)), as a `Gaussian`."""
        level, following = self.levels[index], self.levels[index + 1]
        prediction = policy.predict(x, level, cond, self.guidance)
        return KERNELS[self.kernel](x, prediction, level, following, self.eta)


class Noise:
    """Standard normal noise with one CPU generator a sample.

    A sample's noise depends on its seed alone, not on its batch nor on the number of processes.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device | str):
        self.generators = [torch.Generator().manual_seed(s) for s in seeds]
        self.shape, self.device = tuple(shape), device

    def draw(self) -> Tensor:
        """The next (n, *shape) draw, float32."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(
            self.device
        )


@dataclass(frozen=True)
class Trajectories:
    """States (n, K + 1, *latent) from noise to data, and log p of every transition, (n, K),
    float32.

    The log-probability of a deterministic step is 0 and means nothing.
    """

    states: Tensor
    log_prob: Tensor

    @property
    def final(self) -> Tensor:
        """Clean latents (n, *latent)."""
        return self.states[:, -1]


@torch.no_grad()
def rollout(
    policy: Policy, cond: Cond, sampling: Sampling, seeds: Sequence[int], batch: int
) -> Trajectories:
    """Sample one trajectory per row of `cond` in chunks of `batch`, storing every state.

    A stored state is the very tensor that the next denoiser call saw, so scoring it again gives the
    same log-probability.
    """
    stochastic = (sampling.stds() > 0).tolist()
    states, log_probs = [], []
    for start in range(0, len(seeds), batch):
        chunk = cond[slice(start, start + batch)]
        noise = Noise(seeds[start : start + batch], policy.latent_shape, policy.device)
        x = noise.draw()
        path, scores = [x], []
        for i in range(sampling.steps):
            gaussian = sampling.transition(policy, x, i, chunk)
            x = gaussian.sample(noise.draw()) if stochastic[i] else gaussian.mean
            scores.append(gaussian.log_prob(x) if stochastic[i] else x.new_zeros(len(x)))
            path.append(x)
        states.append(torch.stack(path, 1))
        log_probs.append(torch.stack(scores, 1))
    return Trajectories(torch.cat(states), torch.cat(log_probs))


def adjoint_sweep(
    policy: Policy, cond: Cond, sampling: Sampling, states: Tensor, grad: Tensor, first: int
) -> None:
    """Back-propagate dL/dx_K through the steps `first` … K - 1, one denoiser step's graph at a
    time.

        g_K = dL/dx_K
        ∇θ L += (∂μ_i/∂θ)ᵀ g_{i+1},    g_i = (∂μ_i/∂x_i)ᵀ g_{i+1}      i = K-1 … first

    μ_i is the mean of step i at the stored x_i; the noise added to it is a constant. The result
    equals autograd through the whole chain, at the memory of one step however long the chain.

    states: (n, K + 1, *latent) of a rollout; grad: (n, *latent). Adds to the `.grad` of the policy.
    """
    for i in reversed(range(first, sampling.steps)):
        # nobody needs the gradient with respect to the earliest state
        x = states[:, i].detach().requires_grad_(i > first)
        with torch.enable_grad():
            mean = sampling.transition(policy, x, i, cond).mean
        mean.backward(grad)
        if i > first:
            assert x.grad is not None
            grad = x.grad
