"""Distil emoji-sd into emoji-turbo, a LoRA that makes it a one-step generator.

    python -m diffalign.emoji_world.workshop.distill OUT --sd SD --latents LATENTS

Progressive distillation (arXiv 2202.00512): three stages halve the DDIM steps, 8, 4, 2, 1. One
student step is to land where two teacher steps do. The first teacher uses classifier-free guidance
3, and the student learns its result, so that emoji-turbo is called without guidance. The last stage
only ever sees pure noise. The loss is taken on v, as in the paper's SNR + 1 weighting; at zero SNR
it is the squared error of x0. The paper trains whole networks. We train a low-rank difference, as
LCM-LoRA (2311.05556) does: of every linear layer and convolution, of rank 24, shipped at rank 6.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.nn import functional as F

from ...drawing.grids import image_grid
from ...policies import lora
from ...policies.acceleration import accelerate
from ..scenes import BACKGROUNDS, OBJECTS, article
from . import pipelines
from .train_base import FIRST, dataset, sampler
from .training import fit

GUIDANCE = 3.0
STAGES = {8: 200, 4: 200, 2: 600}  # teacher steps: training steps
RANK = 24  # trained
SHIPPED = 6  # its best approximation in every layer; EmojiEval is the same within a picture or two
TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
]


def truncated(state: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """A LoRA of A (r, in, ...) and B (out, r, ...), with B A replaced by its best approximation of
    rank `rank`."""
    out = {}
    for down in (k for k in state if "lora_A" in k):
        up = down.replace("lora_A", "lora_B")
        a, b = state[down].float(), state[up].float()
        u, s, v = torch.linalg.svd(b.flatten(1) @ a.flatten(1), full_matrices=False)
        root = s[:rank].sqrt()
        out[down] = (root[:, None] * v[:rank]).reshape(-1, *a.shape[1:]).contiguous()
        out[up] = (u[:, :rank] * root).reshape(*b.shape[:1], -1, *b.shape[2:]).contiguous()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sd", type=Path, required=True)
    parser.add_argument("--latents", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=48)
    args = parser.parse_args()
    pipe: Any = StableDiffusionPipeline.from_pretrained(args.sd)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    rows, captions, latents = dataset(pipe.vae, args.latents)
    abar = pipe.scheduler.alphas_cumprod
    student = pipe.unet.to(memory_format=torch.channels_last).requires_grad_(False)
    lora.add(student, RANK, None, TARGETS, seed=0)
    accelerate("auto", False, (), student, "cpu", torch.bfloat16)
    args.out.mkdir(parents=True, exist_ok=True)

    def level(t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha, sigma (n, 1, 1, 1) at timesteps (n,); t = -1 is the clean picture."""
        a = torch.where(t < 0, 1.0, abar[t.clamp_min(0)]).view(-1, 1, 1, 1)
        return a.sqrt(), (1 - a).sqrt()

    def ddim(x: Tensor, v: Tensor, t: Tensor, to: Tensor) -> Tensor:
        (a, s), (a2, s2) = level(t), level(to)
        return a2 * (a * x - s * v) + s2 * (a * v + s * x)

    for number, (steps, budget) in enumerate(STAGES.items()):
        draw = sampler(rows, FIRST * budget)
        teacher = copy.deepcopy(student).eval().requires_grad_(False)
        # trailing timesteps 1000 / steps apart, and -1 for the clean end
        times = torch.arange(steps, -1, -1) * (1000 // steps) - 1

        def velocity(x: Tensor, t: Tensor, prompts: list[str], net=teacher, guided=not number):
            if not guided:
                return net(x, t, pipelines.embed_sd(pipe, prompts)).sample.float()
            text = pipelines.embed_sd(pipe, ["" for _ in prompts] + prompts)
            both = net(torch.cat([x, x]), torch.cat([t, t]), text).sample.float()
            plain, conditional = both.chunk(2)
            return plain + GUIDANCE * (conditional - plain)

        def loss(step: int, draw=draw, steps=steps, times=times, velocity=velocity, net=student):
            pick = draw(step, args.batch)
            x0, prompts = latents[pick].float(), [captions[i] for i in pick.tolist()]
            i = 2 * torch.randint(steps // 2, (args.batch,))
            t, middle, end = times[i], times[i + 1], times[i + 2]
            a, s = level(t)
            x = a * x0 + s * torch.randn_like(x0)
            with torch.no_grad():
                x1 = ddim(x, velocity(x, t, prompts), t, middle)
                x2 = ddim(x1, velocity(x1, middle, prompts), middle, end)
                # the x0 and v with which a single DDIM step from x lands on x2
                a2, s2 = level(end)
                target = (x2 - s2 / s * x) / (a2 - s2 / s * a)
                v = (a * x - target) / s
            out = net(x, t, pipelines.embed_sd(pipe, prompts)).sample
            return F.mse_loss(out.float(), v)

        def report(step: int, steps=steps // 2) -> dict:
            names, grounds = list(OBJECTS), list(BACKGROUNDS)
            prompts = [f"{article(n)} on {article(grounds[i % 9])} background"
                       for i, n in enumerate(names[:96:6])]  # fmt: skip
            prompts += captions[-16:]
            student.eval()
            images = pipelines.draw(pipe, prompts, range(len(prompts)), steps, guidance=1.0)
            student.train()
            image_grid(images, columns=8).save(args.out / f"grid_{steps}_{step:06d}.png")
            return {}

        file = args.out / f"stage_{steps}.pt"
        figures = fit({"unet": student}, loss, budget, 3e-4, file, ema=0.99, report=report,
                      report_every=200)  # fmt: skip
        print({f"{steps} -> {steps // 2}": figures}, flush=True)
    pipe.save_lora_weights(
        args.out,
        unet_lora_layers=truncated(lora.exported(student, lora.state_dict(student)), SHIPPED),
    )


if __name__ == "__main__":
    main()
