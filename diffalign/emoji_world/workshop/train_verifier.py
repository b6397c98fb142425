"""Train the verifier on composed scenes of every kind, with the augmentation of train_clip.

    python -m diffalign.emoji_world.workshop.train_verifier OUT
    python -m diffalign.emoji_world.workshop.train_verifier OUT --referee --vae VAE

Reserved combinations are among them: the verifier is to judge pictures of these, too. The referee
sees other scenes, twice as many of them flat as Noto's, half of them through the VAE with some
noise on the latents, and other augmentations.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from ..scenes import KINDS, SIZE, Scene, sample_scene
from ..tensors import pixels
from ..verifier import GROUNDS, HUES, NAMES, SPREAD, Referee, Verifier, read
from .train_clip import augment
from .training import fit, unit


def targets(scenes: list[Scene], cell: int = 8, spread: float = SPREAD) -> dict[str, Tensor]:
    """What the detector should say of cells of `cell` pixels a side: "centre" in [0, 1] (n, 8, 8),
    class indices (n, 8, 8), (n,)."""
    grid = (torch.arange(SIZE // cell) + 0.5) * cell
    n, side = len(scenes), len(grid)
    center = torch.zeros(n, side, side)
    name, color = (torch.zeros(n, side, side, dtype=torch.long) for _ in range(2))
    for i, scene in enumerate(scenes):
        for item in scene.items:
            square = (grid[None] - item.x).square() + (grid[:, None] - item.y).square()
            bump = (-square / (2 * spread**2)).exp()
            own = bump > center[i]
            name[i][own] = NAMES.index(item.name)
            color[i][own] = HUES.index(item.color)
            center[i] = center[i].maximum(bump)
    ground = torch.tensor([GROUNDS.index(s.background) for s in scenes])
    return {"centre": center, "object": name, "colour": color, "background": ground}


def disturb(images: Tensor) -> Tensor:
    """[0, 1] pictures turned by up to 6 degrees and scaled by up to 6 %, their channels mixed,
    their brightness bent, blotches and noise laid over them."""
    n = len(images)

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(n, *shape) - 1

    angle, scale = 0.1 * uniform(), 1 + 0.06 * uniform()
    cos, sin, shift = angle.cos() * scale, angle.sin() * scale, 0.06 * uniform(2)
    turned = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(n, 2, 3)
    grid = F.affine_grid(turned, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    mix = torch.eye(3) + 0.05 * uniform(3, 3)
    images = torch.einsum("nij,njhw->nihw", mix, images).clamp(0, 1)
    images = images ** (0.3 * uniform(1, 1, 1)).exp()
    rough = F.interpolate(torch.randn(n, 3, 16, 16), scale_factor=4.0, mode="bilinear")
    size = 0.06 * torch.rand(2, n, 1, 1, 1)
    return (images + size[0] * rough + size[1] * torch.randn_like(images)).clamp(0, 1)


@torch.no_grad()
def through_vae(images: Tensor, folder: Path) -> Tensor:
    """uint8 pictures (n, 3, 64, 64) as a VAE gives them back, with noise on the latents."""
    vae: Any = AutoencoderKL.from_pretrained(folder).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = []
    for part in images.split(100):
        with torch.autocast("cpu", torch.bfloat16):
            z = vae.encode(unit(part)).latent_dist.mode()
            seen = vae.decode(z + 0.1 * torch.rand(len(z), 1, 1, 1) * torch.randn_like(z)).sample
        found.append((seen.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8))
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--referee", action="store_true")
    parser.add_argument("--vae", type=Path, help="for the referee")
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    if args.referee != (args.vae is not None):
        parser.error("--vae belongs to --referee")
    seed, flat = (17, 2 / 3) if args.referee else (3, 1 / 2)
    torch.manual_seed(seed)
    model = (Referee if args.referee else Verifier)().to(memory_format=torch.channels_last)
    look = (4, 4.0) if args.referee else (8, SPREAD)
    change = disturb if args.referee else augment

    def sampled(seed: int, n: int, flat: float) -> list[Scene]:
        rng, found = random.Random(seed), []
        while len(found) < n:
            scene = sample_scene(rng, rng.choice(KINDS), reserved=None)
            kept = min(1.0, (flat if scene.items[0].style == "flat" else 1 - flat) * 2)
            if kept == 1.0 or rng.random() < kept:
                found.append(scene)
        return found

    scenes, held = sampled(seed, 60000, flat), sampled(10**6 + seed, 1000, 1 / 2)
    images, truth = pixels(scenes), targets(scenes, *look)
    if args.referee:
        images[::2] = through_vae(images[::2], args.vae)
    held_images, held_truth = pixels(held).float() / 255, targets(held, *look)

    def loss(step: int) -> Tensor:
        pick = torch.randint(len(images), (args.batch,))
        logits = model(change(images[pick].float() / 255))
        center = truth["centre"][pick]
        weight = center * (center > 0.3)
        total = 20 * F.binary_cross_entropy_with_logits(logits["centre"].float(), center)
        for k in ("object", "colour"):
            wrong = F.cross_entropy(logits[k].float(), truth[k][pick], reduction="none")
            total = total + (wrong * weight).sum() / weight.sum()
        ground = F.cross_entropy(logits["background"].float(), truth["background"][pick])
        return total + ground

    @torch.no_grad()
    def report(step: int) -> dict:
        readings = read(held_images, model)
        number = [len(r.things) == len(s.items) for r, s in zip(readings, held, strict=True)]
        logits, on = model(held_images), held_truth["centre"] > 0.5
        right = {k: logits[k].argmax(1)[on] == held_truth[k][on] for k in ("object", "colour")}
        right["background"] = logits["background"].argmax(1) == held_truth["background"]
        right["number of objects"] = torch.tensor(number)
        return {k: round(v.float().mean().item(), 4) for k, v in right.items()}

    figures = fit({"m": model}, loss, args.steps, 2e-3, args.out / "training.pt", report=report)
    print({"figures": figures})
    save_file(
        {k: v.half().contiguous() for k, v in model.state_dict().items()},
        args.out / "model.safetensors",
    )


if __name__ == "__main__":
    main()
