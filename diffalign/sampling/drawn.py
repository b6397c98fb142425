"""Finished pictures with all that it takes to draw them again, as `sample.py --out` writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as encoded
from torch import Tensor

from rewards.files import IMAGE_SUFFIXES
from rewards.redaction import redact

from ..config.files import check_folder, to_json, write_atomic
from ..config.prompts import Prompt
from ..drawing import grids

NOISE, PROMPTS, TRACE = "noise.safetensors", "prompts.jsonl", "trace.json"
OURS = ("image", "prompt", "seed", "text", "lora", "scores")  # keys of a line of prompts.jsonl


@dataclass(frozen=True)
class Drawn:
    """A picture, and its prompt, noise and settings.

    how: model, merge_lora, lora, lora_scale, steps, guidance, resolution, dtype, kernel, eta and
    family. kernel: None = diffusers' own pipeline; any other = the sampler of `rollout`. noise:
    float32, (1, *latent) for the pipeline, (1 + S, *latent) for a sampler with S stochastic steps.
    redraws: False if the sampler does not make the picture from this noise. text: the text that was
    drawn, if it is not the prompt.
    """

    image: Image.Image
    prompt: Prompt
    seed: int
    noise: Tensor
    how: Mapping[str, Any]
    text: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    redraws: bool = True

    def about(self) -> dict[str, Any]:
        """The metadata in its PNG."""
        known = {"text": self.text, "metadata": self.prompt.metadata, "scores": self.scores}
        known = {k: v for k, v in known.items() if v}
        redraws = {} if self.redraws else {"redraws": False}
        how = redact(self.how)  # the prompt's metadata stays: its rewards need it
        return {"prompt": self.prompt.text, "seed": self.seed, **known, **redraws, **how}


@dataclass(frozen=True)
class Stored:
    """A picture to be drawn again; the fields are those of `Drawn`."""

    name: str
    noise: Tensor
    prompt: Prompt
    seed: int
    text: str | None
    redraws: bool
    how: dict[str, Any]


def check_out(out: str, grid: str, names: Iterable[str], trace: bool = False) -> None:
    """Refuse, before any work, a folder that cannot be written to, or one with pictures other than
    `names`, which would be taken for pictures of this call."""
    check_folder(out, "--out")
    folder = Path(out)
    if folder.resolve() in Path(grid).resolve().parents:
        raise ValueError(
            f"--grid {grid!r} lies in --out {out!r}, where it would be taken for one of the "
            "pictures; give it another place"
        )
    ours = {*names, *([TRACE] if trace else [])}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        picture = path.suffix.lower() in IMAGE_SUFFIXES or name == TRACE
        if picture and name not in ours:
            raise ValueError(
                f"--out {out!r} holds {name}, which is not of this call; choose another folder, or "
                "empty it"
            )


def write(out: str, pictures: Mapping[str, Drawn]) -> None:
    """Write pictures {name: picture}, their prompts and their noise into the folder `out`."""
    lines, noise, about = [], {}, {}
    for name, drawn in pictures.items():
        grids.save_png(drawn.image, Path(out) / name, drawn.about())
        line = {"image": name, "prompt": drawn.prompt.text, "seed": drawn.seed, "text": drawn.text}
        line |= {"lora": drawn.how.get("lora"), "scores": drawn.scores}
        own = {k: v for k, v in drawn.prompt.metadata.items() if k not in OURS}
        lines.append(to_json({k: v for k, v in line.items() if v or k in OURS[:3]} | own) + "\n")
        noise[name] = drawn.noise.detach().float().cpu().clone()
        about[name] = drawn.about()
    write_atomic(Path(out) / PROMPTS, "".join(lines).encode())
    write_atomic(Path(out) / NOISE, encoded(noise, {"diffalign": to_json(about)}))


def read(path: str) -> list[Stored]:
    """The pictures of a file that `write` wrote, in its order. Raises ValueError for any other."""
    if not Path(path).is_file():
        kind = "is a folder" if Path(path).is_dir() else "does not exist"
        raise ValueError(f"--noise {path!r} {kind}; give the {NOISE} that sample.py --out wrote")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["diffalign"])
            found = [_stored(name, file.get_tensor(name), about[name]) for name in about]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--noise {path!r} is not whole, or no {NOISE} of sample.py --out ({error}); give one"
        ) from error
    if not found:
        raise ValueError(f"--noise {path!r} holds the noise of no picture")
    return found


def _stored(name: str, noise: Tensor, about: dict[str, Any]) -> Stored:
    how = {k: v for k, v in about.items() if k not in ("prompt", "text", "metadata", "scores")}
    if noise.dtype != torch.float32 or not noise.isfinite().all():
        raise ValueError(f"{name} is {noise.dtype}, or not finite")
    if Path(name).name != name or not name.endswith(".png"):  # a file of that name will be written
        raise ValueError(f"{name!r} is no name of a picture")
    prompt = Prompt(str(about["prompt"]), dict(about.get("metadata", {})))
    seed, redraws = int(how.pop("seed")), how.pop("redraws", True)
    return Stored(name, noise, prompt, seed, about.get("text"), redraws, how)


def rows_of(pictures: Sequence[Drawn]) -> list[list[Drawn]]:
    """Rows of pictures: successive ones with the same prompt, text and settings share a row."""
    rows: list[list[Drawn]] = []
    for drawn in pictures:
        last = rows[-1][-1] if rows else None
        if last and (last.prompt, last.text, last.how) == (drawn.prompt, drawn.text, drawn.how):
            rows[-1].append(drawn)
        else:
            rows.append([drawn])
    return rows


def grid_of(rows: Sequence[Sequence[Drawn]]) -> Image.Image:
    """A row per prompt and a column per seed; if the rows have different seeds, a row per
    picture."""
    seeds = [drawn.seed for drawn in rows[0]]
    if any([drawn.seed for drawn in row] != seeds for row in rows):
        rows = [[drawn] for row in rows for drawn in row]
        columns = {"": [row[0].image for row in rows]}
        return grids.comparison_grid(columns, [f"{_label(r[0])} [{r[0].seed}]" for r in rows])
    columns = {f"seed {s}": [row[i].image for row in rows] for i, s in enumerate(seeds)}
    return grids.comparison_grid(columns, [_label(row[0]) for row in rows])


def _label(drawn: Drawn) -> str:
    lora, text = drawn.how.get("lora"), drawn.text or drawn.prompt.text
    return f"{text} [{Path(lora).name}]" if lora else text
