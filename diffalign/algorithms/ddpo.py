"""DDPO: denoising as a policy (arXiv 2305.13301)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..config.decoding import Limit
from ..policies.base import Policy
from . import surrogate
from .base import KL, Algorithm, Needs, Transitions

Estimator = Literal["is", "sf"]


@dataclass
class DDPO(Algorithm):
    """Policy gradient on the denoising steps (arXiv 2305.13301).

        ρ = p_θ(x' | x, c) / p_old(x' | x, c)
        L_IS = E[ max(-A ρ, -A clip(ρ, 1-ε, 1+ε)) ]   importance-sampled; several updates a rollout
        L_SF = E[ -A log p_θ(x' | x, c) ]             score function; one update a rollout

    over pairs (sample, step) with advantage A (m,). log p is the mean over the latent's elements,
    as in the authors' code, not the paper's sum, which is why ε is as small as 1e-4. The paper's
    advantages are those of `advantage.baseline=tracker`. Guidance is part of the policy: with
    sampler.guidance != 1 rollout and loss both use it, and gradient flows through both branches.

    Differs from the reference code: before the first update of a rollout log p_old is log p itself,
    detached, so that ρ is exactly 1 (the stored log p_old is used as a diagnostic); pairs of all
    steps are shuffled together instead of stepping through time; deterministic transitions, which
    have no density, are not trained. The anchor is not in the paper.
    """

    needs: ClassVar[Needs] = Needs.TRAJECTORY

    estimator: Estimator = "is"
    """is: importance-sampled and clipped; sf: score function, one update per rollout"""
    clip_range: Limit = 1e-4
    """ε, the trust region of the ratio; belongs to log-probabilities averaged over the latent"""
    kl: KL = "g_sqrt_dt"

    @property
    def single_update(self) -> bool:  # type: ignore[override]
        return self.estimator == "sf"

    def loss(self, policy: Policy, batch: Transitions) -> tuple[Tensor, dict[str, Tensor]]:
        seen = batch.predict(policy)
        log_prob = batch.transition(seen).log_prob(batch.x_next)
        log_ratio, metrics = surrogate.log_ratio(log_prob, batch)
        metrics |= surrogate.figures(log_ratio, self.clip_range)
        if self.estimator == "sf":
            loss = -batch.advantage * log_prob
        else:
            loss = surrogate.clipped(log_ratio, batch.advantage, self.clip_range)
        return (loss + self.anchored(policy, batch, seen, metrics)).mean(), metrics
