"""Train the verifier on composed scenes of every kind, with the augmentation of train_clip.

    python -m diffalign.emoji_world.workshop.train_verifier OUT

Reserved combinations are among them: the verifier is to judge pictures of these, too.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from ..scenes import KINDS, SIZE, Scene, sample_scene
from ..tensors import pixels
from ..verifier import CELL, GROUNDS, HUES, NAMES, Verifier, read
from .train_clip import augment
from .training import fit

SPREAD = 6.0  # standard deviation in pixels of the bump around an object's centre


def targets(scenes: list[Scene]) -> dict[str, Tensor]:
    """What the detector should say: "centre" in [0, 1] (n, 8, 8), class indices (n, 8, 8), (n,)."""
    grid = (torch.arange(SIZE // CELL) + 0.5) * CELL
    n, side = len(scenes), len(grid)
    center = torch.zeros(n, side, side)
    name, color = (torch.zeros(n, side, side, dtype=torch.long) for _ in range(2))
    for i, scene in enumerate(scenes):
        for item in scene.items:
            square = (grid[None] - item.x).square() + (grid[:, None] - item.y).square()
            bump = (-square / (2 * SPREAD**2)).exp()
            own = bump > center[i]
            name[i][own] = NAMES.index(item.name)
            color[i][own] = HUES.index(item.color)
            center[i] = center[i].maximum(bump)
    ground = torch.tensor([GROUNDS.index(s.background) for s in scenes])
    return {"centre": center, "object": name, "colour": color, "background": ground}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    torch.manual_seed(3)
    model = Verifier().to(memory_format=torch.channels_last)
    rng = random.Random(3)
    scenes = [sample_scene(rng, rng.choice(KINDS), reserved=None) for _ in range(60000)]
    images, truth = pixels(scenes), targets(scenes)
    rng = random.Random(10**6 + 3)
    held = [sample_scene(rng, rng.choice(KINDS), reserved=None) for _ in range(1000)]
    held_images, held_truth = pixels(held).float() / 255, targets(held)

    def loss(step: int) -> Tensor:
        pick = torch.randint(len(images), (args.batch,))
        logits = model(augment(images[pick].float() / 255))
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
