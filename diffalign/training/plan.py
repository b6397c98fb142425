"""What a run will do, checked and priced before a model is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import rewards as reward_library

from .. import algorithms
from ..config import SamplerConfig, TrainConfig, prompts
from ..config.decoding import ConfigError
from ..config.prompts import Prompt, PromptSampler, for_judges, for_rewards
from .cost import Cost, advice


@dataclass(frozen=True)
class Plan:
    """Everything about a run that can be known, and refused, before a model is loaded."""

    config: TrainConfig
    algorithm: Any
    rewards: Mapping[Any, Any]
    train_prompts: list[Prompt]
    eval_prompts: list[Prompt]
    stochastic: list[bool]  # of the K transitions of the sampler
    latent_shape: tuple[int, ...]
    uses_cfg: bool  # guidance doubles the denoiser calls
    processes: int

    @classmethod
    def make(
        cls,
        config: TrainConfig,
        rewards: Mapping[Any, Any] | None = None,
        train_prompts: prompts.Given | Sequence[prompts.Given] | None = None,
        processes: int = 1,
        algorithm: Any = None,
    ) -> Plan:
        """Check `config` as a whole. Raises ConfigError or ValueError, one clear message.

        `rewards`, `train_prompts` and `algorithm` stand in place of the config's, see `Trainer`."""
        config.check(advantages=False)
        if config.data.groups % processes:
            raise ConfigError(
                f"data.groups={config.data.groups} is not a multiple of the {processes} processes, "
                "and a group stays on one process; make it one"
            )
        data = (
            prompts.load(config.data.prompts)
            if train_prompts is None
            else prompts.collect(train_prompts)
        )
        PromptSampler(len(data), config.data.groups)
        held_out = prompts.load(config.eval.prompts) if config.eval.prompts else []

        # from here on torch is imported, a second that what is refused above need not wait for
        config, method = _with_algorithm(config, algorithm)
        import torch

        from .. import policies
        from ..algorithms import Needs
        from ..record.metrics import check_trackers
        from ..sampling import windows
        from ..sampling.rollout import Sampling
        from .optimizer import check_optimizer

        gradient = method.needs is Needs.GRADIENT
        config.check(advantages=not gradient)
        if method.single_update:
            for name in ("updates_per_epoch", "inner_epochs"):
                if getattr(config.train, name) != 1:
                    raise ConfigError(
                        f"train.{name}={getattr(config.train, name)} needs importance sampling; "
                        "use 1, or algorithm.estimator=is"
                    )
        rewards = config.rewards if rewards is None else _with_options(rewards, config.rewards)
        check_trackers(config.log.trackers)
        check_optimizer(config.train.optimizer)
        policies.check(config.model.name)
        if config.model.merge_lora is not None:
            policies.check_lora(config.model.merge_lora, "model.merge_lora", config.model.name)
        reward_library.check(rewards, *for_rewards(data + held_out))
        if config.eval.rewards:
            reward_library.check(config.eval.rewards, *for_judges(held_out))
        model = config.model
        levels, shape = policies.peek(model.name, config.sampler.steps, model.resolution)
        if held_out:
            policies.peek(model.name, config.eval_steps, model.resolution)
        uses_cfg = policies.family(model.name).uses_cfg
        for section in ("sampler", "eval"):
            name, scale = f"{section}.guidance", getattr(config, section).guidance
            if scale is not None and scale > 1 and not policies.knows_guidance(model.name):
                raise ConfigError(
                    f"{name}={scale:g} does nothing: {model.name!r} takes no guidance scale, as "
                    "FLUX.1-schnell does not; use 1"
                )
        if model.tiny_vae is not None:
            policies.check_tiny_vae(model.tiny_vae, model.name)
        sampling = Sampling(levels, config.sampler.kernel, config.sampler.eta, 1.0)
        stochastic, trajectory = sampling.stochastic, method.needs is Needs.TRAJECTORY
        if gradient:
            method.surrogate(config.sampler.steps, torch.Generator())
            reward_library.check_gradient(rewards)
        if not trajectory:
            for name in ("window", "window_range", "tail"):
                value = getattr(config.sampler, name)
                if value is not None:
                    raise ConfigError(
                        f"sampler.{name}={value} is for policy gradients, and "
                        f"{config.algorithm['type']} trains no transitions; leave it out"
                    )
        if method.needs is Needs.FINAL:
            method.check_levels(config.sampler.steps)
            if config.sampler.same_noise and not any(stochastic):
                reason, remedy = _without_chance(config.sampler)
                raise ConfigError(
                    "sampler.same_noise=true makes all images of a prompt alike, since "
                    f"{reason}; {remedy}, or same_noise=false"
                )
        if trajectory and not any(stochastic):
            reason, remedy = _without_chance(config.sampler)
            raise ConfigError(f"{reason}, and a policy gradient needs chance; {remedy}")
        if trajectory:
            low, high = windows.bounds(config.sampler, stochastic)
            size, places = config.data.group_size, high - low
            each = max(2, size // places)  # one image of a step has none to be compared with
            if config.sampler.window_schedule == "branch" and size != each * places:
                raise ConfigError(
                    f"data.group_size={size} does not give every one of the {places} steps that "
                    "branch the same number of images, 2 or more to compare; use "
                    f"{each * places} or {(each + 1) * places}, or a shorter sampler.window_range"
                )
        return cls(config, method, rewards, data, held_out, stochastic, shape, uses_cfg, processes)

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
        from ..algorithms import Needs

        c, n, cost = self.config, self.samples, Cost.of(self)
        updates = c.train.updates_per_epoch * c.train.inner_epochs
        needs, share = self.algorithm.needs, n // c.train.updates_per_epoch
        rows, unit = share, "samples"
        if needs is not Needs.GRADIENT:
            rows = share * int(cost.what.split()[0])
            unit = "(sample, step) pairs" if needs is Needs.TRAJECTORY else "(sample, level) pairs"
        size = c.train.micro_batch
        if needs is Needs.FINAL:  # the levels of a sample stay together
            size = max(1, size // self.algorithm.times) * self.algorithm.times
        chunks = math.ceil(rows / size)
        last = rows - (chunks - 1) * size
        ragged = "" if last == size else f", the last of {last}"
        rank = c.model.lora_rank
        trained_weights = f"LoRA rank {rank}" if rank else "all weights of the denoiser"
        kept = share if needs is Needs.GRADIENT else n  # those of one update
        stored = kept * (c.sampler.steps + 1) * math.prod(self.latent_shape) * 4 / 2**20
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
            f"memory     {stored:.1f} MiB of stored trajectories, beside model and activations",
        ]
        return "\n".join([*lines, *([f"note       {tip}"] if (tip := advice(cost.share)) else [])])


def _without_chance(sampler: SamplerConfig) -> tuple[str, str]:
    """Why no step of a sampler is stochastic, and what to do."""
    kernel = sampler.kernel
    if kernel == "ode":
        remedy = "use ddim or cps, or for a flow model flow_sde"
        return "sampler.kernel=ode is deterministic", remedy
    if sampler.eta == 0:
        return f"sampler.eta=0 makes sampler.kernel={kernel} deterministic", "raise sampler.eta"
    reason = f"sampler.steps={sampler.steps} is the last step alone, which sampler.kernel={kernel}"
    return f"{reason} takes without noise", "use 2 steps or more"


def _with_algorithm(config: TrainConfig, given: Any) -> tuple[TrainConfig, Any]:
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


def _with_options(rewards: Mapping[Any, Any], configured: Mapping[str, Any]) -> dict[Any, Any]:
    """`rewards` as passed in Python; a bare weight keeps the options the config gives that name."""
    if not isinstance(rewards, Mapping):
        return rewards  # refused by those who read it
    merged = dict(rewards)
    for name, weight in rewards.items():
        options = configured.get(name) if isinstance(name, str) else None
        if isinstance(options, Mapping) and not isinstance(weight, Mapping):
            merged[name] = {**options, "weight": weight}
    return merged
