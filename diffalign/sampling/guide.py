"""Guidance that remembers: calls for the negative prompt that earlier steps made unnecessary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..dynamics import Levels, Prediction
from ..policies.base import Policy
from ..policies.cond import Cond
from ..policies.guidance import Guidance

if TYPE_CHECKING:
    from .rollout import Sampling


@dataclass
class Guide:
    """The predictions of one chunk of samples, step after step, by `sampling.guidance`.

    Where that has no memory (`Guidance.remembers`) a prediction is that of `Sampling.predict`. A
    prediction that depends on earlier ones is no function of the state alone, so that its
    probabilities cannot be scored again: policy gradients must not use it.
    """

    policy: Policy
    sampling: Sampling
    direction: Tensor | None = None  # c - u of the last step with both, (n, *latent)
    on: Tensor | None = None  # the samples that are still guided, long

    def __call__(self, x: Tensor, i: int, cond: Cond) -> Prediction:
        if not (Guidance.of(self.sampling.guidance).remembers and self.policy.uses_cfg):
            return self.sampling.predict(self.policy, x, i, cond)
        how, level = self.policy.weighed(self.sampling.guidance), self.sampling.levels[i]
        guided = self.sampling.guided(type(self.policy))
        if not guided[i]:
            return self.sampling.predict(self.policy, x, i, cond)
        if self.direction is not None and not how.again(sum(guided[:i])):
            c = self.policy.output(x, level, cond)
            seen = self.policy.renormed(c + (how.scale - 1) * self.direction, c)
            return self.policy.parametrize(x, seen, level)
        on = torch.arange(len(x), device=x.device) if self.on is None else self.on
        u, c = self.policy.branches(x, level, cond, on)
        seen = c.index_copy(0, on, how.combine(u, c[on]))
        if how.reuse is not None:
            self.direction = (seen - c) / (how.scale - 1)  # 0 where guided no more
        if how.adaptive is not None:
            self.on = on[self._matters(x[on], u, c[on], level, how)]
        seen = c.index_copy(0, on, self.policy.renormed(seen[on], c[on]))
        return self.policy.parametrize(x, seen, level)

    def _matters(self, x: Tensor, u: Tensor, c: Tensor, level: Levels, how: Guidance) -> Tensor:
        """Whether guidance moves the clean estimate of each sample by more than the threshold."""
        away, own = (self.policy.parametrize(x, f, level).x0.flatten(1) for f in (u, c))
        assert how.adaptive is not None
        return (how.scale - 1) * (own - away).norm(dim=1) >= how.adaptive * own.norm(dim=1)
