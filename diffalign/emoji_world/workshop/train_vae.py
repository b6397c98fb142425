"""Train EmojiWorld's AutoencoderKL: 64×64 pixels to 16×16×8 latents.

    python -m diffalign.emoji_world.workshop.train_vae OUT [--steps N]

Loss: mean squared error + 0.1 mean absolute error + 1e-6 KL. The per-channel mean and standard
deviation of the latents are then folded into `quant_conv` and `post_quant_conv`, so that latents
have unit variance with scaling_factor = 1 and plain diffusers needs no extra number.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from ..scenes import sample_scene
from ..tensors import pixels
from .training import fit, unit

KINDS = ("single",) * 6 + ("pair", "count", "relation", "relation")


def scenes(seed: int, n: int, kinds: tuple[str, ...] = KINDS):
    rng = random.Random(seed)
    return [sample_scene(rng, rng.choice(kinds)) for _ in range(n)]


def build() -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (16, 48, 96),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "latent_channels": 8,
        "mid_block_add_attention": False,
        "sample_size": 64,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    }
    return AutoencoderKL(**options)


@torch.no_grad()
def psnr(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """10 log10(255² / MSE) of every picture in dB, (n,), on pixels rounded to bytes."""
    values = []
    for chunk in images.split(64):
        out = vae.decode(vae.encode(unit(chunk)).latent_dist.mode()).sample
        out = ((out.float() + 1) * 127.5).round().clamp(0, 255)
        mse = (out - chunk.float()).square().flatten(1).mean(1).clamp_min(1e-4)
        values.append(10 * (255**2 / mse).log10())
    return torch.cat(values)


@torch.no_grad()
def fold_statistics(vae: Any, images: torch.Tensor) -> None:
    """Rewrite the 1×1 convolutions around the latent so that it has zero mean and unit variance."""
    z = torch.cat([vae.encode(unit(c)).latent_dist.mode() for c in images.split(64)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    n = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:n] /= std.view(-1, 1, 1, 1)
    quant.bias[:n] = (quant.bias[:n] - mean) / std
    quant.bias[n:] -= 2 * std.log()  # the log-variance of the scaled latent
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= std.view(1, -1, 1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()

    vae = build()
    train = pixels(scenes(0, 40000))
    held_out = pixels(scenes(10**6, 256))
    singles = pixels(scenes(10**6 + 1, 256, ("single",)))

    def loss(step: int) -> torch.Tensor:
        batch = unit(train[torch.randint(len(train), (args.batch,))])
        latent = vae.encode(batch).latent_dist
        out = vae.decode(latent.sample()).sample.float()
        return (
            F.mse_loss(out, batch) + 0.1 * F.l1_loss(out, batch) + 1e-6 * latent.kl().mean() / 1024
        )

    def report(step: int) -> dict:
        return {
            "psnr_db": round(psnr(vae, held_out).mean().item(), 2),
            "psnr_single_db": round(psnr(vae, singles).mean().item(), 2),
        }

    figures = fit(
        {"vae": vae},
        loss,
        args.steps,
        1.5e-3,
        args.out / "training.pt",
        report=report,
        report_every=1000,
    )
    fold_statistics(vae, train[:2048])
    print({"after folding": report(0), "figures": figures})
    vae.save_pretrained(args.out)


if __name__ == "__main__":
    main()
