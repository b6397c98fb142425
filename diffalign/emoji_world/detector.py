"""The verifier as an object detector, and GenEval's metadata for EmojiWorld's prompts.

rewards: {composition: {detector: "diffalign.emoji_world.detector:detect"}}
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rewards.composition import Detection

from ..config.decoding import suggest
from .claims import parse
from .scenes import OBJECTS, SIZE
from .verifier import read

SIDE = 28  # pixels of 64: the size of an object in a pair; the verifier reads only the centres


def detect(images: Tensor, classes: list[list[str]]) -> list[list[Detection]]:
    """Objects of the ``classes`` in each of (n, 3, H, W) pictures, a ``rewards.composition``
    detector.

    The score is always 1, for the verifier has decided already. The box is a square of 28/64 of the
    picture's side. An object in its own colours is given the named colour nearest to them. Raises
    ValueError for a class that is not in EmojiWorld.
    """
    for name in {name for names in classes for name in names}:
        if name not in OBJECTS:
            raise ValueError(f"{name!r} is not an object of EmojiWorld{suggest(name, OBJECTS)}")
    height, width = (side / SIZE for side in images.shape[-2:])

    def found(thing) -> Detection:
        sides = ((thing.x - SIDE / 2) * width, (thing.y - SIDE / 2) * height)
        box = (*sides, sides[0] + SIDE * width, sides[1] + SIDE * height)
        return Detection(thing.name, 1.0, box, thing.color or thing.shade)

    return [
        [found(thing) for thing in reading.things if thing.name in names]
        for reading, names in zip(read(images), classes, strict=True)
    ]


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
