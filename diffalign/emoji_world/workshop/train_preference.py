"""Fine-tune emoji-clip on synthetic preferences: a PickScore-style reward (arXiv 2305.01569).

    python -m diffalign.emoji_world.workshop.train_preference OUT --clip CLIP

One prompt x, two pictures y1, y2; the loss is PickScore's, the cross-entropy of
softmax(s cos(x, y1), s cos(x, y2)) with the preferred one. Half of the pairs are right over wrong
(the other picture shows the scene altered in one respect), half clean over degraded. Synthetic
preferences say nothing of human taste: the file stands in for the format and the role.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from ..scenes import SIZE, Scene, alterations, caption, sample_scene
from ..tensors import pixels
from .train_clip import MIX, augment, normalize
from .training import fit

DEGRADATIONS = ("blur", "noise", "warp", "fade", "holes")


def degrade(images: Tensor, strength: Tensor, kinds: list[str]) -> Tensor:
    """(n, 3, 64, 64) pictures in [0, 1] made worse: `strength` (n,) in [0, 1], one kind each."""
    out = []
    for image, s, kind in zip(images, strength.tolist(), kinds, strict=True):
        x = image[None]
        if kind == "blur":
            side = round(SIZE / (1.5 + 5 * s))
            x = F.interpolate(x, (side, side), mode="area")
            x = F.interpolate(x, (SIZE, SIZE), mode="bicubic")
        elif kind == "noise":
            x = x + (0.05 + 0.2 * s) * torch.randn_like(x)
        elif kind == "warp":  # a smooth displacement of up to a fifth of the side
            shift = F.interpolate(torch.randn(1, 2, 6, 6), (SIZE, SIZE), mode="bicubic")
            line = torch.linspace(-1, 1, SIZE)
            grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)[None]
            grid = grid + (0.04 + 0.12 * s) * shift.permute(0, 2, 3, 1)
            x = F.grid_sample(x, grid, padding_mode="border", align_corners=True)
        elif kind == "fade":
            x = torch.lerp(x, x.mean((1, 2, 3), keepdim=True), 0.3 + 0.6 * s)
        else:  # holes: patches replaced by the picture's mean colour
            keep = (torch.rand(1, 1, 8, 8) > 0.08 + 0.3 * s).float()
            keep = F.interpolate(keep, (SIZE, SIZE))
            x = x * keep + x.mean((2, 3), keepdim=True) * (1 - keep)
        out.append(x[0].clamp(0, 1))
    return torch.stack(out)


def scores(model: Any, images: Tensor, ids: Tensor) -> Tensor:
    """s cos(x_i, y_i), (n,)."""
    image = model.get_image_features(pixel_values=normalize(images)).pooler_output.float()
    text = model.get_text_features(input_ids=ids).pooler_output.float()
    return model.logit_scale.exp() * F.cosine_similarity(image, text)


def pairs(
    scenes: list[Scene], draw: random.Random, clean: bool
) -> tuple[list[str], Tensor, Tensor, list[str]]:
    """(prompts, preferred pictures, other pictures, what differs); floats in [0, 1]."""
    good = pixels(scenes).float() / 255
    if clean:
        kinds = [draw.choice(DEGRADATIONS) for _ in scenes]
        strength = torch.tensor([draw.random() for _ in scenes])
        return [caption(s) for s in scenes], good, degrade(good, strength, kinds), kinds
    altered = [draw.choice(list(alterations(s, draw).items())) for s in scenes]
    bad = pixels([s for _, s in altered]).float() / 255
    return [caption(s) for s in scenes], good, bad, [kind for kind, _ in altered]


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, n: int = 600) -> dict[str, float]:
    """Share of held-out pairs (reserved combinations) in which the preferred picture wins."""
    torch.manual_seed(0)
    draw = random.Random(10**6 + 7)
    right: dict[str, list[bool]] = {}
    model.eval()
    for clean in (False, True):
        scenes = [sample_scene(draw, draw.choice(MIX), reserved=True) for _ in range(n)]
        prompts, good, bad, kinds = pairs(scenes, draw, clean)
        ids = tokenizer(prompts, padding=True, return_tensors="pt").input_ids
        wins = (scores(model, good, ids) > scores(model, bad, ids)).tolist()
        for kind, win in zip(kinds, wins, strict=True):
            right.setdefault(kind, []).append(win)
    model.train()
    return {k: round(sum(v) / len(v), 3) for k, v in sorted(right.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--clip", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=48)
    args = parser.parse_args()
    model = CLIPModel.from_pretrained(args.clip, attn_implementation="eager")
    tokenizer = CLIPTokenizer.from_pretrained(args.clip)
    print({"before": accuracy(model, tokenizer)})

    def loss(step: int) -> Tensor:
        draw = random.Random(7 * 10**7 + step)
        scenes = [sample_scene(draw, draw.choice(MIX)) for _ in range(args.batch)]
        prompts, good, bad, _ = pairs(scenes, draw, clean=step % 2 == 1)
        ids = tokenizer(prompts, padding=True, return_tensors="pt").input_ids
        # a shift of both by the same amount keeps the model from reading single pixels
        both = augment(torch.cat([good, bad])) if step % 4 < 2 else torch.cat([good, bad])
        s = scores(model, both, torch.cat([ids, ids])).view(2, -1)
        return F.softplus(s[1] - s[0]).mean()

    figures = fit(
        {"clip": model},
        loss,
        args.steps,
        2e-4,
        args.out / "training.pt",
        ema=0.99,
        report=lambda step: accuracy(model, tokenizer),
        report_every=300,
    )
    print({"figures": figures})
    model.eval().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    CLIPImageProcessor.from_pretrained(args.clip).save_pretrained(args.out)


if __name__ == "__main__":
    main()
