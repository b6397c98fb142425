"""What an algorithm declares and what the loop hands it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from ..config.decoding import Positive, Weight, bounds_of, choices_of, field_types
from ..dynamics import SDES, Gaussian, Levels, Prediction
from ..policies.base import Policy
from ..policies.cond import Cond
from ..sampling.adjoint import Surrogate
from ..sampling.rollout import Sampling


class Needs(Enum):
    """What the loop must provide for a loss."""

    TRAJECTORY = "stored transitions with advantages"
    FINAL = "clean latents with advantages"
    GRADIENT = "rewards with gradient to the clean latents"


@dataclass(frozen=True)
class Batch:
    """A micro-batch of m rows: what `Transitions` and `Matches` have in common.

    x: the denoiser's input (m, *latent), at `level` (m,). cond: of the rows. advantage: (m,), of
    each row's sample. reward: (m,), of each row's sample, less the epoch's mean and divided by the
    epoch's standard deviation. on_policy: whether no optimizer step was made since the rollout.
    """

    sampling: Sampling
    cond: Cond
    x: Tensor
    level: Levels
    advantage: Tensor
    reward: Tensor
    on_policy: bool

    def predict(self, policy: Policy) -> Prediction:
        """The denoiser's prediction for every row, with guidance."""
        return policy.predict(self.x, self.level, self.cond, self.sampling.guidance)


@dataclass(frozen=True)
class Transitions(Batch):
    """Rows for TRAJECTORY: (sample, step) pairs, where x is the state before the step.

    step: (m,) long. x_next: (m, *latent), the stored state after the step. log_prob_old: (m,), of
    x_next when it was sampled. mean_old: (m, *latent), the mean from which x_next was sampled; None
    unless `stores_means`.
    """

    step: Tensor
    x_next: Tensor
    log_prob_old: Tensor
    mean_old: Tensor | None = None

    def transition(self, seen: Prediction) -> Gaussian:
        """p_θ(x' | x) of every row, by the very function that sampled x'."""
        return self.sampling.step(self.x, seen, self.step)


@dataclass(frozen=True)
class Matches(Batch):
    """Rows for FINAL: (sample, time) pairs, where x = alpha x0 + sigma noise.

    x0: (m, *latent), the clean latents of the sample. noise: (m, *latent). The `times` rows of a
    sample follow each other. They have the same noise and levels whenever the sample comes up
    again.
    """

    x0: Tensor
    noise: Tensor
    times: int = 1


class Matcher(Protocol):
    """What a FINAL algorithm has beside its loss: at which levels a sample is noised again."""

    times: int
    """levels a sample"""

    def check_levels(self, steps: int) -> range:
        """The levels of a schedule of `steps` that are used. Raises ValueError where none is."""
        ...

    def levels(self, policy: Policy, sampling: Sampling, offsets: Tensor) -> Levels:
        """Levels (n * times,) of n samples. offsets: (n,), one draw u ~ U(0, 1) per sample."""
        ...


KL = Literal["g_sqrt_dt", "g", "velocity"]


