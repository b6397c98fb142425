"""Pictures and scores of a run's evaluations, kept in its folder for its report and its film."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from rewards.files import open_image

from ..config.files import write_atomic
from ..config.text import read_text
from ..drawing.grids import to_pil

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

SHEET = 4096  # px: largest side of the sheet that holds the pictures of an evaluation
LOSSLESS = 2**20  # pixels: a sheet up to this size is lossless, a larger one has quality 90


@dataclass(frozen=True)
class Evaluated:
    """One evaluation: one kept picture per held-out prompt, and the scores of all pictures drawn.

    scores: {name: per prompt, the scores of its pictures, the kept picture first}; None if a
    picture was not scored.
    """

    epoch: int
    prompts: list[str]
    scores: dict[str, list[list[float | None]]]
    size: tuple[int, int]
    sheet: Path

    @cached_property
    def pictures(self) -> list[Image.Image]:
        """The kept pictures, one per prompt. Raises ValueError if the sheet cannot be read."""
        (width, height), columns = self.size, _columns(len(self.prompts))
        sheet = open_image(self.sheet)
        if sheet.width < columns * width or sheet.height < height * math.ceil(
            len(self.prompts) / columns
        ):
            raise ValueError(f"{self.sheet} is too small for its pictures; remove it")
        corners = [divmod(i, columns) for i in range(len(self.prompts))]
        return [
            sheet.crop((x * width, y * height, (x + 1) * width, (y + 1) * height))
            for y, x in corners
        ]

    def notes(self, i: int) -> dict[str, float]:
        """The scores of the kept picture of prompt i."""
        return {k: v[i][0] for k, v in self.scores.items() if v[i][0] is not None}  # type: ignore[misc]


def fitted(image: Tensor, n: int) -> Image.Image:
    """(3, H, W) in [0, 1] as a picture, made small enough that n of its size fit on a sheet."""
    picture = to_pil(image)
    side = max(1, SHEET // _columns(n))
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def save(
    run_dir: str | os.PathLike[str],
    epoch: int,
    prompts: Sequence[str],
    pictures: Sequence[Image.Image],
    scores: Mapping[str, Sequence[float]],
) -> None:
    """Write pictures/epoch_NNNN.webp and .json. pictures: one per prompt, all of one size. scores:
    {name: scores of all pictures, prompt by prompt, the same number for each prompt}."""
    (width, height), columns = pictures[0].size, _columns(len(prompts))
    rows = math.ceil(len(prompts) / columns)
    sheet = Image.new("RGB", (columns * width, rows * height))
    for i, picture in enumerate(pictures):
        y, x = divmod(i, columns)
        sheet.paste(picture, (x * width, y * height))
    each = len(next(iter(scores.values()))) // len(prompts)
    known = {k: [x if math.isfinite(x) else None for x in v] for k, v in scores.items()}
    table = {
        "epoch": epoch,
        "size": [width, height],
        "prompts": list(prompts),
        "scores": {k: [v[i : i + each] for i in range(0, len(v), each)] for k, v in known.items()},
    }
    data = io.BytesIO()
    sheet.save(data, "WEBP", quality=90, lossless=sheet.width * sheet.height <= LOSSLESS)
    path = Path(run_dir) / "pictures" / f"epoch_{epoch:04d}.webp"
    write_atomic(path, data.getvalue())
    # last, because `load` looks for the .json
    write_atomic(path.with_suffix(".json"), json.dumps(table, allow_nan=False).encode())


def load(run_dir: str | os.PathLike[str]) -> list[Evaluated]:
    """The evaluations of a run in the order of their epochs; empty if it kept no pictures.

    An evaluation without its sheet is left out. Raises ValueError if a file cannot be read."""
    found = []
    for path in (Path(run_dir) / "pictures").glob("epoch_*.json"):
        sheet = path.with_suffix(".webp")
        if not sheet.exists():
            continue
        try:
            found.append(_evaluated(json.loads(read_text(path)), sheet))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read ({error!r}); remove it") from error
    return sorted(found, key=lambda e: e.epoch)


def _evaluated(table: dict[str, Any], sheet: Path) -> Evaluated:
    prompts, scores = list(map(str, table["prompts"])), dict(table["scores"])
    width, height = map(int, table["size"])
    for name, rows in scores.items():
        values = [x for row in rows for x in row]
        known = all(x is None or isinstance(x, (int, float)) for x in values)
        if len(rows) != len(prompts) or not all(rows) or not known:
            raise ValueError(f"the scores {name!r} are not those of {len(prompts)} prompts")
    if not prompts or min(width, height) < 1:
        raise ValueError("it has no pictures")
    return Evaluated(int(table["epoch"]), prompts, scores, (width, height), sheet)


def drop(run_dir: str | os.PathLike[str], after: int) -> None:
    """Remove the files of epochs after `after`, because a resumed run draws them again."""
    for path in (Path(run_dir) / "pictures").glob("epoch_*.*"):
        if int(path.stem.removeprefix("epoch_")) > after:
            path.unlink()


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most `most` >= 2 of `items`, evenly spaced, including the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(k * (len(items) - 1) / (most - 1))] for k in range(most)]


def _columns(n: int) -> int:
    return math.ceil(math.sqrt(n))
