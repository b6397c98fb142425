"""The processes of a run, by accelerate: what `accelerate launch` asks for, and what is made of it.

A LoRA is trained in replicas: every process has the whole model, and gradients are summed. All
weights of a denoiser are trained in replicas too, or divided among the processes by FSDP2.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

from ..config import DataConfig, LogConfig, TrainConfig
from ..config.decoding import ConfigError
from ..config.prompts import divided

PRECISIONS = {"no": None, "bf16": "bfloat16", "fp16": "float16"}  # accelerate's, and model.dtype


def on(name: str) -> bool:
    """Whether an environment variable of accelerate says yes."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")


def asked_for() -> int:
    """The number of processes by the environment variable WORLD_SIZE. Raises ConfigError."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"WORLD_SIZE={text!r} is no number of processes; use 1 or more")
    return int(text)


def check_launch(config: TrainConfig) -> None:
    """Raises ConfigError for what accelerate's config asks for and a run would not do."""
    environ, model, sampler = os.environ, config.model, config.sampler
    asked = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked != "no" and PRECISIONS.get(asked) != model.dtype:
        raise ConfigError(
            f"accelerate's config has mixed_precision: {asked}, and the model runs in "
            f"model.dtype={model.dtype}; set mixed_precision: 'no', or the dtype alike"
        )
    if (steps := environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) not in ("1", "auto"):
        raise ConfigError(
            f"accelerate's config has gradient_accumulation_steps: {steps}, which is not used: an "
            "update is groups x group_size / updates_per_epoch pictures, train.micro_batch at a "
            "time; set it to 1"
        )
    others = {
        "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
        "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
    }
    for name, engine in others.items():
        if on(name):
            raise ConfigError(
                f"accelerate's config asks for {engine}, which is not supported: its engine takes "
                "one backward pass a step through the network that it wraps, and the updates here "
                "take many; train a LoRA in replicas (configs/accelerate/lora_8gpu.yaml), or all "
                "weights by FSDP2 (configs/accelerate/fsdp2_8gpu.yaml)"
            )
    if (backend := environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()) not in ("no", ""):
        raise ConfigError(
            f"accelerate's config has dynamo_backend: {backend}, which is not used; leave it out "
            "and set model.compile=true"
        )
    if not asked_to_divide():
        return
    if environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("accelerate's config asks for FSDP of version 1; set fsdp_version: 2")
    if model.lora_rank:
        raise ConfigError(
            f"accelerate's config asks for FSDP, and model.lora_rank={model.lora_rank}: a LoRA is "
            "trained in replicas, each with the whole model; use "
            "configs/accelerate/lora_8gpu.yaml, or train all weights with model.lora_rank=0"
        )
    if model.dtype == "float16" or config.train.optimizer == "adamw8bit":
        raise ConfigError(
            f"FSDP with model.dtype={model.dtype} and train.optimizer={config.train.optimizer}: "
            "the loss scale of float16, and 8-bit states, are not divided; use bfloat16 and adamw"
        )
    if sampler.window_schedule == "branch" and sampler.tail is not None:
        raise ConfigError(
            "FSDP with sampler.window_schedule=branch and a sampler.tail: the processes would call "
            "the denoiser unequally often, and wait for each other; leave sampler.tail out"
        )
    for option, instead in {
        "FSDP_OFFLOAD_PARAMS": "it was never run; leave fsdp_offload_params out",
        "FSDP_ACTIVATION_CHECKPOINTING": "set model.gradient_checkpointing=true in its place",
    }.items():
        if on(option):
            raise ConfigError(f"accelerate's config has {option.lower()}: true: {instead}")


def make_accelerator(log: LogConfig, run_dir: Path) -> Any:
    """The engine for one process or several. Raises ValueError where it does not see them all."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    # dtypes are the policy's; here the config's were only compared with them
    accelerator = Accelerator(
        mixed_precision="no", log_with=[*log.trackers] or None, project_dir=str(run_dir)
    )
    launched = asked_for() if {"LOCAL_RANK", "RANK"} & os.environ.keys() else 1
    if launched > accelerator.num_processes:  # as torchrun does on CPUs: each would train alone
        raise ValueError(
            f"{launched} processes were launched, and accelerate sees "
            f"{accelerator.num_processes}; start them by torchrun or accelerate launch; on CPUs "
            "set ACCELERATE_USE_CPU=true"
        )
    if divides(accelerator) and getattr(accelerator.state, "fsdp_plugin", None) is None:
        # accelerate knows FSDP on accelerators alone, torch on CPUs too
        cast(Any, accelerator.state).fsdp_plugin = FullyShardedDataParallelPlugin()
    return accelerator


def asked_to_divide() -> bool:
    """Whether accelerate's config asks for FSDP."""
    return on("ACCELERATE_USE_FSDP")


def divides(accelerator: Any) -> bool:
    """Whether the trained denoiser is divided among the processes. One process divides nothing."""
    return asked_to_divide() and accelerator.num_processes > 1


def shares(data: DataConfig, world: int, per_group: bool) -> list[range]:
    """Which pictures of an epoch each process draws. The groups stay whole where there are as many
    for each process, or where a reward compares their pictures (per_group)."""
    if per_group and data.groups < world:
        raise ConfigError(
            f"data.groups={data.groups} is less than the {world} processes, and a reward that "
            "compares the pictures of a prompt needs them on one; use as many or more"
        )
    whole = per_group or data.groups % world == 0
    return divided(data.groups * data.group_size, world, data.group_size if whole else 1)
