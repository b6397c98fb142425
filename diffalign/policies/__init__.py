"""Model families behind one contract; `load` picks the family from the pipeline's own class."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..config import ModelConfig
from ..dynamics import Levels
from .acceleration import check as check_acceleration
from .base import Policy
from .cond import Cond
from .configs import Size, read_config, text_options
from .flux import FluxPolicy
from .flux2 import Flux2Policy
from .lora_files import check as check_lora
from .qwen_image import QwenImage21Policy, QwenImagePolicy
from .run_folder import resolve
from .sd3 import SD3Policy
from .sharding import Team
from .unet import UNetPolicy
from .z_image import ZImagePolicy

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = [
    "FAMILIES",
    "Cond",
    "Policy",
    "Size",
    "check",
    "check_acceleration",
    "check_lora",
    "check_tiny_vae",
    "family",
    "guided_by",
    "load",
    "merge",
    "peek",
    "pipeline",
    "prepared",
    "read_text_encoders",
    "resolve",
    "skeleton",
    "text_options",
]

# diffusers logs this about the text encoders for every LoRA that is for the denoiser alone, as ours
# are; a LoRA with nothing for the denoiser is reported by another logger
logging.getLogger("diffusers.loaders.lora_base").addFilter(
    lambda record: "No LoRA keys associated" not in record.getMessage()
)

FAMILIES: dict[str, type[Policy]] = {
    "StableDiffusionPipeline": UNetPolicy,
    "StableDiffusionXLPipeline": UNetPolicy,
    "StableDiffusion3Pipeline": SD3Policy,
    "FluxPipeline": FluxPolicy,
    "Flux2KleinPipeline": Flux2Policy,
    "Flux2Pipeline": Flux2Policy,
    "ZImagePipeline": ZImagePolicy,
    "QwenImagePipeline": QwenImagePolicy,
    "QwenImage21Pipeline": QwenImage21Policy,
}


def check(name: str) -> None:
    """Refuse a local path that is neither a pipeline folder nor a run; a hub id passes. No weights
    are read."""
    resolve(name)


def family(name: str) -> type[Policy]:
    """The family of a pipeline, by the class its model_index.json names.

    Raises ValueError for a class that no family handles, and for a name that is neither a folder
    nor a hub id.
    """
    pipeline = read_config(resolve(name).base, "model_index.json").get("_class_name")
    if pipeline not in FAMILIES:
        raise ValueError(
            f"model.name={name!r} is a {pipeline}; supported: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[pipeline]


def peek(name: str, steps: int, resolution: Size | None = None) -> tuple[Levels, tuple[int, ...]]:
    """(K + 1,) levels and latent shape of a pipeline, without reading any weights."""
    model = resolve(name)
    return family(name).peek(model.base, steps, resolution or model.resolution)


def guided_by(name: str) -> Literal["cfg", "input"] | None:
    """How a guidance scale acts on a model's pictures: by a second call of the denoiser, as an
    input of it, or not at all (FLUX.1-schnell)."""
    kind, base = family(name), resolve(name).base
    network = read_config(base, f"{kind.denoiser}/config.json")
    return kind.guided_by(read_config(base, "model_index.json"), network)


def pipeline(name: str, merge_lora: str | None = None, **options: Any) -> Any:
    """The diffusers pipeline of a local folder, hub id or run folder, with merge_lora added to its
    weights. `options` go to `from_pretrained`.

    The safety checker and the watermark are left out whatever the config says, and a note says so:
    they would change finished pictures in a way that training does not see.
    """
    from . import loading  # imports diffusers: seconds that a refusal need not wait for

    return loading.pipeline(name, merge_lora, **options)


def merge(pipe: Any, lora: str, scale: float = 1.0) -> None:
    """Add scale ΔW of a LoRA (a file, folder or hub id) to a pipeline's weights, or replace its
    denoiser by the whole one that a run trained (scale 1 only). Raises ValueError for weights that
    do not fit the pipeline or have nothing for it."""
    from . import loading  # imports diffusers: seconds that a refusal need not wait for

    loading.merge(pipe, lora, scale)


def load(
    name: str,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    resolution: Size | None = None,
    train_all: bool = False,
    merge_lora: str | None = None,
    attention: str = "auto",
    compile: bool = False,
    vae_dtype: str = "float32",
    team: Team | None = None,
    place: bool = True,
) -> Policy:
    """The policy of a local pipeline folder or a hub id such as "org/model".

    dtype: of the frozen network and the text encoders; float32, bfloat16 or float16. train_all:
    every weight of the denoiser trains; these weights are then float32 and run in dtype.
    merge_lora: a LoRA that is merged into the model first. attention and compile: see
    `acceleration.accelerate`. vae_dtype: that the VAE decodes in. team: processes that load it at
    the same time, of which one on each machine reads the weights. place: False leaves the denoiser
    where it was read until `Policy.place`. Raises what `family` raises, and ConfigError for an
    attention kernel that cannot run.
    """
    check_acceleration(attention, compile)
    from . import loading  # imports diffusers: seconds that a refusal need not wait for

    kind = family(name)
    # refuses a bad model or size before any weights are read; some schedules have no single step
    peek(name, 2, resolution)
    half, size = getattr(torch, dtype), resolution or resolve(name).resolution
    dtypes = {"default": half, "vae": getattr(torch, vae_dtype)}
    if train_all:
        dtypes[kind.denoiser] = torch.float32
    made = pipeline if team is None or team.reads else loading.without_weights
    policy = kind(made(name, merge_lora, torch_dtype=dtypes), device, half, size)
    policy.place(team, denoiser=False)
    if train_all:
        policy.network.requires_grad_(True)
    if place:
        policy.place(team)
    policy.read_base = partial(loading.denoiser, name, merge_lora, kind.denoiser)
    policy.accelerate(attention, compile)
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
    needed = vae["latent_channels"], family(name).pixels_per_latent(vae)
    if found != needed:
        raise ValueError(
            f"model.tiny_vae={tiny!r} decodes {found[0]} channels to {found[1]} pixels a latent, "
            f"and the VAE of {name!r} {needed[0]} channels to {needed[1]}; use one made for it"
        )


def prepared(
    model: ModelConfig,
    seed: int,
    device: torch.device | str = "cpu",
    team: Team | None = None,
    texts: Sequence[str] | None = None,
) -> Policy:
    """The policy of a config's section `model`, ready to train either a LoRA, which the seed
    initializes, or all weights of the denoiser.

    team: the processes that train it. texts: encoded first, after which the text encoders go and
    the denoiser comes, so that the device never holds both; None keeps the encoders.
    """
    m = model
    policy = load(
        m.name, device, m.dtype, m.resolution, not m.lora_rank, m.merge_lora, m.attention,
        m.compile, m.vae_dtype, team, place=False,
    )  # fmt: skip
    policy.max_sequence_length = m.max_sequence_length
    if texts is not None:
        policy.encode_all(texts, team)
        policy.free_text_encoders()
    policy.place(team)
    if m.tiny_vae is not None:
        policy.add_tiny_vae(m.tiny_vae)
    return _ready(policy, m, seed)


def skeleton(
    model: ModelConfig, fake: FakeTensorMode, device: torch.device | str = "cpu"
) -> tuple[Policy, int]:
    """A policy like that of `prepared`, made from configs alone, to be called under `fake`, and the
    bytes of its text encoders."""
    from . import loading  # imports diffusers: seconds that a refusal need not wait for

    m, kind = model, family(model.name)
    half, pipe = getattr(torch, m.dtype), loading.skeleton(m.name)
    encoders = [v for k, v in pipe.components.items() if "text_encoder" in k and v is not None]
    for part in (*encoders, *([getattr(pipe, kind.denoiser)] if m.lora_rank else [])):
        part.to(half)
    pipe.vae.to(getattr(torch, m.vae_dtype))
    policy = kind(pipe, "meta", half, m.resolution or resolve(m.name).resolution)
    policy.place(denoiser=False)
    policy.place()
    policy.network.requires_grad_(not m.lora_rank)
    _ready(policy, m, 0)
    for part in (policy.network, policy.vae):
        loading.fake_weights(part, fake, device)
    policy.device = torch.device(device)
    policy.accelerate(m.attention, compile=False)
    return policy, sum(p.nbytes for e in encoders for p in e.parameters())


def _ready(policy: Policy, m: ModelConfig, seed: int) -> Policy:
    """Add what trains, and set how it is called."""
    if m.lora_rank:
        policy.add_lora(m.lora_rank, m.lora_alpha, m.lora_targets, seed)
    policy.decode_batch = m.decode_batch
    if m.gradient_checkpointing:
        for part in (policy.network, policy.vae, policy.tiny_vae):
            if part is not None and part._supports_gradient_checkpointing:
                part.enable_gradient_checkpointing()
        policy.recompute_decoding = not policy.vae._supports_gradient_checkpointing
    return policy


def read_text_encoders(policy: Policy, model: ModelConfig) -> None:
    """Load the text encoders again into a policy of `prepared` that has freed them."""
    # a LoRA may change the text encoders too, and can only be merged into a whole pipeline
    left = {} if model.merge_lora else dict.fromkeys((policy.denoiser, "vae"))
    dtype = {"torch_dtype": getattr(torch, model.dtype)}
    read = pipeline(model.name, model.merge_lora, **left, **dtype).components
    names = [k for k, v in read.items() if "text_encoder" in k and v is not None]
    parts = {k: read[k].to(policy.device).requires_grad_(False).eval() for k in names}
    policy.pipe.register_modules(**parts)
