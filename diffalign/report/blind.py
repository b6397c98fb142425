"""A blind test, `diffalign blind A B`: which picture of a pair is better, without knowing whose."""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

from PIL import Image, ImageOps

from rewards.files import open_image

from ..config.files import check_file, write_atomic
from ..drawing.grids import comparison_grid, save_png
from ..record import pictures

SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")
SIDE = 256  # px at which a pair is shown, at least


@dataclass(frozen=True)
class Pair:
    """What the two sides made of one prompt. swapped: B is shown on the left."""

    prompt: str
    a: Image.Image
    b: Image.Image
    swapped: bool

    @property
    def shown(self) -> tuple[Image.Image, Image.Image]:
        return (self.b, self.a) if self.swapped else (self.a, self.b)


def read(path: str | os.PathLike[str], first: bool = False) -> dict[str, Image.Image]:
    """Pictures by prompt, of the last evaluation of a run folder (or of its first, the base
    model's), or by name of a folder of pictures. Raises ValueError where there are none."""
    if shots := pictures.load(path):
        shot = shots[0 if first else -1]
        return dict(zip(shot.prompts, shot.pictures, strict=True))
    found = sorted(p for p in Path(path).glob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(
            f"{path} holds neither the evaluations of a run nor pictures; give a run folder, or "
            "two folders of pictures with the same names"
        )
    return {p.stem: open_image(p).convert("RGB") for p in found}


def pairs(sides: Sequence[str | os.PathLike[str]], most: int, seed: int) -> list[Pair]:
    """At most so many pairs, chosen and shuffled by the seed, of two sides or of one run before and
    after training. Raises ValueError where the sides have no prompt in common."""
    a, b = read(sides[0], first=len(sides) == 1), read(sides[-1])
    common = [prompt for prompt in a if prompt in b]
    if not common:
        raise ValueError(f"{sides[0]} and {sides[-1]} have no prompts or names in common")
    draw = random.Random(seed)
    chosen = draw.sample(common, min(most, len(common)))
    return [Pair(prompt, a[prompt], b[prompt], draw.random() < 0.5) for prompt in chosen]


def interval(wins: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a binomial share."""
    z = 1.959964
    center, spread = wins + z * z / 2, z * math.sqrt(wins * (n - wins) / n + z * z / 4)
    return (center - spread) / (n + z * z), (center + spread) / (n + z * z)


def chance(wins: int, n: int) -> float:
    """How likely chance alone is to be as far from one half, or farther (two-sided)."""
    least = min(wins, n - wins)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n)


def verdict(shown: Sequence[Pair], answers: str, names: tuple[str, str]) -> str:
    """What answers, 1 = left, 2 = right, 0 = no difference, say. Raises ValueError for others, and
    where their number is not that of the pairs."""
    if len(answers) != len(shown) or set(answers) - set("012"):
        raise ValueError(
            f"--answers {answers!r}: there are {len(shown)} pairs; write as many digits, 1 = the "
            "left picture is better, 2 = the right one, 0 = no difference"
        )
    decided = [(one, pair) for one, pair in zip(answers, shown, strict=True) if one != "0"]
    wins, n = sum((one == "1") == pair.swapped for one, pair in decided), len(decided)
    if not n:
        return f"no difference was seen in {len(shown)} pairs"
    low, high = interval(wins, n)
    return (
        f"{names[1]} beats {names[0]} in {wins} of {n} pairs that differ ({len(shown) - n} do not):"
        f" {wins / n:.0%}, 95 % interval {low:.0%} to {high:.0%}; as far from half by chance alone:"
        f" p = {chance(wins, n):.2g}"
    )


def page(shown: Sequence[Pair], names: tuple[str, str]) -> str:
    """The page that shows the pairs in an order of its own, counts, and states the interval."""

    def encoded(picture: Image.Image) -> str:
        data = io.BytesIO()
        picture.save(data, "WEBP", lossless=True)
        return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"

    found = [{"prompt": p.prompt, "a": encoded(p.a), "b": encoded(p.b)} for p in shown]
    # "</" would end the script
    data = json.dumps({"pairs": found, "names": list(names)}).replace("</", "<\\/")
    return Template(files("diffalign.report").joinpath("blind.html").read_text("utf-8")).substitute(
        data=data
    )


def sheet(shown: Sequence[Pair]) -> Image.Image:
    """The pairs on one picture, numbered, the sides as `verdict` takes them."""
    left, right = zip(*(pair.shown for pair in shown), strict=True)

    def enlarged(picture: Image.Image) -> Image.Image:
        return ImageOps.contain(picture, (SIDE, SIDE), Image.Resampling.NEAREST)

    columns = {"1": [enlarged(p) for p in left], "2": [enlarged(p) for p in right]}
    return comparison_grid(columns, [f"{i}. {p.prompt}" for i, p in enumerate(shown, 1)])


def main(arguments: Sequence[str] | None = None) -> int:
    """`diffalign blind`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="diffalign blind",
        description="A blind test: a page that shows pairs of pictures, left and right at random, "
        "asks which is better, and states how often B won, with its interval. Of one run: B is "
        "after training, A before.",
    )
    parser.add_argument("sides", nargs="+", help="a run; or A B, runs or folders of pictures")
    parser.add_argument("--pairs", type=int, default=40, help="at most; default: 40")
    parser.add_argument("--seed", type=int, default=0, help="of the choice, and of the sheet")
    parser.add_argument("--out", default="blind.html", help="page to write; default: blind.html")
    parser.add_argument("--sheet", help="PNG to write as well, with the pairs numbered")
    parser.add_argument(
        "--answers", help="to the sheet: a digit a pair, 1 left, 2 right, 0 no difference"
    )
    args = parser.parse_args(arguments)
    if len(args.sides) > 2:
        raise ValueError(f"{len(args.sides)} sides were given; compare two, or one run with itself")
    if args.pairs < 1:
        raise ValueError(f"--pairs {args.pairs} shows nothing; use 1 or more")
    shown = pairs(args.sides, args.pairs, args.seed)
    name = Path(args.sides[-1]).name
    names = ("before", "after") if len(args.sides) == 1 else (Path(args.sides[0]).name, name)
    if args.answers is not None:
        print(verdict(shown, args.answers, names))
        return 0
    check_file(args.out, "--out")
    write_atomic(Path(args.out), page(shown, names).encode("utf-8", "replace"))
    print(args.out)
    if args.sheet:
        save_png(sheet(shown), args.sheet)
        print(args.sheet)
    return 0
