"""AWM: advantage-weighted matching (arXiv 2509.25050)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..config.decoding import Limit, Natural, Weight
from ..policies.base import Policy
from . import surrogate
from .base import Matches
from .matching import ADVANTAGE_MAX, Matching, flow_time, matching_loss

Weighting = Literal["uniform", "t", "t2", "huber", "ghuber"]


def pseudo_log_prob(loss: Tensor, t: Tensor, weighting: Weighting) -> Tensor:
    """The pseudo log-probability (m,) of matching losses ℓ (m,) at flow times t (m,).

    uniform -ℓ, t -tℓ, t2 -t²ℓ, huber -t (√(ℓ + e) - √e), ghuber -(t/p) ((ℓ + e)^p - e^p), p = 1/4,
    e = 1e-10.
    """
    e, p = 1e-10, 0.25
    if weighting == "huber":
        return -t * ((loss + e).sqrt() - e**0.5)
    if weighting == "ghuber":
        return -(t / p) * ((loss + e) ** p - e**p)
    return -loss * {"uniform": torch.ones_like(t), "t": t, "t2": t.square()}[weighting]


@dataclass
class AWM(Matching):
    """Policy gradient whose log-probability is the pre-training loss (arXiv 2509.25050).

        x = alpha x0 + sigma noise,   log p_θ = -w(ℓ),   ℓ = mean_D (f_θ(x) - f*)²
        L = E[ max(-A ρ, -A clip(ρ, 1-ε, 1+ε)) ] + β |f_θ - f_ref|² + γ |f_θ - f_slow|²
        ρ = p_θ / p_old

    at `times` levels per sample, with A divided by 5. Samples of positive advantage are learnt, the
    others unlearnt, with one forward per row. No trajectories are needed, so rollouts may use any
    sampler, `ode` above all. ρ is 1 before the first update of a rollout; after it p_old is that of
    the copy "old", which drew the rollout, at the same noise. f_slow is a slow average of the
    policy, updated after every epoch with decay min(0.3, 0.001 n), where n counts the optimizer
    steps so far.

    Differs from the reference: levels are drawn for every sample, not once for the micro-batch;
    noise and v models are matched in their own output, with t = sigma / (alpha + sigma); float32 in
    place of float64. Left out: the ELBO-weighted reference KL, and the ratio of means over times
    (that is `fpo`).
    """

    weighting: Weighting = "ghuber"
    """uniform | t | t2 | huber | ghuber: how the loss stands for a log-probability"""
    clip_range: Limit = 1.0
    """ε of the ratio; 1 hardly ever acts"""
    slow_weight: Weight = 1.0
    """γ of the distance to a slow average of the policy; > 0 costs one more forward"""
    first: Natural = 1

    def copies(self) -> Mapping[str, Callable[[int], float]]:
        slow = {"slow": lambda n: min(0.3, 0.001 * n)} if self.slow_weight else {}
        return {"old": lambda n: 0.0, **slow}

    def frozen_calls(self, updates: int) -> float:
        # from the second update on, the old policy's loss
        old = 1 - 1 / updates
        return super().frozen_calls(updates) + old + (self.slow_weight > 0)

    def loss(self, policy: Policy, batch: Matches) -> tuple[Tensor, dict[str, Tensor]]:
        t = flow_time(batch.level)
        seen = batch.predict(policy)
        matching = matching_loss(policy, batch, seen)
        log_prob = pseudo_log_prob(matching, t, self.weighting)
        old = log_prob.detach()
        if not batch.on_policy:
            with torch.no_grad(), policy.adapter("old"):
                old = matching_loss(policy, batch, batch.predict(policy))
                old = pseudo_log_prob(old, t, self.weighting)
        metrics = {"matching_loss": matching.detach()}
        metrics |= surrogate.figures(log_prob - old, self.clip_range)
        loss = surrogate.clipped(log_prob - old, batch.advantage / ADVANTAGE_MAX, self.clip_range)
        if self.slow_weight:
            with torch.no_grad(), policy.adapter("slow"):
                slow = batch.predict(policy)
            distance = (seen.native - slow.native).square().flatten(1).mean(1)
            metrics["slow_distance"] = distance.detach()
            loss = loss + self.slow_weight * distance
        return (loss + self.anchored(policy, batch, seen, metrics)).mean(), metrics
