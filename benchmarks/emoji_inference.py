"""Searches for a better picture on EmojiEval, all with the same budget of denoiser calls.

    python benchmarks/emoji_inference.py                       # all methods, seeds 0 1 2
    python benchmarks/emoji_inference.py --models emoji-turbo --methods best_of_n reno
    python benchmarks/emoji_inference.py --tune                # what chose the options below
    python benchmarks/emoji_inference.py --report              # only the table

The reward is the CLIP reward; the judge and EmojiEval never guide a search. Prompts are every
fourth (of the models with many steps every eighth) of EmojiEval's held-out ones. "plain" is the
first picture of every search; changes are against it, ± their standard error over the prompts. A
call is one sample through the denoiser; a gradient's backward pass is none, and takes about as long
as one. Finished runs are kept in --runs and not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from clusters import clustered

import rewards
from diffalign import policies
from diffalign.config.files import write_atomic
from diffalign.config.prompts import Prompt
from diffalign.emoji_world.claims import parse
from diffalign.emoji_world.evaluate import load_prompts, table
from diffalign.emoji_world.verifier import findings
from diffalign.optimize_noise import Budget, Result, Task, build, sampling_for, search

REWARD = {"clip": {"model": "assets/emoji-clip"}}
JUDGE = {"judge": {"type": "clip", "model": "assets/emoji-judge"}}
MODELS: dict[str, dict[str, Any]] = {
    "emoji-turbo": {"name": "assets/emoji-sd", "turbo": True, "steps": 1, "budget": 50, "every": 4},
    "emoji-sd": {"name": "assets/emoji-sd", "steps": 8, "budget": 160, "every": 8},
    "emoji-sd3": {"name": "assets/emoji-sd3", "steps": 8, "budget": 160, "every": 8},
}
TURBO = "assets/emoji-turbo"
KEYS = ("reward", "judge", "overall")
SIDES = ("plain", "best")
# searches that end by themselves are as large as the budget of 160 calls allows
METHODS: dict[str, dict[str, Any]] = {
    "best_of_n": {"n": 1000},
    "best_of_n_twice": {"n": 1000},
    "zero_order": {"rounds": 1000},
    "reno": {"iterations": 50},
    "dno": {"iterations": 1000, "initial_only": True},
    "paths": {"keep": 2, "children": 9},
    "smc": {"particles": 19},
    "flow_map": {"particles": 19},
    "flow_map_turbo": {"particles": 9},
    "universal_guidance": {},
}
ABOUT = {
    "best_of_n_twice": "best of N, twice the calls",
    "dno": "DNO, initial noise only",
    "smc": "FK steering",
    "flow_map": "look-ahead tilting, the model its own map",
    "flow_map_turbo": "look-ahead tilting, emoji-turbo as the map",
    "reno": "ReNO",
    "best_of_n": "best of N",
    "zero_order": "zero order",
    "paths": "search over paths",
    "universal_guidance": "universal guidance",
}
TUNED: dict[tuple[str, str], dict[str, Any]] = {  # the highest rewards of --tune
    ("emoji-sd", "zero_order"): {"cosine": 0.8},
    ("emoji-sd", "dno"): {"lr": 0.1},
    ("emoji-sd", "smc"): {"strength": 160, "end": 0.8},
    ("emoji-sd", "flow_map"): {"strength": 160},
    ("emoji-sd", "flow_map_turbo"): {"strength": 160},
    ("emoji-sd", "universal_guidance"): {"strength": 100, "recurrence": 4},
    ("emoji-sd3", "zero_order"): {"cosine": 0.8},
    ("emoji-sd3", "dno"): {"lr": 0.1},
    ("emoji-sd3", "smc"): {"strength": 160, "end": 0.8},
    ("emoji-sd3", "flow_map"): {"strength": 160},
    ("emoji-sd3", "universal_guidance"): {"strength": 100, "recurrence": 4},
}
TUNING: dict[str, dict[str, Sequence[Any]]] = {
    "zero_order": {"cosine": (0.8, 0.95)},
    "reno": {"lr": (0.5, 1, 2, 5)},
    "dno": {"lr": (0.03, 0.1, 0.3)},
    "smc": {"strength": (10, 40, 160), "end": (0.3, 0.8)},
    "flow_map": {"strength": (10, 40, 160)},
    "universal_guidance": {"strength": (1, 10, 100), "recurrence": (1, 4, 19)},
}


def applies(model: str, method: str) -> bool:
    """ReNO is meant for one step; what changes the sampler's steps needs several."""
    if MODELS[model]["steps"] == 1:
        return method in ("best_of_n", "best_of_n_twice", "zero_order", "reno")
    if method == "flow_map_turbo":
        return model == "emoji-sd"
    return method not in ("reno", "best_of_n_twice")


def searching(
    model: str, method: str, options: dict[str, Any]
) -> Callable[[Sequence[str], Sequence[int]], tuple[list[Result], list[Result]]]:
    """Plain and best results of texts and their seeds."""
    how = MODELS[model]
    policy = policies.load(how["name"], merge_lora=TURBO if how.get("turbo") else None)
    kind = method.removesuffix("_turbo").removesuffix("_twice")
    kernel = "ode" if method == "dno" else None
    sampling = sampling_for(kind, policy.levels(how["steps"]), 1.0, kernel)
    reward = rewards.build(REWARD)
    make = build(kind, options)
    ahead: dict[str, Any] = {}
    if method == "flow_map_turbo":
        ahead["look_ahead"] = policies.load(how["name"], merge_lora=TURBO)
    most = Budget(denoiser_calls=how["budget"] * (2 if method == "best_of_n_twice" else 1))

    def run(texts: Sequence[str], seeds: Sequence[int]) -> tuple[list[Result], list[Result]]:
        task = Task(policy, reward, [Prompt(t) for t in texts], sampling, seeds, batch=16)
        plain = search(task, make(task, **ahead), Budget(denoiser_calls=0))
        return plain, search(task, make(task, **ahead), most)

    return run


