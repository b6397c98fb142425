"""The film of a run, `diffalign film`: the same prompts and noise over its evaluations."""

from __future__ import annotations

import argparse
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..config.files import check_folder, write_atomic
from ..drawing.fonts import Font
from ..drawing.grids import GRAY, GUTTER, INK, comparison_grid, fit, image_grid, save_png
from ..record import pictures
from ..record.pictures import Evaluated
from .run import epoch_name

FRAMES = 60  # most frames of an animation
SHOWN, LAST = 500, 2000  # ms that a frame is shown, and the last frame


def film(
    run_dir: str | os.PathLike[str],
    prompts: int = 8,
    strip_epochs: int = 8,
    cell: int = 256,
    out: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Write the film of the first `prompts` prompts and return the paths of its files: film.png, a
    strip of at most `strip_epochs` evaluations; film.webp and film.gif, an animation of up to 60.

    cell: px of a picture. out: folder to write to; None = the run's. Raises ValueError for a run
    that kept no pictures.
    """
    folder, shots = Path(out or run_dir), pictures.load(run_dir)
    if not shots:
        raise ValueError(
            f"{run_dir} holds no pictures/epoch_*.json; give the folder of a run that was evaluated"
        )
    check_folder(folder, "--out")
    # a run may have been resumed with other prompts
    shots = [s for s in shots if s.prompts == shots[-1].prompts]
    strip = strip_of(pictures.spread(shots, strip_epochs), prompts, cell)
    what = {"run": str(run_dir), "epochs": [s.epoch for s in shots]}
    save_png(strip, folder / "film.png", what)
    frames = [frame(shot, prompts, cell) for shot in pictures.spread(shots, FRAMES)]
    # a GIF has 256 colours a frame; without dithering they show as bands
    dithered = [f.quantize(palette=f.quantize(256)) for f in frames]
    for suffix, images in (("webp", frames), ("gif", dithered)):
        write_atomic(folder / f"film.{suffix}", _animated(images, suffix))
    return [folder / f"film.{suffix}" for suffix in ("png", "webp", "gif")]


def webp(shots: Sequence[Evaluated], prompts: int, cell: int) -> bytes:
    """The animation of some evaluations, as in film.webp."""
    return _animated([frame(shot, prompts, cell) for shot in shots], "webp")


def _animated(frames: Sequence[Image.Image], suffix: str) -> bytes:
    times, data = [SHOWN] * (len(frames) - 1) + [LAST], io.BytesIO()
    frames[0].save(
        data, suffix.upper(), save_all=True, append_images=frames[1:], duration=times, loop=0,
        quality=85,
    )  # fmt: skip
    return data.getvalue()


def strip_of(
    shots: Sequence[Evaluated], prompts: int, cell: int, flagged: int | None = None
) -> Image.Image:
    """One row per prompt, one column per evaluation, the rewards under the pictures; the epoch that
    is `flagged` says so."""
    texts, rewards, columns = shots[0].prompts[:prompts], {}, {}
    for s in shots:
        name = epoch_name(s.epoch) + (": flagged" if s.epoch == flagged else "")
        rewards[name] = [s.notes(i).get("reward") for i in range(len(texts))]
        columns[name] = s.pictures[: len(texts)]
    return comparison_grid(columns, texts, rewards, cell)


def frame(shot: Evaluated, prompts: int, cell: int) -> Image.Image:
    """The pictures of one evaluation above their prompts, its epoch and mean reward on top."""
    shown, texts = fit(shot.pictures[:prompts], cell), shot.prompts[:prompts]
    across = math.ceil(len(shown) / math.ceil(len(shown) / 4))  # rows as even as possible
    # no scores: with them the frames would differ in height
    body = image_grid(shown, across, texts)
    values = [x for row in shot.scores.get("reward", []) for x in row if x is not None]
    size = min(max(body.width / 45, 14), 28)
    font, top = Font(size), round(size * 1.3) + 2 * GUTTER
    canvas = Image.new("RGB", (body.width, body.height + top), "white")
    canvas.paste(body, (0, top))
    font.draw(canvas, GUTTER, GUTTER, epoch_name(shot.epoch), INK)
    if values:
        mean = f"mean reward {sum(values) / len(values):.3f}"
        font.draw(canvas, body.width - GUTTER, GUTTER, mean, GRAY, "right")
    return canvas


def main(arguments: Sequence[str] | None = None) -> int:
    """`diffalign film`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="diffalign film", description="The evaluations of a run as a strip and an animation."
    )
    parser.add_argument("run", help="run folder")
    parser.add_argument("--prompts", type=int, default=8, help="pictures shown at a time")
    parser.add_argument("--epochs", type=int, default=8, help="columns of the strip at most")
    parser.add_argument("--cell", type=int, default=256, help="side of a picture in pixels")
    parser.add_argument("--out", help="folder to write to; default: the run's")
    args = parser.parse_args(arguments)
    for name, least in (("prompts", 1), ("epochs", 2), ("cell", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)} is too few; use {least} or more")
    for path in film(args.run, args.prompts, args.epochs, args.cell, args.out):
        print(path)
    return 0
