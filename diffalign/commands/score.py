"""Scores of finished pictures: `diffalign score`, no training, no denoiser."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import torch
from tqdm import tqdm

import rewards
from rewards.device import choose_device, default_device
from rewards.files import IMAGE_SUFFIXES, MOST_PIXELS, load_image

from ..config import prompts
from ..config.files import write_atomic
from ..config.prompts import Prompt, for_rewards
from ..config.text import unusable
from . import arguments as arguments_of


def pair(folder: Path, file: str | None) -> list[tuple[Path, Prompt]]:
    """The pictures of a folder, at any depth, in the order of their names, with their prompts.

    A prompt of the file belongs to the picture that its "image" names (a path inside the folder).
    If no prompt has an "image", prompts belong to the pictures in order. Without a file every
    prompt is "". Raises ValueError for a folder without pictures and for prompts that do not fit
    them.
    """
    if not folder.is_dir():
        what = "is a file, give its folder" if folder.is_file() else "does not exist"
        raise ValueError(f"folder of pictures {folder} {what}")
    inside = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]
    paths = [p for p in inside if not p.is_dir()]
    if not paths:
        kinds = ", ".join(IMAGE_SUFFIXES)
        raise ValueError(f"{folder} holds no pictures ({kinds}); give a folder that does")
    for path in paths:
        if problem := unusable(str(path)):
            raise ValueError(f"the name of picture {str(path)!r} {problem}")
    if file is None:
        return [(path, Prompt("")) for path in paths]
    texts = prompts.load(file)
    named: dict[str, Prompt] = {}
    lines = [p for p in texts if "image" in p.metadata]
    if lines and len(lines) < len(texts):
        raise ValueError(f'{file}: {len(lines)} of {len(texts)} lines have an "image"; all or none')
    for prompt in lines:
        name = prompt.metadata["image"]
        if not isinstance(name, str):
            raise ValueError(f'{file}: "image" is {name!r}, not the path of a picture')
        if named.setdefault(PurePosixPath(name).as_posix(), prompt) is not prompt:
            raise ValueError(f"{file} has two prompts for {name}; give one")
    if not named:
        if len(texts) != len(paths):
            raise ValueError(
                f"{file} has {len(texts)} prompts for the {len(paths)} pictures of {folder}; give "
                'one each, in the order of their names, or name them: {"image": ..., "prompt": ...}'
            )
        return list(zip(paths, texts, strict=True))
    names = [path.relative_to(folder).as_posix() for path in paths]
    missing = [name for name in names if name not in named]
    if missing:
        raise ValueError(
            f"{file} has no prompt for {missing[0]}"
            + (f" and {len(missing) - 1} others" if missing[1:] else "")
        )
    return [(path, named[name]) for path, name in zip(paths, names, strict=True)]


def score(
    folder: str,
    spec: rewards.Spec,
    prompt_file: str | None,
    out: str,
    batch: int = 16,
) -> dict[str, float]:
    """Write `out`, a CSV with columns for image, prompt and each reward of `spec`; returns the mean
    of each reward over the pictures that it scores. Rows that are there already are kept, so that
    an interrupted call goes on where it was; a file of other rewards or prompts is refused. Raises
    ValueError for bad input, before any model is read, OSError and RewardError."""
    if batch < 1:
        raise ValueError(f"--batch {batch} scores nothing; use 1 or more")
    device = default_device()
    pictures, path = pair(Path(folder), prompt_file), Path(out)
    rewards.check(spec, *for_rewards([p for _, p in pictures]))
    rows = [[p.relative_to(folder).as_posix(), prompt.text] for p, prompt in pictures]
    header = ["image", "prompt", *spec]
    done = _done(path, header, rows)
    lines = [header, *[row + values for row, values in zip(rows, done, strict=False)]]
    write_atomic(path, _csv(lines).encode())  # without a line that was cut short
    total = rewards.build(spec) if len(done) < len(rows) else None
    bar = tqdm(total=len(rows), initial=len(done), desc="scoring", unit="image")
    with path.open("a", encoding="utf-8", newline="") as file, torch.inference_mode(), bar:
        while total is not None and len(done) < len(rows):
            start, images = len(done), []
            for picture, _ in pictures[start : start + batch]:
                image = load_image(picture)
                whole = (len(images) + 1) * image[0, 0].numel() > MOST_PIXELS
                if images and (whole or image.shape != images[0].shape):
                    break  # pictures of another size go into another batch
                images.append(image)
            end = start + len(images)
            texts = for_rewards([prompt for _, prompt in pictures[start:end]])
            parts = total.to(device).score(torch.cat(images).to(device), *texts)[1]
            found = [[f"{parts[name][i]:.6g}" for name in spec] for i in range(len(images))]
            file.write(_csv(row + new for row, new in zip(rows[start:end], found, strict=True)))
            file.flush()
            done += found
            bar.update(len(found))
    columns = {k: [float(row[i]) for row in done] for i, k in enumerate(spec)}
    known = {k: [x for x in column if x == x] for k, column in columns.items()}
    return {k: statistics.fmean(column) if column else math.nan for k, column in known.items()}


def _csv(rows: Iterable[Sequence[str]]) -> str:
    return "".join(map(_line, rows))


def _line(row: Sequence[str]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\r\n").writerow(row)  # makes it quote line breaks
    return text.getvalue().removesuffix("\r\n") + "\n"


def _done(path: Path, header: list[str], rows: list[list[str]]) -> list[list[str]]:
    """The scores that the file `path` has for the first of `rows`; a line that a crash cut short is
    dropped. Raises ValueError if the file is about other rewards or pictures, or is no table of
    scores."""
    if not path.exists():
        return []
    try:
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1].decode()
        lines = list(csv.reader(io.StringIO(whole, newline="")))
        if len(lines) > 1 and len(lines[-1]) < len(header):  # cut within a prompt of several lines
            lines.pop()
        for line in lines:
            if len(line) < 2:
                raise ValueError(f"a line of {len(line)} columns")
        [float(value) for line in lines[1:] for value in line[2:]]
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(
            f"{path} is no table of scores to go on with ({error}); choose another --out"
        ) from error
    begun = lines or _csv([header]).encode().startswith(data)
    if not begun or (lines and lines[0] != header and (lines[1:] or lines[0][:2] != header[:2])):
        raise ValueError(
            f"{path} has the columns {', '.join(lines[0]) if lines else '(none)'}, not "
            f"{', '.join(header)}; choose another --out, or delete it"
        )
    done = [line[2:] for line in lines[1:]]
    for line, row in zip(lines[1:], rows, strict=False):
        if line[:2] != row:
            raise ValueError(
                f"{path} goes on with {line[0]} ({line[1]!r}) where the folder has {row[0]} "
                f"({row[1]!r}); choose another --out, or delete it"
            )
    if len(done) > len(rows):
        raise ValueError(f"{path} has {len(done)} rows for {len(rows)} pictures; choose another")
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    """`diffalign score`; returns the exit status."""
    args = arguments_of.scoring().parse_args(arguments)
    spec = rewards.from_arguments(args.reward)
    choose_device(args.device)
    means = score(args.images, spec, args.prompts, args.out, args.batch)
    for name, mean in means.items():
        print(f"{name:<28}{mean:>10.4f}")
    print(args.out)
    return 0
