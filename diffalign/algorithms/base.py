"""What an algorithm declares and what the loop hands it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Protocol

from torch import Tensor

from ..dynamics import Gaussian
from ..policies.base import Cond, Policy
from ..rollout import Sampling


class Needs(Enum):
    """What the loop must provide for a loss."""

    TRAJECTORY = "stored transitions with advantages"
    FINAL = "clean latents with advantages"
    GRADIENT = "rewards with gradient to the clean latents"


@dataclass(frozen=True)
class Batch:
    """A micro-batch of m rows. TRAJECTORY rows are (sample, step) pairs, FINAL rows are samples.

    cond: conditioning of the rows. advantage: (m,). x0: clean latents (m, *latent).
    TRAJECTORY only: step (m,) long, x and x_next (m, *latent) the stored transition, log_prob_old
    (m,) its log-probability when it was sampled. on_policy: no optimiser step was made since the
    rollout.
    """

    sampling: Sampling
    cond: Cond
    advantage: Tensor
    x0: Tensor
    on_policy: bool
    step: Tensor | None = None
    x: Tensor | None = None
    x_next: Tensor | None = None
    log_prob_old: Tensor | None = None

    def transition(self, policy: Policy) -> Gaussian:
        """p_θ(x' | x) of every row, by the very function that sampled it."""
        assert self.x is not None
        assert self.step is not None
        return self.sampling.transition(policy, self.x, self.step, self.cond)


class Algorithm(Protocol):
    """A loss over batches (TRAJECTORY, FINAL); one dataclass a file, its fields are its options."""

    needs: ClassVar[Needs]

    def loss(self, policy: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over the rows, and per-row diagnostics (m,) or scalars, detached."""
        ...


class GradientAlgorithm(Protocol):
    """A loss over rewards (GRADIENT), and the steps its gradient goes through."""

    needs: ClassVar[Needs]

    def first_step(self, steps: int) -> int:
        """Steps first_step … steps - 1 carry gradient; those before are sampled without."""
        ...

    def loss(self, rewards: Tensor) -> Tensor:
        """Per-sample losses (n,) of differentiable rewards (n,)."""
        ...
