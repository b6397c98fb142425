"""Stable Diffusion 3 and 3.5: a rectified-flow transformer with two CLIPs and, optionally, a T5."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..dynamics import Levels
from .configs import Size, latent_sides
from .flow import JOINT_ATTENTION, PATCH, FlowPolicy, flow_levels


class SD3Policy(FlowPolicy):
    """`StableDiffusion3Pipeline` (arXiv 2403.03206) as a policy: u = noise - data, with CFG.

    The LoRA targets are Flow-GRPO's: the attention projections of both streams. They leave out the
    MLPs, the modulation (adaLN) and the second attention `attn2` of SD3.5-medium's first blocks.
    Skip-layer guidance (SD3.5-medium) and IP-adapters are not supported.
    """

    repeated = ("JointTransformerBlock",)
    lora_targets = JOINT_ATTENTION

    @classmethod
    def shape(
        cls, network: Mapping[str, Any], vae: Mapping[str, Any], resolution: Size | None
    ) -> tuple[int, ...]:
        latents, patch = (network["sample_size"],) * 2, network["patch_size"]
        if patch != PATCH:
            raise ValueError(f"patch_size={patch} of this transformer is not the {PATCH} of SD3's")
        if resolution is not None:
            latents = latent_sides(resolution, cls.pixels_per_latent(vae), patch)
        largest, side = network["pos_embed_max_size"] * patch, max(latents)
        if side > largest:
            raise ValueError(
                f"model.resolution={resolution} needs {side // patch} tokens a side, and this "
                f"model has positions for {largest // patch}; use "
                f"{largest * cls.pixels_per_latent(vae)} pixels at most"
            )
        return network["in_channels"], *latents

    @classmethod
    def schedule(cls, config: dict[str, Any], steps: int, shape: tuple[int, ...]) -> Levels:
        return flow_levels(config, steps, shape, linspace=False)

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        """Without a T5 the pipeline appends as many zero tokens as a T5 prompt would have."""
        tokens, _, pooled, _ = self.pipe.encode_prompt(
            prompts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
        )
        return {"prompt": tokens, "pooled": pooled}

    def text_shapes(self, tokens: Callable[[str, int], int]) -> dict[str, tuple[int, ...]]:
        """The tokens of CLIP, then those of T5 or zeros in their place."""
        c, t5 = self.network.config, self.pipe.text_encoder_3 is not None
        last = self.max_sequence_length or (tokens("tokenizer_3", 256) if t5 else 256)
        length = tokens("tokenizer", 77) + last
        return {"prompt": (length, c.joint_attention_dim), "pooled": (c.pooled_projection_dim,)}

    def call(self, x: Tensor, t: Tensor, text: dict[str, Tensor], guidance: float) -> Tensor:
        return self.network(
            x.to(self.dtype),
            timestep=t,
            encoder_hidden_states=text["prompt"].to(self.dtype),
            pooled_projections=text["pooled"].to(self.dtype),
        ).sample