def run(
    model: str, method: str, seed: int, texts: Sequence[str], options: dict[str, Any]
) -> dict[str, Any]:
    """Scores of the plain and the best pictures of all prompts."""
    find, judge = searching(model, method, options), rewards.build(JUDGE)
    sides: dict[str, list[Result]] = {side: [] for side in SIDES}
    for start in range(0, len(texts), 8):
        part = texts[start : start + 8]
        found = find(part, [1000 * seed + start + i for i in range(len(part))])
        for side, results in zip(sides, found, strict=True):
            sides[side] += results
    out: dict[str, Any] = {"model": model, "method": method, "seed": seed, "prompts": len(texts)}
    kinds = [parse(t).category for t in texts]
    # so that the mean over the prompts is the mean of the categories
    weights = {k: len(texts) / len(set(kinds)) / kinds.count(k) for k in set(kinds)}
    for side, results in sides.items():
        images = torch.stack([r.image for r in results])
        with torch.no_grad():
            judged = judge(images, texts).tolist()
        each = {"reward": [r.reward for r in results], "judge": judged}
        hits = [all(found.values()) for found in findings(images, list(texts))]
        each["overall"] = [weights[k] * hit for k, hit in zip(kinds, hits, strict=True)]
        means = {k: statistics.fmean(v) for k, v in each.items()}
        each = {k: [round(x, 4) for x in v] for k, v in each.items()}
        out[side] = table(images, texts) | means | {"each": each}
    for cost in ("denoiser_calls", "reward_calls", "seconds"):
        out[cost] = statistics.fmean(r.trace[-1][cost] for r in sides["best"])
    return out


def tune(models: Sequence[str], methods: Sequence[str]) -> None:
    """The reward of 16 training prompts, by the options in TUNING."""
    texts = load_prompts("train")[::29][:16]
    for model, method in product(models, methods):
        if not applies(model, method) or method not in TUNING:
            continue
        for values in product(*TUNING[method].values()):
            tried = dict(zip(TUNING[method], values, strict=True))
            found = run(model, method, 77, texts, METHODS[method] | tried)
            costs = f"{found['denoiser_calls']:.0f} calls"
            best = {k: round(found["best"][k], 4) for k in KEYS}
            print(model, method, tried, best, costs, flush=True)


def report(runs: Path, out: Path) -> None:
    """The table of all finished runs, a row for each model and method, means over seeds; in
    brackets the change from the method's own plain pictures and its standard error. The
    runs themselves are kept beside it."""
    found = [json.loads(p.read_text("utf-8")) for p in sorted(runs.glob("*.json"))]
    heads = ["", "reward", "gain", "judge", "EmojiEval", "denoiser calls", "reward calls", "s"]
    lines = []
    for model in MODELS:
        rows: list[list[str]] = []
        for method in METHODS:
            mine = [r for r in found if (r["model"], r["method"]) == (model, method)]
            if not mine:
                continue
            before = [statistics.fmean(r["plain"][k] for r in mine) for k in KEYS]
            after = [statistics.fmean(r["best"][k] for r in mine) for k in KEYS]
            if not rows:
                rows.append(["plain", f"{before[0]:.3f}", "", *(f"{x:.3f}" for x in before[1:])])
            cells = [f"{after[0]:.3f}"]
            for i, key in enumerate(KEYS):
                gain, error = clustered([
                    [b - a for a, b in zip(*(r[s]["each"][key] for s in SIDES), strict=True)]
                    for r in mine
                ])  # fmt: skip
                found_gain = f"{gain:+.3f} ± {error:.3f}"
                cells.append(f"{after[i]:.3f} ({found_gain})" if i else found_gain)
            costs = [
                f"{statistics.fmean(r[k] for r in mine):.{d}f}"
                for k, d in (("denoiser_calls", 0), ("reward_calls", 0), ("seconds", 1))
            ]
            name = f"{ABOUT[method]} ({len(mine)})"
            rows.append([name, *cells, *costs])
        if rows:
            n = next(r["prompts"] for r in found if r["model"] == model)
            steps = MODELS[model]["steps"]
            lines += [f"**{model}**, {n} prompts, {steps} step{'s' * (steps > 1)}", ""]
            rows = [heads, ["---"] * len(heads), *rows]
            lines += [f"| {' | '.join(row + [''] * (len(heads) - len(row)))} |" for row in rows]
            lines.append("")
    write_atomic(out, ("\n".join(lines).rstrip() + "\n").encode())
    write_atomic(out.with_suffix(".json"), (json.dumps(found) + "\n").encode())
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/inference"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/inference.md"))
    parser.add_argument("--tune", action="store_true", help="try options on training prompts")
    parser.add_argument("--report", action="store_true", help="the table of what is there")
    args = parser.parse_args()
    if args.tune:
        tune(args.models, args.methods)
        return
    for seed, model, method in product(args.seeds, args.models, args.methods):
        path = args.runs / f"{model}_{method}_{seed}.json"
        if args.report or path.exists() or not applies(model, method):
            continue
        texts = load_prompts("held_out")[:: MODELS[model]["every"]]
        options = METHODS[method] | TUNED.get((model, method), {})
        result = run(model, method, seed, texts, options)
        write_atomic(path, (json.dumps(result, indent=1) + "\n").encode())
        print(path, {k: round(result["best"][k], 4) for k in KEYS}, flush=True)
    report(args.runs, args.out)


if __name__ == "__main__":
    main()
