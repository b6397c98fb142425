"""GRPO-Guard: ratios without bias, steps of equal weight (arXiv 2510.22319)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..config.decoding import Limit
from ..policies.base import Policy
from . import surrogate
from .base import Transitions
from .trust import TrustRegion


@dataclass
class GRPOGuard(TrustRegion):
    """Flow-GRPO with normalised ratios and re-weighted steps (arXiv 2510.22319).

        log ρ̂ = s (log ρ + mean_D δ² / 2s²) = mean_D(z δ),   δ = μ_θ - μ_old,  x' = μ_old + s z
        L = E[ max(-A ρ̂, -A clip(ρ̂, 1-ε, 1+ε)) / |b_i| ]

    As the policy moves, plain ratios fall below 1, further for smaller s, so that the upper clip
    hardly ever acts. log ρ̂ has mean 0 at every step under the old policy. b_i says how much the
    mean of step i moves with the network's output f_i: δ = b_i (f_i - f_old). So the gradient of
    log ρ̂ is b_i mean_D(z ∂f_i/∂θ), and dividing by |b_i| removes the sampler's factor. The
    network's own Jacobian remains, which differs from step to step; without `ratio_norm` a factor
    1/s remains too.

    With `trust=kl` the sign of A log ρ̂ tells exactly which rows move on away from the rollout's
    policy: descent on -A ρ̂ moves μ_θ along A z, which raises D where A mean_D(z δ) > 0. For log ρ
    this is only nearly true.

    Differs from the reference: the bias is a mean over the latent of each sample, where theirs also
    runs over the batch; |b_i| comes from the kernel itself, so that UNets are served too (for a
    flow SDE it is 1 + a²/2 times their |Δt|, and just |Δt| at σ = 1); and 1/|b_i| is scaled to mean
    1 over all stochastic steps. Theirs is not, which for K steps makes the policy gradient K times
    as large or more; their β and gradient norm suit that size. The KL is not re-weighted. Compared
    with it, and when gradients are clipped, the policy gradient of every step is as large as if its
    |b_i| were the harmonic mean of all.
    """

    clip_range: Limit = 2e-6
    """ε; smaller than for plain ratios, which carry a factor 1/s"""
    ratio_norm: bool = True
    """use ρ̂ in place of ρ"""
    reweight: bool = True
    """divide by |b_i|"""

    @property
    def stores_means(self) -> bool:  # type: ignore[override]
        return self.ratio_norm or super().stores_means

    def loss(self, policy: Policy, batch: Transitions) -> tuple[Tensor, dict[str, Tensor]]:
        seen = batch.predict(policy)
        step = batch.transition(seen)
        log_ratio, metrics = surrogate.log_ratio(step.log_prob(batch.x_next), batch)
        if self.ratio_norm:
            log_ratio = surrogate.ratio_norm(step, surrogate.old(step, batch).mean, log_ratio)
        loss, figures = self.objective(log_ratio, step, batch)
        if self.reweight:
            inverse = 1 / batch.sampling.sensitivity(policy)
            loss = loss * (inverse / inverse[batch.sampling.drawn].mean())[batch.step]
        metrics |= figures
        return (loss + self.anchored(policy, batch, seen, metrics)).mean(), metrics
