"""`sample.py --reno` and the other methods: a better picture for every prompt and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import rewards as reward_library
from rewards.device import default_device

from .. import policies
from ..config.files import to_json, write_atomic
from ..config.prompts import Prompt, collect, for_rewards
from ..drawing import grids
from ..optimize_noise import build, sampling_for
from ..optimize_noise.base import Result, Task, search
from ..optimize_noise.options import Wanted
from ..sampling import drawn
from ..sampling.drawn import Drawn
from ..sampling.pipeline import Drawing, parse_seeds


def run(method: str, wanted: Wanted, drawing: Drawing) -> Path:
    """Write a grid of the plain and the best picture of every prompt and seed; returns its path.

    `sampler.batch` pictures are searched for at once, each with its own budget. With `drawing.out`
    the best pictures are written as `pipeline.draw` writes them, and trace.json holds what each
    search had used and found after every step. After Ctrl-C what was found is kept. The same holds
    if a reward fails, but its error is then raised.
    """
    numbers, texts = parse_seeds(drawing.seeds), collect(drawing.prompts, "--prompts")
    jobs = [(prompt, seed) for prompt in texts for seed in numbers]
    reward_library.check(wanted.rewards, *for_rewards([p for p, _ in jobs]))
    options = dict(wanted.options)
    ahead = options.pop("look_ahead", None) if method == "flow_map" else None
    make: Any = build(method, options)
    levels, shape = drawing.check(**{"flow_map.look_ahead": ahead})
    kernel, eta = wanted.sampler.kernel, wanted.sampler.eta
    sampling = sampling_for(method, levels, drawing.guidance, kernel, eta)
    if drawing.compare:
        raise ValueError(
            "--compare is for a LoRA; a search sets its pictures beside the plain ones"
        )
    names = [f"{i:03d}_seed{seed}.png" for i, (_, seed) in enumerate(jobs)]
    out, grid, batch = drawing.out, drawing.grid, wanted.sampler.batch
    if out is not None:
        drawn.check_out(out, grid, names, trace=True)
    device = default_device()
    reward = reward_library.build(wanted.rewards).to(device)
    prompt, seed = jobs[0]
    peeked: Any = SimpleNamespace(latent_shape=shape)
    make(Task(peeked, reward, [prompt], sampling, [seed], batch))  # refuses bad settings
    how = drawing.how(sampling.kernel, sampling.eta)
    policy = loaded(how)
    if ahead is not None:
        other = loaded(how | {"merge_lora": ahead, "lora": None})
        make = partial(make, look_ahead=other)
    plain: list[Result] = []
    best: list[Result] = []
    try:
        for start in range(0, len(jobs), batch):
            some, several = zip(*jobs[start : start + batch], strict=True)
            task = Task(policy, reward, some, sampling, several, batch)

            def keep(found: Sequence[Result], start: int = start) -> None:
                plain.extend(found if len(plain) == start else ())
                best[start:] = found

            title = some[0].text[:40] if len(some) == 1 else f"{len(some)} pictures"
            if search(task, make(task), wanted.budget, title, keep)[0].stopped:
                print("stopped; the best so far is kept")
                break
    finally:
        if best:
            how |= {"method": method, "options": wanted.options, "rewards": wanted.rewards}
            how |= {"budget": vars(wanted.budget)}
            done, several = jobs[: len(best)], len(numbers) > 1
            columns = {"plain": plain, method.replace("_", " "): best}
            picture = grids.comparison_grid(
                {name: [r.image for r in column] for name, column in columns.items()},
                [f"{prompt.text} [{seed}]" if several else prompt.text for prompt, seed in done],
                {name: list(map(_scores, column)) for name, column in columns.items()},
            )
            grids.save_png(picture, grid, how | {"seeds": numbers})
            if out is not None:
                _write(out, names, done, best, how)
    return Path(grid)


def loaded(how: Mapping[str, Any]) -> policies.Policy:
    """The policy with the model, LoRA and settings of `how`, see `drawn.Drawn`."""
    options = default_device(), how["dtype"], how["resolution"]
    policy = policies.load(how["model"], *options, merge_lora=how["merge_lora"])
    if how["lora"] is not None:
        policies.merge(policy.pipe, how["lora"], how["lora_scale"])
    return policy


def _scores(result: Result) -> dict[str, float]:
    """What is written under a picture: the reward and its parts, or its only part if that equals
    it."""
    parts = {k: v for k, v in result.parts.items() if v == v}
    return parts if list(parts.values()) == [result.reward] else {"reward": result.reward} | parts


def _write(
    out: str,
    names: Sequence[str],
    jobs: Sequence[tuple[Prompt, int]],
    best: Sequence[Result],
    how: Mapping[str, Any],
) -> None:
    """The best pictures of the jobs done, and their traces, in the folder `out`."""
    found, traces = {}, []
    for name, (prompt, seed), result in zip(names, jobs, best, strict=False):
        text = result.text if result.text != prompt.text else None
        image, scores = grids.to_pil(result.image), _scores(result)
        found[name] = Drawn(
            image, prompt, seed, result.noise, how, text, scores, redraws=result.redraws
        )
        said = {"prompt": prompt.text, "text": result.text, "trace": result.trace}
        traces.append({"image": name, "seed": seed, **said})
    drawn.write(out, found)
    write_atomic(Path(out) / drawn.TRACE, to_json(traces, indent=1).encode())
