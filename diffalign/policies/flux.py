"""FLUX.1 dev and schnell: a rectified-flow transformer on packed latents, with CLIP and T5."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..dynamics import Levels
from .configs import Size, latent_sides
from .flow import JOINT_ATTENTION, PATCH, FlowPolicy, flow_levels, packed, unpacked


class FluxPolicy(FlowPolicy):
    """`FluxPipeline` as a policy: u = noise - data; guidance is an input (dev) or absent (schnell).

    There is no second branch: dev is distilled from classifier-free guidance (arXiv 2210.03142) and
    takes its scale as an embedding; schnell ignores the scale, as in diffusers. True CFG with a
    negative prompt, ControlNets and IP-adapters are not supported.

    Latents are (n, C, H, W) outside the policy; `call` packs 2×2 of them into a token. The LoRA
    targets are Flow-GRPO's: attention and MLPs of the double-stream blocks, and attention's q, k, v
    of the single-stream blocks. Like the references, they leave out `proj_mlp` and `proj_out` of
    the single-stream blocks and all modulation.
    """

    repeated = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    lora_targets = (
        *JOINT_ATTENTION,
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip

    @classmethod
    def guided_by(
        cls, index: Mapping[str, Any], network: Mapping[str, Any]
    ) -> Literal["cfg", "input"] | None:
        return "input" if network.get("guidance_embeds") else None  # dev, and schnell

    @classmethod
    def shape(
        cls, network: Mapping[str, Any], vae: Mapping[str, Any], resolution: Size | None
    ) -> tuple[int, ...]:
        # the transformer's config names no size; the VAE's sample_size is 1024 for FLUX.1
        asked = resolution or vae["sample_size"]
        latents = latent_sides(asked, cls.pixels_per_latent(vae), PATCH)
        return network["in_channels"] // PATCH**2, *latents

    @classmethod
    def schedule(cls, config: dict[str, Any], steps: int, shape: tuple[int, ...]) -> Levels:
        return flow_levels(config, steps, shape, linspace=True)

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        tokens, pooled, _ = self.pipe.encode_prompt(
            prompts, None, device=self.device, max_sequence_length=self.text_length
        )
        return {"prompt": tokens, "pooled": pooled}

    def text_shapes(self, tokens: Callable[[str, int], int]) -> dict[str, tuple[int, ...]]:
        c, length = self.network.config, self.max_sequence_length or tokens("tokenizer_2", 512)
        return {"prompt": (length, c.joint_attention_dim), "pooled": (c.pooled_projection_dim,)}

    @classmethod
    def as_pipeline(cls, x: Tensor) -> Tensor:
        return packed(x)

    def call(self, x: Tensor, t: Tensor, text: dict[str, Tensor], guidance: float) -> Tensor:
        n, _, height, width = x.shape
        rows, columns = height // PATCH, width // PATCH
        # the last two coordinates are a token's row and column; text tokens are all at the origin
        places = torch.zeros(rows, columns, 3, device=x.device)
        places[..., 1] += torch.arange(rows, device=x.device)[:, None]
        places[..., 2] += torch.arange(columns, device=x.device)
        scale = None
        if self.network.config.guidance_embeds:
            scale = torch.full((n,), float(guidance), device=x.device)
        out = self.network(
            packed(x).to(self.dtype),
            timestep=t / 1000,
            guidance=scale,
            encoder_hidden_states=text["prompt"].to(self.dtype),
            pooled_projections=text["pooled"].to(self.dtype),
            img_ids=places.view(-1, 3),
            txt_ids=torch.zeros(text["prompt"].shape[1], 3, device=x.device),
        ).sample
        return unpacked(out, height, width)
