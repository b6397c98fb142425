"""Train a tiny CLIPModel on EmojiWorld: a reward, or with another seed a held-out judge.

    python -m diffalign.emoji_world.workshop.train_clip OUT --seed 1 [--patch 8]

Symmetric InfoNCE (arXiv 2103.00020) with hard negatives as in NegCLIP (2210.01936): beside the
captions of the batch, each picture is compared with captions that differ from its own in one
respect (object, colour, background, count, position, or two colours swapped), and with "a NAME" of
every object. Two linear heads, thrown away afterwards, name the object under each patch and, from
either embedding, at nine points of the picture: a small model learns shapes and places much sooner
from labels that say where. Pictures are shifted, blurred and noised: a reward that has only seen
clean scenes says nothing useful about generated ones. From three fifths of the steps on, two in
three scenes are relations: left and right are learnt last, and only from many of them. Another seed
also draws other scenes, and another patch size sees them differently, so that reward and judge
share little but the world.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from ..scenes import OBJECTS, SIZE, Scene, alterations, article, caption, sample_scene
from ..tensors import pixels
from .tokenizer import LENGTH, build_tokenizer
from .training import fit

WIDTH = 128
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MIX = ("single", "single", "single", "pair", "count", "relation", "relation")  # of scene kinds
NEGATIVES = 3  # altered captions per picture
HARD = {"position": 0, "binding": 1, "object": 1, "count": 1}  # which of them come first


def build(seed: int, patch: int, tokenizer: Any) -> CLIPModel:
    torch.manual_seed(seed)
    both = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4}
    both |= {"projection_dim": WIDTH}
    eos = tokenizer.eos_token_id
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH, "eos_token_id": eos}
    text |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": eos, "num_hidden_layers": 3}
    vision = {"image_size": SIZE, "patch_size": patch, "num_hidden_layers": 4}
    return CLIPModel(
        CLIPConfig(text_config=both | text, vision_config=both | vision, projection_dim=WIDTH)
    )


def normalize(images: Tensor) -> Tensor:
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


def features(model: Any, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Unit embeddings of images and texts, and the vision tower's own output."""
    out = model(input_ids=ids, pixel_values=normalize(images))
    return out.image_embeds.float(), out.text_embeds.float(), out.vision_model_output


def names_at(scenes: list[Scene], line: Tensor) -> Tensor:
    """(n, len(line)²): the index of the object at each point of a square grid, of which `line` has
    the coordinates in pixels; 112 where there is none."""
    under = torch.full((len(scenes), len(line), len(line)), len(OBJECTS))
    for i, scene in enumerate(scenes):
        for item in scene.items:
            x, y = (line - item.x).abs() < item.size / 2, (line - item.y).abs() < item.size / 2
            under[i][y[:, None] & x[None]] = list(OBJECTS).index(item.name)
    return under.flatten(1)


