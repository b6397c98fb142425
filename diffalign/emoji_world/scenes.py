"""EmojiWorld scenes: what is in a picture, the caption that says so, and the pixels.

A `Scene` is the ground truth; `caption(scene)` and `render(scene)` are functions of it, so the
object, count, colour, position and background behind every prompt are exact labels. Pictures are
64×64 RGB. Sprites come from two licence-clean emoji sets (see assets/emoji-world/NOTICE.md).
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

ASSETS = Path(__file__).resolve().parents[2] / "assets"
SPRITES = ASSETS / "emoji-world" / "sprites"
SIZE = 64  # pixels a side of a scene

# name -> the emoji it is cut from; names are what a person would type
OBJECTS: dict[str, str] = {
    "dog": "🐶", "cat": "🐱", "panda": "🐼", "frog": "🐸", "fox": "🦊", "lion": "🦁",
    "pig": "🐷", "koala": "🐨", "monkey": "🐵", "chicken": "🐔", "penguin": "🐧", "owl": "🦉",
    "fish": "🐟", "octopus": "🐙", "butterfly": "🦋", "turtle": "🐢",
    "apple": "🍎", "banana": "🍌", "orange": "🍊", "strawberry": "🍓", "watermelon": "🍉",
    "grapes": "🍇", "pineapple": "🍍", "carrot": "🥕", "mushroom": "🍄", "pizza": "🍕",
    "burger": "🍔", "donut": "🍩", "cake": "🎂", "ice cream": "🍦",
    "car": "🚗", "bus": "🚌", "rocket": "🚀", "sailboat": "⛵", "house": "🏠", "castle": "🏰",
    "tree": "🌳", "cactus": "🌵", "sunflower": "🌻", "rose": "🌹",
    "star": "⭐", "heart": "❤", "crown": "👑", "balloon": "🎈", "gift": "🎁", "clock": "⏰",
    "guitar": "🎸", "ghost": "👻",
}  # fmt: skip
PLURALS = {
    "fish": "fish", "grapes": "bunches of grapes", "strawberry": "strawberries", "fox": "foxes",
    "butterfly": "butterflies", "octopus": "octopuses", "monkey": "monkeys", "bus": "buses",
    "cactus": "cacti", "ice cream": "ice creams",
}  # fmt: skip
STYLES = ("glossy", "flat")  # Noto, Fluent flat
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 40, 40), "orange": (245, 140, 20), "yellow": (250, 210, 30),
    "green": (50, 165, 70), "blue": (45, 100, 225), "purple": (140, 70, 190),
    "pink": (245, 120, 175), "brown": (135, 85, 50),
}  # fmt: skip
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255), "gray": (200, 200, 204), "pink": (255, 205, 220),
    "yellow": (255, 240, 175), "green": (190, 230, 190), "blue": (180, 215, 250),
    "purple": (215, 200, 245), "orange": (255, 215, 170), "black": (28, 28, 34),
}  # fmt: skip
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
NUMBERS = ("zero", "one", "two", "three", "four")


@dataclass(frozen=True)
class Item:
    """One sprite: `size` and centre (`x`, `y`) in pixels; `colour` None = its own colours."""

    name: str
    style: str
    colour: str | None
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Scene:
    """Ground truth of a picture. `kind`: single, count or relation; `says_*`: what is captioned."""

    kind: str
    items: tuple[Item, ...]
    background: str
    relation: str | None = None
    says_background: bool = True
    says_style: bool = False


def article(words: str) -> str:
    """ "a red apple", "an orange", "a bunch of grapes"."""
    if words.startswith("grapes") or words.endswith(" grapes"):
        words = words.replace("grapes", "bunch of grapes")
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(name: str) -> str:
    return PLURALS.get(name, name + "s")


def caption(scene: Scene) -> str:
    """The sentence that describes `scene`, e.g. "a flat red car on a blue background"."""

    def noun(item: Item, many: bool = False) -> str:
        style = item.style if scene.says_style else None
        name = plural(item.name) if many else item.name
        return " ".join(w for w in (style, item.colour, name) if w)

    first = scene.items[0]
    if scene.kind == "count":
        text = f"{NUMBERS[len(scene.items)]} {noun(first, many=True)}"
    elif scene.kind == "relation":
        text = f"{article(noun(first))} {scene.relation} {article(noun(scene.items[1]))}"
    else:
        text = article(noun(first))
    if scene.says_background:
        text += f" on {article(scene.background)} background"
    return text


def sample_scene(rng: random.Random, kind: str = "single") -> Scene:
    """A random scene of one `kind`. The caption names the background 2 times in 3, the style 1 in
    4, and one object in two is recoloured. Sizes vary and are never named: that freedom is the
    policy's."""
    background = rng.choice(list(BACKGROUNDS))
    style = rng.choice(STYLES)

    def item(name: str, x: float, y: float, size: float) -> Item:
        # a colour equal to the background's name would hide the object
        colours = [c for c in COLOURS if c != background]
        colour = rng.choice(colours) if rng.random() < 0.5 else None
        return Item(name, style, colour, x, y, size)

    relation = None
    if kind == "single":
        size = rng.uniform(38, 54)
        x, y = (SIZE / 2 + rng.uniform(-1.5, 1.5) for _ in range(2))
        items = (item(rng.choice(list(OBJECTS)), x, y, size),)
    elif kind == "count":
        first = item(rng.choice(list(OBJECTS)), 0, 0, 0)
        cells = rng.sample([(x, y) for x in (16, 48) for y in (16, 48)], rng.randint(2, 4))
        items = tuple(
            Item(first.name, style, first.colour, x + rng.uniform(-1.5, 1.5),
                 y + rng.uniform(-1.5, 1.5), rng.uniform(24, 28))
            for x, y in cells
        )  # fmt: skip
    elif kind == "relation":
        relation, (dx, dy) = rng.choice(list(RELATIONS.items()))
        a, b = rng.sample(list(OBJECTS), 2)
        size = rng.uniform(25, 29)
        items = tuple(
            item(name, SIZE / 2 + sign * dx * 16 + rng.uniform(-1, 1),
                 SIZE / 2 + sign * dy * 16 + rng.uniform(-1, 1), size)
            for name, sign in ((a, 1), (b, -1))
        )  # fmt: skip
    else:
        raise ValueError(f"kind={kind!r} is not a scene kind; use single, count or relation")
    return Scene(kind, items, background, relation, rng.random() < 2 / 3, rng.random() < 0.25)


