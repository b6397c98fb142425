"""Stable Diffusion 1.x and 2.x: a UNet that predicts noise or v on a DDPM schedule."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from ..dynamics import Levels, Prediction
from . import lora
from .base import Policy

PARAMETRISATIONS = {"epsilon": Prediction.from_epsilon, "v_prediction": Prediction.from_v}


def latent_shape(config: Any) -> tuple[int, int, int]:
    """(channels, height, width) of the latents a UNet config was made for."""
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return config["in_channels"], height, width


class UNetPolicy(Policy):
    """`StableDiffusionPipeline` (2112.10752) as a policy: epsilon or v-prediction, VP levels.

    The noise schedule and the spacing of the timesteps are the pipeline's own, read as DDIM; other
    samplers of the hub's configuration (PNDM, Euler) only differ in how they integrate.
    """

    def __init__(self, pipe: Any, device: torch.device | str, dtype: torch.dtype):
        super().__init__(pipe.to(device), device, dtype)
        self.network, self.vae = pipe.unet.eval(), pipe.vae.eval()
        for part in (pipe.unet, pipe.vae, pipe.text_encoder):
            part.requires_grad_(False)
        # only the denoiser: in half precision some VAEs overflow
        if dtype != torch.float32:
            self.network.to(dtype)
        self.scheduler: Any = DDIMScheduler.from_config(pipe.scheduler.config)
        config = self.scheduler.config
        if config.prediction_type not in PARAMETRISATIONS:
            raise ValueError(
                f"prediction_type={config.prediction_type!r} of the scheduler is not supported; "
                f"known: {', '.join(PARAMETRISATIONS)}"
            )
        self.parametrise = PARAMETRISATIONS[config.prediction_type]
        self.latent_shape = latent_shape(pipe.unet.config)

    @staticmethod
    def schedule(scheduler: DDIMScheduler, steps: int) -> Levels:
        """VP levels `alpha = sqrt(abar_t)`, `sigma = sqrt(1 - abar_t)` at the scheduler's
        timesteps.

        The state after step i is at the timestep of step i + 1. diffusers steps to `t - 1000 //
        steps` instead, which is the same whenever `steps` divides the number of training timesteps.
        """
        scheduler.set_timesteps(steps)
        t = scheduler.timesteps.cpu()
        final = torch.as_tensor(scheduler.final_alpha_cumprod).reshape(1).cpu()
        abar = torch.cat([scheduler.alphas_cumprod.cpu()[t], final]).double()
        t = torch.cat([t, torch.zeros(1, dtype=t.dtype)])
        return Levels(t.float(), abar.sqrt().float(), (1 - abar).sqrt().float())

    @classmethod
    def peek(cls, name: str, steps: int) -> tuple[Levels, tuple[int, ...]]:
        scheduler: Any = DDIMScheduler.from_pretrained(name, subfolder="scheduler")
        config = UNet2DConditionModel.load_config(name, subfolder="unet")
        return cls.schedule(scheduler, steps), latent_shape(config)

    def levels(self, steps: int) -> Levels:
        return self.schedule(self.scheduler, steps).to(self.device)

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _ = self.pipe.encode_prompt(prompts, self.device, 1, False)
        return {"prompt": embeds}

    def call(self, x: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
        embeds = text["prompt"].to(self.dtype)
        return self.network(x.to(self.dtype), t, encoder_hidden_states=embeds).sample

    def save_lora(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as temporary:
            self.pipe.save_lora_weights(temporary, unet_lora_layers=lora.exported(self.network))
            written = Path(temporary) / lora.WEIGHTS
            written.chmod(0o644)  # safetensors writes for the owner alone
            return written.replace(folder / lora.WEIGHTS)
