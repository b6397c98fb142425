"""The verifier: reads object, colour and background off a picture. A judge, never a reward by
default.

    python -m diffalign.emoji_world.verifier OUT        # trains it

A small convolutional classifier trained on single composed scenes with the augmentation of
train_clip. `verify` scores a picture by the share of the attributes its prompt names that the
picture has.
"""

from __future__ import annotations

import argparse
import random
import re
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .scenes import ASSETS, BACKGROUNDS, COLOURS, OBJECTS, Scene, sample_scene
from .train_clip import augment
from .training import fit, pixels

CLASSES = {"object": list(OBJECTS), "colour": [*COLOURS, None], "background": list(BACKGROUNDS)}


class Verifier(nn.Module):
    """(n, 3, 64, 64) in [0, 1] -> {"object": (n, 48), "colour": (n, 9), "background": (n, 9)}
    logits.

    The last colour class is "its own colours".
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 256)
        self.trunk = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(a, b, 3, 2, 1),
                    nn.GroupNorm(8, b),
                    nn.SiLU(),
                    nn.Conv2d(b, b, 3, 1, 1),
                    nn.GroupNorm(8, b),
                    nn.SiLU(),
                )
                for a, b in pairwise(widths)
            )
        )
        self.heads = nn.ModuleDict({k: nn.Linear(widths[-1], len(v)) for k, v in CLASSES.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        h = self.trunk(images * 2 - 1).mean((2, 3))
        return {k: head(h) for k, head in self.heads.items()}


def labels(scenes: list[Scene]) -> dict[str, Tensor]:
    """Class indices (n,) of the first item of every scene."""
    truth = [(s.items[0].name, s.items[0].colour, s.background) for s in scenes]
    return {k: torch.tensor([CLASSES[k].index(t[i]) for t in truth]) for i, k in enumerate(CLASSES)}


def parse(prompt: str) -> dict[str, str]:
    """Attributes a single-object prompt names: {"object": .., "colour": .., "background": ..}."""
    found: dict[str, str] = {}
    if match := re.search(r"on an? (\w+) background", prompt):
        if match[1] in BACKGROUNDS:
            found["background"] = match[1]
        prompt = prompt[: match.start()]
    words = prompt.replace("bunch of grapes", "grapes")
    # the object is the last noun: "an orange orange" is a fruit and its colour
    if match := re.search(rf"\b({'|'.join(sorted(OBJECTS, key=len, reverse=True))})\s*$", words):
        found["object"] = match[1]
        words = words[: match.start()]
    for colour in COLOURS:
        if re.search(rf"\b{colour}\b", words):
            found["colour"] = colour
    return found


@lru_cache
def load(path: str = str(ASSETS / "emoji-verifier")) -> Verifier:
    model = Verifier()
    state = load_file(Path(path) / "model.safetensors")
    model.load_state_dict({k: v.float() for k, v in state.items()})
    return model.eval().requires_grad_(False)


@torch.no_grad()
def verify(images: Tensor, prompts: list[str]) -> Tensor:
    """Share of the named attributes that are right, (n,) in [0, 1]. ValueError if none is named."""
    logits = load()(F.interpolate(images.float().cpu(), (64, 64), mode="area"))
    read = {k: [CLASSES[k][i] for i in v.argmax(1).tolist()] for k, v in logits.items()}
    scores = []
    for i, prompt in enumerate(prompts):
        wanted = parse(prompt)
        if not wanted:
            raise ValueError(f"prompt {prompt!r} names no EmojiWorld object, colour or background")
        scores.append(sum(read[k][i] == v for k, v in wanted.items()) / len(wanted))
    return torch.tensor(scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    torch.manual_seed(3)
    model = Verifier().to(memory_format=torch.channels_last)
    rng = random.Random(3)
    scenes = [sample_scene(rng) for _ in range(30000)]
    images, truth = pixels(scenes), labels(scenes)
    rng = random.Random(10**6 + 3)
    held = [sample_scene(rng) for _ in range(1000)]
    held_images, held_truth = pixels(held).float() / 255, labels(held)

    def loss(step: int) -> Tensor:
        pick = torch.randint(len(images), (args.batch,))
        logits = model(augment(images[pick].float() / 255))
        losses = [F.cross_entropy(v.float(), truth[k][pick]) for k, v in logits.items()]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def report(step: int) -> dict:
        logits = model(held_images)
        right = {k: (v.argmax(1) == held_truth[k]).float().mean() for k, v in logits.items()}
        return {k: round(v.item(), 4) for k, v in right.items()}

    figures = fit({"m": model}, loss, args.steps, 2e-3, args.out / "training.pt", report=report)
    print({"figures": figures})
    save_file(
        {k: v.half().contiguous() for k, v in model.state_dict().items()},
        args.out / "model.safetensors",
    )


if __name__ == "__main__":
    main()
