"""What a run will do, checked and priced before a model is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import rewards as reward_library

from . import algorithms, policies, prompts
from .algorithms import Needs
from .config import ConfigError, TrainConfig
from .prompts import Prompt, PromptSampler
from .rollout import Sampling
from .tracking import check_trackers


@dataclass(frozen=True)
class Plan:
    """Everything about a run that can be known, and refused, before a model is loaded."""

    config: TrainConfig
    algorithm: Any
    rewards: Mapping[Any, Any]
    train_prompts: list[Prompt]
    eval_prompts: list[Prompt]
    stds: list[float]  # of the K transitions of the sampler
    latent_shape: tuple[int, ...]
    uses_cfg: bool  # guidance doubles the denoiser calls
    processes: int

    @classmethod
    def make(
        cls,
        config: TrainConfig,
        rewards: Mapping[Any, Any] | None = None,
        train_prompts: Sequence[str] | None = None,
        processes: int = 1,
    ) -> Plan:
        """Check `config` as a whole. Raises ConfigError or ValueError, one clear message."""
        algorithm: Any = algorithms.build(config.algorithm)
        gradient = algorithm.needs is Needs.GRADIENT
        config.check(advantages=not gradient)
        if config.data.groups % processes:
            raise ConfigError(
                f"data.groups={config.data.groups} is not a multiple of the {processes} processes, "
                "and a group stays on one process; make it one"
            )
        if getattr(algorithm, "single_update", False):
            for name in ("updates_per_epoch", "inner_epochs"):
                if getattr(config.train, name) != 1:
                    raise ConfigError(
                        f"train.{name}={getattr(config.train, name)} needs importance sampling; "
                        "use 1, or algorithm.estimator=is"
                    )
        rewards = config.rewards if rewards is None else _with_options(rewards, config.rewards)
        reward_library.check(rewards)
        if config.eval.rewards:
            reward_library.check(config.eval.rewards)
        check_trackers(config.log.trackers)
        policies.check(config.model.name)
        data = (
            [Prompt(p) for p in train_prompts]
            if train_prompts is not None
            else prompts.load(config.data.prompts)
        )
        PromptSampler(len(data), config.data.groups)
        held_out = prompts.load(config.eval.prompts) if config.eval.prompts else []
        model = config.model
        levels, shape = policies.peek(model.name, config.sampler.steps, model.resolution)
        uses_cfg = policies.family(model.name).uses_cfg
        if model.tiny_vae is not None:
            policies.check_tiny_vae(model.tiny_vae, model.name)
        sampling = Sampling(levels, config.sampler.kernel, config.sampler.eta, 1.0)
        stds = sampling.stds().tolist()
        if gradient:
            algorithm.first_step(config.sampler.steps)
        elif algorithm.needs is Needs.TRAJECTORY and not any(stds):
            raise ConfigError(
                f"sampler.kernel={config.sampler.kernel} with sampler.eta={config.sampler.eta:g} "
                "is deterministic, and a policy gradient needs chance; raise sampler.eta"
            )
        return cls(config, algorithm, rewards, data, held_out, stds, shape, uses_cfg, processes)

    @property
    def samples(self) -> int:
        """Pictures of one epoch, over all processes."""
        return self.config.data.groups * self.config.data.group_size

    @property
    def trained_steps(self) -> list[int]:
        """Steps that are trained: the stochastic ones, or the tail of a GRADIENT algorithm."""
        steps = self.config.sampler.steps
        if self.algorithm.needs is Needs.GRADIENT:
            return list(range(self.algorithm.first_step(steps), steps))
        return [i for i, std in enumerate(self.stds) if std > 0]

    def describe(self) -> str:
        """The geometry and the cost of the run, for --dry-run."""
        c, n = self.config, self.samples
        updates = c.train.updates_per_epoch * c.train.inner_epochs
        branches = 2 if self.uses_cfg and c.sampler.guidance > 1 else 1
        needs = self.algorithm.needs
        rows = n // c.train.updates_per_epoch
        if needs is Needs.TRAJECTORY:
            rows *= len(self.trained_steps)
            trained = rows * updates
            unit = f"{rows:,} (sample, step) pairs"
        else:
            trained = rows * updates * (len(self.trained_steps) if needs is Needs.GRADIENT else 1)
            unit = f"{rows:,} samples"
        chunks = math.ceil(rows / c.train.micro_batch)
        last = rows - (chunks - 1) * c.train.micro_batch
        ragged = "" if last == c.train.micro_batch else f", the last of {last}"
        reference = 2 if getattr(self.algorithm, "kl_weight", 0) else 1
        evaluations = len(self.eval_prompts) * c.eval.images_per_prompt
        eval_branches = 2 if self.uses_cfg and c.eval.guidance > 1 else 1
        eval_calls = evaluations * c.eval.steps * eval_branches
        eval_runs = 1 + math.ceil(c.train.epochs / (c.eval.every or c.train.epochs))
        sampled, learned = n * c.sampler.steps * branches, trained * branches * reference
        latent = math.prod(self.latent_shape)
        rank = c.model.lora_rank
        trained_weights = f"LoRA rank {rank}" if rank else "all weights of the denoiser"
        stored = n * (c.sampler.steps + 1) * latent * 4 / 2**20
        lines = [
            f"run        {c.log.dir}",
            f"model      {c.model.name}, {trained_weights}, {c.model.dtype}",
            f"algorithm  {c.algorithm['type']}: {needs.value}",
            f"epoch      {c.data.groups} prompts x {c.data.group_size} images = {n} samples"
            + (f" on {self.processes} processes" if self.processes > 1 else ""),
            f"sampling   {c.sampler.steps} steps, {c.sampler.kernel}, eta {c.sampler.eta:g}, "
            f"guidance {c.sampler.guidance:g}: {sampled:,} denoiser calls, "
            f"{c.sampler.batch} at a time",
            f"update     {updates} optimiser step(s) of {unit}: "
            f"{chunks} micro-batch(es) of {min(c.train.micro_batch, rows)}{ragged}",
            f"learning   {len(self.trained_steps)} of {c.sampler.steps} steps: "
            f"{learned:,} denoiser calls forward and back",
            f"evaluation {len(self.eval_prompts)} prompts x {c.eval.images_per_prompt} images, "
            f"{eval_runs} times: {eval_calls:,} denoiser calls each",
            f"whole run  {c.train.epochs} epochs: "
            f"{c.train.epochs * (sampled + learned) + eval_runs * eval_calls:,} denoiser calls",
            f"memory     {stored:.1f} MiB of stored trajectories, beside model and activations",
        ]
        return "\n".join(lines)


def _with_options(rewards: Mapping[Any, Any], configured: Mapping[str, Any]) -> dict[Any, Any]:
    """`rewards` as passed in Python; a bare weight keeps the options the config gives that name."""
    merged = dict(rewards)
    for name, weight in rewards.items():
        options = configured.get(name) if isinstance(name, str) else None
        if isinstance(options, Mapping) and not isinstance(weight, Mapping):
            merged[name] = {**options, "weight": weight}
    return merged
