"""EmojiEval's table of pipelines: `diffalign eval`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rewards.device import choose_device, default_device

from .. import policies
from ..config.files import check_folder, to_json, write_atomic
from ..drawing.grids import image_grid, save_png
from ..emoji_world.evaluate import VERIFIERS, Figure, draw, load_prompts, real_scenes, scores
from ..report.run import short_names
from ..sampling.pipeline import check_drawing
from . import arguments as arguments_of

Scores = dict[str, dict[str, Figure]]  # by verifier, then by name


def scored(images: Any, texts: Sequence[str]) -> Scores:
    return {v: scores(images, texts, v) for v in VERIFIERS}


def formatted(columns: dict[str, Scores]) -> str:
    """A Markdown table with a row per score and a column per model and verifier."""
    each = [found[v] for found in columns.values() for v in VERIFIERS]
    heads = [f"{name}, {v.removeprefix('emoji-')}" for name in columns for v in VERIFIERS]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in dict.fromkeys(k for found in each for k in found):
        cells = [str(found[name]) if name in found else "" for found in each]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """`diffalign eval`: prints the table; returns the exit status."""
    args = arguments_of.evaluation().parse_args(arguments)
    choose_device(args.device)
    if args.pictures < 1:
        raise ValueError(f"--pictures {args.pictures} draws nothing; use 1 or more")
    if args.lora and not args.models:
        raise ValueError("--lora needs the model it was trained on; name that first")
    for model in args.models:
        check_drawing(model, args.steps, args.guidance, None)
    named = [*args.models, *([args.lora] if args.lora else [])]
    names = short_names(named) if named else []
    if args.out:
        check_folder(args.out, "--out")
    jobs: list[tuple[str, str | None]] = [(model, None) for model in args.models]
    if args.lora:
        jobs.append((args.models[0], args.lora))
    for model, lora in jobs:
        for option, path in (("--lora", lora), ("--merge-lora", args.merge_lora)):
            if path:
                policies.check_lora(path, option, model)
    texts = load_prompts(args.split)
    columns: dict[str, Scores] = {"real scenes": scored(*real_scenes(args.split))}
    for name, (model, lora) in zip(names, jobs, strict=True):
        policy: Any = policies.load(model, default_device(), merge_lora=args.merge_lora)
        if lora:
            policies.merge(policy.pipe, lora)
        seeds = range(args.seed, args.seed + args.pictures)
        images = [draw(policy, texts, args.steps, args.guidance, seed) for seed in seeds]
        columns[name] = scored(torch.cat(images), texts * len(images))
        if args.out:
            save_png(image_grid(list(images[0]), columns=28), Path(args.out) / f"{name}.png")
    print(formatted(columns))
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        plain = {
            name: {v: {k: asdict(f) for k, f in found.items()} for v, found in one.items()}
            for name, one in columns.items()
        }
        text = to_json({"settings": settings, "scores": plain}, indent=2)
        write_atomic(Path(args.out) / "scores.json", f"{text}\n".encode())
    return 0
