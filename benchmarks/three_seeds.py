"""Train a config with several seeds and print held-out means before and after, with their errors.

    python benchmarks/three_seeds.py configs/emoji_draft_clip.yaml [--seeds 0,1,2] [--name NAME]
    [--section.key VALUE ...]

Writes runs/NAME_seedS, which it goes on with, and benchmarks/results/NAME.md; NAME is that of the
config if nothing else is said; a run that is done is only read. Every seed changes the LoRA's
initialisation, the prompt order and the noise, that of the evaluation too, so that "before" has a
spread. Before and after are means ± the standard deviation over the seeds; the
change is that of the same prompts from the same noise, ± its standard error over the prompts.
referee: the share of the kept pictures, one a prompt, of which EmojiWorld's referee confirms all
that their prompts say.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from clusters import changes, clustered

from diffalign import TrainConfig, Trainer
from diffalign.emoji_world.evaluate import right
from diffalign.report.run import read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--name")
    args, overrides = parser.parse_known_args()
    path, seeds = args.config, tuple(map(int, args.seeds.split(",")))
    name = args.name or path.stem
    runs, results, minutes = [], [], []
    for seed in seeds:
        config = TrainConfig.from_file(path, overrides)
        config.train.seed = seed
        config.log.dir = f"runs/{name}_seed{seed}"
        finished(config)
        runs.append(read([config.log.dir])[0])
        looks = [row for row in runs[-1].rows if "eval/reward" in row]
        results.append((looks[0], looks[-1]))
        minutes.append((runs[-1].total("seconds") or 0.0) / 60)
    lines = [
        f"`python benchmarks/three_seeds.py {' '.join(sys.argv[1:])}`, seeds {seeds}, "
        f"{statistics.mean(minutes):.1f} minutes a run, evaluations left out.",
        "",
        "| held-out mean | before | after | change | change of each seed |",
        "|---|---|---|---|---|",
    ]
    for key in (k for k in results[0][0] if k.startswith("eval/")):
        before, after = ([r[end][key] for r in results] for end in (0, 1))
        change = [b - a for a, b in zip(before, after, strict=True)]
        measure, mean = key.removeprefix("eval/"), f"{statistics.mean(change):+.4f}"
        if measure != "diversity":  # which is no mean over pictures
            mean += f" ± {clustered([changes(run.dir, measure) for run in runs])[1]:.4f}"
        lines.append(row(measure, before, after, mean))
    ends = [(run.shots[0], run.shots[-1]) for run in runs]
    hits = [[[*map(float, right(s.pictures, s.prompts))] for s in shots] for shots in ends]
    shares = [[statistics.mean(h[k]) for h in hits] for k in (0, 1)]
    gains = [[b - a for a, b in zip(*h, strict=True)] for h in hits]
    mean, error = clustered(gains)
    lines.append(row("referee", shares[0], shares[1], f"{mean:+.4f} ± {error:.4f}"))
    table = "\n".join(lines) + "\n"
    out = Path("benchmarks/results") / f"{name}.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(table, "utf-8")
    print(table)


def finished(config: TrainConfig) -> None:
    """Train a run to its end, from where it is."""
    there = (Path(config.log.dir) / "metrics.jsonl").exists()
    if not there or read([config.log.dir])[0].epochs < config.train.epochs:
        Trainer(config, resume="latest").train()


def row(name: str, before: list[float], after: list[float], mean: str) -> str:
    spreads = [f"{statistics.mean(v):.4f} ± {statistics.stdev(v):.4f}" for v in (before, after)]
    each = ", ".join(f"{b - a:+.4f}" for a, b in zip(before, after, strict=True))
    return f"| {name} | {spreads[0]} | {spreads[1]} | {mean} | {each} |"


if __name__ == "__main__":
    main()
