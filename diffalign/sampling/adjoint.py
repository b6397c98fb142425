"""The exact gradient of a reward through a trajectory, at the memory of one denoiser step.

A GRADIENT algorithm describes by a `Surrogate` what its reward sees and which denoiser calls carry
gradient. A rollout without gradient gives the states, from which `reward_input` computes the
latents that the reward sees. `adjoint_sweep` takes the reward's gradient with respect to these
latents back to the weights, one step at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dynamics import Prediction, noised
from ..policies.base import Policy
from ..policies.cond import Cond
from .rollout import Sampling


@dataclass(frozen=True)
class Surrogate:
    """The differentiable stand-in for a trajectory that a GRADIENT algorithm learns from.

    active: steps whose denoiser call carries gradient. at: the reward sees the x0 predicted at this
    step; None = the final latent. detach: every denoiser call sees sg[x], that is x without
    gradient, so that gradient crosses a step by its linear part alone. renoised: number of copies
    of the final latent that are noised to the last level again and denoised in one step; the reward
    is averaged over them and the original.
    """

    active: tuple[int, ...]
    at: int | None = None
    detach: bool = False
    renoised: int = 0


@torch.no_grad()
def reward_input(
    policy: Policy, cond: Cond, sampling: Sampling, states: Tensor, plan: Surrogate
) -> Tensor:
    """The latents (n, *latent) that are decoded for the reward, from states (n, K + 1, *latent)."""
    if plan.at is None:
        return states[:, -1]
    return sampling.predict(policy, states[:, plan.at], plan.at, cond).x0


def renoise_last(
    policy: Policy, cond: Cond, sampling: Sampling, states: Tensor, noise: Tensor
) -> Tensor:
    """`states` (n, K + 1, *latent) with the last two replaced: the final latent noised by `noise`
    (n, *latent) to the last level, and the result of one step from there (DRaFT-LV)."""
    last = sampling.steps - 1
    x = noised(states[:, -1], noise, sampling.levels[last])
    with torch.no_grad():
        x_next = sampling.transition(policy, x, last, cond).mean
    return torch.cat([states[:, :last], x[:, None], x_next[:, None]], 1)


def adjoint_sweep(
    policy: Policy,
    cond: Cond,
    sampling: Sampling,
    states: Tensor,
    grad: Tensor,
    plan: Surrogate,
    penalty: Callable[[Tensor, Prediction, int], Tensor] | None = None,
) -> None:
    """Back-propagate g = dL/d(reward input) through a surrogate, one denoiser graph at a time.

        g_K = g,   ∇θ L += (∂μ_i/∂θ)ᵀ g_{i+1},   g_i = (∂μ_i/∂x_i)ᵀ g_{i+1}    i = K-1 … min(active)

    μ_i is the mean of step i at the stored x_i; the noise added to it is a constant. Where step i
    is not active its denoiser call is a constant too, so that gradient passes only through the
    linear part of μ_i. With `plan.detach` x_i gets gradient only through that part at every step.
    With `plan.at` = e the sweep starts at x̂0 of step e in place of μ_e. The result equals autograd
    through the whole surrogate, with the memory of one denoiser step however long the chain is.

    states: (n, K + 1, *latent) of a rollout; grad: (n, *latent). penalty: a function of (the
    denoiser's input, its prediction, step) whose scalar is added to L at every active step. The
    gradient is added to the `.grad` of the policy's weights. Raises ValueError for guidance that
    remembers (`Sampling.stateless`).
    """
    sampling.stateless()
    first = min(plan.active)
    top = sampling.steps - 1 if plan.at is None else plan.at
    for i in reversed(range(first, top + 1)):
        # nobody needs the gradient with respect to the earliest state
        x = states[:, i].detach().requires_grad_(i > first)
        level = sampling.levels[i]
        with torch.enable_grad():
            inner = x.detach() if plan.detach else x
            if i in plan.active:
                seen = sampling.predict(policy, inner, i, cond)
                if plan.detach:
                    seen = policy.parametrize(x, seen.native, level)
            else:  # x̂0 and noise are affine in x, whatever the constant output
                seen = policy.parametrize(x, torch.zeros_like(x), level)
            out = seen.x0 if i == plan.at else sampling.step(x, seen, i).mean
            extra = penalty(inner, seen, i) if penalty is not None and i in plan.active else None
        outputs = [out] if extra is None else [out, extra]
        torch.autograd.backward(outputs, [grad, None][: len(outputs)])
        if i > first:
            assert x.grad is not None
            grad = x.grad
