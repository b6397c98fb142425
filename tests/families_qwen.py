"""Tiny random pipelines whose texts a language model encodes, see `families`: Z-Image, FLUX.2 and
Qwen-Image."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from families_flow import spread
from tokenizers import pre_tokenizers
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from diffalign import policies

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer(most: int) -> Qwen2Tokenizer:
    """Of bytes alone."""
    vocab = {t: i for i, t in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL])}
    return Qwen2Tokenizer(
        vocab=vocab, merges=[], model_max_length=most, additional_special_tokens=SPECIAL[1:],
        pad_token=SPECIAL[0], eos_token=SPECIAL[2], chat_template=TEMPLATE,
    )  # fmt: skip


TEXT: dict[str, Any] = {
    "vocab_size": 256 + len(SPECIAL),
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
IDS = {
    f"{name}_token_id": 256 + SPECIAL.index(f"<|{token}|>")
    for name, token in (
        ("image", "image_pad"), ("video", "video_pad"),
        ("vision_start", "vision_start"), ("vision_end", "vision_end"),
    )
}  # fmt: skip


def qwen3(layers: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=layers, **TEXT))


def build_z_image(folder: Path) -> None:
    from families import vae

    torch.manual_seed(0)
    network = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 2, 2],
        axes_lens=[512, 512, 512],
    )
    spread(network)
    ZImagePipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae(scaling_factor=0.4, shift_factor=0.1),
        text_encoder=qwen3(3),
        tokenizer=qwen_tokenizer(96),
    ).save_pretrained(folder)


def build_flux2(
    folder: Path,
    kind: type,
    text_encoder: Any,
    tokenizer: Any,
    guidance: bool = False,
    **options: Any,
) -> None:
    network = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance,
    )
    spread(network)
    for parameter in network.parameters():  # else its blocks hardly matter
        parameter.data *= 1 + (parameter.ndim > 1)
    decoder = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
    )
    # as fresh they are 0 and 1, and their use would not be seen
    decoder.bn.running_mean.normal_()
    decoder.bn.running_var.uniform_(0.5, 4.0)
    kind(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=decoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        **options,
    ).save_pretrained(folder)


def build_klein(folder: Path, distilled: bool) -> None:
    torch.manual_seed(0)
    how = {"is_distilled": distilled}
    build_flux2(folder, Flux2KleinPipeline, qwen3(28), qwen_tokenizer(96), **how)


def build_dev(folder: Path) -> None:
    """Its prompts follow a long message of the system's."""
    torch.manual_seed(0)
    sizes = {k: v for k, v in TEXT.items() if k != "max_position_embeddings"}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    config = Mistral3Config(
        text_config={"model_type": "mistral", "num_hidden_layers": 31, **sizes},
        vision_config={"model_type": "pixtral", "num_attention_heads": 2, **vision},
        image_token_index=IDS["image_token_id"],
    )
    image, end = "<|image_pad|>", "<|vision_end|>"
    processor = PixtralProcessor(
        PixtralImageProcessor(), qwen_tokenizer(512), chat_template=TEMPLATE, image_token=image,
        image_break_token=end, image_end_token=end,
    )  # fmt: skip
    encoder = Mistral3ForConditionalGeneration(config)
    build_flux2(folder, Flux2Pipeline, encoder, processor, guidance=True)


def statistics(channels: int) -> dict[str, list[float]]:
    return {
        "latents_mean": torch.randn(channels).tolist(),
        "latents_std": (torch.rand(channels) + 0.5).tolist(),
    }


def build_qwen(folder: Path) -> None:
    torch.manual_seed(0)
    network = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    spread(network)
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    text = {
        **TEXT,
        "num_hidden_layers": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }
    QwenImagePipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            shift_terminal=0.02,
            base_shift=0.5,
            max_shift=0.9,
            max_image_seq_len=8192,
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            **statistics(4),
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config=text, vision_config={**vision, "out_hidden_size": 16}, **IDS
            )
        ),
        tokenizer=qwen_tokenizer(224),
    ).save_pretrained(folder)


def build_qwen21(folder: Path, sigmas: list[float] | None = None) -> None:
    torch.manual_seed(0)
    network = QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    spread(network)
    tokenizer = qwen_tokenizer(224)
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
        "out_hidden_size": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    text = {
        **TEXT,
        "num_hidden_layers": 2,
        "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }
    QwenImage21Pipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        vae=AutoencoderKLQwenImage21(
            # its pipeline knows no other factor than 16
            base_dim=8,
            decoder_base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True, True],
            **statistics(4),
        ),
        text_encoder=Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(text_config=text, vision_config=vision, **IDS)
        ),
        processor=Qwen3VLProcessor(
            Qwen2VLImageProcessor(), tokenizer, Qwen3VLVideoProcessor(), chat_template=TEMPLATE
        ),
        sample_sigmas=sigmas,
    ).save_pretrained(folder)


QWEN_BUILDERS: dict[str, Callable[[Path], None]] = {
    "z-image": build_z_image,
    "klein-base": partial(build_klein, distilled=False),
    "flux2-dev": build_dev,
    "klein": partial(build_klein, distilled=True),
    "qwen": build_qwen,
    "qwen21": build_qwen21,
}


def ask(pipe: Any, prompts: list[str], x: torch.Tensor, guidance: float, **options: Any) -> Any:
    """Pictures (n, 3, H, W) by `pipe` itself, from noise (n, C, H, W)."""
    kind = type(pipe).__name__
    if kind == "QwenImage21Pipeline" and len(prompts) > 1:  # a longer neighbor moves a picture
        each = zip(prompts, x.split(1), strict=True)
        return torch.cat([ask(pipe, [p], z, guidance, **options) for p, z in each])
    if kind in ("FluxPipeline", "QwenImagePipeline", "QwenImage21Pipeline"):
        x = pipe._pack_latents(x, *x.shape)
    scale: dict[str, Any] = {"guidance_scale": guidance}
    if kind.startswith("Qwen"):
        scale = {"true_cfg_scale": guidance, "negative_prompt": [" "] * len(prompts)}
    options = policies.text_options(pipe) | options
    # a copy, as Z-Image writes into it
    images = pipe(prompt=list(prompts), latents=x, output_type="pt", **scale, **options).images
    if images.shape[1] == 4:
        images = images[:, :3] * images[:, 3:] + 1 - images[:, 3:]
    return images
