"""Train a config with several seeds and print held-out means before and after, with their errors.

    python benchmarks/three_seeds.py configs/emoji_draft_clip.yaml [--section.key VALUE ...]

Writes runs/NAME_seedS and benchmarks/results/NAME.md. Every seed changes the LoRA's initialisation,
the prompt order and the noise, that of the evaluation too, so that "before" has a spread. Before
and after are means ± the standard deviation over the seeds; the change is that of the same
prompts from the same noise, ± its standard error over the prompts.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from pathlib import Path

from clusters import changes, clustered

from diffalign import TrainConfig, Trainer

SEEDS = (0, 1, 2)


def main() -> None:
    path, overrides = Path(sys.argv[1]), sys.argv[2:]
    results, minutes = [], []
    for seed in SEEDS:
        config = TrainConfig.from_file(path, overrides)
        config.train.seed = seed
        config.log.dir = f"runs/{path.stem}_seed{seed}"
        shutil.rmtree(config.log.dir, ignore_errors=True)
        start = time.time()
        results.append(Trainer(config).train())
        minutes.append((time.time() - start) / 60)
    lines = [
        f"`python benchmarks/three_seeds.py {' '.join(sys.argv[1:])}`, seeds {SEEDS}, "
        f"{statistics.mean(minutes):.1f} minutes a run on two cores.",
        "",
        "| held-out mean | before | after | change | change of each seed |",
        "|---|---|---|---|---|",
    ]
    for key in results[0]["after"]:
        before = [r["before"][key] for r in results]
        after = [r["after"][key] for r in results]
        change = [b - a for a, b in zip(before, after, strict=True)]
        name, mean = key.removeprefix("eval/"), f"{statistics.mean(change):+.4f}"
        if name != "diversity":  # which is no mean over pictures
            runs = [f"runs/{path.stem}_seed{seed}" for seed in SEEDS]
            mean += f" ± {clustered([changes(run, name) for run in runs])[1]:.4f}"
        lines.append(
            f"| {name} | {statistics.mean(before):.4f} ± {statistics.stdev(before):.4f} "
            f"| {statistics.mean(after):.4f} ± {statistics.stdev(after):.4f} | {mean} | "
            f"{', '.join(f'{c:+.4f}' for c in change)} |"
        )
    table = "\n".join(lines) + "\n"
    out = Path("benchmarks/results") / f"{path.stem}.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(table, "utf-8")
    print(table)


if __name__ == "__main__":
    main()
