"""RWR: reward-weighted regression, the classical baseline."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..config.decoding import Limit
from ..policies.base import Policy
from .base import Matches
from .matching import Matching, matching_loss


@dataclass
class RWR(Matching):
    """Matching of the policy's own samples, weighted by their rewards.

        L = E[ exp(A / τ) ℓ_θ(x0) ],   ℓ_θ = mean_D (f_θ(alpha x0 + sigma noise) - f*)²

    (Peters and Schaal 2007; on text-to-image models arXiv 2302.12192, and the RWR of DDPO's paper.)
    It only imitates: bad samples are learnt less, not unlearnt. Differs from DDPO's RWR, whose
    weights are a softmax of raw rewards over the batch: advantages compare images of one prompt,
    and since the config clips them to [-5, 5], no weight exceeds exp(5 / τ).
    """

    temperature: Limit = 1.0
    """τ; small values imitate the best alone"""

    def loss(self, policy: Policy, batch: Matches) -> tuple[Tensor, dict[str, Tensor]]:
        seen = batch.predict(policy)
        matching = matching_loss(policy, batch, seen)
        weight = (batch.advantage / self.temperature).exp()
        metrics = {"matching_loss": matching.detach(), "sample_weight": weight}
        return (weight * matching + self.anchored(policy, batch, seen, metrics)).mean(), metrics
