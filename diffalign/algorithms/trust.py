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

    The ratio is a noisy measure of how far the policy has moved: over the noise that drew x', log ρ
    is -D ± √(2D/n) for n elements, and the two terms are equally large at D = 2/n. D itself has no
    noise. A row that would move on beyond τ gives no gradient, a row that moves back always does,
    and nothing else bounds ρ. Neither region acts in the first update of a rollout, where ρ = 1 and
    D = 0. D needs the means of the rollout, which take as much memory as its states.

    A good τ depends on the learning rate and the number of updates. 1e-5 is that of the authors'
    code; their paper has 1e-7 for flow_sde and 1e-6 for cps. The paper's equations sum D over the
    latent, and by them A (log ρ - D) > 0 is the exact sign of a move away from μ_old. The mask here
    uses A log ρ, as the paper's experiments do, which differs where D is not small compared with
    √(2D/n).
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
        """Losses (m,) of rows, from their log-ratios (m,) and transitions, and diagnostics."""
        if self.trust == "ratio":
            loss = surrogate.clipped(log_ratio, batch.advantage, self.clip_range)
            return loss, surrogate.figures(log_ratio, self.clip_range)
        divergence = step.kl(surrogate.old(step, batch)).detach()
        loss, mask = surrogate.masked(log_ratio, batch.advantage, divergence, self.kl_max)
        drift = log_ratio.detach().expm1().abs()
        return loss, {"ratio_drift": drift, "trust_kl": divergence, "masked": mask.float()}
