"""Model families behind one contract; `load` picks the family from the pipeline's own class."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..config import ModelConfig
from ..dynamics import Levels
from .base import Cond, Policy, pixels_per_latent, read_config, text_options
from .flux import FluxPolicy
from .sd3 import SD3Policy
from .unet import UNetPolicy

__all__ = [
    "FAMILIES",
    "Cond",
    "Policy",
    "check",
    "check_tiny_vae",
    "family",
    "load",
    "merge",
    "peek",
    "pipeline",
    "prepared",
    "read_text_encoders",
    "text_options",
]

# diffusers says it of the text encoders of every LoRA of a denoiser alone, such as ours; that there
# is nothing for the denoiser either is said by another logger
logging.getLogger("diffusers.loaders.lora_base").addFilter(
    lambda record: "No LoRA keys associated" not in record.getMessage()
)

FAMILIES: dict[str, type[Policy]] = {
    "StableDiffusionPipeline": UNetPolicy,
    "StableDiffusionXLPipeline": UNetPolicy,
    "StableDiffusion3Pipeline": SD3Policy,
    "FluxPipeline": FluxPolicy,
}


def check(name: str) -> None:
    """Refuse a local path that is no pipeline folder; a hub id passes. No weights are read."""
    path = Path(name)
    looks_local = path.is_absolute() or name.startswith((".", "~", "assets/", "runs/"))
    if path.is_dir():
        if not (path / "model_index.json").exists():
            raise ValueError(
                f"model.name={name!r} has no model_index.json, so it is not a diffusers pipeline; "
                "give the folder that pipe.save_pretrained wrote"
            )
    elif looks_local or path.exists():
        raise ValueError(f"model.name={name!r} is not a folder; give a local pipeline or a hub id")


def family(name: str) -> type[Policy]:
    """The family of a pipeline, by the class its model_index.json names.

    Raises ValueError for a class of no known family, or when neither a folder nor a hub id fits.
    """
    check(name)
    try:
        pipeline = read_config(name, "model_index.json").get("_class_name")
    except OSError as error:
        raise ValueError(
            f"model.name={name!r} is neither a local folder nor a hub id that can be read: {error}"
        ) from error
    if pipeline not in FAMILIES:
        raise ValueError(
            f"model.name={name!r} is a {pipeline}; supported: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[pipeline]


def peek(name: str, steps: int, resolution: int | None = None) -> tuple[Levels, tuple[int, ...]]:
    """(K + 1,) levels and latent shape of a pipeline, without reading any weights."""
    return family(name).peek(name, steps, resolution)


def pipeline(name: str, merge_lora: str | None = None, **options: Any) -> Any:
    """The diffusers pipeline itself, of a local folder or hub id; merge_lora is added to its
    weights.

    It has no safety checker and no watermark, whatever its config says, and says so: they would
    change finished pictures, which training does not see.
    """
    import diffusers  # seconds, which a refusal need not wait for
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    index = read_config(name, "model_index.json")
    # diffusers asks for parts that were saved as none (SD3 without its T5) to be passed as None
    parts: dict[str, Any] = {key: None for key, value in index.items() if value == [None, None]}
    if index["_class_name"] == "StableDiffusionPipeline":
        parts |= {"safety_checker": None, "requires_safety_checker": False}
        if index.get("safety_checker", [None, None])[1]:
            _note(f"{name}: drawn without its safety checker, as in training")
    if index["_class_name"] == "StableDiffusionXLPipeline":
        parts |= {"add_watermarker": False}
        if index.get("add_watermarker"):
            _note(f"{name}: drawn without its watermark, as in training")
    with warnings.catch_warnings():
        # torch_dtype is to become dtype, which our oldest diffusers does not know
        warnings.simplefilter("ignore", FutureWarning)
        pipe: Any = diffusers.DiffusionPipeline.from_pretrained(name, **parts, **options)
    if merge_lora is not None:
        merge(pipe, merge_lora)
    return pipe


@cache
def _note(text: str) -> None:
    """Say something once, on the first process."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def merge(pipe: Any, lora: str, scale: float = 1.0) -> None:
    """Add scale ΔW of a LoRA, a folder or hub id, to a pipeline's weights. Raises ValueError for
    one that has nothing for it."""
    pipe.load_lora_weights(lora)
    if not pipe.get_list_adapters():
        raise ValueError(
            f"the LoRA {lora!r} has nothing for a {type(pipe).__name__}; give one that was trained "
            "on such a model"
        )
    pipe.fuse_lora(lora_scale=scale)
    pipe.unload_lora_weights()


