"""EmojiWorld scenes: what is in a picture, the caption that says so, and the pixels.

A `Scene` is the ground truth; `caption(scene)` and `render(scene)` are functions of it, so the
object, count, colour, position and background behind every prompt are exact labels. Pictures are
64×64 RGB. Sprites come from two licence-clean emoji sets (see assets/emoji-world/NOTICE.md).
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
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
    "fish": "🐟", "octopus": "🐙", "butterfly": "🦋", "turtle": "🐢", "bear": "🐻", "mouse": "🐭",
    "rabbit": "🐰", "cow": "🐮", "unicorn": "🦄", "tiger": "🐯", "elephant": "🐘", "whale": "🐳",
    "crab": "🦀", "snail": "🐌", "bee": "🐝", "ladybug": "🐞", "duck": "🦆", "dinosaur": "🦕",
    "chick": "🐤", "hedgehog": "🦔",
    "apple": "🍎", "banana": "🍌", "orange": "🍊", "strawberry": "🍓", "watermelon": "🍉",
    "grapes": "🍇", "pineapple": "🍍", "carrot": "🥕", "mushroom": "🍄", "pizza": "🍕",
    "burger": "🍔", "donut": "🍩", "cake": "🎂", "ice cream": "🍦", "lemon": "🍋", "cherry": "🍒",
    "peach": "🍑", "pear": "🍐", "tomato": "🍅", "avocado": "🥑", "eggplant": "🍆", "kiwi": "🥝",
    "pretzel": "🥨", "croissant": "🥐", "cookie": "🍪", "cupcake": "🧁", "lollipop": "🍭",
    "tree": "🌳", "cactus": "🌵", "sunflower": "🌻", "rose": "🌹", "tulip": "🌷",
    "palm tree": "🌴", "maple leaf": "🍁",
    "car": "🚗", "bus": "🚌", "truck": "🚚", "airplane": "✈", "rocket": "🚀", "sailboat": "⛵",
    "house": "🏠", "castle": "🏰", "tent": "⛺", "volcano": "🌋",
    "star": "⭐", "moon": "🌙", "sun": "🌞", "cloud": "☁", "rainbow": "🌈", "flame": "🔥",
    "snowman": "⛄", "heart": "❤", "crown": "👑", "balloon": "🎈", "gift": "🎁", "clock": "⏰",
    "guitar": "🎸", "drum": "🥁", "ghost": "👻", "robot": "🤖", "pumpkin": "🎃", "umbrella": "☔",
    "key": "🔑", "bell": "🔔", "book": "📕", "light bulb": "💡", "camera": "📷",
    "television": "📺", "trophy": "🏆", "soccer ball": "⚽", "basketball": "🏀", "dice": "🎲",
    "gem": "💎", "lock": "🔒", "hammer": "🔨", "envelope": "✉", "magnet": "🧲", "shirt": "👕",
    "shoe": "👟", "hat": "🎩",
}  # fmt: skip
PLURALS = {
    "fish": "fish", "grapes": "bunches of grapes", "strawberry": "strawberries", "fox": "foxes",
    "butterfly": "butterflies", "octopus": "octopuses", "bus": "buses", "cactus": "cacti",
    "mouse": "mice", "cherry": "cherries", "peach": "peaches", "tomato": "tomatoes",
    "maple leaf": "maple leaves", "volcano": "volcanoes", "snowman": "snowmen",
    "trophy": "trophies", "dice": "dice",
}  # fmt: skip
STYLES = ("glossy", "flat")  # Noto, Fluent flat
COLORS: dict[str, tuple[int, int, int]] = {
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
KINDS = ("single", "pair", "count", "relation")
CELLS = [(x, y) for x in (16, 48) for y in (16, 48)]  # centres that a count is drawn from


@dataclass(frozen=True)
class Item:
    """One sprite: `size` and centre (`x`, `y`) in pixels; `color` None = its own colours."""

    name: str
    style: str
    color: str | None
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Scene:
    """Ground truth of a picture. `kind`: one of KINDS; `says_*`: what is captioned."""

    kind: str
    items: tuple[Item, ...]
    background: str
    relation: str | None = None
    says_background: bool = True
    says_style: bool = False


def article(words: str) -> str:
    """ "a red apple", "an orange", "a unicorn", "a bunch of grapes"."""
    if words.startswith("grapes") or words.endswith(" grapes"):
        words = words.replace("grapes", "bunch of grapes")
    vowel = words[0] in "aeiou" and not words.startswith("unicorn")
    return f"{'an' if vowel else 'a'} {words}"


def plural(name: str) -> str:
    return PLURALS.get(name, name + "s")


def caption(scene: Scene) -> str:
    """The sentence that describes `scene`, e.g. "a flat red car on a blue background"."""

    def noun(item: Item, many: bool = False) -> str:
        style = item.style if scene.says_style else None
        name = plural(item.name) if many else item.name
        return " ".join(w for w in (style, item.color, name) if w)

    first = scene.items[0]
    if scene.kind == "count":
        text = f"{NUMBERS[len(scene.items)]} {noun(first, many=True)}"
    elif scene.kind in ("pair", "relation"):
        text = f"{article(noun(first))} {scene.relation or 'and'} {article(noun(scene.items[1]))}"
    else:
        text = article(noun(first))
    if scene.says_background:
        text += f" on {article(scene.background)} background"
    return text


def reserved_color(name: str, color: str | None) -> bool:
    """Of every object one colour is held out."""
    if color is None:
        return False
    return (list(OBJECTS).index(name) + list(COLORS).index(color)) % len(COLORS) == 0


def held_out(scene: Scene) -> bool:
    """Whether `scene` shows a reserved combination: one colour of every object, one background of
    every single object, one number of one object in four, or one pair of objects in eight.

    No denoiser and no VAE was trained on these. The CLIP reward, the judge and the verifier were,
    and with the reward the CLIP text tower of emoji-sd and emoji-flux.
    """
    if any(reserved_color(item.name, item.color) for item in scene.items):
        return True
    names, backgrounds = list(OBJECTS), list(BACKGROUNDS)
    places = [names.index(item.name) for item in scene.items]
    if scene.kind == "single":
        return (places[0] + backgrounds.index(scene.background)) % len(backgrounds) == 0
    if scene.kind == "count":
        return places[0] % 12 + 2 == len(places)
    return sum(places) % 8 == 0


def sample_scene(rng: random.Random, kind: str = "single", reserved: bool | None = False) -> Scene:
    """A random scene of one `kind`, with a reserved combination (True), with none (False) or either
    way (None), see `held_out`.

    One object in two is recoloured. The caption names the background 2 times in 3 and the style 1
    in 3. Sizes vary and are never named: that freedom is the policy's.
    """
    while True:
        scene = _sample_scene(rng, kind)
        if reserved is None or held_out(scene) == reserved:
            return scene


def _sample_scene(rng: random.Random, kind: str) -> Scene:
    background = rng.choice(list(BACKGROUNDS))
    style = rng.choice(STYLES)

    def look(name: str) -> str | None:
        """A colour, or None for its own; never one that the background hides."""
        colors = [c for c in COLORS if c != background]
        if rng.random() < 0.5 or not readable(name, style, background):
            return rng.choice(colors)
        return None

    relation = None
    if kind == "single":
        name = rng.choice(list(OBJECTS))
        x, y = (SIZE / 2 + rng.uniform(-1.5, 1.5) for _ in range(2))
        items = (Item(name, style, look(name), x, y, rng.uniform(42, 52)),)
    elif kind == "count":
        name = rng.choice(list(OBJECTS))
        color = look(name)
        cells = rng.sample(CELLS, rng.randint(2, 4))
        items = tuple(
            Item(name, style, color, x + rng.uniform(-1, 1), y + rng.uniform(-1, 1),
                 rng.uniform(26, 30))
            for x, y in cells
        )  # fmt: skip
    elif kind in ("pair", "relation"):
        relation, (dx, dy) = rng.choice(list(RELATIONS.items()))
        size = rng.uniform(26, 30)
        items = tuple(
            Item(name, style, look(name), SIZE / 2 + sign * dx * 16 + rng.uniform(-1, 1),
                 SIZE / 2 + sign * dy * 16 + rng.uniform(-1, 1), size)
            for name, sign in zip(rng.sample(list(OBJECTS), 2), (1, -1), strict=True)
        )  # fmt: skip
        relation = relation if kind == "relation" else None
    else:
        raise ValueError(f"kind={kind!r} is not a scene kind; use {', '.join(KINDS)}")
    return Scene(kind, items, background, relation, rng.random() < 2 / 3, rng.random() < 1 / 3)


def alterations(scene: Scene, rng: random.Random) -> dict[str, Scene]:
    """Scenes like `scene` in all but one respect, whose captions are wrong about it.

    Keys: "object"; "colour", "background", "count" and "position" where the caption names them;
    "binding", the colours of two objects swapped, where these differ.
    """
    first, others = scene.items[0], scene.items[1:]
    taken = {item.name for item in scene.items}
    name = rng.choice([n for n in OBJECTS if n not in taken])
    result = {}

    def alter(**changes) -> Scene:
        """The scene with its first item changed; in a count with all, which look alike."""
        rest = tuple(replace(i, **changes) for i in others) if scene.kind == "count" else others
        return replace(scene, items=(replace(first, **changes), *rest))

    if others and scene.kind != "count" and rng.random() < 0.5:
        result["object"] = replace(scene, items=(first, replace(others[0], name=name)))
    else:
        result["object"] = alter(name=name)
    if first.color:
        result["colour"] = alter(color=rng.choice([c for c in COLORS if c != first.color]))
    if scene.says_background:
        background = rng.choice([b for b in BACKGROUNDS if b != scene.background])
        result["background"] = replace(scene, background=background)
    if scene.kind == "count":
        n = rng.choice([n for n in (2, 3, 4) if n != len(scene.items)])
        items = tuple(replace(first, x=x, y=y) for x, y in rng.sample(CELLS, n))
        result["count"] = replace(scene, items=items)
    if scene.kind == "relation":
        relation = rng.choice([r for r in RELATIONS if r != scene.relation])
        dx, dy = RELATIONS[relation]
        items = tuple(
            replace(item, x=SIZE / 2 + sign * dx * 16, y=SIZE / 2 + sign * dy * 16)
            for item, sign in zip(scene.items, (1, -1), strict=True)
        )
        result["position"] = replace(scene, items=items, relation=relation)
    if scene.kind in ("pair", "relation") and first.color != others[0].color:
        swapped = (replace(first, color=others[0].color), replace(others[0], color=first.color))
        result["binding"] = replace(scene, items=swapped)
    return result


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
def sprite(name: str, style: str, color: str | None) -> Image.Image:
    """64×64 RGBA sprite. A tint keeps the luminance of each pixel: white stays white."""
    image = _sheet(style)[name]
    if color is None:
        return image
    pixels = np.asarray(image, np.float32)
    luminance = pixels[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32) / 255
    seen = pixels[..., 3] > 128
    luminance = luminance - luminance[seen].mean() + 0.5  # a dark sprite still shows its new colour
    luminance = luminance.clip(0, 1)[..., None]
    tint = np.array(COLORS[color], np.float32)
    dark, light = luminance * 2 * tint, 255 - (1 - luminance) * 2 * (255 - tint)
    rgb = np.where(luminance < 0.5, dark, light)
    return Image.fromarray(np.concatenate([rgb, pixels[..., 3:]], -1).round().astype(np.uint8))


@lru_cache
def readable(name: str, style: str, background: str) -> bool:
    """Whether a sprite in its own colours stands out from a background."""
    pixels = np.asarray(_sheet(style)[name], np.float32)
    seen = pixels[..., :3][pixels[..., 3] > 128]
    near = np.abs(seen - np.array(BACKGROUNDS[background])).max(-1) < 40
    return bool(near.mean() < 0.5)


def render(scene: Scene) -> Image.Image:
    """The 64×64 RGB picture of `scene`."""
    canvas = Image.new("RGBA", (SIZE, SIZE), (*BACKGROUNDS[scene.background], 255))
    for it in scene.items:
        side = round(it.size)
        image = sprite(it.name, it.style, it.color).resize((side, side), Image.Resampling.LANCZOS)
        canvas.alpha_composite(
            image, (max(0, round(it.x - side / 2)), max(0, round(it.y - side / 2)))
        )
    return canvas.convert("RGB")
