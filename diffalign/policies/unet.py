"""Stable Diffusion 1.x, 2.x and XL: a UNet that predicts noise or v on a DDPM schedule."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ..dynamics import Levels
from .base import Policy, latent_side, pixels_per_latent

KINDS = ("epsilon", "v_prediction")


class UNetPolicy(Policy):
    """`StableDiffusionPipeline` (2112.10752) and `StableDiffusionXLPipeline` (2307.01952), one-step
    distillations of them (SD-Turbo, SDXL-Turbo, 2311.17042) included: epsilon or v, VP levels.

    The noise schedule and the spacing of the timesteps are the pipeline's own, read as DDIM; other
    samplers of the hub's configuration (PNDM, Euler) only differ in how they integrate, and Euler
    starts from noise of scale `sigma` where DDIM starts from scale 1.

    A LoRA goes to all attention projections, as in DDPO and AlignProp. Left out: convolutions, time
    embedding, the feed-forward of the transformer blocks and their proj_in and proj_out.
    """

    denoiser = "unet"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(
        self,
        pipe: Any,
        device: torch.device | str,
        dtype: torch.dtype,
        resolution: int | None = None,
    ):
        super().__init__(pipe, device, dtype, resolution)
        self.predicts = pipe.scheduler.config.prediction_type
        ddim: Any = DDIMScheduler.from_config(self.schedule_config)
        self.abar = ddim.alphas_cumprod.double()
        self.zero_negative = pipe.config.get("force_zeros_for_empty_prompt", False)
        self.is_xl = self.network.config.addition_embed_type == "text_time"
        factor = pixels_per_latent(self.vae.config)
        height, width = (side * factor for side in self.latent_shape[1:])
        # original size, crop corner, target size
        self.time_ids = torch.tensor([[height, width, 0, 0, height, width]], device=device)

    @classmethod
    def shape(
        cls, network: Mapping[str, Any], vae: Mapping[str, Any], resolution: int | None
    ) -> tuple[int, ...]:
        if network.get("time_cond_proj_dim") is not None:
            raise ValueError(
                "this UNet takes the guidance scale as an input (time_cond_proj_dim), as latent "
                "consistency models do, and these are not supported; use the model it was "
                "distilled from, or a Turbo model"
            )
        size = network["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        if resolution is not None:
            height = width = latent_side(resolution, pixels_per_latent(vae))
        return network["in_channels"], height, width

    @classmethod
    def schedule(cls, config: dict[str, Any], steps: int, shape: tuple[int, ...]) -> Levels:
        """VP levels `alpha = sqrt(abar_t)`, `sigma = sqrt(1 - abar_t)` at the scheduler's
        timesteps.

        The state after step i is at the timestep of step i + 1. diffusers steps to `t - 1000 //
        steps` instead, which is the same whenever `steps` divides the number of training timesteps.
        """
        name, kind = config["_class_name"], config.get("prediction_type", "epsilon")
        if "beta_start" not in config:
            raise ValueError(f"{name} has no DDPM noise schedule; use a pipeline with e.g. DDIM")
        if kind not in KINDS:
            raise ValueError(
                f"prediction_type={kind!r} of the scheduler is not supported; "
                f"known: {', '.join(KINDS)}"
            )
        # Turbo models carry set_alpha_to_one=False for a sampler that ends at sigma 0 anyway
        if "set_alpha_to_one" not in inspect.signature(getattr(diffusers, name)).parameters:
            config = config | {"set_alpha_to_one": True}
        scheduler: Any = DDIMScheduler.from_config(config)
        scheduler.set_timesteps(steps)
        t = scheduler.timesteps.cpu()
        final = torch.as_tensor(scheduler.final_alpha_cumprod).reshape(1).cpu()
        abar = torch.cat([scheduler.alphas_cumprod.cpu()[t], final]).double()
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

    def call(self, x: Tensor, t: Tensor, text: dict[str, Tensor], guidance: float) -> Tensor:
        added = None
        if self.is_xl:
            added = {"text_embeds": text["pooled"], "time_ids": self.time_ids.expand(len(x), -1)}
        embeds = text["prompt"].to(self.dtype)
        return self.network(
            x.to(self.dtype), t, encoder_hidden_states=embeds, added_cond_kwargs=added
        ).sample
