"""The exact gradient of a reward through a trajectory, at the memory of one denoiser step.

A GRADIENT algorithm says by a `Surrogate` what its reward sees and which denoiser calls carry
gradient. A rollout without gradient gives the states; `reward_input` what the reward decodes of
them; `adjoint_sweep` takes the reward's gradient there back to the weights, one step at a time.
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
    step; None = the final latent. detach: every denoiser call sees sg[x], so that gradient crosses
    a step by its linear part alone. renoised: copies of the final latent that are noised to the
    last level again and denoised in one step, the reward averaged over them and the original.
    """

    active: tuple[int, ...]
    at: int | None = None
    detach: bool = False
    renoised: int = 0


@torch.no_grad()
def reward_input(
    policy: Policy, cond: Cond, sampling: Sampling, states: Tensor, plan: Surrogate
) -> Tensor:
    """The latents (n, *latent) that the reward decodes, of states (n, K + 1, *latent)."""
    if plan.at is None:
        return states[:, -1]
    x, level = states[:, plan.at], sampling.levels[plan.at]
    return policy.predict(x, level, cond, sampling.guidance).x0


def renoise_last(
    policy: Policy, cond: Cond, sampling: Sampling, states: Tensor, noise: Tensor
) -> Tensor:
    """`states` (n, K + 1, *latent) with the last two replaced: the final latent noised by `noise`
    (n, *latent) to the last level, and what one step makes of it (DRaFT-LV)."""
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
    is not active its denoiser call is a constant too, so that only the linear part of μ_i counts,
    and with `plan.detach` that is all that reaches x_i. With `plan.at` = e the sweep starts at x̂0
    of step e in place of μ_e. The result equals autograd through the whole surrogate, at the memory
    of one denoiser step however long the chain.

    states: (n, K + 1, *latent) of a rollout; grad: (n, *latent). penalty: (what the denoiser was
    shown, its prediction, step) to a scalar added to L at every active step. Adds to the `.grad` of
    the policy's weights.
    """
    first = min(plan.active)
    top = sampling.steps - 1 if plan.at is None else plan.at
    for i in reversed(range(first, top + 1)):
        # nobody needs the gradient with respect to the earliest state
        x = states[:, i].detach().requires_grad_(i > first)
        level = sampling.levels[i]
        with torch.enable_grad():
            inner = x.detach() if plan.detach else x
            if i in plan.active:
                seen = policy.predict(inner, level, cond, sampling.guidance)
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
