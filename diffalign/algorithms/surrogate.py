"""Policy-gradient objectives and the log-ratios they are given: pure functions over rows (m,)."""

from __future__ import annotations

from torch import Tensor

from ..dynamics import Gaussian
from .base import Transitions


def log_ratio(log_prob: Tensor, batch: Transitions) -> tuple[Tensor, dict[str, Tensor]]:
    """log ρ = log p_θ - log p_old of TRAJECTORY rows, and the rollout's mismatch.

    Before the first update p_old is p_θ itself, detached, so that ρ is exactly 1. The mismatch of
    rollout and training is then |p_θ / p - 1|, where p is the probability that the rollout stored.
    """
    if not batch.on_policy:
        return log_prob - batch.log_prob_old, {}
    drift = log_prob.detach() - batch.log_prob_old
    return log_prob - log_prob.detach(), {"mismatch": drift.expm1().abs()}


def clipped(log_ratio: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """max(-A ρ, -A clip(ρ, 1 - ε, 1 + ε)), ρ = exp(log_ratio), per row (1707.06347)."""
    ratio = _ratio(log_ratio)
    bounded = ratio.clamp(1 - clip_range, 1 + clip_range)
    return (-advantage * ratio).maximum(-advantage * bounded)


def masked(
    log_ratio: Tensor, advantage: Tensor, divergence: Tensor, kl_max: float
) -> tuple[Tensor, Tensor]:
    """The loss -A ρ, but 0 where D ≥ τ and A log ρ > 0, and the mask of these rows: (m,)
    (2606.11025).

    divergence: D >= 0 of every row, without gradient. kl_max: τ >= 0; infinite = nothing is masked.
    A log ρ > 0 says that the policy has already moved where the row's advantage sends it.
    """
    mask = (divergence >= kl_max) & (advantage * log_ratio > 0)
    return (-advantage * _ratio(log_ratio)).masked_fill(mask, 0.0), mask


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp_max(60).exp()  # an advantage of 0 times infinity would be NaN


def old(step: Gaussian, batch: Transitions) -> Gaussian:
    """The transitions of the rollout; before the first update these are the present ones,
    detached."""
    mean = step.mean.detach() if batch.on_policy else batch.mean_old
    assert mean is not None  # an algorithm that asks for it has `stores_means`
    return Gaussian(mean, step.std)


def figures(log_ratio: Tensor, clip_range: float) -> dict[str, Tensor]:
    """|ρ - 1|, and the shares of ratios above and below the trust region."""
    excess = log_ratio.detach().expm1()
    return {
        "ratio_drift": excess.abs(),
        "clip_high": (excess > clip_range).float(),
        "clip_low": (excess < -clip_range).float(),
    }


def stds(step: Gaussian, like: Tensor) -> Tensor:
    """The std of every transition, (m,)."""
    return step.std.flatten().expand(len(like))


def ratio_norm(step: Gaussian, mean_old: Tensor, log_ratio: Tensor) -> Tensor:
    """GRPO-Guard's log ρ̂ (2510.22319), (m,).

        log ρ̂ = s (log ρ + mean_D δ² / 2s²) = mean_D(z δ),   δ = μ_θ - μ_old,  x' = μ_old + s z

    Its mean under the old policy is 0, where that of log ρ is below 0, and it lacks log ρ's scale
    1/s.
    """
    s = stds(step, log_ratio)
    bias = (step.mean - mean_old).square().flatten(1).mean(1) / (2 * s.square())
    return s * (log_ratio + bias)
