"""Model families behind one contract; `load` picks the family from the pipeline's own class."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch

from ..config import ModelConfig
from ..dynamics import Levels
from .base import Policy
from .cond import Cond
from .configs import pixels_per_latent, read_config, text_options
from .flux import FluxPolicy
from .lora_files import check as check_lora
from .run_folder import resolve
from .sd3 import SD3Policy
from .unet import UNetPolicy

__all__ = [
    "FAMILIES",
    "Cond",
    "Policy",
    "check",
    "check_lora",
    "check_tiny_vae",
    "family",
    "knows_guidance",
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
    """Refuse a local path that is neither a pipeline folder nor a run; a hub id passes. No weights
    are read."""
    resolve(name)


def family(name: str) -> type[Policy]:
    """The family of a pipeline, by the class its model_index.json names.

    Raises ValueError for a class of no known family, or when neither a folder nor a hub id fits.
    """
    pipeline = read_config(resolve(name).base, "model_index.json").get("_class_name")
    if pipeline not in FAMILIES:
        raise ValueError(
            f"model.name={name!r} is a {pipeline}; supported: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[pipeline]


def peek(name: str, steps: int, resolution: int | None = None) -> tuple[Levels, tuple[int, ...]]:
    """(K + 1,) levels and latent shape of a pipeline, without reading any weights."""
    model = resolve(name)
    return family(name).peek(model.base, steps, resolution or model.resolution)


def knows_guidance(name: str) -> bool:
    """Whether a guidance scale changes a model's pictures; FLUX.1-schnell ignores it."""
    kind = family(name)
    return kind.knows_guidance(read_config(resolve(name).base, f"{kind.denoiser}/config.json"))


def pipeline(name: str, merge_lora: str | None = None, **options: Any) -> Any:
    """The diffusers pipeline itself, of a local folder, hub id or run folder; merge_lora is added
    to its weights. `options` are those of `from_pretrained`.

    It has no safety checker and no watermark, whatever its config says, and says so: they would
    change finished pictures, which training does not see.
    """
    from . import loading  # diffusers: seconds, which a refusal need not wait for

    return loading.pipeline(name, merge_lora, **options)


def merge(pipe: Any, lora: str, scale: float = 1.0) -> None:
    """Add scale ΔW of a LoRA, a file, folder or hub id, to a pipeline's weights, or put the whole
    denoiser that a run trained in place of its own (scale 1). Raises ValueError for one that has
    nothing for it or does not fit."""
    from . import loading  # diffusers: seconds, which a refusal need not wait for

    loading.merge(pipe, lora, scale)


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
    from . import loading  # diffusers: seconds, which a refusal need not wait for

    kind = family(name)
    peek(name, 1, resolution)  # refuses what cannot be drawn before the weights are read
    half, size = getattr(torch, dtype), resolution or resolve(name).resolution
    # in half precision some VAEs overflow
    dtypes = {"default": half, "vae": torch.float32}
    if train_all:
        dtypes[kind.denoiser] = torch.float32
    policy = kind(pipeline(name, merge_lora, torch_dtype=dtypes), device, half, size)
    policy.read_base = partial(loading.denoiser, name, merge_lora, kind.denoiser)
    if train_all:
        policy.network.requires_grad_(True)
    return policy


def check_tiny_vae(tiny: str, name: str) -> None:
    """Refuse an AutoencoderTiny that does not decode the latents of the pipeline `name`."""
    given = read_config(tiny, "config.json", "model.tiny_vae")
    if (kind := given.get("_class_name")) != "AutoencoderTiny":
        raise ValueError(f"model.tiny_vae={tiny!r} is a {kind}, no AutoencoderTiny")
    vae = read_config(resolve(name).base, "vae/config.json")
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
