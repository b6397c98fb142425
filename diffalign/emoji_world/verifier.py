"""The verifier: finds the objects of a picture, their colours and places, and the background.

A small one-stage detector in the manner of CenterNet (arXiv 1904.07850), trained by
`workshop/train_verifier.py`. It is a judge, and a reward only where a run makes it one: `verify`
scores a picture by the share of what its prompt says that the picture shows. The referee is a
second one, of another architecture, seed and augmentation. It only judges, so that what a run has
learnt of the verifier's faults does not count; no reward may use it, and no choice of a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from rewards.loading import reading

from .claims import Thing, judge, parse
from .scenes import ASSETS, BACKGROUNDS, COLORS, OBJECTS, SIZE

NAMES, HUES, GROUNDS = list(OBJECTS), [*COLORS, None], list(BACKGROUNDS)
SPREAD = 6.0  # standard deviation in pixels of the bump that an object's centre makes
THRESHOLD = 0.35  # a centre between four cells reads 0.64 in each, an empty place 0


def block(a: int, b: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.GroupNorm(8, b), nn.SiLU())


class Verifier(nn.Module):
    """(n, 3, 64, 64) in [0, 1] -> logits {"centre": (n, 8, 8), "object": (n, 112, 8, 8), "colour":
    (n, 9, 8, 8), "background": (n, 9)}.

    The last colour class is "its own colours".
    """

    def __init__(self) -> None:
        super().__init__()
        self.local = nn.Sequential(
            block(3, 32, 2), block(32, 32, 1), block(32, 64, 2), block(64, 64, 1),
            block(64, 128, 2), block(128, 128, 1),
        )  # fmt: skip
        self.wide = nn.Sequential(block(128, 128, 2), block(128, 128, 1), block(128, 128, 1))
        self.merge = block(256, 160, 1)
        self.cells = nn.Conv2d(160, 1 + len(NAMES) + len(HUES), 1)
        self.ground = nn.Linear(128, len(GROUNDS))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        near = self.local(images * 2 - 1)
        far = self.wide(near)
        both = torch.cat([near, F.interpolate(far, scale_factor=2.0, mode="nearest")], 1)
        center, name, color = self.cells(self.merge(both)).split([1, len(NAMES), len(HUES)], 1)
        ground = self.ground(near.mean((2, 3)))
        return {"centre": center[:, 0], "object": name, "colour": color, "background": ground}


class Residual(nn.Module):
    """x + f(x) as in ConvNeXt (arXiv 2201.03545): a wide convolution of each channel, then two of
    single points."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 5, padding=2, groups=width), nn.GroupNorm(1, width),
            nn.Conv2d(width, 3 * width, 1), nn.GELU(), nn.Conv2d(3 * width, width, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Referee(nn.Module):
    """The same logits as the verifier's, on 16 × 16 cells."""

    def __init__(self) -> None:
        super().__init__()
        self.local = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1), nn.GELU(), nn.Conv2d(32, 80, 3, 2, 1), Residual(80),
            Residual(80),
        )  # fmt: skip
        self.wide = nn.Sequential(
            nn.Conv2d(80, 160, 2, 2), Residual(160), Residual(160), Residual(160)
        )
        self.wider = nn.Sequential(nn.Conv2d(160, 160, 2, 2), Residual(160), Residual(160))
        self.merge = nn.Conv2d(80 + 160 + 160, 160, 1)
        self.cells = nn.Sequential(Residual(160), nn.Conv2d(160, 1 + len(NAMES) + len(HUES), 1))
        self.ground = nn.Linear(80, len(GROUNDS))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        near = self.local(images * 2 - 1)
        far = self.wide(near)
        scales = [F.interpolate(m, near.shape[-2:]) for m in (far, self.wider(far))]
        both = self.merge(torch.cat([near, *scales], 1))
        center, name, color = self.cells(both).split([1, len(NAMES), len(HUES)], 1)
        ground = self.ground(near.mean((2, 3)))
        return {"centre": center[:, 0], "object": name, "colour": color, "background": ground}


DETECTORS: dict[str, type[nn.Module]] = {"emoji-verifier": Verifier, "emoji-referee": Referee}


@dataclass(frozen=True)
class Reading:
    """What the verifier sees in a picture."""

    things: tuple[Thing, ...]
    background: str


@lru_cache
def load(name: str = "emoji-verifier", folder: Path = ASSETS) -> nn.Module:
    """One of DETECTORS."""
    model, file = DETECTORS[name](), str(folder / name / "model.safetensors")
    with reading(f"the verifier {file}", file):
        model.load_state_dict({k: v.float() for k, v in load_file(file).items()})
    return model.eval().requires_grad_(False)


@torch.no_grad()
def read(images: Tensor, model: nn.Module | None = None) -> list[Reading]:
    """What pictures (n, 3, H, W) in [0, 1] show: an object at every peak of the centre map above
    THRESHOLD, 8 pixels or more from a higher one."""
    small = F.interpolate(images.float().cpu(), (SIZE, SIZE), mode="area")
    logits = (model or load())(small)
    heat = logits["centre"].sigmoid()
    side = SIZE // heat.shape[-1]  # of a cell, in pixels
    around = 8 // side
    highest = F.max_pool2d(heat[:, None], 2 * around + 1, 1, around)[:, 0]
    peak = (heat == highest) & (heat > THRESHOLD)
    name, color = logits["object"].argmax(1), logits["colour"].argmax(1)
    shade = logits["colour"][:, :-1].argmax(1)
    readings = []
    for i in range(len(images)):
        things = tuple(
            Thing(
                NAMES[int(name[i, y, x])],
                HUES[int(color[i, y, x])],
                (x + 0.5) * side,
                (y + 0.5) * side,
                HUES[int(shade[i, y, x])],
            )
            for y, x in peak[i].nonzero().tolist()
        )
        readings.append(Reading(things, GROUNDS[int(logits["background"][i].argmax())]))
    return readings


def findings(
    images: Tensor, prompts: list[str], model: nn.Module | None = None
) -> list[dict[str, bool]]:
    """For every picture, which of its prompt's claims hold of it: see `claims.judge`.

    Raises ValueError for a prompt that says nothing EmojiWorld knows.
    """
    claims = [parse(p) for p in prompts]
    return [
        judge(claim, reading.things, reading.background)
        for claim, reading in zip(claims, read(images, model), strict=True)
    ]


def verify(images: Tensor, prompts: list[str]) -> Tensor:
    """Share of what the prompt says that the picture shows, (n,) in [0, 1]."""
    return torch.tensor([sum(f.values()) / len(f) for f in findings(images, prompts)])