@torch.no_grad()
def probes(
    image: Callable[[Tensor], Tensor],
    text: Callable[[list[str]], Tensor],
    n: int = 300,
    seed: int = 10**6,
) -> dict[str, list[bool]]:
    """Whether each of n held-out scenes is told from others, by two towers that give unit features
    (m, d) of pictures (m, 3, 64, 64) in [0, 1] and of texts.

    For every respect in which a caption can be altered: whether the scene's own caption beats one
    that is wrong in that respect (chance is 1 in 2). "object of all", of single objects: whether
    the object's name beats all others (1 in 112).
    """
    rng = random.Random(seed)
    hits: dict[str, list[bool]] = {}
    for i in range(n):
        scene = sample_scene(rng, MIX[i % len(MIX)], None)
        own = caption(scene)
        others = {k: [caption(s)] for k, s in alterations(scene, rng).items()}
        if scene.kind == "single":
            names = [replace(scene, items=(replace(scene.items[0], name=o),)) for o in OBJECTS]
            others["object of all"] = [c for c in map(caption, names) if c != own]
        seen = image(pixels([scene]).float() / 255)[0]
        for kind, texts in others.items():
            best = (text([own, *texts]) @ seen).argmax() == 0
            hits.setdefault(kind, []).append(bool(best))
    return {k: hits[k] for k in sorted(hits)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--patch", type=int, default=8, help="pixels a side of a vision token")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()

    tokenizer: Any = build_tokenizer()
    model: Any = build(args.seed, args.patch, tokenizer)
    # three matmuls are faster on a CPU at these sizes than the fused attention's backward
    model.set_attn_implementation("eager")
    head = torch.nn.Linear(WIDTH, len(OBJECTS) + 1)
    point_head = torch.nn.Linear(WIDTH, 9 * (len(OBJECTS) + 1))
    rarely = torch.ones(len(OBJECTS) + 1)
    rarely[-1] = 0.05  # most patches show the background
    rng = random.Random(args.seed)
    scenes: list[Scene] = [sample_scene(rng, rng.choice(MIX), None) for _ in range(60000)]
    under = names_at(scenes, (torch.arange(SIZE // args.patch) + 0.5) * args.patch)
    points = names_at(scenes, torch.tensor([16.0, 32.0, 48.0]))
    says_where = torch.tensor([s.kind in ("single", "relation") for s in scenes])
    images = pixels(scenes)
    # no caption is longer than 20 tokens, and the end token is all that counts
    bank = tokenizer([article(n) for n in OBJECTS], padding=True, return_tensors="pt").input_ids
    place = {name: i for i, name in enumerate(OBJECTS)}
    relations = [i for i, s in enumerate(scenes) if s.kind == "relation"]

    def loss(step: int) -> Tensor:
        draw = random.Random(args.seed * 10**7 + step)
        late = 0.6 if step >= 0.6 * args.steps else 0.0
        rows = [
            draw.choice(relations) if draw.random() < late else draw.randrange(len(scenes))
            for _ in range(args.batch)
        ]
        texts = [caption(scenes[r]) for r in rows]
        for r in rows:
            altered = sorted(alterations(scenes[r], draw).items(), key=lambda a: HARD.get(a[0], 2))
            texts += [caption(s) for _, s in (altered * NEGATIVES)[:NEGATIVES]]
        text = tokenizer(texts, padding=True, return_tensors="pt").input_ids
        a, b, vision = features(model, augment(images[rows].float() / 255), text)
        names = model.get_text_features(input_ids=bank).pooler_output.float()
        scale = model.logit_scale.exp().clamp(max=100)
        # pictures with the same caption are not each other's negatives
        same = (text[: args.batch, None] == text[None]).all(-1).float()
        shown = torch.zeros(args.batch, len(OBJECTS))
        for i, r in enumerate(rows):
            shown[i, [place[item.name] for item in scenes[r].items]] = 1
        own = same[:, : args.batch]
        pairs = (
            (scale * a @ b.T, same),
            (scale * b[: args.batch] @ a.T, own),
            (scale * a @ F.normalize(names, dim=-1).T, shown),
        )
        losses = [F.cross_entropy(x, y / y.sum(1, keepdim=True)) for x, y in pairs]
        # Each altered caption against the true one alone. Where an object stands is learnt last:
        # among many candidates it would get no gradient until all else is settled.
        wrong = (a[:, None] * b[args.batch :].view(args.batch, NEGATIVES, -1)).sum(-1)
        margin = scale * (wrong - (a * b[: args.batch]).sum(-1, keepdim=True))
        own_text = b[: args.batch][says_where[rows]]
        named = (
            (vision.last_hidden_state[:, 1:], head, under[rows]),
            (WIDTH**0.5 * a, point_head, points[rows]),
            (WIDTH**0.5 * own_text, point_head, points[rows][says_where[rows]]),
        )
        where = [
            F.cross_entropy(h(x).float().view(-1, len(rarely)), y.flatten(), rarely)
            for x, h, y in named
        ]
        return losses[0] + F.softplus(margin).mean() + (losses[1] + losses[2] + sum(where)) / 2

    def report(step: int) -> dict[str, float]:
        def text(texts: list[str]) -> Tensor:
            ids = tokenizer(texts, padding=True, return_tensors="pt").input_ids
            return F.normalize(model.get_text_features(input_ids=ids).pooler_output, dim=-1)

        def image(pictures: Tensor) -> Tensor:
            pixel_values = normalize(pictures)
            return F.normalize(model.get_image_features(pixel_values).pooler_output, dim=-1)

        model.eval()
        found = {k: round(sum(v) / len(v), 3) for k, v in probes(image, text).items()}
        model.train()
        return found

    figures = fit(
        {"clip": model, "head": head, "point_head": point_head},
        loss,
        args.steps,
        1e-3,
        args.out / "training.pt",
        ema=0.998,
        weight_decay=0.05,
        report=report,
    )
    print({"figures": figures})
    model.eval().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    ).save_pretrained(args.out)


if __name__ == "__main__":
    main()
