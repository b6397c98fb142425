"""Every algorithm on EmojiWorld with the same budget of denoiser calls, and what that bought.

    python benchmarks/emoji_leaderboard.py --dry-run                # settings, checked and priced
    python benchmarks/emoji_leaderboard.py --seeds 0 1 2            # all of it
    python benchmarks/emoji_leaderboard.py --models assets/emoji-sd --algorithms ddpo draft_1
    python benchmarks/emoji_leaderboard.py --report                 # only the table and the figure

A call is one sample through the denoiser, with or without gradient, in sampling or in learning. A
run stops at the end of the epoch that uses the budget up; reward calls and seconds are what it took
besides (evaluation left out). The reward is small files that still show what the prompt says, minus
kilobytes plus four times CLIP: there is something to gain, and something to lose that the judge
sees. Only reward gradients use its gradient. Prompts are of EmojiEval's six categories; no method
sees the judge, the verifier or a held-out combination.

One seed of everything comes first, then the next. A finished run is skipped and an interrupted one
resumed. Two of these may run side by side if their --models differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clusters import changes, clustered
from matplotlib.axes import Axes
from matplotlib.ticker import AutoLocator
from PIL import Image

from diffalign import TrainConfig, Trainer, algorithms, policies
from diffalign.algorithms import Needs
from diffalign.config.files import write_atomic
from diffalign.drawing.curves import panels, picture
from diffalign.drawing.grids import save_png
from diffalign.emoji_world.evaluate import draw, load_prompts, table
from diffalign.policies.flow import FlowPolicy
from diffalign.training.plan import Plan
from diffalign.verdict import WARNINGS

Tree = Mapping[str, Mapping[str, Any]]

MODELS = ("assets/emoji-sd", "assets/emoji-sd3")
STEPS = 10  # of the evaluation's deterministic sampler
POINTS = 5  # evaluations on the way, at least
CURVE = slice(0, None, 14)  # 32 held-out prompts for the curves
EMOJI_EVAL = slice(1, None, 2)  # 222 others for EmojiEval, before and after

COMMON: Tree = {
    "model": {"lora_rank": 8, "free_text_encoders": False},  # EmojiEval asks for new prompts
    "sampler": {"steps": 8, "guidance": 1.0, "batch": 16},
    "rewards": {
        "jpeg": {"surrogate": True},  # minus kilobytes, about -2
        "clip": {"weight": 4.0, "model": "assets/emoji-clip"},  # a cosine, about 0.6
    },
    "data": {"prompts": "assets/emoji-world/prompts/eval_train.jsonl"},
    "train": {"lr": 1e-3, "micro_batch": 16},
    "eval": {
        "images_per_prompt": 2,  # one alone has no diversity
        "steps": STEPS,
        "guidance": 1.0,
        "rewards": {"judge": {"type": "clip", "model": "assets/emoji-judge"}},
    },
}

# An update sees 32 pictures of four prompts, or 16 of 16 prompts where no two are compared.
PAIRS: Tree = {"data": {"groups": 8, "group_size": 8}, "train": {"updates_per_epoch": 2}}
MATCHES: Tree = {
    "data": {"groups": 4, "group_size": 8},
    "sampler": {"kernel": "ode"},
    "train": {"micro_batch": 48},
}
GRADIENTS: Tree = {"data": {"groups": 16, "group_size": 1}, "sampler": {"kernel": "ode"}}

DDIM: Tree = {"sampler": {"kernel": "ddim", "eta": 1.0}}
CPS: Tree = {"sampler": {"kernel": "cps", "eta": 0.8}}
FLOW_SDE: Tree = {"sampler": {"kernel": "flow_sde", "eta": 0.7}}
OWN_STD: Tree = {"advantage": {"std": "group"}}


def loss(kind: str, **options: Any) -> Tree:
    return {"algorithm": {"type": kind, **options}}


def window(length: int, schedule: str, **options: Any) -> Tree:
    return {"sampler": {"window": length, "window_schedule": schedule, **options}}


# Clip ranges are ten times those published for latents 32 times as large, as in
# configs/emoji_ddpo_jpeg.yaml: a mean over fewer elements moves more. Only train.lr was swept, on
# another seed and with three of the methods (docs/algorithms.md has the figures).
SETTINGS: dict[str, tuple[Tree, ...]] = {
    "ddpo": (PAIRS, DDIM, loss("ddpo", clip_range=1e-3)),
    "dpok": (PAIRS, DDIM, loss("dpok", clip_range=1e-3)),
    "flow_grpo": (PAIRS, CPS, loss("flow_grpo", clip_range=1e-3)),
    "flow_grpo_fast": (
        *(PAIRS, CPS, window(2, "random", window_range=[0, 4])),
        loss("flow_grpo", clip_range=1e-4, log_prob="cps"),
    ),
    "mix_grpo": (
        *(PAIRS, DDIM, OWN_STD, loss("flow_grpo", clip_range=1e-3)),
        window(2, "progressive", window_epochs=4, tail=3, same_noise=True),
    ),
    "tempflow": (
        *(PAIRS, DDIM, OWN_STD, window(1, "branch", window_range=[0, 4], same_noise=True)),
        {"data": {"groups": 4, "group_size": 16}},  # four pictures branch at each step
        loss("flow_grpo", clip_range=1e-3, step_weight="noise"),
    ),
    "grpo_guard": (PAIRS, DDIM, OWN_STD, loss("grpo_guard", clip_range=2e-5)),
    "awm": (MATCHES, loss("awm")),
    "nft": (MATCHES, loss("nft")),
    "fpo": (MATCHES, PAIRS, loss("fpo")),
    "rwr": (MATCHES, loss("rwr")),
    "draft_1": (GRADIENTS, loss("draft", last=1)),
    "draft_k4": (GRADIENTS, loss("draft", last=4)),
    "draft_lv": (GRADIENTS, loss("draft", last=1, renoised=2)),
    "alignprop": (GRADIENTS, loss("alignprop")),
    "refl": (GRADIENTS, loss("refl")),
    "drtune": (GRADIENTS, loss("drtune")),
}
# What a flow model has and a UNet has not: the SDE that these papers use.
ON_FLOWS = dict.fromkeys(("flow_grpo", "mix_grpo", "tempflow", "grpo_guard"), FLOW_SDE)

QUALITIES = {
    "eval/reward": "reward", "eval/judge": "judge", "emoji_eval": "EmojiEval",
    "eval/diversity": "diversity",
}  # fmt: skip
COSTS = {
    "denoiser_calls": "denoiser calls", "reward_calls": "reward calls", "seconds": "seconds"
}  # fmt: skip
COLORS, MARKS = ("#0072b2", "#d55e00", "#009e73"), "os^vDPX*"  # colours of Okabe and Ito
NEEDS = {
    Needs.TRAJECTORY: "policy gradient",
    Needs.FINAL: "forward matching",
    Needs.GRADIENT: "reward gradient",
}


def configured(
    model: str, name: str, seed: int, budget: int, runs: Path, lr: float | None = None
) -> TrainConfig:
    """The run of a model, an algorithm and a seed."""
    flow = issubclass(policies.family(model), FlowPolicy)
    tree: dict[str, dict[str, Any]] = {}
    for part in (COMMON, *SETTINGS[name], *([ON_FLOWS[name]] if flow and name in ON_FLOWS else [])):
        for section, values in part.items():
            tree[section] = {**tree.get(section, {}), **values}
    config = TrainConfig.from_dict(tree)
    config.model.name, config.train.seed = model, seed
    config.train.lr = lr or config.train.lr
    config.log.dir = str(runs / Path(model).name / f"{name}_seed{seed}")
    config.eval.prompts = str(runs / "held_out.txt")
    epochs = budget / Plan.make(config).calls_per_epoch
    config.train.max_denoiser_calls = budget
    config.train.epochs = int(2 * epochs) + 2  # never reached
    config.eval.every = config.train.checkpoint_every = max(1, int(epochs / POINTS))
    return config


def emoji_eval(policy: policies.Policy) -> dict[str, float]:
    texts = load_prompts("held_out")[EMOJI_EVAL]
    return table(draw(policy, texts, STEPS, 1.0, seed=0), texts)


def run(config: TrainConfig, budget: int) -> None:
    """Train until the budget is used up, however often interrupted; writes result.json."""
    folder = Path(config.log.dir)
    begun = (folder / "config.yaml").exists()
    if begun and TrainConfig.from_file(folder / "config.yaml") != config:
        raise ValueError(f"{folder} was begun with other settings; delete it, or use other --runs")
    if (folder / "result.json").exists():
        return
    trainer = Trainer(config, resume=begun)
    trainer.train()
    rows = trainer.tracker.rows

    def total(name: str) -> float:
        return sum(row.get(name, 0.0) for row in rows)

    evaluated = [row for row in rows if "eval/reward" in row]
    calls = np.cumsum([row.get("denoiser_calls", 0.0) for row in rows]).tolist()
    result = {
        "model": config.model.name, "algorithm": folder.name.rpartition("_seed")[0],
        "need": NEEDS[trainer.algorithm.needs], "seed": config.train.seed, "budget": budget,
        "threads": torch.get_num_threads(), "epochs": trainer.epoch,
        "updates": trainer.optimizer.updates,
        **{name: total(name) for name in COSTS},
        "before": {k: v for k, v in evaluated[0].items() if k.startswith("eval/")},
        "after": {k: v for k, v in evaluated[-1].items() if k.startswith("eval/")},
        "changes": {k: changes(folder, k) for k in ("reward", "judge")},
        "emoji_eval": emoji_eval(trainer.policy),
        **{name: [row["step"] for row in evaluated if row.get(name)] for name in WARNINGS},
        "curve": [
            {"denoiser_calls": c} | {k: row[k] for k in ("eval/reward", "eval/judge")}
            for c, row in zip(calls, rows, strict=True) if "eval/reward" in row
        ],
    }  # fmt: skip
    write_atomic(folder / "result.json", (json.dumps(result, indent=1) + "\n").encode())


def base(model: str, runs: Path) -> dict[str, float]:
    """EmojiEval of the model before training, drawn once."""
    path = runs / Path(model).name / "base.json"
    if not path.exists():
        scores = emoji_eval(policies.load(model))
        write_atomic(path, (json.dumps(scores, indent=1) + "\n").encode())
    return json.loads(path.read_text("utf-8"))


def columns(scores: Mapping[str, float], emoji_eval: Mapping[str, float]) -> dict[str, float]:
    """The QUALITIES of a model: its means on held-out prompts, and EmojiEval."""
    return {k: scores[k] for k in QUALITIES if k in scores} | {"emoji_eval": emoji_eval["overall"]}


def cell(values: Iterable[float], digits: int) -> str:
    """Mean, and the range where there are several values."""
    values = list(values)
    text = f"{statistics.mean(values):,.{digits}f}"
    if min(values) == max(values):
        return text
    return f"{text} [{min(values):,.{digits}f}, {max(values):,.{digits}f}]"


def report(runs: Path, budget: int, out: Path) -> None:
    """leaderboard.json, .md and .png of all finished runs with this budget."""
    found = [json.loads(p.read_text("utf-8")) for p in sorted(runs.glob("*/*/result.json"))]
    boards: dict[str, dict[str, list[Any]]] = {}
    for result in sorted(found, key=lambda r: r["seed"]):
        if result["budget"] == budget:
            board = boards.setdefault(result["model"], {})
            board.setdefault(result["algorithm"], []).append(result)
    if not boards:
        print(f"no finished run with a budget of {budget:,} denoiser calls in {runs}")
        return
    lines: list[str] = []
    for model, board in boards.items():
        lines += markdown(model, board, base(model, runs), budget)
    save_png(figure(boards, budget), out / "leaderboard.png")
    bases = {model: base(model, runs) for model in boards}
    data = {"budget": budget, "base": bases, "runs": [r for r in found if r["budget"] == budget]}
    write_atomic(out / "leaderboard.json", (json.dumps(data, indent=1) + "\n").encode())
    write_atomic(out / "leaderboard.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


def figure(boards: Mapping[str, Mapping[str, list[Any]]], budget: int) -> Image.Image:
    """For every model the reward over denoiser calls, and the judge over the reward from the base
    model (a cross) on; means over the seeds, a colour for every need."""
    grid, needs = np.linspace(0, budget, POINTS + 1), list(NEEDS.values())
    chart, axes = panels(2 * len(boards), 2, (900, 620))
    for model, ax, plane in zip(boards, axes[::2], axes[1::2], strict=True):
        marks = dict.fromkeys(needs, 0)
        for name in (n for n in SETTINGS if n in boards[model]):
            results = boards[model][name]
            need, means = results[0]["need"], []
            for quantity in ("eval/reward", "eval/judge"):
                curves = [
                    np.interp(
                        grid,
                        [p["denoiser_calls"] for p in r["curve"]],
                        [p[quantity] for p in r["curve"]],
                    )
                    for r in results
                ]
                means.append(np.mean(curves, 0))
            reward, judge = means
            look: Any = {"color": COLORS[needs.index(need)], "marker": MARKS[marks[need]]}
            look |= {"mec": "white", "label": name}
            marks[need] += 1
            ax.plot(grid, reward, **look)
            plane.plot(reward, judge, markevery=[len(grid) - 1], lw=0.8, **look)
        plane.plot(*(line[0] for line in plane.get_lines()[0].get_data()), "x", color="black")
        ax.set_title(f"{Path(model).name}: reward, held-out prompts", loc="left")
        ax.set_xlabel("denoiser calls")
        # the legend in the order in which the lines end
        handles = sorted(ax.get_lines(), key=lambda line: -np.asarray(line.get_ydata())[-1])
        ax.legend(
            handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False,
            labelcolor="linecolor",
        )  # fmt: skip
        plane.set_title(f"{Path(model).name}: judge over reward", loc="left")
        plane.set_xlabel("reward")
        plane.xaxis.set_major_locator(AutoLocator())
        plane.margins(x=0.12)
        chart.draw_without_rendering()  # so that ends are known in pixels
        label_ends(plane)
    title = "  ".join(f"{c}: {n}" for c, n in zip(("blue", "orange", "green"), needs, strict=True))
    chart.suptitle(title)
    return picture(chart)


def label_ends(ax: Axes) -> None:
    """Write the name of every line beside its end, moved down where another is in the way."""
    lines = [line for line in ax.get_lines() if not line.get_label().startswith("_")]
    ends = [ax.transData.transform([line.get_xydata()[-1]])[0] for line in lines]
    placed: list[tuple[float, float]] = []
    for line, (x, y) in sorted(zip(lines, ends, strict=True), key=lambda pair: -pair[1][1]):
        level = y
        while any(abs(x - a) < 110 and abs(level - b) < 12 for a, b in placed):
            level -= 2
        placed.append((x, level))
        shift = 8, (level - y) * 72 / ax.figure.dpi
        ax.annotate(
            line.get_label(), line.get_xydata()[-1], shift, textcoords="offset points",
            va="center", color=line.get_color(), size=8,
        )  # fmt: skip


def markdown(
    model: str, board: Mapping[str, list[Any]], before: Mapping[str, float], budget: int
) -> list[str]:
    """The table of a model, the best judge first."""
    seeds = sorted({r["seed"] for results in board.values() for r in results})
    threads = sorted({r["threads"] for results in board.values() for r in results})
    each = {r["seed"]: columns(r["before"], before) for rs in board.values() for r in rs}
    names = [*QUALITIES.values(), *COSTS.values()]
    lines = [
        f"**{Path(model).name}**: {budget:,} denoiser calls, seed{'s' if len(seeds) > 1 else ''} "
        f"{', '.join(map(str, seeds))}, {' or '.join(map(str, threads))} thread(s) a run; mean "
        "[least, most] over the seeds, on held-out prompts, the best judge first; in brackets its "
        "change ± the standard error over the prompts, paired.",
        "",
        f"| | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
        f"| before | {' | '.join(cell((e[k] for e in each.values()), 4) for k in QUALITIES)} |"
        + " |" * len(COSTS),
    ]

    def judged(name: str) -> float:
        return statistics.mean(r["after"]["eval/judge"] for r in board[name])

    for name in sorted(board, key=judged, reverse=True):
        after = [columns(r["after"], r["emoji_eval"]) for r in board[name]]
        cells = [cell((a[k] for a in after), 4) for k in QUALITIES]
        change, error = clustered([r["changes"]["judge"] for r in board[name]])
        cells[list(QUALITIES).index("eval/judge")] += f" ({change:+.4f} ± {error:.4f})"
        cells += [cell((r[k] for r in board[name]), 0) for k in COSTS]
        fewer = "" if len(after) == len(seeds) else f" ({len(after)} of {len(seeds)} seeds)"
        lines.append(f"| {name}{fewer} | {' | '.join(cells)} |")
    return [*lines, "", *gains(board)]


def gains(board: Mapping[str, list[Any]]) -> list[str]:
    """How each run came to its reward: a table of its evaluations."""
    lines = [
        "The gain in reward on the way, after so many denoiser calls; the pictures scored by the "
        "first of these evaluations; and how many of them the guard flagged.",
        "",
        "| seed | run | gain | pictures | flagged |",
        "|---|---|---|---|---|",
    ]
    for r in (r for name in sorted(board) for r in board[name]):
        start, *points = r["curve"]
        way = ", ".join(
            f"{p['denoiser_calls']:,.0f}: {p['eval/reward'] - start['eval/reward']:+.3f}"
            for p in points
        )
        epochs = round(r["epochs"] * points[0]["denoiser_calls"] / r["denoiser_calls"])
        scored = f"{epochs * r['reward_calls'] / r['epochs']:.0f}"
        flagged = f"{sum(len(r[name]) for name in WARNINGS)} of {len(points)}"
        lines.append(f"| {r['seed']} | {r['algorithm']} | {way} | {scored} | {flagged} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--models", nargs="+", default=MODELS, help="pipeline folders")
    parser.add_argument("--algorithms", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--budget", type=int, default=10_000, help="denoiser calls a run")
    parser.add_argument("--lr", type=float, help="another learning rate, for a sweep")
    parser.add_argument("--runs", type=Path, default=Path("runs/leaderboard"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/leaderboard"))
    parser.add_argument("--report", action="store_true", help="only the report")
    parser.add_argument("--dry-run", action="store_true", help="only check and price the runs")
    args = parser.parse_args()
    if not args.report:
        held_out = "\n".join(load_prompts("held_out")[CURVE]) + "\n"
        write_atomic(args.runs / "held_out.txt", held_out.encode())
        settings = (args.budget, args.runs, args.lr)
        configs = [  # all are checked before any is trained
            configured(model, name, seed, *settings)
            for seed in args.seeds for model in args.models for name in args.algorithms
        ]  # fmt: skip
        for config in configs:
            needs = algorithms.build(config.algorithm).needs
            print(f"{config.log.dir}: {NEEDS[needs]}, about {config.train.epochs // 2} epochs")
        if args.dry_run:
            return
        for config in configs:
            base(config.model.name, args.runs)
            run(config, args.budget)
    report(args.runs, args.budget, args.out)


if __name__ == "__main__":
    main()
