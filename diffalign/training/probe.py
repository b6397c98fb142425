"""The noise scale of a config before it is run, `diffalign probe CONFIG`: is there a signal to
follow, and what would an update cost that follows it?"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..algorithms.base import Needs
from ..record.metrics import Meter
from .learning import Rollout, Update
from .noise_scale import Parts, scale

if TYPE_CHECKING:
    from .trainer import Trainer

ALL = -1  # all trained steps together


@dataclass(frozen=True)
class Probed:
    """Estimates of |G|² and S of every epoch, by the trained step or ALL; and seconds a picture
    takes, sampled and learnt from."""

    seen: dict[int, list[tuple[float, float]]]
    pictures: int
    seconds: float

    def scale(self, step: int = ALL) -> dict[str, float]:
        """As `noise_scale.scale`: empty for fewer than two epochs."""
        return scale(self.seen[step])


def probe(trainer: Trainer, epochs: int) -> Probed:
    """Gradients of `epochs` updates of an epoch's pictures each, at the weights as they are; none
    is followed. Raises ValueError where an update's gradient comes in one part."""
    seen: dict[int, list[tuple[float, float]]] = defaultdict(list)
    seconds = []
    for epoch in range(epochs):
        start = time.perf_counter()
        for step, split in _gradients(trainer, epoch):
            if step == ALL:  # the first; the others are parts of it
                seconds.append(time.perf_counter() - start)
            norm = torch.nn.utils.get_total_norm(
                [p.grad for p in trainer.optimizer.trained if p.grad is not None]
            )
            scaled = trainer.optimizer.scaler.get_scale()
            n = trainer.plan.samples
            found = split.figures(norm / scaled, n, trainer.accelerator)
            if not found:
                raise ValueError(
                    f"{trainer.config.data.groups} prompt(s) an epoch in micro-batches of "
                    f"{trainer.config.train.micro_batch} give one part of a gradient, and nothing "
                    "to compare it with; use more data.groups or a smaller train.micro_batch"
                )
            seen[step].append((found["gradient_signal"].item(), found["gradient_noise"].item()))
    seconds = seconds[1:] or seconds  # the first warms up
    return Probed(dict(seen), trainer.plan.samples, sum(seconds) / len(seconds) / n)


def _gradients(trainer: Trainer, epoch: int) -> Iterator[tuple[int, Parts]]:
    """The gradient of an epoch's pictures, in the weights' `grad` while it is looked at: of all
    steps, then of each alone."""
    learner, data, n = trainer.learner, trainer._sample(epoch), trainer.plan.samples
    mine = torch.arange(len(data.keys))
    if isinstance(data, Rollout):
        credit, _ = trainer.credit(data)
        steps = range(0)
        if trainer.algorithm.needs is Needs.TRAJECTORY and data.paths.log_prob.shape[1] > 1:
            steps = range(data.paths.log_prob.shape[1])
        for step in (None, *steps):
            with _cleared(trainer):
                split = learner.accumulate(data, credit, Update(mine, n, n), True, Meter(), step)
                yield ALL if step is None else step, split
    else:
        (plan, *_) = learner.surrogates(epoch)
        with _cleared(trainer):
            yield ALL, learner.sweep(data, Update(mine, n, n), plan, Meter(), {}, [])


@contextmanager
def _cleared(trainer: Trainer) -> Iterator[None]:
    trainer.optimizer.adamw.zero_grad()
    yield
    trainer.optimizer.adamw.zero_grad()
    trainer.optimizer.suspects.clear()
