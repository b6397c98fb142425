"""Flow-DPPO beside the clip of the ratio, four updates a rollout, on EmojiWorld's SD3.

    python benchmarks/flow_dppo.py --sweep     # thresholds, on a seed and prompts of their own
    python benchmarks/flow_dppo.py             # the comparison with the two thresholds chosen
    python benchmarks/flow_dppo.py --report    # only the tables and the figure

flow_grpo with `trust: ratio` and with `trust: kl` at two learning rates, the same denoiser calls,
rollouts of the same noise. The reward is that of emoji_leaderboard.py, small files that still show
what the prompt says; the judge is never trained on. Three steps of the first half are drawn from
the SDE and trained, as in the published recipe. No KL to the base model is penalized: how far each
goes for its reward is what is measured. A finished run is skipped, an interrupted one resumed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from clusters import changes, clustered
from emoji_leaderboard import COMMON
from matplotlib.ticker import AutoLocator
from PIL import Image

from diffalign import TrainConfig, Trainer
from diffalign.config.files import to_json, write_atomic
from diffalign.drawing.curves import panels, picture
from diffalign.drawing.grids import save_png
from diffalign.emoji_world.evaluate import load_prompts

LRS, SEEDS, EPOCHS, EVERY = (1e-3, 4e-3), (0, 1, 2), 16, 4
SWEEP_SEED, SWEEP_EPOCHS = 100, 12
Arm = tuple[str, float]  # trust, and its threshold
CHOSEN: tuple[Arm, ...] = (("ratio", 3e-5), ("kl", 1e-4))  # the best means of the sweep
SWEPT: tuple[Arm, ...] = (
    *(("ratio", e) for e in (3e-5, 1e-4, 3e-4)),
    *(("kl", t) for t in (1e-6, 1e-5, 1e-4, math.inf)),
)
THRESHOLD = {"ratio": "clip_range", "kl": "kl_max"}
CURVES = ("eval/reward", "eval/judge", "eval/kl")
COLORS = {"ratio": "#d55e00", "kl": "#0072b2"}


def configured(arm: Arm, lr: float, seed: int, epochs: int, every: int, runs: Path) -> TrainConfig:
    trust, threshold = arm
    train = {"updates_per_epoch": 4, "micro_batch": 48, "lr": lr, "seed": seed, "epochs": epochs}
    changed: dict[str, dict[str, Any]] = {
        "model": {"name": "assets/emoji-sd3"},
        "algorithm": {"type": "flow_grpo", "trust": trust, THRESHOLD[trust]: threshold},
        "sampler": {"kernel": "flow_sde", "eta": 0.7, "window": 3, "window_range": [0, 4]},
        "data": {"groups": 8, "group_size": 8},
        "train": train | {"checkpoint_every": every},
        "eval": {"prompts": str(runs / "held_out.txt"), "every": every},
        "log": {"dir": str(runs / f"{trust}_{threshold:g}_lr{lr:g}_seed{seed}")},
    }
    sections = COMMON.keys() | changed.keys()
    return TrainConfig.from_dict(
        {name: {**COMMON.get(name, {}), **changed.get(name, {})} for name in sections}
    )


def run(config: TrainConfig) -> None:
    """Train, however often interrupted; writes result.json."""
    folder = Path(config.log.dir)
    if (folder / "result.json").exists():
        return
    trainer = Trainer(config, resume=(folder / "config.yaml").exists())
    trainer.train()
    rows, calls, curve = trainer.tracker.rows, 0.0, []
    for row in rows:
        calls += row.get("denoiser_calls", 0.0)
        if "eval/reward" in row:
            curve.append({"denoiser_calls": calls} | {k: row[k] for k in CURVES})
    algorithm, trained = config.algorithm, [row for row in rows if "loss" in row]
    stopped = ("masked",) if algorithm["trust"] == "kl" else ("clip_high", "clip_low")
    result = {
        "trust": algorithm["trust"], "threshold": algorithm[THRESHOLD[algorithm["trust"]]],
        "lr": config.train.lr, "seed": config.train.seed, "denoiser_calls": calls,
        "seconds": sum(row["seconds"] for row in trained), "curve": curve,
        "outside": statistics.fmean(sum(row[k] for k in stopped) for row in trained),
        "changes": {k: changes(folder, k) for k in ("reward", "judge")},
    }  # fmt: skip
    write_atomic(folder / "result.json", (json.dumps(result, indent=1) + "\n").encode())


def finished(runs: Path) -> dict[tuple[float, Arm], list[dict[str, Any]]]:
    """The results of every learning rate and arm, by seed."""
    found = [json.loads(p.read_text("utf-8")) for p in runs.glob("*/result.json")]
    board: dict[tuple[float, Arm], list[dict[str, Any]]] = {}
    for r in sorted(found, key=lambda r: (r["lr"], r["trust"] == "kl", r["threshold"], r["seed"])):
        board.setdefault((r["lr"], (r["trust"], r["threshold"])), []).append(r)
    return board


def signed(results: list[list[float]]) -> str:
    change, error = clustered(results)
    return f"{change:+.4f} ± {error:.4f}"


def table(board: dict[tuple[float, Arm], list[dict[str, Any]]]) -> list[str]:
    """A row for every learning rate and arm."""
    lines = [
        "| lr | trust | reward | of each seed | judge | KL to the base model | outside |",
        "|---|---|---|---|---|---|---|",
    ]
    for (lr, (trust, threshold)), rs in board.items():
        seeds = ", ".join(f"{statistics.fmean(r['changes']['reward']):+.3f}" for r in rs)
        kl = statistics.fmean(r["curve"][-1]["eval/kl"] for r in rs)
        lines.append(
            f"| {lr:g} | `{trust}`, {THRESHOLD[trust]} {threshold:g} "
            f"| {signed([r['changes']['reward'] for r in rs])} | {seeds} "
            f"| {signed([r['changes']['judge'] for r in rs])} | {kl:.4f} "
            f"| {statistics.fmean(r['outside'] for r in rs):.1%} |"
        )
    return lines


def differences(board: dict[tuple[float, Arm], list[dict[str, Any]]]) -> list[str]:
    """What the mask by KL has more than the clip, of the same prompts, noise and seeds."""
    lines = ["| lr | reward, kl less ratio | of each seed | judge |", "|---|---|---|---|"]
    for lr in LRS:
        pairs = list(zip(*(board.get((lr, arm), []) for arm in CHOSEN), strict=False))
        if pairs:
            more = {
                k: [
                    [b - a for a, b in zip(clip["changes"][k], kl["changes"][k], strict=True)]
                    for clip, kl in pairs
                ]
                for k in ("reward", "judge")
            }
            seeds = ", ".join(f"{statistics.fmean(d):+.3f}" for d in more["reward"])
            lines.append(
                f"| {lr:g} | {signed(more['reward'])} | {seeds} | {signed(more['judge'])} |"
            )
    return lines


def figure(board: dict[tuple[float, Arm], list[dict[str, Any]]]) -> Image.Image:
    """The held-out reward over denoiser calls and over the distance to the base model: means over
    the seeds, and every seed thinly."""
    chart, axes = panels(2, 2, (760, 520))
    for (lr, (trust, _)), results in board.items():
        look: Any = {"color": COLORS[trust], "ls": "-" if lr == LRS[0] else "--"}
        each = [[list(p.values()) for p in r["curve"]] for r in results]
        means = [[statistics.fmean(v) for v in zip(*points, strict=True)]
                 for points in zip(*each, strict=True)]  # fmt: skip
        for points, width in [(p, 0.6) for p in each] + [(means, 2.5)]:
            calls, reward, _, kl = zip(*points, strict=True)
            label = f"{trust}, lr {lr:g}" if points is means else None
            axes[0].plot(calls, reward, lw=width, label=label, **look)
            axes[1].plot([max(k, 0) ** 0.5 for k in kl], reward, lw=width, **look)
    axes[0].legend(frameon=False)
    for ax, name in zip(axes, ("denoiser calls", "root mean square distance (√kl)"), strict=True):
        ax.set_title("reward, held-out prompts", loc="left")
        ax.set_xlabel(name)
        ax.xaxis.set_major_locator(AutoLocator())
    return picture(chart)


def report(runs: Path, out: Path) -> None:
    board, swept = finished(runs), finished(runs / "sweep")
    lines = ["Changes on held-out prompts ± the standard error over the prompts, paired.", ""]
    lines += [*table(board), "", *differences(board), ""] if board else []
    lines += [f"The sweep, seed {SWEEP_SEED}, {SWEEP_EPOCHS} epochs:", "", *table(swept)]
    if board:
        save_png(figure(board), out.with_suffix(".png"))
    data = {"runs": [r for rs in board.values() for r in rs]}
    data["sweep"] = [r for rs in swept.values() for r in rs]
    write_atomic(out.with_suffix(".json"), (to_json(data) + "\n").encode())
    write_atomic(out.with_suffix(".md"), ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweep", action="store_true", help="the sweep of the thresholds")
    parser.add_argument("--report", action="store_true", help="only the report")
    parser.add_argument("--runs", type=Path, default=Path("runs/flow_dppo"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/flow_dppo"))
    args = parser.parse_args()
    if not args.report:
        runs = args.runs / "sweep" if args.sweep else args.runs
        # 32 of EmojiEval's prompts; the sweep has 32 others
        texts = load_prompts("held_out")[slice(7 if args.sweep else 0, None, 14)]
        write_atomic(runs / "held_out.txt", ("\n".join(texts) + "\n").encode())
        how = (SWEEP_EPOCHS, SWEEP_EPOCHS, runs) if args.sweep else (EPOCHS, EVERY, runs)
        arms, seeds = (SWEPT, (SWEEP_SEED,)) if args.sweep else (CHOSEN, SEEDS)
        for seed, arm, lr in ((s, a, lr) for s in seeds for a in arms for lr in LRS):
            run(configured(arm, lr, seed, *how))
    report(args.runs, args.out)


if __name__ == "__main__":
    main()
