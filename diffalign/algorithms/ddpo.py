"""DDPO: denoising as a policy (arXiv 2305.13301)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..policies.base import Policy
from .base import Batch, Needs


@dataclass
class DDPO:
    """Policy gradient on the denoising steps (arXiv 2305.13301).

        ρ = p_θ(x' | x, c) / p_old(x' | x, c)
        L_IS = E[ max(-A ρ, -A clip(ρ, 1-ε, 1+ε)) ]     importance-sampled; several updates a
        rollout L_SF = E[ -A log p_θ(x' | x, c) ]               score function; one update a rollout
        L    = L_IS or L_SF  +  β KL(p_θ || p_ref)      per step, reference = adapters off

    over pairs (sample, step) with advantage A (m,). log p is the mean over the latent's elements,
    as in the authors' code and not the sum of the paper; that is why ε is as small as 1e-4.
    Guidance is part of the policy: with sampler.guidance != 1 rollout and loss both use it, and
    gradient flows through both branches.

    Differs from the reference code: before the first update of a rollout ρ is exactly 1 by taking
    log p itself, detached, as the old one (the stored one is kept as a diagnostic); pairs of all
    steps are shuffled together instead of stepping through time; deterministic transitions, which
    have no density, are not trained. β is not in the paper; it is the correct Gaussian KL of each
    step.
    """

    needs: ClassVar[Needs] = Needs.TRAJECTORY

    estimator: Literal["is", "sf"] = "is"
    """is: importance-sampled and clipped; sf: score function, one update per rollout"""
    clip_range: float = 1e-4
    """ε, the trust region of the ratio; belongs to log-probabilities averaged over the latent"""
    kl_weight: float = 0.0
    """β of the per-step KL to the base model; > 0 costs a second forward with the adapters off"""

    def __post_init__(self) -> None:
        if self.estimator not in ("is", "sf"):
            raise ValueError(f"algorithm.estimator={self.estimator!r} is unknown; use is or sf")
        if self.clip_range <= 0:
            raise ValueError(f"algorithm.clip_range={self.clip_range} must be positive")
        if self.kl_weight < 0:
            raise ValueError(f"algorithm.kl_weight={self.kl_weight} must not be negative")

    @property
    def single_update(self) -> bool:
        """Whether the loss is right only for the first update after a rollout."""
        return self.estimator == "sf"

    def loss(self, policy: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.x_next is not None
        assert batch.log_prob_old is not None
        policy_step = batch.transition(policy)
        log_prob = policy_step.log_prob(batch.x_next)
        old = log_prob.detach() if batch.on_policy else batch.log_prob_old
        ratio = (log_prob - old).exp()
        advantage = batch.advantage
        if self.estimator == "sf":
            loss = -advantage * log_prob
        else:
            clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
            loss = torch.maximum(-advantage * ratio, -advantage * clipped)
        drift = log_prob.detach() - batch.log_prob_old
        metrics = {
            # the stored ratio: on the first update its distance from 1 is train/rollout mismatch
            "mismatch" if batch.on_policy else "ratio_drift": drift.exp().sub(1).abs(),
            "clip_fraction": (ratio.detach() - 1).abs().gt(self.clip_range).float(),
        }
        if self.kl_weight > 0:
            with torch.no_grad(), policy.reference():
                reference_step = batch.transition(policy)
            kl = policy_step.kl(reference_step)
            loss = loss + self.kl_weight * kl
            metrics["kl"] = kl.detach()
        return loss.mean(), metrics
