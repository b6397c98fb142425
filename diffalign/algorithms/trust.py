"""The trust region of GRPO: a clip of the ratio, or a mask by the KL (arXiv 2606.11025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..config.decoding import Limit
from ..dynamics import Gaussian
from . import surrogate
from .base import KL, Algorithm, Needs, Transitions

Trust = Literal["ratio", "kl"]


@dataclass
class TrustRegion(Algorithm):
    """GRPO on transitions, kept near the policy that drew them. Base of flow_grpo and grpo_guard.

        trust=ratio   max(-A ρ, -A clip(ρ, 1-ε, 1+ε))         PPO (arXiv 1707.06347)
        trust=kl      0 where D ≥ τ and A log ρ > 0, else -A ρ   Flow-DPPO (arXiv 2606.11025)

        D = mean_D (μ_θ - μ_old)² / 2s²,   the Gaussian KL of the step per element of the latent

    The ratio is a noisy sign of how far the policy has moved: over the noise that drew x', log ρ is
    -D ± √(2D/n) for n elements, and the second term is as large as the first for D = 2/n. D itself
    has no noise in it. A row that would move on beyond τ teaches nothing, one that comes back
    always does, and nothing else bounds ρ. Neither region acts in the first update of a rollout,
    where ρ = 1 and D = 0. D needs the means of the rollout, as large as its states again.

    τ belongs to a learning rate and a number of updates. 1e-5 is that of the authors' code; their
    paper has 1e-7 for flow_sde and 1e-6 for cps. It sums D over the latent in its equations, and
    names A (log ρ - D) as the exact sign of a move away from μ_old; as in its experiments, the mask
    has A log ρ here, which differs where D is not small beside √(2D/n).
    """

    needs: ClassVar[Needs] = Needs.TRAJECTORY

    clip_range: Limit = 1e-4
    """ε, the trust region of the ratio; belongs to log-probabilities averaged over the latent"""
    trust: Trust = "ratio"
    """ratio: clip it at clip_range; kl: mask the rows that leave kl_max (Flow-DPPO)"""
    kl_max: Limit = 1e-5
    """τ of trust=kl: the largest KL of a step from the rollout's, per latent element; inf = none"""
    kl: KL = "g"

    @property
    def stores_means(self) -> bool:  # type: ignore[override]
        return self.trust == "kl"

    def objective(
        self, log_ratio: Tensor, step: Gaussian, batch: Transitions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses of rows (m,) by their log-ratios (m,) and transitions, and the diagnostics."""
        if self.trust == "ratio":
            loss = surrogate.clipped(log_ratio, batch.advantage, self.clip_range)
            return loss, surrogate.figures(log_ratio, self.clip_range)
        divergence = step.kl(surrogate.old(step, batch)).detach()
        loss, mask = surrogate.masked(log_ratio, batch.advantage, divergence, self.kl_max)
        drift = log_ratio.detach().expm1().abs()
        return loss, {"ratio_drift": drift, "trust_kl": divergence, "masked": mask.float()}
