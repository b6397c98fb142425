"""Pictures of several sizes in one run: those of an epoch are of one, as their prompts ask for."""

from __future__ import annotations

from collections.abc import Sequence
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
    drawn = {p.size: (p, config.sampler.steps) for p in trained}
    seen = {p.size: (p, config.eval_steps) for p in held_out} if not config.eval.resolution else {}
    for size, (prompt, steps) in (drawn | seen).items():
        if size is None:
            continue
        try:
            policies.peek(name, steps, size)
        except ValueError as error:
            raise ValueError(f"the prompt {prompt.text[:40]!r}: {error}") from error
    if config.eval.resolution and held_out:
        try:
            policies.peek(name, config.eval_steps, config.eval.resolution)
        except ValueError as error:
            text = str(error).replace("model.resolution", "eval.resolution")
            raise ValueError(text) from error
