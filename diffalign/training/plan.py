"""What a run will do, checked and priced before a model is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import rewards as reward_library

from .. import algorithms
from ..config import TrainConfig, prompts
from ..config.decoding import ConfigError
from ..config.prompts import Buckets, Prompt
from .cost import Cost, advice

if TYPE_CHECKING:
    from ..algorithms.base import Algorithm, Matcher

Named = Mapping[str, Any] | str
"""An algorithm by its name, or by `type` and options."""


@dataclass(frozen=True)
class Plan:
    """Everything about a run that can be known, and refused, before a model is loaded."""

    config: TrainConfig
    algorithm: Algorithm
    rewards: reward_library.Spec
    train_prompts: list[Prompt]
    eval_prompts: list[Prompt]
    stochastic: list[bool]  # of the K transitions of the sampler
    latent_shape: tuple[int, ...]
    branches: list[int]  # denoiser calls of each step: two where classifier-free guidance acts
    eval_branches: list[int]
    processes: int

    @classmethod
    def make(
        cls,
        config: TrainConfig,
        rewards: reward_library.Spec | None = None,
        train_prompts: prompts.Given | Sequence[prompts.Given] | None = None,
        processes: int = 1,
        algorithm: Algorithm | Named | None = None,
    ) -> Plan:
        """Check `config` as a whole. Raises ConfigError or ValueError, one clear message.

        `rewards`, `train_prompts` and `algorithm` stand in place of the config's, see `Trainer`."""
        config.check(advantages=False)
        if config.data.groups * config.data.group_size < processes:
            raise ConfigError(
                f"data.groups={config.data.groups} x data.group_size={config.data.group_size} "
                f"pictures an epoch are fewer than the {processes} processes; use more"
            )
        trained, held_out = _prompts(config, train_prompts)

        # from here on torch is imported, a second that what is refused above need not wait for
        config, method = _with_algorithm(config, algorithm)
        from .. import policies
        from ..algorithms.base import Needs
        from ..sampling.rollout import Sampling
        from . import checks, sizes
        from .engine import check_launch

        config.check(advantages=method.needs is not Needs.GRADIENT)
        check_launch(config)
        checks.check_updates(config, method)
        rewards = config.rewards if rewards is None else _with_options(rewards, config.rewards)
        checks.check_packages(config)
        checks.check_model(config)
        checks.check_rewards(rewards, config.eval.rewards, trained, held_out)
        name, resolution, s = config.model.name, config.model.resolution, config.sampler
        levels, shape = policies.peek(name, s.steps, resolution)
        sizes.check(config, trained, held_out)
        size = config.eval.resolution or resolution
        looked_at = policies.peek(name, config.eval_steps, size)[0] if held_out else levels
        checks.check_guidance(config, method.needs)
        checks.check_tiny_vae(config)
        sampling = sizes.training_sampling(config, levels)
        evaluated = sizes.evaluation_sampling(config, looked_at)
        stochastic = sampling.stochastic

        def called(how: Sampling) -> list[int]:
            cfg = policies.guided_by(name) == "cfg"
            return how.branches(policies.family(name)) if cfg else [1] * how.steps

        checks.check_steps(config, method, stochastic, rewards)
        return cls(
            config=config,
            algorithm=method,
            rewards=rewards,
            train_prompts=trained,
            eval_prompts=held_out,
            stochastic=stochastic,
            branches=called(sampling),
            eval_branches=called(evaluated),
            latent_shape=shape,
            processes=processes,
        )

    @property
    def samples(self) -> int:
        """Pictures of one epoch, over all processes."""
        return self.config.data.groups * self.config.data.group_size

    @property
    def calls_per_epoch(self) -> float:
        """Denoiser calls that training makes in an epoch; a mean where that is random."""
        return Cost.of(self).epoch

    def describe(self) -> str:
        """The geometry and the cost of the run, for --dry-run."""
        from ..algorithms.base import Needs

        c, n, cost = self.config, self.samples, Cost.of(self)
        updates = c.train.updates_per_epoch * c.train.inner_epochs
        needs, share = self.algorithm.needs, n // c.train.updates_per_epoch
        rows, unit = share, "samples"
        if needs is not Needs.GRADIENT:
            rows = share * int(cost.what.split()[0])
            unit = "(sample, step) pairs" if needs is Needs.TRAJECTORY else "(sample, level) pairs"
        size = c.train.micro_batch
        if needs is Needs.FINAL:  # the levels of a sample stay together
            times = cast("Matcher", self.algorithm).times
            size = max(1, size // times) * times
        chunks = math.ceil(rows / size)
        last = rows - (chunks - 1) * size
        ragged = "" if last == size else f", the last of {last}"
        rank = c.model.lora_rank
        trained_weights = f"LoRA rank {rank}" if rank else "all weights of the denoiser"
        lines = [
            f"run        {c.log.dir}",
            f"model      {c.model.name}, {trained_weights}, {c.model.dtype}",
            f"algorithm  {c.algorithm['type']}: {needs.value}",
            f"epoch      {c.data.groups} prompts x {c.data.group_size} images = {n} samples"
            + (f" on {self.processes} processes" if self.processes > 1 else ""),
            f"sampling   {c.sampler.steps} steps, {c.sampler.kernel}, eta {c.sampler.eta:g}, "
            f"guidance {c.sampler.guidance:g}: {cost.sampled:,.0f} denoiser calls, "
            f"{c.sampler.batch} at a time",
            f"update     {updates} optimiser step(s) of {rows:,} {unit}: "
            f"{chunks} micro-batch(es) of {min(size, rows)}{ragged}",
            f"learning   {cost.what}: {cost.learned:,.0f} denoiser calls",
            f"evaluation {len(self.eval_prompts)} prompts x {c.eval.images_per_prompt} images, "
            f"{cost.evaluations} times: {cost.evaluated:,.0f} denoiser calls each",
            f"whole run  {cost.epochs} epochs: {cost.whole:,.0f} denoiser calls, "
            f"evaluation about {cost.share:.0%} of the work",
        ]
        return "\n".join([*lines, *([f"note       {tip}"] if (tip := advice(cost.share)) else [])])


def _prompts(
    config: TrainConfig, given: prompts.Given | Sequence[prompts.Given] | None
) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on, enough for an epoch, and those held out."""
    trained = prompts.load(config.data.prompts) if given is None else prompts.collect(given)
    Buckets(trained, config.data.groups)
    return trained, prompts.load(config.eval.prompts) if config.eval.prompts else []


def _with_algorithm(
    config: TrainConfig, given: Algorithm | Named | None
) -> tuple[TrainConfig, Algorithm]:
    """The algorithm, and the config that names it."""
    if given is None:
        return config, algorithms.build(config.algorithm)
    if isinstance(given, str):
        given = {"type": given}
    if isinstance(given, Mapping):
        config = replace(config, algorithm=dict(given))
        return config, algorithms.build(config.algorithm)
    if isinstance(given, type):
        raise ConfigError(
            f"algorithm={given.__name__} is a class; give {given.__name__}(...), or its name"
        )
    algorithms.check(given)
    named = {"type": algorithms.name_of(given), **asdict(given)}
    return replace(config, algorithm=named), given


def _with_options(
    rewards: reward_library.Spec, configured: Mapping[str, Any]
) -> reward_library.Spec:
    """`rewards` as passed in Python; a bare weight keeps the options the config gives that name."""
    if not isinstance(rewards, Mapping):
        return rewards  # refused by those who read it
    merged = dict(rewards)
    for name, weight in rewards.items():
        options = configured.get(name) if isinstance(name, str) else None
        if isinstance(options, Mapping) and not isinstance(weight, Mapping):
            merged[name] = {**options, "weight": weight}
    return merged
