"""Released text-to-image models by their hyperparameters, with random weights: nothing is fetched.

The numbers are those of the configs that the models are released with. `toy` shrinks them to what a
test on a CPU can run; all classes stay.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

LINEAR = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
TOY_UNET = {"norm_num_groups": 4, "cross_attention_dim": 16}
TOY_DIT = {"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16}
TOY_VAE = {
    "block_out_channels": (4, 4, 4, 4), "norm_num_groups": 2, "layers_per_block": 1,
    "latent_channels": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A model, how it is usually sampled, and what fits a GPU of 80 GB.

    tokens: of the text. billions: parameters of the denoiser, as published. rows: samples a call at
    1024 pixels, before guidance doubles them.
    """

    pipeline: Any
    network: Any
    config: dict[str, Any]
    vae: dict[str, Any]
    scheduler: Any
    tokens: int
    guidance: float
    billions: float
    toy: dict[str, Any]
    rows: int = 2
    checkpointing: bool = False

    @property
    def denoiser(self) -> str:
        return "unet" if self.network is UNet2DConditionModel else "transformer"

    @property
    def is_flow(self) -> bool:
        return isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler)

    def text_shapes(self, config: Any, toy: bool) -> dict[str, tuple[int, ...]]:
        """Shapes of the text embeddings that a network of this config takes, by their names."""
        tokens = 8 if toy else self.tokens
        if self.denoiser == "transformer":
            return {
                "prompt": (tokens, config.joint_attention_dim),
                "pooled": (config.pooled_projection_dim,),
            }
        shapes = {"prompt": (tokens, config.cross_attention_dim)}
        pooled = _pooled(config)
        return shapes | ({"pooled": (pooled,)} if pooled else {})


def _pooled(config: Any) -> int:
    """Width of the pooled text that an SDXL takes beside six numbers; 0 for another UNet."""
    if config.addition_embed_type is None:
        return 0
    return config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim


MODELS = {
    "sd15": Architecture(
        StableDiffusionPipeline,
        UNet2DConditionModel,
        {
            "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280),
            "down_block_types": (DOWN[1],) * 3 + DOWN[:1],
            "up_block_types": UP[:1] + (UP[1],) * 3,
            "cross_attention_dim": 768, "attention_head_dim": 8,
        },
        {"latent_channels": 4, "scaling_factor": 0.18215, "sample_size": 512},
        DDIMScheduler(**LINEAR, clip_sample=False, set_alpha_to_one=False),
        tokens=77, guidance=5.0, billions=0.8595,
        toy=TOY_UNET | {"block_out_channels": (8, 8, 8, 8), "attention_head_dim": 2},
    ),
    "sdxl": Architecture(
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
        {
            "sample_size": 128, "block_out_channels": (320, 640, 1280),
            "down_block_types": (DOWN[0], DOWN[1], DOWN[1]),
            "up_block_types": (UP[1], UP[1], UP[0]),
            "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048, "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        {"latent_channels": 4, "scaling_factor": 0.13025, "sample_size": 1024},
        EulerDiscreteScheduler(**LINEAR, timestep_spacing="leading"),
        tokens=77, guidance=5.0, billions=2.567,
        toy=TOY_UNET | {
            "block_out_channels": (8, 16, 16), "attention_head_dim": (1, 2, 2),
            "transformer_layers_per_block": 1, "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 8 + 6 * 4,
        },
    ),
    "sd35-medium": Architecture(
        StableDiffusion3Pipeline,
        SD3Transformer2DModel,
        {
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16,
            "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24,
            "joint_attention_dim": 4096, "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
            "dual_attention_layers": tuple(range(13)),
        },
        {
            "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609,
            "sample_size": 1024, "use_quant_conv": False, "use_post_quant_conv": False,
        },
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokens=77 + 256, guidance=4.5, billions=2.243,
        toy=TOY_DIT | {
            "num_layers": 2, "in_channels": 4, "out_channels": 4, "caption_projection_dim": 16,
            "pooled_projection_dim": 8, "dual_attention_layers": (0,),
        },
    ),
    "flux-dev": Architecture(
        FluxPipeline,
        FluxTransformer2DModel,
        {
            "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38,
            "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
            "pooled_projection_dim": 768, "guidance_embeds": True,
        },
        {
            "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159,
            "sample_size": 1024, "use_quant_conv": False, "use_post_quant_conv": False,
        },
        FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15
        ),
        tokens=512, guidance=3.5, billions=11.901, rows=1, checkpointing=True,
        toy=TOY_DIT | {
            "num_layers": 1, "num_single_layers": 1, "in_channels": 16,
            "axes_dims_rope": (2, 2, 4), "pooled_projection_dim": 8,
        },
    ),
}  # fmt: skip


def modules(model: Architecture, toy: bool = False) -> tuple[Any, Any]:
    """Denoiser and VAE on the meta device: shapes, and no memory."""
    vae = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
    }
    with torch.device("meta"):
        network = model.network(**model.config | (model.toy if toy else {}))
        return network, AutoencoderKL(**vae | model.vae | (TOY_VAE if toy else {}))


def build(model: Architecture, device: torch.device, dtype: torch.dtype, toy: bool) -> Any:
    """The pipeline with random weights: denoiser in `dtype`, VAE in float32, no text encoders.

    SDXL keeps a small one, whose width its policy looks at.
    """
    network, vae = modules(model, toy)
    for module, own in ((network, dtype), (vae, torch.float32)):
        # diffusers' own `to` warns of parts to keep in float32, of which these models have none
        _fill(nn.Module.to(module, own).to_empty(device=device))
    asked = inspect.signature(model.pipeline.__init__).parameters.values()
    parts: dict[str, Any] = {p.name: None for p in asked if p.default is p.empty}
    parts.pop("self")
    parts |= {model.denoiser: network, "vae": vae, "scheduler": model.scheduler}
    if model.pipeline is StableDiffusionPipeline:
        parts["requires_safety_checker"] = False
    if model.pipeline is StableDiffusionXLPipeline:
        width = _pooled(network.config)
        config = CLIPTextConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            vocab_size=8, bos_token_id=0, eos_token_id=1, projection_dim=width,
        )  # fmt: skip
        parts["text_encoder_2"] = CLIPTextModelWithProjection(config)
    return model.pipeline(**parts)


@torch.no_grad()
def _fill(module: nn.Module) -> None:
    """Weights of about the size of trained ones, so that all values stay finite."""
    for name, value in chain(module.named_parameters(), module.named_buffers()):
        value.normal_(std=0.02) if value.ndim > 1 else value.fill_(name.endswith("weight"))


def save_configs(model: Architecture, folder: Path, toy: bool) -> None:
    """The configs of the pipeline, which is all that a run reads before its weights."""
    pipe = build(model, torch.device("meta"), torch.float32, toy)
    pipe.save_config(folder)
    for name in (model.denoiser, "vae", "scheduler"):
        getattr(pipe, name).save_config(folder / name)
