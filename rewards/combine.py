"""The weighted sum of rewards that training maximises."""

from __future__ import annotations

import time
from collections.abc import Mapping

from torch import Tensor, nn

from .base import Reward, evaluate


class WeightedSum(nn.Module):
    """R(u, c) = sum_k w_k R_k(u, c); every R_k frozen and validated by ``evaluate``.

    ``parts`` maps a label to (reward, weight). A weight of 0 keeps a reward as a monitor.
    """

    def __init__(self, parts: Mapping[str, tuple[Reward, float]]):
        super().__init__()
        if not parts:
            raise ValueError("no reward: give at least one, for instance {'jpeg': 1.0}")
        self.parts = dict(parts)
        self.images, self.seconds = 0, 0.0  # scored so far, and the time it took
        self.rewards = nn.ModuleList([reward.freeze() for reward, _ in self.parts.values()])

    def forward(
        self, images: Tensor, prompts: list[str], metadata: list[dict] | None = None
    ) -> Tensor:
        return self.score(images, prompts, metadata)[0]

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[dict] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total and unweighted parts, (n,) float32 each; raises as ``evaluate`` does."""
        start = time.perf_counter()
        values = {
            name: evaluate(reward, images, prompts, metadata, name)
            for name, (reward, _) in self.parts.items()
        }
        total = sum(weight * values[name] for name, (_, weight) in self.parts.items())
        assert isinstance(total, Tensor)
        self.images += len(images)
        self.seconds += time.perf_counter() - start
        return total, values

    @property
    def differentiable(self) -> bool:
        return all(reward.differentiable for reward, _ in self.parts.values())

    def require_differentiable(self) -> None:
        """Raise ValueError naming the first reward without gradient, and what to do about it."""
        for name, (reward, _) in self.parts.items():
            if not reward.differentiable:
                hint = reward.gradient_hint.format(name=name)
                raise ValueError(
                    f"rewards.{name} is not differentiable, and reward backpropagation needs "
                    f"every reward to be: {hint}"
                )
