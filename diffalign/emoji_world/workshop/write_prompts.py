"""Write EmojiWorld's prompt sets: train, and held out by combination.

    python -m diffalign.emoji_world.workshop.write_prompts

prompts/{train,held_out}.txt: single objects, three and one prompts per object. prompts/eval_train
and eval_held_out (.jsonl, with "category"): EmojiEval's six categories, about 448 prompts each.
Held-out prompts ask for combinations that `scenes.held_out` reserves, which no denoiser has been
trained on: a colour or background of an object, a number of it, or a pair of objects.
composition_train.jsonl: unreserved combinations of all categories on named backgrounds, with
GenEval's metadata for the reward `composition`. counting_train and counting_held_out (.jsonl): the
same of two to four objects in their own colours, every number of every object once.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from typing import Any

from ..claims import parse
from ..detector import metadata
from ..scenes import (
    ASSETS,
    BACKGROUNDS,
    COLORS,
    OBJECTS,
    STYLES,
    Item,
    Scene,
    caption,
    held_out,
    readable,
    reserved_color,
    sample_scene,
)

COMPOSED = {"single": 300, "pair": 900, "count": 600, "relation": 900}
PAIRS = 56  # prompts of each category that is not one per object


def single(name: str, color: str | None, background: str | None) -> Scene:
    ground = background or "white"
    item = Item(name, "glossy", color, 32, 32, 48)
    return Scene("single", (item,), ground, says_background=background is not None)


def singles(rng: random.Random) -> tuple[list[str], list[str]]:
    train, held = [], []
    for name in OBJECTS:
        own = [b for b in BACKGROUNDS if readable(name, "glossy", b) and readable(name, "flat", b)]
        # no colour on a background of its own name, which would hide the object
        mixed = [(c, b) for c in COLORS for b in BACKGROUNDS if c != b]
        train.append(caption(single(name, None, None)))
        free = [b for b in own if not held_out(single(name, None, b))]
        train.append(caption(single(name, None, rng.choice(free))))
        free_pairs = [p for p in mixed if not held_out(single(name, *p))]
        train.append(caption(single(name, *rng.choice(free_pairs))))
        reserved = [p for p in mixed if reserved_color(name, p[0])]
        held.append(caption(single(name, *rng.choice(reserved))))
    rng.shuffle(held)  # the first few are the rows of the grid
    return train, held


def evaluation(rng: random.Random, reserved: bool) -> list[dict[str, Any]]:
    """EmojiEval's prompts of one split."""
    found: dict[str, list[str]] = {"single object": [], "colours": []}
    for name in OBJECTS:
        grounds = [b for b in BACKGROUNDS if any(readable(name, s, b) for s in STYLES)]
        fit = [b for b in grounds if held_out(single(name, None, b)) == reserved]
        if fit:  # else the one reserved background hides the object
            found["single object"].append(caption(single(name, None, rng.choice(fit))))
        colors = [c for c in COLORS if reserved_color(name, c) == reserved]
        found["colours"].append(caption(single(name, rng.choice(colors), None)))
    kinds = {"two objects": "pair", "counting": "count", "position": "relation"}
    for category, kind in (kinds | {"colour attribution": "pair"}).items():
        texts: dict[str, None] = {}
        while len(texts) < PAIRS:
            scene = sample_scene(rng, kind, reserved)
            colored = [item.color is not None for item in scene.items]
            if category == "colour attribution" and (
                not all(colored) or scene.items[0].color == scene.items[1].color
            ):
                continue
            if category in ("two objects", "position") and any(colored):
                continue
            plain = Scene(kind, scene.items, scene.background, scene.relation, False, False)
            texts[caption(plain)] = None
        found[category] = list(texts)
    for category, texts_of in found.items():
        assert all(parse(t).category == category for t in texts_of), category
    return [
        {"prompt": t, "category": c, **metadata(t)} for c, texts in found.items() for t in texts
    ]


def composition(rng: random.Random) -> list[dict[str, Any]]:
    """Prompts and what they ask for. All name the background: one that is left open would be bent
    to what suits the reward, and every picture would get the same."""
    texts: dict[str, None] = {}
    for kind, n in COMPOSED.items():
        wanted = len(texts) + n
        while len(texts) < wanted:
            scene = sample_scene(rng, kind)
            scene = replace(scene, says_background=True, says_style=False)
            texts[caption(scene)] = None
    found = [{"prompt": t, **metadata(t)} for t in texts]
    rng.shuffle(found)
    return found


def counting(rng: random.Random) -> dict[str, list[dict[str, Any]]]:
    """Both splits. The held-out one is shorter, so it has two backgrounds of each."""
    found: dict[str, list[dict[str, Any]]] = {"train": [], "held_out": []}
    for name in OBJECTS:
        grounds = [b for b in BACKGROUNDS if readable(name, "glossy", b)]
        for number in (2, 3, 4):
            items = (Item(name, "glossy", None, 32, 32, 24),) * number
            reserved = held_out(Scene("count", items, grounds[0]))
            for ground in rng.sample(grounds, 2 if reserved else 1):
                text = caption(Scene("count", items, ground))
                line = {"prompt": text, **metadata(text)}
                found["held_out" if reserved else "train"].append(line)
    for lines in found.values():
        rng.shuffle(lines)
    return found


def main() -> None:
    rng = random.Random(0)
    folder = ASSETS / "emoji-world" / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    for split, prompts in zip(("train", "held_out"), singles(rng), strict=True):
        (folder / f"{split}.txt").write_text("\n".join(prompts) + "\n", "utf-8")
    for split, reserved in (("train", False), ("held_out", True)):
        lines = [json.dumps(line) + "\n" for line in evaluation(rng, reserved)]
        (folder / f"eval_{split}.jsonl").write_text("".join(lines), "utf-8")
    lines = [json.dumps(line) + "\n" for line in composition(random.Random(1))]
    (folder / "composition_train.jsonl").write_text("".join(lines), "utf-8")
    for split, found in counting(random.Random(2)).items():
        lines = [json.dumps(line) + "\n" for line in found]
        (folder / f"counting_{split}.jsonl").write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
