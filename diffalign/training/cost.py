"""What a run costs: its denoiser calls, and the time that they take here once one was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from ..algorithms.base import GradientAlgorithm, Matcher
    from .plan import Plan

BACKWARD = 2  # calls that a backward pass takes the time of
DRAWS = 2000  # of what an algorithm draws anew for every update, for its mean


@dataclass(frozen=True)
class Cost:
    """Denoiser calls of a run, over all processes and with both branches of CFG counted; means
    where they are random. An evaluation is of `pictures`; the first one, of the base model, needs
    no `distance` to it."""

    sampled: float  # by the rollouts of an epoch
    learned: float  # by its updates, those without gradient included
    carried: float  # by its updates, with gradient
    what: str  # is learnt of a sample
    epochs: int
    samples: int  # pictures of an epoch
    evaluations: int
    pictures: int
    evaluated: float
    distance: float

    @classmethod
    def of(cls, plan: Plan) -> Cost:
        c, n = plan.config, plan.samples
        sampled, learned, carried, what = _calls(plan)
        sampled, learned, carried = (
            n * calls
            for calls in (sampled, c.train.inner_epochs * learned, c.train.inner_epochs * carried)
        )
        epochs = c.train.epochs
        if c.train.max_denoiser_calls is not None:
            epochs = min(epochs, math.ceil(c.train.max_denoiser_calls / (sampled + learned)))
        pictures = len(plan.eval_prompts) * c.eval.images_per_prompt
        half = plan.eval_branches[c.eval_steps // 2] if plan.eval_prompts else 1
        return cls(
            sampled, learned, carried, what, epochs, n,
            1 + math.ceil(epochs / (c.eval.every or epochs)),
            pictures, pictures * sum(plan.eval_branches),
            2 * pictures * half if c.model.lora_rank else 0,
        )  # fmt: skip

    @property
    def epoch(self) -> float:
        """Calls of training in an epoch."""
        return self.sampled + self.learned

    @property
    def whole(self) -> float:
        """Calls of the whole run."""
        return self.epochs * self.epoch + self._evaluation

    @property
    def _evaluation(self) -> float:
        return self.evaluations * self.evaluated + (self.evaluations - 1) * self.distance

    @property
    def share(self) -> float:
        """About what part of the work of the run is evaluation, a backward pass counted as two
        calls, and decoding and rewards left out."""
        work = self.whole + self.epochs * BACKWARD * self.carried
        return self._evaluation / work


def _calls(plan: Plan) -> tuple[float, float, float, str]:
    """Denoiser calls for a sample, both branches of guidance counted: of its rollout, of each time
    it is learnt from, and of these with gradient; and what is learnt, in words."""
    import torch

    from ..algorithms import Needs
    from ..sampling import windows

    c, algorithm = plan.config, plan.algorithm
    steps = c.sampler.steps
    frozen = algorithm.frozen_calls(c.train.updates_per_epoch * c.train.inner_epochs)
    if algorithm.needs is Needs.FINAL:
        times = cast("Matcher", algorithm).times
        calls = times * sum(plan.branches) / steps
        return sum(plan.branches), calls * (1 + frozen), calls, f"{times} noise levels"
    if algorithm.needs is Needs.TRAJECTORY:
        low, high = windows.bounds(c.sampler, plan.stochastic)
        trained = c.sampler.window or high - low
        share = plan.samples // plan.processes
        sampled = windows.calls_per_sample(c.sampler, plan.stochastic, c.data.group_size, share)
        sampled *= sum(plan.branches) / steps
        calls = trained * sum(plan.branches[low:high]) / (high - low)
        return sampled, calls * (1 + frozen), calls, f"{trained} of {steps} steps"
    generator = torch.Generator()
    gradient = cast("GradientAlgorithm", algorithm)
    draws = [gradient.surrogate(steps, generator) for _ in range(DRAWS)]

    def mean(values: Sequence[float]) -> float:
        return sum(values) / DRAWS

    branches = plan.branches
    active = mean([len(d.active) for d in draws])
    sampled = mean([sum(branches[: d.at]) for d in draws])
    carried = mean([(1 + d.renoised) * sum(branches[i] for i in d.active) for d in draws])
    others = mean(
        [d.renoised * branches[-1] + (0 if d.at is None else branches[d.at]) for d in draws]
    )
    # every update draws its own
    sampled *= c.train.inner_epochs
    return sampled, carried * (1 + frozen) + others, carried, f"{active:g} of {steps} steps"


def advice(share: float) -> str:
    """What to do about an evaluation that takes this share of a run; empty where there is no
    need."""
    if share <= 0.5:
        return ""
    return (
        f"evaluation takes {share:.0%} of the run: raise eval.every, or lower "
        "eval.images_per_prompt, eval.steps or the number of eval.prompts"
    )
