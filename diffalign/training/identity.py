"""What makes a run the run it is: the settings that must be the same when it goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rewards as reward_library
from rewards.redaction import redact

from .. import algorithms
from ..config import TrainConfig
from ..config.decoding import converted, setting_types
from ..config.prompts import Prompt
from ..config.reading import read_yaml
from ..policies.guidance import scheduled

if TYPE_CHECKING:
    from ..algorithms.base import Algorithm
    from .plan import Plan

MAY_CHANGE = frozenset(
    {
        # how long, how fast, how carefully: no weight or figure of the past becomes wrong
        *("train.epochs", "train.max_denoiser_calls", "train.checkpoint_every"),
        "train.reward_timeout",
        *("train.lr", "train.lr_schedule", "train.warmup"),
        *("train.weight_decay", "train.max_grad_norm"),
        # memory and speed: the same results
        *("train.micro_batch", "sampler.batch", "model.decode_batch"),
        *("model.gradient_checkpointing", "model.free_text_encoders"),
        *("model.compile", "model.attention"),  # but for rounding
        # when to look, and what to say of it
        *("eval.every", "eval.grid_prompts"),
        *("eval.guard", "eval.guard_drop", "eval.guard_diversity"),
        *("log.dir", "log.trackers", "log.keep_checkpoints"),
    }
)
"""Settings that a resumed run may have otherwise; every other one must be as it was."""

SERVING = frozenset(
    {"url", "token_env", "api_key_env", "timeout", "patience", "retries", "batch", "workers"}
)
"""Options of a reward, or judge, that say where it is served and how it is asked: they may change
too, and are not kept."""

PROMPTS = {"data.prompts": "train_prompts", "eval.prompts": "eval_prompts"}

Settings = dict[str, Any]


def settings(plan: Plan) -> Settings:
    """{dotted name: plain value} of everything in a plan that must stay.

    Algorithms are there with all their options, rewards with their weights. For prompt files stands
    a digest of what is in them, so that they may move.
    """
    found = _settings(plan.config, plan.algorithm, plan.rewards)
    return found | {key: _digest_of(getattr(plan, name)) for key, name in PROMPTS.items()}


def _settings(config: TrainConfig, algorithm: Algorithm, rewards: reward_library.Spec) -> Settings:
    """As `settings`, with the paths of prompt files."""
    tree = config.to_dict()
    tree["algorithm"] = {"type": tree["algorithm"]["type"], **asdict(algorithm)}
    tree["rewards"] = _weighted(rewards)
    tree["eval"]["rewards"] = _weighted(config.eval.rewards)
    tree["eval"]["steps"] = config.eval_steps
    if not scheduled(config.sampler):  # else null and an equal number are not the same
        tree["eval"]["guidance"] = config.eval_guidance
    return redact(_plain({key: value for key, value in _flat(tree).items() if _stays(key)}))


def digest(known: Settings) -> str:
    """SHA-256 of settings, in hexadecimal; the same for the same ones."""
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def changes(run_dir: Path, state: Mapping[str, Any], plan: Plan) -> dict[str, str]:
    """What differs between the run that a checkpoint is of and `plan`: {"train.seed": "0 -> 1"}.

    A checkpoint that does not say what it is of is taken to be of the folder's config.yaml.
    """
    if "run" in state:
        old, new = state["run"]["settings"], settings(plan)
    else:
        try:
            config = TrainConfig.from_dict(read_yaml(run_dir / "config.yaml"))
            algorithm = algorithms.build(config.algorithm)
        except ValueError:  # gone, or of a version with other settings
            return {}
        old = _settings(config, algorithm, config.rewards)
        new = _settings(plan.config, plan.algorithm, plan.rewards)
    key = "algorithm.type"
    if old[key] != new[key]:  # and so the options are others too
        old, new = (
            {k: v for k, v in s.items() if k == key or not k.startswith("algorithm.")}
            for s in (old, new)
        )
    # what an older version did not have was then as the default is now
    options = {f.name: f.default for f in fields(plan.algorithm) if f.default is not MISSING}
    default = _plain(_flat({**TrainConfig().to_dict(), "algorithm": options}))
    types, found = setting_types(TrainConfig), {}
    for key in dict.fromkeys([*old, *new]):
        if key not in new and not key.startswith(("rewards.", "eval.rewards.")):
            continue  # this version does not have it
        before, after = old.get(key, default.get(key)), new.get(key)
        before = converted(types.get(key, Any), before)  # maybe in its former spelling
        if before != after:
            texts = key in PROMPTS and "run" in state
            found[key] = "other texts" if texts else f"{json.dumps(before)} -> {json.dumps(after)}"
    return found


def words(found: Mapping[str, str]) -> str:
    """The first of `changes`, for a message."""
    first = [f"{key}: {values}" for key, values in list(found.items())[:6]]
    more = len(found) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")


def _stays(key: str) -> bool:
    of_reward = key.startswith(("rewards.", "eval.rewards."))
    return key not in MAY_CHANGE and not (of_reward and key.rpartition(".")[2] in SERVING)


def _weighted(rewards: reward_library.Spec) -> dict[str, dict[str, Any]]:
    """Rewards by name, {"jpeg": 1.0} as {"jpeg": {"weight": 1.0}}."""
    return {
        name: {"weight": 1.0, **(value if isinstance(value, Mapping) else {"weight": value})}
        for name, value in named(rewards).items()
    }


def _digest_of(prompts: Sequence[Prompt]) -> str:
    rows = [[p.text, p.metadata] for p in prompts]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else None
        flat |= {f"{prefix}{key}": value} if inner is None else inner
    return flat


def _plain(values: Settings) -> Settings:
    """As JSON gives it back: tuples as lists, objects by their class, whatever their address."""
    return json.loads(json.dumps(values, default=lambda value: str(named(type(value)))))


def named(spec: Any) -> Any:
    """A spec of rewards as a config has it: module:function for what was passed in Python."""
    if isinstance(spec, Mapping):
        return {named(k): named(v) for k, v in spec.items()}
    if callable(spec):
        spec = spec if hasattr(spec, "__qualname__") else type(spec)
        return f"{spec.__module__}:{spec.__qualname__}"
    return spec