@lru_cache
def _sheet(style: str) -> dict[str, Image.Image]:
    """Sprites of one style, cut from its sheet: 64-pixel cells, 8 a row, in index order."""
    names = json.loads((SPRITES / "index.json").read_text("utf-8"))
    sheet = Image.open(SPRITES / f"{style}.png").convert("RGBA")
    return {
        name: sheet.crop((64 * (i % 8), 64 * (i // 8), 64 * (i % 8) + 64, 64 * (i // 8) + 64))
        for i, name in enumerate(names)
    }


@lru_cache(maxsize=4096)
def sprite(name: str, style: str, colour: str | None) -> Image.Image:
    """64×64 RGBA sprite. A tint keeps the luminance of each pixel: white stays white."""
    image = _sheet(style)[name]
    if colour is None:
        return image
    pixels = np.asarray(image, np.float32)
    luminance = pixels[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32) / 255
    seen = pixels[..., 3] > 128
    luminance = luminance - luminance[seen].mean() + 0.5  # a dark sprite still shows its new colour
    luminance = luminance.clip(0, 1)[..., None]
    tint = np.array(COLOURS[colour], np.float32)
    dark, light = luminance * 2 * tint, 255 - (1 - luminance) * 2 * (255 - tint)
    rgb = np.where(luminance < 0.5, dark, light)
    return Image.fromarray(np.concatenate([rgb, pixels[..., 3:]], -1).round().astype(np.uint8))


def render(scene: Scene) -> Image.Image:
    """The 64×64 RGB picture of `scene`."""
    canvas = Image.new("RGBA", (SIZE, SIZE), (*BACKGROUNDS[scene.background], 255))
    for it in scene.items:
        side = round(it.size)
        image = sprite(it.name, it.style, it.colour).resize((side, side), Image.Resampling.LANCZOS)
        canvas.alpha_composite(
            image, (max(0, round(it.x - side / 2)), max(0, round(it.y - side / 2)))
        )
    return canvas.convert("RGB")
