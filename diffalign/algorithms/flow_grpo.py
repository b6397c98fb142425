"""Flow-GRPO: group-relative policy gradient on the SDE of a flow (arXiv 2505.05470)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..policies.base import Policy
from . import surrogate
from .base import Transitions
from .trust import TrustRegion

LogProb = Literal["gaussian", "cps"]
StepWeight = Literal["none", "noise"]


@dataclass
class FlowGRPO(TrustRegion):
    """PPO with group-relative advantages on stochastic denoising steps (arXiv 2505.05470).

        ρ = p_θ(x' | x, c) / p_old(x' | x, c)
        L = E[ w_i max(-A ρ, -A clip(ρ, 1-ε, 1+ε)) ] + β KL_i

    over pairs (sample, step). Options make it the methods of later papers:

    - sampler.kernel: flow_sde, dance_sde (DanceGRPO, 2505.07818), cps (Flow-CPS, 2509.05952; its
      code scores with -mean_D (x' - μ)², which is `log_prob=cps`: log ρ times 2s²), or ddim and cps
      for a UNet.
    - sampler.window, window_schedule: few stochastic steps, the others by the ODE. `random` is
      Flow-GRPO-Fast, `progressive` or `decay` with sampler.tail MixGRPO (2507.21802), and `branch`
      with `step_weight=noise` TempFlow-GRPO (2508.04324): one trunk per prompt with branches at
      each of its steps; the branches of the same step are compared with each other.
    - sampler.same_noise: the images of a prompt start from one noise.
    - trust: `kl` is Flow-DPPO (2606.11025), for several updates per rollout. In place of the clip,
      the loss of a row is 0 if A log ρ > 0 and the KL of its step from the rollout's is at least
      `kl_max`.

    w_i is 1, or with `step_weight=noise` the std of step i divided by the mean std of all
    stochastic steps (for SD3's ten steps that is TempFlow's 2.25 s). Differs from the reference:
    the KL is measured as `kl` says, and `g` is theirs; all prompts of an epoch share one window.
    """

    log_prob: LogProb = "gaussian"
    """gaussian, or cps: not divided by 2s²; its published clip range is 1e-5"""
    step_weight: StepWeight = "none"
    """none, or noise: steps count in proportion to their std"""

    def loss(self, policy: Policy, batch: Transitions) -> tuple[Tensor, dict[str, Tensor]]:
        seen = batch.predict(policy)
        step = batch.transition(seen)
        log_ratio, metrics = surrogate.log_ratio(step.log_prob(batch.x_next), batch)
        std = surrogate.stds(step, log_ratio)
        if self.log_prob == "cps":
            log_ratio = 2 * std.square() * log_ratio
        loss, figures = self.objective(log_ratio, step, batch)
        if self.step_weight == "noise":
            loss = loss * std / batch.sampling.stds[batch.sampling.drawn].mean()
        metrics |= figures
        return (loss + self.anchored(policy, batch, seen, metrics)).mean(), metrics
