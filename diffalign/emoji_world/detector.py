"""The verifier as an object detector, and GenEval's metadata for EmojiWorld's prompts.

rewards: {composition: {detector: "diffalign.emoji_world.detector:detect"}}
rewards: {composition: {detector: "diffalign.emoji_world.detector:evidence", soft: true}}
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rewards.composition import Detection
from rewards.soft_composition import Evidence

from ..config.decoding import suggest
from .claims import parse
from .scenes import OBJECTS, SIZE
from .verifier import HUES, NAMES, SPREAD, load, read

SIDE = 28  # pixels of 64: the size of an object in a pair; the verifier reads only the centres


def detect(images: Tensor, classes: list[list[str]]) -> list[list[Detection]]:
    """Objects of the ``classes`` in each of (n, 3, H, W) pictures, a ``rewards.composition``
    detector.

    The score is always 1, for the verifier has decided already. The box is a square of 28/64 of the
    picture's side. An object in its own colours is given the named colour nearest to them. Raises
    ValueError for a class that is not in EmojiWorld.
    """
    _check(classes)
    height, width = (side / SIZE for side in images.shape[-2:])

    def found(thing) -> Detection:
        sides = ((thing.x - SIDE / 2) * width, (thing.y - SIDE / 2) * height)
        box = (*sides, sides[0] + SIDE * width, sides[1] + SIDE * height)
        return Detection(thing.name, 1.0, box, thing.color or thing.shade)

    return [
        [found(thing) for thing in reading.things if thing.name in names]
        for reading, names in zip(read(images), classes, strict=True)
    ]


def evidence(images: Tensor, classes: list[list[str]]) -> list[Evidence]:
    """The same before anything is decided, a ``SoftDetector``: the verifier's 64 cells as places,
    σ(centre) P(object) in each, with gradient to the images (n, 3, H, W)."""
    _check(classes)
    small = F.interpolate(images.float(), (SIZE, SIZE), mode="area")
    logits = load().to(images.device)(small)
    heat, hues = logits["centre"].sigmoid(), logits["colour"]
    own = hues.softmax(1)[:, -1:]  # what is in its own colours has the named ones nearest to them
    named = hues.softmax(1)[:, :-1] + own * hues[:, :-1].softmax(1)
    known = _middle(heat, torch.cat([logits["object"].softmax(1), named], 1)).flatten(2)
    heat = heat.flatten(1)
    objects, colors = heat[:, None] * known[:, : len(NAMES)], known[:, len(NAMES) :]
    cell = 1 / logits["centre"].shape[-1]
    line = (torch.arange(len(heat[0])) * cell).to(heat)
    x, y = (line % 1 + cell / 2), line.floor() * cell + cell / 2
    half = SIDE / SIZE / 2
    boxes = torch.stack([x - half, y - half, x + half, y + half], 1)
    mass = 2 * math.pi * (SPREAD / (SIZE * cell)) ** 2
    found = []
    for names, share, hue, hot in zip(classes, objects, colors, heat, strict=True):
        shares = torch.stack([share[NAMES.index(name)] for name in names])
        seen = dict(zip(HUES[:-1], hue, strict=True))
        found.append(Evidence(shares, hot - shares.sum(0), boxes, seen, mass))
    return found


def _middle(heat: Tensor, seen: Tensor) -> Tensor:
    """What is seen (n, k, 8, 8) at each cell and its neighbours, mostly where the heat (n, 8, 8) is
    highest: the verifier was not taught to name an object at its rim."""
    weight = heat[:, None] ** 3
    total = F.avg_pool2d(weight, 3, 1, 1) + 1e-6
    return F.avg_pool2d(weight * seen, 3, 1, 1) / total


def _check(classes: list[list[str]]) -> None:
    for name in {name for names in classes for name in names}:
        if name not in OBJECTS:
            raise ValueError(f"{name!r} is not an object of EmojiWorld{suggest(name, OBJECTS)}")


def metadata(prompt: str) -> dict[str, Any]:
    """What a prompt says in GenEval's format: {"tag": ..., "include": [...]}, no background.

    Raises ValueError for a prompt that says nothing EmojiWorld knows.
    """
    claim = parse(prompt)
    include: list[dict[str, Any]] = [
        {"class": name, "count": claim.number or 1} | ({"color": color} if color else {})
        for name, color in claim.nouns
    ]
    if claim.relation:  # a position refers to an earlier clause
        include.reverse()
        include[1]["position"] = [claim.relation, 0]
    return {"tag": claim.category, "include": include}
