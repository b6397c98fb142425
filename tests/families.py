"""Tiny random pipelines of the real diffusers classes, one builder a kind of model.

A new family adds its kinds to `BUILDERS`, and every conformance test runs on it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from families_flow import FLOW_BUILDERS
from families_qwen import QWEN_BUILDERS
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffalign.emoji_world.workshop.tokenizer import LENGTH, build_tokenizer

# SD 1.x as on the hub, zero terminal SNR (2305.08891) as emoji-sd has it, SDXL and Turbo with the
# set_alpha_to_one=False that their samplers do not know
LINEAR = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
OLD = {"clip_sample": False, "set_alpha_to_one": False}
EPSILON = DDIMScheduler(**LINEAR, **OLD)
V = DDIMScheduler(
    prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
    timestep_spacing="trailing",
    steps_offset=1,
    clip_sample=False,
)
XL = EulerDiscreteScheduler.from_config({**LINEAR, **OLD, "timestep_spacing": "leading"})
TURBO = EulerAncestralDiscreteScheduler.from_config(
    {**LINEAR, **OLD, "timestep_spacing": "trailing"}
)


def text_model(kind: type = CLIPTextModel, width: int = 16, **options: Any):
    tokenizer = build_tokenizer()
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            **options,
        )
    )


def unet(**options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **{"cross_attention_dim": 16, "attention_head_dim": 2, "norm_num_groups": 4} | options,
    )


def vae(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        **{"latent_channels": 4, "scaling_factor": 0.5} | options,
    )


def build_sd(folder: Path, scheduler: Any) -> None:
    torch.manual_seed(0)
    # in this order, which draws the weights that thresholds of tests were set for
    network, decoder, text = unet(), vae(), text_model()
    StableDiffusionPipeline(
        vae=decoder,
        text_encoder=text,
        tokenizer=build_tokenizer(),
        unet=network,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def build_sdxl(folder: Path) -> None:
    torch.manual_seed(0)
    StableDiffusionXLPipeline(
        vae=vae(
            force_upcast=True,
            latents_mean=[0.5, -1.0, 2.0, 0.3],
            latents_std=[2.0, 3.0, 1.5, 2.5],
        ),
        text_encoder=text_model(),
        text_encoder_2=text_model(CLIPTextModelWithProjection, 24, projection_dim=12),
        tokenizer=build_tokenizer(),
        tokenizer_2=build_tokenizer(),
        unet=unet(
            cross_attention_dim=16 + 24,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=12 + 6 * 4,
        ),
        scheduler=XL,
        add_watermarker=False,
    ).save_pretrained(folder)


def tiny_vae(folder: Path, channels: int = 4, blocks: int = 2) -> str:
    torch.manual_seed(0)
    AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=(8,) * blocks,
        decoder_block_out_channels=(8,) * blocks,
        num_encoder_blocks=(1,) * blocks,
        num_decoder_blocks=(1,) * blocks,
    ).save_pretrained(folder)
    return str(folder)


BUILDERS: dict[str, Callable[[Path], None]] = {
    "sd-epsilon": partial(build_sd, scheduler=EPSILON),
    "sd-v": partial(build_sd, scheduler=V),
    "sd-turbo": partial(build_sd, scheduler=TURBO),
    "sdxl": build_sdxl,
    **FLOW_BUILDERS,
    **QWEN_BUILDERS,
}
