"""Z-Image and Z-Image-Turbo: a single-stream rectified-flow transformer with a Qwen3 encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..dynamics import Levels
from .configs import Size, latent_sides
from .flow import PATCH, FlowPolicy, flow_levels
from .guidance import Guidance


class ZImagePolicy(FlowPolicy):
    """`ZImagePipeline` (arXiv 2511.22699) as a policy: u = noise - data, with CFG.

    A guidance scale s is the pipeline's: c + s (c - u), w = s + 1, off at 0, which is how Turbo is
    used. Its options cfg_normalization and cfg_truncation are not supported; both are off unless
    asked for. The network is told 1 - sigma and gives data - noise, which `call` turns around. The
    positions of a picture begin behind its text, rounded up to 32 tokens, so that every text keeps
    its own length.

    The LoRA targets are attention and MLP of the main layers. The refiners, whose layers have the
    same names, are left out: they work on text and noise before these meet.
    """

    repeated = ("ZImageTransformerBlock",)
    lora_targets = r"layers\.\d+\.(attention\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.w[123])"

    @classmethod
    def weighed(cls, guidance: float | Guidance) -> Guidance:
        how = Guidance.of(guidance)
        return replace(how, scale=how.scale + 1)

    @classmethod
    def check(
        cls, index: Mapping[str, Any], network: Mapping[str, Any], vae: Mapping[str, Any]
    ) -> None:
        super().check(index, network, vae)
        patches = network["all_patch_size"], network["all_f_patch_size"]
        if PATCH not in patches[0] or 1 not in patches[1]:
            raise ValueError(f"tokens of {patches} latents are not the {PATCH}x{PATCH} of Z-Image")
        if network.get("siglip_feat_dim") is not None:
            raise ValueError("this is Z-Image-Omni, which takes pictures too; use Z-Image")

    @classmethod
    def shape(
        cls, network: Mapping[str, Any], vae: Mapping[str, Any], resolution: Size | None
    ) -> tuple[int, ...]:
        # no config names a size; the pipeline's own is 1024
        factor = cls.pixels_per_latent(vae)
        latents = latent_sides(resolution or 1024, factor, PATCH)
        side = max(latents)
        if side // PATCH > (most := min(network["axes_lens"][1:])):
            raise ValueError(
                f"model.resolution={resolution} needs {side // PATCH} tokens a side, and this "
                f"model has positions for {most}; use {most * PATCH * factor} pixels at most"
            )
        return network["in_channels"], *latents

    @classmethod
    def schedule(cls, config: dict[str, Any], steps: int, shape: tuple[int, ...]) -> Levels:
        # as its pipeline rounds them
        return flow_levels(config, steps, shape, torch.linspace(1.0, 1 / steps, steps).tolist())

    def embed(self, prompts: list[str]) -> Mapping[str, Tensor | list[Tensor]]:
        rows, _ = self.pipe.encode_prompt(
            list(prompts),  # it writes into the list
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
        )
        return {"prompt": rows, "length": torch.tensor([len(row) for row in rows])}

    def text_shapes(self, tokens: Callable[[str, int], int]) -> dict[str, tuple[int, ...]]:
        length = self.max_sequence_length or tokens("tokenizer", 512)
        return {"prompt": (length, self.network.config.cap_feat_dim), "length": ()}

    def call(self, x: Tensor, t: Tensor, text: dict[str, Tensor], guidance: float) -> Tensor:
        # a list of texts as long as they are, which waits for the device once a call
        lengths = text["length"].tolist()
        rows = [e[:n] for e, n in zip(text["prompt"].to(self.dtype), lengths, strict=True)]
        pictures = list(x.to(self.dtype).unsqueeze(2).unbind())
        out = self.network(pictures, 1 - t / 1000, rows).sample
        return -torch.stack(list(out)).squeeze(2)
