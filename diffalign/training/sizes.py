"""Pictures of several sizes in one run: those of an epoch are of one, as their prompts ask for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .. import policies
from ..config import TrainConfig
from ..config.prompts import Prompt, sides
from ..dynamics import Levels
from ..policies.guidance import of_evaluation, of_sampler
from ..sampling.rollout import Sampling
from .engine import asked_to_divide

if TYPE_CHECKING:
    from .trainer import Trainer


def training_sampling(config: TrainConfig, levels: Levels) -> Sampling:
    """How the pictures to learn from are drawn, over `levels` (K + 1,)."""
    s = config.sampler
    return Sampling(levels, s.kernel, s.eta, of_sampler(s, levels))


def evaluation_sampling(config: TrainConfig, levels: Levels) -> Sampling:
    """How those of evaluations are drawn, over `levels` (K + 1,)."""
    return Sampling(levels, "ode", 0.0, of_evaluation(config, levels))


def fitted(trainer: Trainer, size: policies.Size | None) -> Sampling:
    """How a run's next pictures are drawn, of another `size`, None = that of its policy."""
    policy, config = trainer.policy, trainer.config
    if (size or policy.made_for) == policy.resolution:
        return trainer.sampling
    policy.resize(size)
    return training_sampling(config, policy.levels(config.sampler.steps))


def looked_at(config: TrainConfig, prompt: Prompt) -> tuple[int, int] | None:
    """The size of a prompt's pictures in evaluations, None = the policy's own."""
    asked = config.eval.resolution
    return prompt.size if asked is None else sides(asked, "eval.resolution=")


def check(config: TrainConfig, trained: Sequence[Prompt], held_out: Sequence[Prompt]) -> None:
    """Refuse a size that the model cannot draw. Raises ValueError."""
    name = config.model.name
    if asked_to_divide() and len({looked_at(config, p) for p in held_out}) > 1:
        raise ValueError(
            "the held-out prompts ask for several sizes, and processes that share a divided "
            "denoiser must draw equally many batches; set eval.resolution"
        )
    for prompt in {p.size: p for p in trained if p.size}.values():
        with _named(f"the prompt {prompt.text[:40]!r}: "):
            training_sampling(config, policies.peek(name, config.sampler.steps, prompt.size)[0])
    for prompt in {looked_at(config, p): p for p in held_out}.values():
        if size := looked_at(config, prompt):
            own = config.eval.resolution is None
            with _named(f"the prompt {prompt.text[:40]!r}: " if own else "eval.resolution: "):
                evaluation_sampling(config, policies.peek(name, config.eval_steps, size)[0])


@contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(what + str(error).removeprefix("model.resolution=")) from error
