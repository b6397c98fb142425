"""Comparison grids, `diffalign grid`: a row per prompt with one noise, a column per model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

import rewards as reward_library
from rewards.device import choose_device

from .. import optimize_noise, policies
from ..config.prompts import Prompt, collect, for_rewards
from ..drawing import grids
from ..optimize_noise import Budget, Result, Task
from ..policies import Policy
from ..report.run import short_names
from ..sampling.pipeline import (
    BATCH,
    Sampler,
    check_drawing,
    check_loras,
    check_plain,
    check_scale,
    parse_seeds,
    settings,
    trained_denoiser,
)
from ..sampling.rollout import Sampling
from . import arguments as arguments_of

Columns = Mapping[str, Mapping[str, float]]  # {header: {LoRA: factor of its ΔW}}

BASE = "base"


def scales(lora: str, factors: Sequence[float], name: str = "scale") -> dict[str, dict]:
    """Columns of W + s ΔW, from the base model (0) to what was trained (1) and beyond."""
    return {f"{name} {s:g}": {lora: s} for s in factors}


def interpolation(a: str, b: str, points: int = 5) -> dict[str, dict]:
    """Columns of W + (1 - t) ΔW_a + t ΔW_b, t from 0 to 1."""
    if points < 2:
        raise ValueError(f"--points {points} leaves nothing between two LoRAs; use 2 or more")
    names = short_names([a, b])
    columns = {}
    for k in range(points):
        t = k / (points - 1)
        mixed = f"{1 - t:.3g} {names[0]} + {t:.3g} {names[1]}"
        columns[{0.0: names[0], 1.0: names[1]}.get(t, mixed)] = {a: 1 - t, b: t}
    return columns


def compare(
    model: str,
    prompts: Sequence[Prompt | str],
    columns: Columns | None = None,
    seeds: Sequence[int] = (0,),
    steps: int = 20,
    guidance: float = 3.0,
    resolution: policies.Size | None = None,
    merge_lora: str | None = None,
    dtype: str = "float32",
    rewards: reward_library.Spec | None = None,
    reno: Sequence[int] = (),
    pictures: Mapping[str, Sequence[Image.Image]] | None = None,
    cell: int | None = None,
) -> Image.Image:
    """Draw a grid with a row per prompt and seed; its columns are the base model and `columns` (see
    `scales` and `interpolation`). Without `columns` the seeds are the columns.

    rewards: a spec of the `rewards` package; a picture's rewards are written under it. reno:
    numbers of iterations; for each a column with the best pictures of ReNO on the base model, for
    the sum of the rewards. The first iteration is the plain picture. pictures: columns that were
    drawn elsewhere, one picture per row, by prompt and then by seed. cell: side of a picture in px.
    Raises ValueError for bad input, before any model is loaded, and RewardError.
    """
    texts = collect(prompts)
    rows = [(p, s) for p in texts for s in seeds]
    policies.check(model)
    for header, found in (pictures or {}).items():
        if len(found) != len(rows):
            raise ValueError(f"'{header}' has {len(found)} pictures for the {len(rows)} rows")
    if rewards is not None:
        reward_library.check(rewards, *for_rewards(texts))
    if reno and (rewards is None or min(reno) < 1):
        raise ValueError(
            f"--reno {min(reno)} is no number of iterations; use 1, the plain picture, or more"
            if rewards is not None
            else "--reno needs something to optimise; give --reward as well"
        )
    judge = reward_library.build(rewards) if rewards is not None else None
    if reno and judge is not None:
        judge.require_differentiable()
    # a column with all factors 0 is the base model again
    variants = {k: v for k, v in (columns or {}).items() if any(v.values())}
    sampler, drawn = Sampler(model, merge_lora, dtype), {}
    for header, weights in {BASE: {}, **variants}.items():
        sampler.use(weights)
        drawn[header] = []
        for i in range(0, len(rows), BATCH):
            part = rows[i : i + BATCH]
            how = [p.text for p, _ in part], [s for _, s in part], steps, guidance, resolution
            drawn[header] += sampler.draw(*how)
    drawn |= pictures or {}
    scores, device = {}, sampler.device
    if judge is not None:
        judge = judge.to(device)
        if reno:
            del sampler  # the model is loaded again, to be differentiated
            policy = policies.load(model, device, dtype, resolution, merge_lora=merge_lora)
            sampling = Sampling(policy.levels(steps), "ode", 0.0, guidance)
            drawn |= _reno(policy, judge, rows, sampling, sorted(set(reno)))
        known = [p for p, _ in rows]
        scores = {k: _scores(judge, v, known, device) for k, v in drawn.items()}
    labels = [p.text + (f" (seed {s})" if len(seeds) > 1 else "") for p, s in rows]
    if len(drawn) == 1:
        labels = [p.text for p in texts]
        drawn, scores = _by_seed(drawn, seeds), _by_seed(scores, seeds)
    return grids.comparison_grid(drawn, labels, scores, cell)


def _reno(
    policy: Policy,
    reward: reward_library.WeightedSum,
    rows: Sequence[tuple[Prompt, int]],
    sampling: Sampling,
    iterations: Sequence[int],
) -> dict[str, list[Image.Image]]:
    """The best pictures after each of `iterations`, which are in rising order."""
    drawn: dict[str, list[Image.Image]] = {f"ReNO {n}": [] for n in iterations}
    method = optimize_noise.build("reno", {"iterations": iterations[-1]})
    for i in range(0, len(rows), BATCH):
        prompts, seeds = zip(*rows[i : i + BATCH], strict=True)
        task = Task(policy, reward, prompts, sampling, seeds)
        count = itertools.count(1)

        def keep(best: Sequence[Result], count: Iterator[int] = count) -> None:
            if (n := next(count)) in iterations:
                drawn[f"ReNO {n}"] += [grids.to_pil(result.image) for result in best]

        found = optimize_noise.search(task, method(task), Budget(), "ReNO", keep)
        if found[0].stopped:
            raise KeyboardInterrupt
    return drawn


def _by_seed(table: Mapping[str, Sequence], seeds: Sequence[int]) -> dict[str, Sequence]:
    """The only column of `table`, with all prompts and seeds, split into a column per seed."""
    n = len(seeds)
    return {f"seed {s}": v[j::n] for v in table.values() for j, s in enumerate(seeds)}


@torch.no_grad()
def _scores(
    judge: reward_library.WeightedSum,
    images: Sequence[Image.Image],
    prompts: Sequence[Prompt],
    device: str,
) -> list[dict[str, float]]:
    """The parts of every picture's reward, without those that do not score its prompt."""
    found = []
    for i in range(0, len(images), BATCH):
        batch = torch.stack([to_tensor(image.convert("RGB")) for image in images[i : i + BATCH]])
        texts = for_rewards(prompts[i : i + BATCH])
        parts = judge.score(batch.to(device), *texts, held_out=True)[1]
        rows = [{k: v[j].item() for k, v in parts.items()} for j in range(len(batch))]
        found += [{k: x for k, x in row.items() if x == x} for row in rows]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """`diffalign grid`; returns the exit status."""
    args = arguments_of.grid().parse_args(arguments)
    choose_device(args.device)
    texts = collect(args.prompts, "--prompts")
    how = settings([*[*args.runs, *(args.interpolate or ())][:1], args.model], vars(args))
    size = how["resolution"]
    check_drawing(how["model"], how["steps"], how["guidance"], size, args.out, "--out")
    check_plain(how["model"], size)
    check_loras(how["model"], how["merge_lora"])
    columns = _columns(args.runs, args.lora_scales, args.interpolate, args.points, how["model"])
    if args.cell is not None and args.cell < 1:
        raise ValueError(f"--cell {args.cell} shows nothing; use pixels, such as 256")
    how |= {"columns": columns, "seeds": parse_seeds(args.seeds), "reno": args.reno}
    how["rewards"] = reward_library.from_arguments(args.reward) if args.reward else None
    image = compare(prompts=texts, cell=args.cell, **how)
    grids.save_png(image, args.out, {"prompts": [p.text for p in texts], **how})
    print(args.out)
    return 0


def _columns(
    runs: Sequence[str],
    factors: Sequence[float] | None,
    ends: Sequence[str] | None,
    points: int,
    model: str,
) -> dict[str, dict]:
    for option, paths in (("--runs", runs), ("--interpolate", ends or ())):
        for path in paths:
            policies.check_lora(path, option, model)
            if (factors or ends) and trained_denoiser(path) is not None:
                raise ValueError(
                    f"{option} {path!r} holds a whole denoiser, and only a LoRA can be scaled or "
                    "mixed; leave out --lora-scales and --interpolate"
                )
    for factor in factors or ():
        check_scale(factor, "--lora-scales")
    if factors and not runs:
        raise ValueError(f"--lora-scales {factors} needs a LoRA to scale; give --runs as well")
    columns = {}
    for path, name in zip(runs, short_names(runs) if runs else [], strict=True):
        own = "scale" if len(runs) == 1 else name
        columns |= scales(path, factors, own) if factors else {name: {path: 1.0}}
    return columns | (interpolation(ends[0], ends[1], points) if ends else {})