@dataclass
class Algorithm:
    """A loss, its options as fields, and what it asks of the loop. Base of all algorithms.

    All algorithms share the anchor: β times the distance of the policy from the base model
    (adapters off). While β > 0 it costs one more forward of the denoiser, without gradient.

        g_sqrt_dt  mean_D (μ_θ - μ_ref)² / 2s²       the Gaussian KL of the step, s its std
        g          |Δσ| times that: … / 2g²          of flow_sde, dance_sde, as in Flow-GRPO's code
                   the Gaussian KL                   of cps, as there, and of ddim, which have no g
        velocity   mean_D (f_θ - f_ref)²             of the network's outputs (DPOK, DRaFT+, AWM)

    With `kl_target` β is doubled after an epoch whose mean distance is above 1.5 times the target
    and halved below 1/1.5 of it (PPO's adaptive penalty, arXiv 1707.06347).
    """

    needs: ClassVar[Needs]
    stores_means: ClassVar[bool] = False
    """TRAJECTORY: keep the mean of every trained transition"""
    single_update: ClassVar[bool] = False
    """the loss is right only for the first update after a rollout"""

    kl_weight: Weight = 0.0
    """β of the distance to the base model; > 0 costs one more forward with the adapters off"""
    kl: KL = "velocity"
    """how the distance is measured: g_sqrt_dt (Gaussian KL) | g (as in Flow-GRPO's code) |
    velocity; the first two only where transitions are trained"""
    kl_target: Positive | None = None
    """distance to keep by adapting kl_weight after every epoch; null = kl_weight stays"""

    def __post_init__(self) -> None:
        check_options(self)
        if self.kl != "velocity" and self.needs is not Needs.TRAJECTORY:
            raise ValueError(
                f"algorithm.kl={self.kl} is of transitions, and none are trained; use velocity"
            )
        if self.kl_target is not None and not self.kl_weight:
            raise ValueError(
                f"algorithm.kl_target={self.kl_target:g} adapts kl_weight, which is 0; start at "
                "e.g. 0.01"
            )

    def copies(self) -> Mapping[str, Callable[[int], float]]:
        """Named copies of the trained weights θ, {name: d(n)}. After every epoch copy <- d copy +
        (1 - d) θ, where n counts the optimizer steps so far."""
        return {}

    sampled_by: ClassVar[str | None] = None
    """the copy that draws the rollouts; None = the trained weights"""

    def setup(self, policy: Policy) -> None:
        """Make modules that depend on the policy's shapes. Of texts other than "" only those of the
        run can be encoded."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """The algorithm's own weights, which the loop trains beside the policy's."""
        return ()

    def frozen_calls(self, updates: int) -> float:
        """Denoiser calls without gradient per row, averaged over the `updates` of a rollout."""
        return float(self.kl_weight > 0)

    def loss(self, policy: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over the rows, and diagnostics: one value per row (m,), or scalars.

        batch: `Transitions` where the algorithm needs TRAJECTORY, `Matches` where it needs FINAL.
        """
        raise NotImplementedError

    def anchored(
        self, policy: Policy, batch: Batch, seen: Prediction, metrics: dict[str, Tensor]
    ) -> Tensor | float:
        """β times the distance of every row (m,) to the base model, added to `metrics` as "kl"."""
        if not self.kl_weight:
            return 0.0
        with torch.no_grad(), policy.reference():
            base = batch.predict(policy)
        if isinstance(batch, Transitions) and self.kl != "velocity":
            distance = batch.transition(seen).kl(batch.transition(base))
            if self.kl == "g" and batch.sampling.kernel in SDES:
                distance = distance * (
                    batch.level.sigma - batch.sampling.levels.sigma[batch.step + 1]
                )
        else:
            distance = (seen.native - base.native).square().flatten(1).mean(1)
        metrics["kl"] = distance.detach()
        return self.kl_weight * distance

    def end_epoch(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Adapt to an epoch's mean `metrics`; returns metrics to add."""
        if self.kl_target is None or not metrics["kl"]:  # a fresh LoRA is the base model
            return {}
        used = self.kl_weight
        if metrics["kl"] > 1.5 * self.kl_target:
            self.kl_weight *= 2
        elif metrics["kl"] < self.kl_target / 1.5:
            self.kl_weight /= 2
        return {"kl_weight": used}

    def state_dict(self) -> dict[str, Any]:
        return {"kl_weight": self.kl_weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.kl_target is not None:  # else the config's weight counts, which may have changed
            self.kl_weight = state["kl_weight"]


@dataclass
class GradientAlgorithm(Algorithm):
    """An algorithm that back-propagates the reward: it defines a surrogate and a loss of the
    reward."""

    needs: ClassVar[Needs] = Needs.GRADIENT

    def surrogate(self, steps: int, generator: torch.Generator) -> Surrogate:
        """The differentiable stand-in for a trajectory of `steps`, drawn anew for every update."""
        raise NotImplementedError

    def reward_loss(self, rewards: Tensor) -> Tensor:
        """Per-sample losses (n,) of differentiable rewards (n,)."""
        return -rewards


def check_options(algorithm: Any) -> None:
    """Raises ValueError for an option that is none of the choices of its type, or out of its
    bounds."""
    for name, hint in field_types(type(algorithm)).items():
        value, choices, bounds = getattr(algorithm, name), choices_of(hint), bounds_of(hint)
        if choices and value not in choices:
            raise ValueError(f"algorithm.{name}={value!r} is unknown; use {' or '.join(choices)}")
        if bounds is not None and value is not None and value not in bounds:
            why = "must not be negative" if 0 in bounds else "must be positive"
            if math.isnan(value) or value == math.inf:
                why = "is no number" if math.isnan(value) else "is not finite"
            elif bounds.high is not None and value >= bounds.high:
                why = f"must be below {bounds.high:g}"
            raise ValueError(f"algorithm.{name}={value:g} {why}")
