"""Measure a base pipeline: verifier accuracy on single-object prompts, and a 4×8 wall to look at.

    python -m diffalign.emoji_world.evaluate [MODEL] [--wall docs/images/emoji_wall.png]

Draws every object on 4 backgrounds (20 steps, guidance 3) and prints the verifier's top-1, of all
and of 32 objects chosen on other pictures than those they are scored on; beside it the verifier's
own accuracy on real scenes, without which the first figures mean little.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torchvision.transforms.functional import to_tensor

from ..grids import image_grid, save_png
from .scenes import ASSETS, BACKGROUNDS, OBJECTS, article, sample_scene
from .training import pixels
from .verifier import CLASSES, labels, load


@torch.no_grad()
def real_scene_accuracy(n: int = 1000) -> dict[str, float]:
    """The verifier's accuracy on n held-out real scenes, per attribute."""
    rng = random.Random(10**6 + 4)
    scenes = [sample_scene(rng) for _ in range(n)]
    logits, truth = load()(pixels(scenes).float() / 255), labels(scenes)
    return {k: (v.argmax(1) == truth[k]).float().mean().item() for k, v in logits.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=str(ASSETS / "emoji-sd"))
    parser.add_argument("--wall", default="runs/emoji_wall.png")
    parser.add_argument("--rounds", type=int, default=4, help="pictures per object")
    args = parser.parse_args()
    pipe: Any = StableDiffusionPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    backgrounds = list(BACKGROUNDS)
    hits: dict[str, list[list[bool]]] = {"object": [], "background": []}  # (round, object)
    wall = []
    for k in range(args.rounds):
        jobs = [(n, backgrounds[(i + k) % len(backgrounds)]) for i, n in enumerate(OBJECTS)]
        prompts = [f"{article(n)} on {article(b)} background" for n, b in jobs]
        generators = [torch.Generator().manual_seed(1000 * k + i) for i in range(len(jobs))]
        images = []
        for start in range(0, len(jobs), 16):
            rows = slice(start, start + 16)
            images += pipe(
                prompts[rows],
                num_inference_steps=20,
                guidance_scale=3.0,
                generator=generators[rows],
            ).images
        read = load()(torch.stack([to_tensor(im) for im in images]))
        for place, name in enumerate(hits):
            guess = [CLASSES[name][g] for g in read[name].argmax(1).tolist()]
            hits[name].append([g == job[place] for g, job in zip(guess, jobs, strict=True)])
        wall = images
    score = {k: torch.tensor(v).float() for k, v in hits.items()}
    # which objects are good is decided on the even rounds, how good on the odd ones
    chosen = score["object"][::2].mean(0).sort(descending=True, stable=True).indices[:32]
    save_png(image_grid([wall[i] for i in chosen.sort().values], columns=8), args.wall)
    names = list(OBJECTS)
    per_object = score["object"].mean(0)
    print({"top-1 of all": {k: round(v.mean().item(), 3) for k, v in score.items()}})
    print({"object top-1 of 32 chosen": round(score["object"][1::2][:, chosen].mean().item(), 3)})
    print({"verifier on real scenes": {k: round(v, 3) for k, v in real_scene_accuracy().items()}})
    print(
        {"weakest": {names[i]: round(per_object[i].item(), 2) for i in per_object.argsort()[:12]}}
    )


if __name__ == "__main__":
    main()
