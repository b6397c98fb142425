"""Tiny randomly initialised pipelines of the real diffusers classes, built once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from diffalign import policies
from diffalign.emoji_world.tokenizer import LENGTH, build_tokenizer
from diffalign.policies import Policy, lora

SCHEDULERS = {
    # SD 1.x as on the hub, and zero terminal SNR (2305.08891) as emoji-sd has it
    "epsilon": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
    },
    "v_prediction": {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "steps_offset": 1,
        "clip_sample": False,
    },
}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def build_pipeline(folder: Path, kind: str) -> str:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULERS[kind]),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=sorted(SCHEDULERS))
def folder(request, pipelines) -> str:
    """A pipeline of each parametrisation in turn."""
    return pipelines[request.param]


@pytest.fixture
def policy(folder) -> Policy:
    """Its policy, with a LoRA at its initialisation."""
    policy = policies.load(folder)
    lora.add(policy.network, 2, None, ["to_q", "to_k", "to_v", "to_out.0"], seed=0)
    return policy


def perturb(policy: Policy, scale: float = 0.2) -> None:
    """Move the adapter off its initialisation, as training would."""
    generator = torch.Generator().manual_seed(1)
    for p in policy.trainable_parameters():
        p.data += scale * torch.randn(p.shape, generator=generator)


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory) -> dict[str, str]:
    """{"epsilon": folder, "v_prediction": folder}."""
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: build_pipeline(root / kind, kind) for kind in SCHEDULERS}
