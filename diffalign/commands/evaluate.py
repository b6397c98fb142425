"""EmojiEval's table of pipelines: `diffalign eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewards.device import choose_device, default_device

from .. import policies
from ..config.files import check_folder, to_json, write_atomic
from ..drawing.grids import image_grid, save_png
from ..emoji_world.evaluate import draw, load_prompts, real_scenes, table
from ..report.run import short_names
from ..sampling.pipeline import check_drawing
from . import arguments as arguments_of


def formatted(columns: dict[str, dict[str, float]]) -> str:
    """A Markdown table with a row per score and a column per model."""
    names = list(dict.fromkeys(k for scores in columns.values() for k in scores))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = [f"{s[name]:.3f}" if name in s else "" for s in columns.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """`diffalign eval`: prints the table; returns the exit status."""
    args = arguments_of.evaluation().parse_args(arguments)
    choose_device(args.device)
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
    columns: dict[str, dict[str, float]] = {"real scenes": real_scenes(args.split)}
    for name, (model, lora) in zip(names, jobs, strict=True):
        policy: Any = policies.load(model, default_device(), merge_lora=args.merge_lora)
        if lora:
            policies.merge(policy.pipe, lora)
        images = draw(policy, texts, args.steps, args.guidance, args.seed)
        columns[name] = table(images, texts)
        if args.out:
            save_png(image_grid(list(images), columns=28), Path(args.out) / f"{name}.png")
    print(formatted(columns))
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        text = to_json({"settings": settings, "scores": columns}, indent=2)
        write_atomic(Path(args.out) / "scores.json", f"{text}\n".encode())
    return 0
