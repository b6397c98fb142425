"""Train a tiny CLIPModel on EmojiWorld: a reward, or with another seed a held-out judge.

    python -m diffalign.emoji_world.train_clip OUT --seed 1 [--patch 8]

Symmetric InfoNCE (arXiv 2103.00020) on batches whose negatives differ from a caption in one word.
Pictures are shifted, blurred and noised: a reward that has only seen clean scenes says nothing
useful about generated ones. Another seed also draws other scenes, and another patch size sees them
differently, so that reward and judge share little but the world.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from .scenes import BACKGROUNDS, COLOURS, OBJECTS, SIZE, Scene, caption, sample_scene
from .tokenizer import LENGTH, build_tokenizer
from .training import fit, pixels

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
KINDS = ("single",) * 6 + ("count", "relation")


def build(seed: int, patch: int, vocabulary: int, eos: int, bos: int) -> CLIPModel:
    torch.manual_seed(seed)
    width = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
    text = {"vocab_size": vocabulary, "max_position_embeddings": LENGTH, "eos_token_id": eos}
    text |= {"bos_token_id": bos, "pad_token_id": eos, "num_attention_heads": 4}
    vision = {"image_size": SIZE, "patch_size": patch, "num_attention_heads": 4}
    return CLIPModel(
        CLIPConfig(text_config=width | text, vision_config=width | vision, projection_dim=128)
    )


def normalise(images: Tensor) -> Tensor:
    """[0, 1] pixels to what CLIP's vision tower sees."""
    return (images - images.new_tensor(MEAN).view(3, 1, 1)) / images.new_tensor(STD).view(3, 1, 1)


def augment(images: Tensor) -> Tensor:
    """[0, 1] pictures shifted by up to 3 pixels; some blurred, noised, changed in contrast."""
    n = len(images)
    dx, dy = torch.randint(-3, 4, (2,)).tolist()
    images = F.pad(images, (3, 3, 3, 3), mode="replicate")[
        :, :, 3 + dy : 3 + dy + SIZE, 3 + dx : 3 + dx + SIZE
    ]
    small = F.interpolate(images, scale_factor=0.5, mode="area")
    blurred = F.interpolate(small, size=(SIZE, SIZE), mode="bilinear")
    images = torch.lerp(images, blurred, torch.rand(n, 1, 1, 1).round() * torch.rand(n, 1, 1, 1))
    images = images * (1 + 0.15 * (torch.rand(n, 1, 1, 1) - 0.5)) + 0.1 * (
        torch.rand(n, 3, 1, 1) - 0.5
    )
    noise = torch.rand(n, 1, 1, 1).round() * 0.08 * torch.rand(n, 1, 1, 1)
    return (images + noise * torch.randn_like(images)).clamp(0, 1)


def features(model: CLIPModel, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    out = model(input_ids=ids, pixel_values=normalise(images))
    return out.image_embeds.float(), out.text_embeds.float()


@torch.no_grad()
def probes(model: CLIPModel, tokenizer, seed: int = 10**6, n: int = 512) -> dict:
    """Share of held-out single scenes whose own caption beats all single-word swaps of it."""
    rng = random.Random(seed)
    right: dict[str, int] = dict.fromkeys(("object", "colour", "background"), 0)
    total = dict(right)
    model.eval()
    for _ in range(n):
        scene = sample_scene(rng)
        item = scene.items[0]
        image, words = pixels([scene]).float() / 255, caption(scene)
        swaps = {"object": [words.replace(item.name, o) for o in OBJECTS if o != item.name]}
        if item.colour:
            swaps["colour"] = [words.replace(item.colour, c) for c in COLOURS if c != item.colour]
        if scene.says_background:
            swaps["background"] = [
                words.replace(f"{scene.background} background", f"{b} background")
                for b in BACKGROUNDS
                if b != scene.background
            ]
        for kind, wrong in swaps.items():
            ids = tokenizer([words, *wrong], padding="max_length", return_tensors="pt").input_ids
            image_features, text_features = features(model, image, ids)
            right[kind] += int((text_features @ image_features[0]).argmax() == 0)
            total[kind] += 1
    model.train()
    return {k: round(right[k] / total[k], 3) for k in right}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--patch", type=int, default=8, help="pixels a side of a vision token")
    parser.add_argument("--steps", type=int, default=2300)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()

    tokenizer: Any = build_tokenizer()
    model = build(
        args.seed, args.patch, len(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id
    )
    rng = random.Random(args.seed)
    scenes: list[Scene] = [sample_scene(rng, rng.choice(KINDS)) for _ in range(40000)]
    images = pixels(scenes)
    # no caption is longer than 20 tokens, and the end token is all that counts
    ids = tokenizer([caption(s) for s in scenes], padding=True, return_tensors="pt")
    by_object, by_look = defaultdict(list), defaultdict(list)
    for i, scene in enumerate(scenes):
        by_object[scene.items[0].name].append(i)
        by_look[scene.items[0].colour, scene.background].append(i)

    def loss(step: int) -> Tensor:
        draw = random.Random(args.seed * 10**7 + step)
        # In a random batch colour and background tell the captions apart and the object is never
        # learnt. So a batch has few looks and all objects, or few objects and all looks.
        pools = by_look if step % 2 else by_object
        chosen = draw.sample(list(pools), 3 if step % 2 else 12)
        rows = torch.tensor([draw.choice(pools[draw.choice(chosen)]) for _ in range(args.batch)])
        batch, text = images[rows].float() / 255, ids.input_ids[rows]
        a, b = features(model, augment(batch), text)
        # pictures with the same caption are not each other's negatives
        same = (text[:, None] == text[None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        logits = model.logit_scale.exp().clamp(max=100) * a @ b.T
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    figures = fit(
        {"clip": model},
        loss,
        args.steps,
        1e-3,
        args.out / "training.pt",
        ema=0.998,
        weight_decay=0.05,
        report=lambda step: probes(model, tokenizer),
    )
    print({"figures": figures})
    model.eval().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    ).save_pretrained(args.out)


if __name__ == "__main__":
    main()
