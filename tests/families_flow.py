"""Tiny random SD3 and FLUX pipelines, see `families`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

from diffalign.emoji_world.scenes import COLORS, OBJECTS
from diffalign.emoji_world.workshop.t5 import build_t5_tokenizer
from diffalign.emoji_world.workshop.tokenizer import build_tokenizer


def t5(width: int) -> tuple[Any, Any]:
    words = [*OBJECTS, *COLORS, "a", "on", "background"]
    tokenizer = build_t5_tokenizer(words, model_max_length=24)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    return T5EncoderModel(config), tokenizer


def spread(network: torch.nn.Module) -> None:
    """Draw the weights that diffusers starts at zero too, so that every input matters."""
    for parameter in network.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)


def build_sd3(folder: Path, with_t5: bool, **schedule: Any) -> None:
    from families import text_model, vae

    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=40,
        caption_projection_dim=16,
        pooled_projection_dim=20,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    spread(network)
    encoder, tokenizer = t5(40) if with_t5 else (None, None)
    StableDiffusion3Pipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(**schedule),
        vae=vae(scaling_factor=0.7, shift_factor=0.1, sample_size=8),
        text_encoder=text_model(CLIPTextModelWithProjection, 16, projection_dim=12),
        tokenizer=build_tokenizer(),
        text_encoder_2=text_model(CLIPTextModelWithProjection, 24, projection_dim=8),
        tokenizer_2=build_tokenizer(),
        text_encoder_3=encoder,
        tokenizer_3=tokenizer,
    ).save_pretrained(folder)


def build_flux(folder: Path, dev: bool) -> None:
    from families import text_model, vae

    torch.manual_seed(0)
    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        guidance_embeds=dev,
        axes_dims_rope=(2, 2, 4),
    )
    spread(network)
    encoder, tokenizer = t5(24)
    FluxPipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(
            **({"use_dynamic_shifting": True, "shift": 3.0} if dev else {})
        ),
        vae=vae(scaling_factor=0.4, shift_factor=0.1, sample_size=8),
        text_encoder=text_model(),
        tokenizer=build_tokenizer(),
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
    ).save_pretrained(folder)


FLOW_BUILDERS: dict[str, Callable[[Path], None]] = {
    "sd3": partial(build_sd3, with_t5=False, shift=3.0),
    "sd3-t5": partial(build_sd3, with_t5=True, use_dynamic_shifting=True),
    "flux-dev": partial(build_flux, dev=True),
    "flux-schnell": partial(build_flux, dev=False),
}
