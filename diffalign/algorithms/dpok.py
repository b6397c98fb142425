"""DPOK: policy gradient kept near the base model (arXiv 2305.16381)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config.decoding import Limit, Weight
from ..policies.base import Policy
from ..policies.cond import Cond
from . import surrogate
from .base import Algorithm, Needs, Transitions

POOLED = 8  # side of the pooled latents that the value network sees


class Value(nn.Module):
    """V(x, c, t) (m,): the expected reward of a state, from its pooled latents, the noise level and
    the mean text embedding."""

    def __init__(self, channels: int, text: int, width: int = 256):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(channels * POOLED**2 + text + 2, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1),
        )  # fmt: skip

    def forward(self, batch: Transitions) -> Tensor:
        x = batch.x if batch.x.ndim == 4 else batch.x.flatten(1)[:, :, None, None]
        x = F.adaptive_avg_pool2d(x, POOLED).flatten(1)
        level = torch.stack([batch.level.alpha, batch.level.sigma], 1).expand(len(x), -1)
        return self.body(torch.cat([x, level, text_of(batch.cond)], 1))[:, 0]


def text_of(cond: Cond) -> Tensor:
    """The first text embedding of every row, averaged over its tokens, (m, width) float32."""
    embedding = next(iter(cond.positive.values())).float()
    if "length" in cond.positive:  # what is behind it is zero
        return embedding.sum(1) / cond.positive["length"][:, None]
    return embedding.flatten(1, -2).mean(1) if embedding.ndim > 2 else embedding


@dataclass
class DPOK(Algorithm):
    """Clipped policy gradient with a penalty on the distance to the base model (arXiv 2305.16381).

        L = E[ max(-A ρ, -A clip(ρ, 1-ε, 1+ε)) ] + β KL_i
        A = r - V_ψ(x_i, c, t_i) with `value_weight`, else the advantage of the config

    over pairs (sample, step). `kl=velocity` is the reference's plain mean square of the guided
    outputs; `kl=g_sqrt_dt` the Gaussian KL that the paper derives. V is a small network that is
    trained along with the policy, by λ (V - r)², where r is normalized by the epoch's mean and
    standard deviation.

    The reference weighs the policy gradient by 100 and the distance by 0.01; here these weights are
    1 and β = 1e-4.

    Differs from the reference code: the loss is PPO's maximum, where theirs only clips and so loses
    the gradient on both sides; V learns from the rows of the update, where theirs makes five steps
    of its own on a replay buffer; here there is no buffer.
    """

    needs: ClassVar[Needs] = Needs.TRAJECTORY

    clip_range: Limit = 1e-4
    """ε, the trust region of the ratio; belongs to log-probabilities averaged over the latent"""
    kl_weight: Weight = 1e-4
    value_weight: Weight = 0.0
    """λ; > 0 replaces the advantage by the reward less a learnt value of the state"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.value: Value | None = None

    def setup(self, policy: Policy) -> None:
        if self.value_weight:
            width = text_of(policy.encode([""])).shape[1]
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.value = Value(policy.latent_shape[0], width).to(policy.device)

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.value.parameters() if self.value is not None else ()

    def loss(self, policy: Policy, batch: Transitions) -> tuple[Tensor, dict[str, Tensor]]:
        seen = batch.predict(policy)
        log_prob = batch.transition(seen).log_prob(batch.x_next)
        log_ratio, metrics = surrogate.log_ratio(log_prob, batch)
        metrics |= surrogate.figures(log_ratio, self.clip_range)
        advantage, penalty = batch.advantage, 0.0
        if self.value is not None:
            value = self.value(batch)
            advantage, error = batch.reward - value.detach(), (value - batch.reward).square()
            penalty = self.value_weight * error
            metrics["value_error"] = error.detach()
        loss = surrogate.clipped(log_ratio, advantage, self.clip_range) + penalty
        return (loss + self.anchored(policy, batch, seen, metrics)).mean(), metrics

    def state_dict(self) -> dict[str, Any]:
        value = self.value.state_dict() if self.value is not None else {}
        return super().state_dict() | {"value": {k: v.cpu().clone() for k, v in value.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self.value is not None:
            self.value.load_state_dict(state["value"])
