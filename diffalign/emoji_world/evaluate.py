"""EmojiEval: GenEval's six categories (arXiv 2310.11513) in EmojiWorld, scored by the verifier.

    diffalign eval MODEL [MODEL ...] [--lora RUN] [--split train|held_out]

448 fixed prompts in the split `train`, 444 in `held_out`; the latter ask for combinations that no
denoiser was trained on (`scenes.held_out`). A picture succeeds when the verifier confirms
everything its prompt says; the score of a category is the share that succeeds, the overall score
the mean of the six.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards.device import choose_device, default_device

from .. import policies
from ..commands import arguments as arguments_of
from ..commands.arguments import SPLITS
from ..config import prompts
from ..config.files import check_folder, to_json, write_atomic
from ..drawing.grids import image_grid, save_png
from ..report.run import short_names
from ..sampling.pipeline import check_drawing
from ..sampling.rollout import Sampling, rollout
from .claims import parse
from .scenes import ASSETS, STYLES, Scene, readable, sample_scene
from .training import pixels
from .verifier import findings

CATEGORIES = (
    "single object", "two objects", "counting", "colours", "position", "colour attribution",
)  # fmt: skip
KINDS = {"counting": "count", "two objects": "pair", "colour attribution": "pair",
         "position": "relation"}  # fmt: skip


def load_prompts(split: str) -> list[str]:
    """The prompts of a split, category by category."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    path = ASSETS / "emoji-world" / "prompts" / f"eval_{split}.jsonl"
    return [p.text for p in prompts.load(path)]


def successes(images: Tensor, texts: Sequence[str]) -> dict[str, list[bool]]:
    """For every category, whether each of its pictures, of (n, 3, H, W) in [0, 1], succeeds."""
    found: dict[str, list[bool]] = {}
    for text, seen in zip(texts, findings(images, list(texts)), strict=True):
        found.setdefault(parse(text).category, []).append(all(seen.values()))
    return found


def table(images: Tensor, texts: Sequence[str]) -> dict[str, float]:
    """Scores of (n, 3, H, W) pictures in [0, 1]: "overall", the six categories, and over all
    prompts that say it, "said: object", "said: colour", ... ."""
    success, said = defaultdict(list), defaultdict(list)
    for text, found in zip(texts, findings(images, list(texts)), strict=True):
        success[parse(text).category].append(all(found.values()))
        for what, right in found.items():
            said[what].append(right)
    scores = {c: sum(success[c]) / len(success[c]) for c in CATEGORIES if success[c]}
    details = {f"said: {k}": sum(v) / len(v) for k, v in said.items()}
    return {"overall": sum(scores.values()) / len(scores)} | scores | details


def real_scene(text: str, rng: random.Random) -> Scene:
    """A scene that a prompt describes, all that it leaves open drawn at random."""
    claim = parse(text)
    while True:
        scene = sample_scene(rng, KINDS.get(claim.category, "single"), reserved=None)
        if claim.relation == scene.relation and claim.number in (None, len(scene.items)):
            break
    nouns = claim.nouns * claim.number if claim.number else claim.nouns
    ground, style = claim.background or scene.background, rng.choice(STYLES)
    hidden = any(c == ground or (not c and not readable(n, style, ground)) for n, c in nouns)
    if hidden and claim.background is None:
        return real_scene(text, rng)  # another background
    items = tuple(
        replace(item, name=name, color=color, style=style)
        for item, (name, color) in zip(scene.items, nouns, strict=True)
    )
    return replace(scene, items=items, background=ground)


def real_scenes(split: str = "held_out", rounds: int = 4) -> dict[str, float]:
    """The table of perfect pictures: the verifier's own accuracy on `rounds` scenes a prompt."""
    rng = random.Random(10**6 + 5)
    texts = load_prompts(split) * rounds
    return table(pixels([real_scene(t, rng) for t in texts]).float() / 255, texts)


@torch.no_grad()
def draw(
    policy: policies.Policy, texts: Sequence[str], steps: int, guidance: float, seed: int
) -> Tensor:
    """Pictures (n, 3, H, W) of `texts` by the deterministic sampler; prompt i has a seed of its
    own."""
    sampling = Sampling(policy.levels(steps), "ode", 0.0, guidance)
    images = []
    for start in range(0, len(texts), 32):
        chunk = texts[start : start + 32]
        seeds = [1000 * seed + start + i for i in range(len(chunk))]
        paths = rollout(policy, policy.encode(chunk), sampling, seeds, 32)
        images.append(policy.decode(paths.final).cpu())
    return torch.cat(images)


def formatted(columns: dict[str, dict[str, float]]) -> str:
    """A Markdown table: a row a score, a column a model."""
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


if __name__ == "__main__":
    raise SystemExit(main())
