"""EmojiWorld's tiny pipelines in the real diffusers classes: how they are built and called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from ..scenes import BACKGROUNDS, COLORS, NUMBERS, OBJECTS, SIZE, STYLES, plural
from .t5 import build_t5_tokenizer

LENGTH = 24  # CLIP tokens a prompt, padding included; the longest caption has 18
WORDS = 20  # T5 tokens a prompt
SIDE = 16  # of a latent


def text_tower(folder: Path) -> tuple[Any, Any]:
    """The text tower of a trained CLIP, frozen, and its tokenizer at our prompt length."""
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)
    return CLIPTextModel.from_pretrained(folder).eval().requires_grad_(False), tokenizer


def build_unet(channels: int, width: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(64, 128, 160),
        layers_per_block=1,
        # attention at 8×8 and 4×4 only: at 16×16 it costs 1.6 times the step on a CPU
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=16,
        # the prompt as a whole also joins the timestep: every block then knows what is asked for
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def build_sd(vae: Any, text_encoder: Any, tokenizer: Any) -> tuple[Any, dict[str, nn.Module]]:
    """(pipeline, {name: module that is trained}) from frozen parts; all builders return this."""
    unet: Any = build_unet(vae.config.latent_channels, text_encoder.config.hidden_size)
    # the cosine schedule: 16×16 latents lose their content at lower noise than 64×64 ones
    scheduler: Any = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,  # unused by trailing spacing; diffusers warns about 0
        clip_sample=False,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet.to(memory_format=torch.channels_last),
        scheduler=scheduler,
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        image_encoder=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    return pipe, {"unet": unet}


def _t5(width: int) -> tuple[Any, Any]:
    """A T5 encoder of one layer and its tokenizer, of the world's words."""
    words = [*OBJECTS, *map(plural, OBJECTS), *COLORS, *BACKGROUNDS, *NUMBERS, *STYLES]
    words += ["a", "an", "on", "of", "and", "left", "right", "above", "below", "background"]
    tokenizer = build_t5_tokenizer(words, WORDS)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=24,
        d_ff=2 * width,
        num_layers=1,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config), tokenizer


def _small_clip(like: Any) -> CLIPTextModelWithProjection:
    """One layer of 32 over the vocabulary of `like`, a CLIPTextConfig."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=like.vocab_size,
            hidden_size=32,
            intermediate_size=128,
            projection_dim=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=like.max_position_embeddings,
            bos_token_id=like.bos_token_id,
            eos_token_id=like.eos_token_id,
            pad_token_id=like.pad_token_id,
        )
    )


def build_sd3(vae: Any, text_encoder: Any, tokenizer: Any) -> tuple[Any, dict[str, nn.Module]]:
    """All three encoders are small and trained with the denoiser; a plain load needs every slot."""
    first, second = _small_clip(text_encoder.config), _small_clip(text_encoder.config)
    t5, tokenizer_3 = _t5(128)
    transformer = SD3Transformer2DModel(
        sample_size=SIDE,
        patch_size=2,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        caption_projection_dim=128,
        pooled_projection_dim=64,
        pos_embed_max_size=SIDE,
        qk_norm="rms_norm",
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=tokenizer_3,  # type: ignore[arg-type]
    )
    encoders: dict[str, nn.Module] = {"text_encoder": first, "text_encoder_2": second}
    return pipe, {"transformer": transformer, **encoders, "text_encoder_3": t5}


def build_flux(vae: Any, text_encoder: Any, tokenizer: Any) -> tuple[Any, dict[str, nn.Module]]:
    """The pooled CLIP text and a T5 that is trained with the denoiser."""
    t5, tokenizer_2 = _t5(96)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * vae.config.latent_channels,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=96,
        pooled_projection_dim=text_encoder.config.hidden_size,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=tokenizer_2,  # type: ignore[arg-type]
        transformer=transformer,
    )
    return pipe, {"transformer": transformer, "text_encoder_2": t5}


BUILDERS = {"sd": build_sd, "sd3": build_sd3, "flux": build_flux}


def embed_sd(pipe: Any, prompts: list[str]) -> Tensor:
    return pipe.encode_prompt(prompts, pipe.device, 1, False)[0]


def embed_sd3(pipe: Any, prompts: list[str], length: int = WORDS) -> tuple[Tensor, Tensor]:
    """(CLIP tokens, then T5 tokens (n, 24 + length, 128), pooled (n, 64))."""
    tokens, _, pooled, _ = pipe.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
    )
    return tokens, pooled


def embed_flux(pipe: Any, prompts: list[str], length: int = WORDS) -> tuple[Tensor, Tensor]:
    """(T5 tokens (n, length, 96), pooled CLIP (n, 128))."""
    tokens, pooled, _ = pipe.encode_prompt(prompts, None, max_sequence_length=length)
    return tokens, pooled


def call_sd3(pipe: Any, x: Tensor, t: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
    return pipe.transformer(
        x, encoder_hidden_states=text[0], pooled_projections=text[1], timestep=t * 1000
    ).sample


def call_flux(
    pipe: Any, x: Tensor, t: Tensor, text: tuple[Tensor, Tensor], guidance: Tensor
) -> Tensor:
    n, c, h, w = x.shape
    packed = pipe._pack_latents(x, n, c, h, w)
    out = pipe.transformer(
        packed,
        encoder_hidden_states=text[0],
        pooled_projections=text[1],
        timestep=t,
        guidance=guidance,
        img_ids=pipe._prepare_latent_image_ids(n, h // 2, w // 2, x.device, x.dtype),
        txt_ids=torch.zeros(text[0].shape[1], 3, device=x.device),
    ).sample
    grid = out.view(n, h // 2, w // 2, c, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)


def draw(
    pipe: Any, prompts: list[str], seeds: Sequence[int], steps: int = 20, guidance: float = 3.0
) -> list[Image.Image]:
    """Pictures of `prompts` by a plain call of any of the pipelines, one seed each."""
    pictures: list[Image.Image] = []
    options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
    if isinstance(pipe, StableDiffusion3Pipeline):
        options["max_sequence_length"] = WORDS
    if isinstance(pipe, FluxPipeline):
        options |= {"max_sequence_length": WORDS, "height": SIZE, "width": SIZE}
    for start in range(0, len(prompts), 16):
        rows = slice(start, start + 16)
        generators = [torch.Generator().manual_seed(s) for s in seeds[rows]]
        drawn: Any = pipe(prompts[rows], generator=generators, **options)
        pictures += drawn.images
    return pictures
