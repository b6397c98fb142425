"""What of a run is refused before a model is loaded, a function a topic. Each raises ConfigError or
ValueError with one message that names the setting, the reason and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

import rewards as reward_library

from .. import policies
from ..algorithms.base import Algorithm, GradientAlgorithm, Matcher, Needs
from ..config import SamplerConfig, TrainConfig
from ..config.decoding import ConfigError
from ..config.prompts import Prompt, for_judges, for_rewards
from ..record.metrics import check_trackers
from ..sampling import windows
from .optimizer import check_optimizer


def check_updates(config: TrainConfig, algorithm: Algorithm) -> None:
    """More updates a rollout than the loss is right for."""
    if not algorithm.single_update:
        return
    for name in ("updates_per_epoch", "inner_epochs"):
        if getattr(config.train, name) != 1:
            raise ConfigError(
                f"train.{name}={getattr(config.train, name)} needs importance sampling; "
                "use 1, or algorithm.estimator=is"
            )


def check_packages(config: TrainConfig) -> None:
    """Trackers, optimizers, attention kernels and compilers that are not installed."""
    check_trackers(config.log.trackers)
    check_optimizer(config.train.optimizer)
    policies.check_acceleration(config.model.attention, config.model.compile)


def check_model(config: TrainConfig) -> None:
    """A model that is none, of no known family, or a LoRA that does not fit it."""
    policies.check(config.model.name)
    if config.model.merge_lora is not None:
        policies.check_lora(config.model.merge_lora, "model.merge_lora", config.model.name)


def check_rewards(
    rewards: reward_library.Spec,
    judges: reward_library.Spec,
    trained: Sequence[Prompt],
    held_out: Sequence[Prompt],
) -> None:
    """Rewards and judges that are unknown, or cannot score these prompts."""
    reward_library.check(rewards, *for_rewards([*trained, *held_out]))
    if judges:
        reward_library.check(judges, *for_judges(held_out))


def check_guidance(config: TrainConfig, needs: Needs) -> None:
    """A guidance scale for a model that takes none, and steps without guidance that cannot be."""
    name, kind = config.model.name, policies.family(config.model.name)
    s, scored = config.sampler, needs is not Needs.FINAL
    given = {
        f"{section}.{k}": (v, scale)
        for section, scale in (("sampler", s.guidance), ("eval", config.eval_guidance))
        for k, v in vars(getattr(config, section)).items()
        if k.startswith("guidance_") and v not in (None, False)
    }
    interval, until = s.guidance_interval, s.guidance_until
    if until is not None and until > 1:
        raise ConfigError(
            f"sampler.guidance_until={until:g} is no share of the steps; use above 0, up to 1"
        )
    if interval is not None and (len(interval) != 2 or not 0 <= interval[0] < interval[1]):
        raise ConfigError(
            f"sampler.guidance_interval={interval} is not [low, high] of noise levels sigma/alpha; "
            "use e.g. [0.28, 5.42]"
        )
    for option, (value, scale) in given.items():
        section, key = option.split(".")
        why, remedy = "", "leave it out"
        if policies.guided_by(name) != "cfg":
            why = f"{name!r} is called once a step whatever its guidance is"
        elif kind.weighed(scale).scale <= 1:
            why = f"there is no guidance with {section}.guidance={scale:g}"
        elif section == "sampler" and key in ("guidance_reuse", "guidance_adaptive") and scored:
            why = (
                f"{config.algorithm['type']} calls the denoiser at a step again, where what "
                "earlier steps left is not known"
            )
            remedy = f"use sampler.guidance_until, or eval.{key}"
        elif key == "guidance_star" and getattr(kind, "predicts", None) != "flow":
            why = f"CFG-Zero* is for flow models, and {name!r} is none"
        if why:
            raise ConfigError(f"{option}={value} cannot be: {why}; {remedy}")
    for section in ("sampler", "eval"):
        scale = getattr(config, section).guidance
        if scale is not None and scale > 1 and policies.guided_by(name) is None:
            raise ConfigError(
                f"{section}.guidance={scale:g} does nothing: {name!r} takes no guidance scale, as "
                "FLUX.1-schnell does not; use 1"
            )


def check_tiny_vae(config: TrainConfig) -> None:
    """A tiny VAE of other latents than the model's."""
    if config.model.tiny_vae is not None:
        policies.check_tiny_vae(config.model.tiny_vae, config.model.name)


def check_steps(
    config: TrainConfig,
    algorithm: Algorithm,
    stochastic: list[bool],
    rewards: reward_library.Spec,
) -> None:
    """Denoising steps that the algorithm cannot learn from. stochastic: of each, whether it is."""
    if algorithm.needs is Needs.TRAJECTORY:
        _check_transitions(config, stochastic)
        return
    if algorithm.needs is Needs.GRADIENT:
        cast(GradientAlgorithm, algorithm).surrogate(config.sampler.steps, torch.Generator())
        reward_library.check_gradient(rewards)
    for name in ("window", "window_range", "tail"):
        value = getattr(config.sampler, name)
        if value is not None:
            raise ConfigError(
                f"sampler.{name}={value} is for policy gradients, and "
                f"{config.algorithm['type']} trains no transitions; leave it out"
            )
    if algorithm.needs is Needs.FINAL:
        cast(Matcher, algorithm).check_levels(config.sampler.steps)
        if config.sampler.same_noise and not any(stochastic):
            reason, remedy = _without_chance(config.sampler)
            raise ConfigError(
                "sampler.same_noise=true makes all images of a prompt alike, since "
                f"{reason}; {remedy}, or same_noise=false"
            )


def _check_transitions(config: TrainConfig, stochastic: list[bool]) -> None:
    """Policy gradients: chance, windows that fit, branches that can be compared."""
    if not any(stochastic):
        reason, remedy = _without_chance(config.sampler)
        raise ConfigError(f"{reason}, and a policy gradient needs chance; {remedy}")
    low, high = windows.bounds(config.sampler, stochastic)
    size, places = config.data.group_size, high - low
    each = max(2, size // places)  # one image of a step has none to be compared with
    if config.sampler.window_schedule == "branch" and size != each * places:
        raise ConfigError(
            f"data.group_size={size} does not give every one of the {places} steps that "
            "branch the same number of images, 2 or more to compare; use "
            f"{each * places} or {(each + 1) * places}, or a shorter sampler.window_range"
        )


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
