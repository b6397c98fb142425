"""FPO: PPO on the change of the matching loss (arXiv 2507.21053)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.decoding import Count, Limit
from ..policies.base import Policy
from . import surrogate
from .base import Matches
from .matching import Matching, matching_loss


@dataclass
class FPO(Matching):
    """Flow policy optimisation (arXiv 2507.21053).

        ρ = exp( mean_k ℓ_old(x0; noise_k, t_k) - mean_k ℓ_θ(x0; noise_k, t_k) )
        L = E[ max(-A ρ, -A clip(ρ, 1-ε, 1+ε)) ]

    with one ratio per sample, whose two mean matching losses ℓ are over the same `times` pairs of
    noise and level. ρ is 1 before the first update of a rollout; after it ℓ_old is that of the copy
    "old", which drew the rollout.

    Differs from the reference, which controls robots: advantages are group-relative, there is no
    value network and no GAE; ℓ_old is computed again rather than stored. Their ε of 0.05 suits
    ratios that move by as much; the ratios of a LoRA move less and are hardly clipped.
    """

    times: Count = 8
    clip_range: Limit = 0.05
    """ε, the trust region of the ratio"""

    def copies(self) -> Mapping[str, Callable[[int], float]]:
        return {"old": lambda n: 0.0}

    def frozen_calls(self, updates: int) -> float:
        return super().frozen_calls(updates) + 1 - 1 / updates  # from the second update on

    def loss(self, policy: Policy, batch: Matches) -> tuple[Tensor, dict[str, Tensor]]:
        seen = batch.predict(policy)
        matching = matching_loss(policy, batch, seen)
        old = matching.detach()
        if not batch.on_policy:
            with torch.no_grad(), policy.adapter("old"):
                old = matching_loss(policy, batch, batch.predict(policy))
        log_ratio = (old - matching).view(-1, batch.times).mean(1)
        metrics = {"matching_loss": matching.detach()}
        metrics |= surrogate.figures(log_ratio, self.clip_range)
        loss = surrogate.clipped(log_ratio, batch.advantage[:: batch.times], self.clip_range)
        anchor = torch.as_tensor(self.anchored(policy, batch, seen, metrics)).mean()
        return loss.mean() + anchor, metrics