def load(
    name: str,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    resolution: int | None = None,
    train_all: bool = False,
    merge_lora: str | None = None,
) -> Policy:
    """The policy of a local pipeline folder or a hub id such as "org/model".

    dtype is that of the frozen network and the text encoders: float32, bfloat16 or float16. With
    train_all every weight of the denoiser trains: it is then kept in float32 and runs in dtype.
    merge_lora: a LoRA that becomes part of the model before anything else.
    Raises as `family` does.
    """
    kind = family(name)
    kind.peek(name, 1, resolution)  # refuses what cannot be drawn before the weights are read
    half = getattr(torch, dtype)
    # in half precision some VAEs overflow
    dtypes = {"default": half, "vae": torch.float32}
    if train_all:
        dtypes[kind.denoiser] = torch.float32
    policy = kind(pipeline(name, merge_lora, torch_dtype=dtypes), device, half, resolution)
    if train_all:
        policy.network.requires_grad_(True)
    return policy


def check_tiny_vae(tiny: str, name: str) -> None:
    """Refuse an AutoencoderTiny that does not decode the latents of the pipeline `name`."""
    try:
        given = read_config(tiny, "config.json")
    except OSError as error:
        raise ValueError(
            f"model.tiny_vae={tiny!r} is neither the folder of an AutoencoderTiny nor a hub id "
            f"that can be read: {error}"
        ) from error
    if (kind := given.get("_class_name")) != "AutoencoderTiny":
        raise ValueError(f"model.tiny_vae={tiny!r} is a {kind}, no AutoencoderTiny")
    vae = read_config(name, "vae/config.json")
    if vae.get("latents_mean") is not None and vae.get("latents_std") is not None:
        raise ValueError(
            f"model.tiny_vae={tiny!r} cannot stand for the VAE of {name!r}, whose latents are "
            "normalized by latents_mean and latents_std; leave model.tiny_vae out"
        )
    blocks = len(given["decoder_block_out_channels"]) - 1
    found = given["latent_channels"], given["upsampling_scaling_factor"] ** blocks
    needed = vae["latent_channels"], pixels_per_latent(vae)
    if found != needed:
        raise ValueError(
            f"model.tiny_vae={tiny!r} decodes {found[0]} channels to {found[1]} pixels a latent, "
            f"and the VAE of {name!r} {needed[0]} channels to {needed[1]}; use one made for it"
        )


def prepared(model: ModelConfig, seed: int, device: torch.device | str = "cpu") -> Policy:
    """The policy of a config's section `model`, ready to be trained: with its LoRA, whose
    initialisation depends on the seed, or with all weights of the denoiser."""
    m = model
    policy = load(m.name, device, m.dtype, m.resolution, not m.lora_rank, m.merge_lora)
    if m.lora_rank:
        policy.add_lora(m.lora_rank, m.lora_alpha, m.lora_targets, seed)
    if m.tiny_vae is not None:
        policy.add_tiny_vae(m.tiny_vae)
    policy.decode_batch = m.decode_batch
    policy.max_sequence_length = m.max_sequence_length
    if m.gradient_checkpointing:
        for part in (policy.network, policy.vae, policy.tiny_vae):
            if part is not None:
                part.enable_gradient_checkpointing()
    return policy


def read_text_encoders(policy: Policy, model: ModelConfig) -> None:
    """Give a policy of `prepared` the text encoders again that it has freed."""
    # a LoRA may be part of them, and is merged into a pipeline that is whole
    left = {} if model.merge_lora else dict.fromkeys((policy.denoiser, "vae"))
    dtype = {"torch_dtype": getattr(torch, model.dtype)}
    read = pipeline(model.name, model.merge_lora, **left, **dtype).components
    names = [k for k, v in read.items() if "text_encoder" in k and v is not None]
    parts = {k: read[k].to(policy.device).requires_grad_(False).eval() for k in names}
    policy.pipe.register_modules(**parts)
