"""Stable Diffusion 1.x, 2.x and XL: a UNet that predicts noise or v on a DDPM schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..dynamics import Levels
from . import schedulers
from .base import Policy
from .configs import Size, latent_sides

XL = "StableDiffusionXLPipeline"


class UNetPolicy(Policy):
    """`StableDiffusionPipeline` (2112.10752) and `StableDiffusionXLPipeline` (2307.01952), one-step
    distillations of them (SD-Turbo, SDXL-Turbo, 2311.17042) included: epsilon or v, VP levels.

    The noise schedule and the spacing of the timesteps are the pipeline's own, read as a DDIM
    scheduler's. The other schedulers of published pipelines (PNDM, Euler) differ only in how they
    integrate, and Euler also in the scale of its initial noise, `sigma` where DDIM has 1. Scheduler
    settings that change more than that (clipping, Karras sigmas) are refused. Guidance is not
    rescaled, which is the pipelines' default too.

    A LoRA goes to all attention projections, as in DDPO and AlignProp. Left out: convolutions, time
    embedding, the feed-forward of the transformer blocks and their proj_in and proj_out.
    """

    denoiser = "unet"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def setup(self) -> None:
        self.predicts = self.schedule_config["prediction_type"]
        self.abar = schedulers.alphas_cumprod(self.schedule_config).double()
        self.zero_negative = self.pipe.config.get("force_zeros_for_empty_prompt", False)
        self.is_xl = type(self.pipe).__name__ == XL
        if self.is_xl:
            self._check_time_ids()

    def _check_time_ids(self) -> None:
        c = self.network.config
        pooled = self.pipe.text_encoder_2.config.projection_dim
        numbers = (c.projection_class_embeddings_input_dim - pooled) / c.addition_time_embed_dim
        if numbers != 6:
            raise ValueError(
                f"this UNet takes {numbers:g} numbers beside the text and SDXL gives 6, the sizes "
                "and the crop; SDXL's refiner is not supported, use the base model"
            )

    @classmethod
    def check(
        cls, index: Mapping[str, Any], network: Mapping[str, Any], vae: Mapping[str, Any]
    ) -> None:
        super().check(index, network, vae)
        if network.get("time_cond_proj_dim") is not None:
            raise ValueError(
                "this UNet takes the guidance scale as an input (time_cond_proj_dim), as latent "
                "consistency models do, and these are not supported; use the model it was "
                "distilled from, or a Turbo model"
            )
        if index.get("requires_aesthetics_score"):
            raise ValueError(
                "requires_aesthetics_score of this pipeline is of SDXL's refiner, which only goes "
                "on from another model's picture; use the base model"
            )
        kind = network.get("addition_embed_type")
        given = ("text_time",) if index["_class_name"] == XL else (None, "text")
        if kind not in given:
            raise ValueError(
                f"addition_embed_type={kind!r} of this UNet is not what a {index['_class_name']} "
                "gives its UNet; use a model whose pipeline and UNet belong together"
            )
        asks = [
            f"{key}={network[key]!r}"
            for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
            if network.get(key) not in (None, "text_proj")
        ]
        if asks:
            raise ValueError(
                f"{asks[0]} of this UNet is a condition beside the text, which a text-to-image "
                "pipeline does not give it; use a model that takes text alone"
            )

    @classmethod
    def shape(
        cls, network: Mapping[str, Any], vae: Mapping[str, Any], resolution: Size | None
    ) -> tuple[int, ...]:
        size = network["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        if resolution is not None:
            height, width = latent_sides(resolution, cls.pixels_per_latent(vae))
        return network["in_channels"], height, width

    @classmethod
    def scheduler_config(cls, index: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
        return schedulers.as_ddim(index["_class_name"], config)

    @classmethod
    def schedule(cls, config: dict[str, Any], steps: int, shape: tuple[int, ...]) -> Levels:
        """VP levels `alpha = sqrt(abar_t)`, `sigma = sqrt(1 - abar_t)` at the timesteps of a DDIM
        scheduler, see `schedulers.as_ddim`.

        The state after step i is at the timestep of step i + 1. diffusers steps to `t - 1000 //
        steps` instead, which is the same whenever `steps` divides the number of training timesteps.
        """
        abar, t = schedulers.alphas_cumprod(config), schedulers.timesteps(config, steps)
        if steps > len(abar) or len(abar) <= t.max():
            raise ValueError(
                f"{steps} steps from timestep {t.max()} are more than this model was trained for, "
                f"{len(abar)}; use fewer"
            )
        final = torch.ones(1) if config["set_alpha_to_one"] else abar[:1]
        abar = torch.cat([abar[t], final]).double()
        t = torch.cat([t, torch.zeros(1, dtype=t.dtype)])
        return Levels(t.float(), abar.sqrt().float(), (1 - abar).sqrt().float())

    def at(self, time: Tensor) -> Levels:
        t = (time.cpu() * len(self.abar)).long().clamp_max(len(self.abar) - 1)
        abar = self.abar[t]
        levels = Levels(t.float(), abar.sqrt().float(), (1 - abar).sqrt().float())
        return levels.to(self.device)

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        embedded = self.pipe.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"prompt": embedded[0]} | ({"pooled": embedded[2]} if self.is_xl else {})

    def text_shapes(self, tokens: Callable[[str, int], int]) -> dict[str, tuple[int, ...]]:
        c = self.network.config
        shapes: dict[str, tuple[int, ...]] = {
            "prompt": (tokens("tokenizer", 77), c.cross_attention_dim)
        }
        if self.is_xl:
            pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
            shapes["pooled"] = (pooled,)
        return shapes

    def call(self, x: Tensor, t: Tensor, text: dict[str, Tensor], guidance: float) -> Tensor:
        added = None
        if self.is_xl:
            factor = self.pixels_per_latent(self.vae.config)
            height, width = (side * factor for side in x.shape[2:])
            # original size, crop corner, target size; filled on the device, which waits for nothing
            sizes = (height, width, 0, 0, height, width)
            ids = torch.stack([x.new_full((len(x),), float(side)) for side in sizes], 1)
            added = {"text_embeds": text["pooled"], "time_ids": ids}
        embeds = text["prompt"].to(self.dtype)
        return self.network(
            x.to(self.dtype), t, encoder_hidden_states=embeds, added_cond_kwargs=added
        ).sample

    def unscaled(self, x0: Tensor, vae: Mapping[str, Any]) -> Tensor:
        mean, std = vae.get("latents_mean"), vae.get("latents_std")
        if type(self.pipe).__name__ != XL or mean is None or std is None:  # as its pipeline does
            return x0 / vae["scaling_factor"]
        # filled on the device: torch.tensor would copy them there and wait for it
        mean, std = (
            torch.stack([x0.new_full((1, 1), v) for v in values]) for values in (mean, std)
        )
        return x0 * std / vae["scaling_factor"] + mean
