"""FLUX.2-klein and FLUX.2-dev: a rectified-flow transformer on the latents of a patchified VAE."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..dynamics import Levels
from .configs import Size, latent_sides, pixels_per_latent
from .flow import PATCH, FlowPolicy, flow_levels


def empirical_mu(tokens: int, steps: int) -> float:
    """The shift of FLUX.2's schedule for a picture of `tokens` tokens, as its pipelines compute it:
    linear in the tokens, and up to 4300 of them between the values for 10 and for 200 steps."""
    many, few = 0.00016927 * tokens + 0.45666666, 8.73809524e-05 * tokens + 1.89833333
    if tokens > 4300:
        return many
    slope = (many - few) / 190
    return slope * steps + many - 200 * slope


class Flux2Policy(FlowPolicy):
    """`Flux2KleinPipeline` and `Flux2Pipeline` as a policy: u = noise - data.

    klein-base has CFG; distilled klein ignores a guidance scale, as its pipeline does; dev takes it
    as an input. Latents are (n, 128, H / 16, W / 16): the VAE's 32 channels of 2×2, normalized by
    the statistics of the VAE's BatchNorm, which has no scaling factor. Texts are padded to
    `max_sequence_length` (512), and the network attends to the padding, so that another length
    gives another picture. Reference pictures (editing) are not supported.

    The LoRA targets are attention and MLP of both streams, and the fused projections of the
    single-stream blocks; no modulation, which all blocks share. They are a regular expression since
    `attn.to_out` is a layer in the single-stream blocks alone.
    """

    vaes = ("AutoencoderKLFlux2",)
    repeated = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")
    lora_targets = (
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|ff(_context)?\.linear_(in|out))"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    )

    @classmethod
    def guided_by(
        cls, index: Mapping[str, Any], network: Mapping[str, Any]
    ) -> Literal["cfg", "input"] | None:
        if index["_class_name"] == "Flux2Pipeline":
            return "input" if network.get("guidance_embeds") else None
        return None if index.get("is_distilled") else "cfg"

    @classmethod
    def pixels_per_latent(cls, vae: Mapping[str, Any]) -> int:
        return PATCH * pixels_per_latent(vae)

    @classmethod
    def channels(cls, vae: Mapping[str, Any]) -> int:
        return PATCH**2 * vae["latent_channels"]

    @classmethod
    def shape(
        cls, network: Mapping[str, Any], vae: Mapping[str, Any], resolution: Size | None
    ) -> tuple[int, ...]:
        # the size that the pipelines draw unless asked
        return network["in_channels"], *latent_sides(resolution or 1024, cls.pixels_per_latent(vae))

    @classmethod
    def schedule(cls, config: dict[str, Any], steps: int, shape: tuple[int, ...]) -> Levels:
        linspace = not config.get("use_flow_sigmas")
        mu = empirical_mu(shape[1] * shape[2], steps)
        return flow_levels(config, steps, shape, linspace, patch=1, mu=mu)

    def embed(self, prompts: list[str]) -> Mapping[str, Tensor | list[Tensor]]:
        embeds, _ = self.pipe.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.text_length
        )
        return {"prompt": embeds}

    def text_shapes(self, tokens: Callable[[str, int], int]) -> dict[str, tuple[int, ...]]:
        length = self.max_sequence_length or tokens("tokenizer", 512)
        return {"prompt": (length, self.network.config.joint_attention_dim)}

    def call(self, x: Tensor, t: Tensor, text: dict[str, Tensor], guidance: float) -> Tensor:
        n, _, height, width = x.shape
        length = text["prompt"].shape[1]
        # frame, row and column of a picture's token, and place of a text's; one copy a sample
        picture = torch.zeros(height, width, 4, device=x.device)
        picture[..., 1] += torch.arange(height, device=x.device)[:, None]
        picture[..., 2] += torch.arange(width, device=x.device)
        words = torch.zeros(length, 4, device=x.device)
        words[:, 3] = torch.arange(length, device=x.device)
        scale = None
        if self.network.config.guidance_embeds:
            scale = torch.full((n,), float(guidance), device=x.device)
        out = self.network(
            x.flatten(2).transpose(1, 2).to(self.dtype),
            timestep=t / 1000,
            guidance=scale,
            encoder_hidden_states=text["prompt"].to(self.dtype),
            txt_ids=words.expand(n, -1, -1),
            img_ids=picture.view(-1, 4).expand(n, -1, -1),
        ).sample
        return out.transpose(1, 2).reshape(x.shape)

    def unscaled(self, x0: Tensor, vae: Mapping[str, Any]) -> Tensor:
        bn = self.vae.bn
        std = (bn.running_var.float() + vae["batch_norm_eps"]).sqrt()
        x0 = x0 * std.view(1, -1, 1, 1) + bn.running_mean.float().view(1, -1, 1, 1)
        n, _, height, width = x0.shape
        x0 = x0.view(n, -1, PATCH, PATCH, height, width).permute(0, 1, 4, 2, 5, 3)
        return x0.reshape(n, -1, PATCH * height, PATCH * width)
