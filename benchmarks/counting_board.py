"""Three ways to teach numbers with the budget of the demo: 20,480 denoiser calls, 20 or 21 updates.

    python benchmarks/counting_board.py draft ddpo awm    # 50 minutes each, one thread; resumes
    python benchmarks/counting_board.py --report

All train the whole network of configs/emoji_counting.yaml on its reward. An update is as large as
lets the budget hold twenty. A method's learning rate is the better of RATES on seed 9, by the
held-out reward; that of DRaFT was chosen on seeds 0 to 2. Then come SEEDS, on which nothing was
chosen. Writes benchmarks/results/counting_board.json, and with --report its table.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from clusters import clustered
from three_seeds import finished

from diffalign import TrainConfig
from diffalign.config.files import write_atomic
from diffalign.emoji_world.evaluate import right
from diffalign.report.run import read

RESULTS = Path(__file__).parent / "results" / "counting_board.json"
CONFIG = Path("configs/emoji_counting.yaml")
OPTIONS = [
    *("--eval.images_per_prompt", "2"),
    *("--eval.rewards.verifier.type", "diffalign.emoji_world.verifier:verify"),
]
SEEDS, CHOICE, RATES = (3, 4, 5), 9, (5e-5, 2e-4)
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "draft": {},
    "ddpo": {
        "algorithm": {"type": "ddpo", "clip_range": 1e-3},
        "sampler": {"kernel": "ddim", "eta": 1.0},
        "data": {"groups": 8, "group_size": 8},
        "train": {"epochs": 21},
    },
    "awm": {
        "algorithm": {"type": "awm"},
        "data": {"groups": 6, "group_size": 8},
        "train": {"epochs": 21},
    },
}


def trained(method: str, seed: int, lr: float | None) -> dict[str, Any]:
    """What a run measured on held-out prompts: before, after, and per prompt."""
    tree = TrainConfig.from_file(CONFIG, OPTIONS).to_dict()
    for section, values in METHODS[method].items():
        tree[section] = values if section == "algorithm" else tree[section] | values
    config = TrainConfig.from_dict(tree)
    config.train.seed, config.train.lr = seed, lr or config.train.lr
    kind = "" if method == "draft" else f"_{method}_lr{lr:g}"
    config.log.dir = f"runs/{CONFIG.stem}{kind}_seed{seed}"
    finished(config)
    run = read([config.log.dir])[0]
    ends = [run.shots[0], run.shots[-1]]
    hits = [[*map(float, right(s.pictures, s.prompts))] for s in ends]
    gains = {
        name: [
            statistics.fmean(b) - statistics.fmean(a)
            for a, b in zip(*(s.scores[name] for s in ends), strict=True)
        ]
        for name in ("composition", "clip", "judge")
    }
    gains["referee"] = [b - a for a, b in zip(*hits, strict=True)]
    changes = {name: run.change(name) for name in ("reward", "diversity")}
    return {
        "lr": config.train.lr,
        "calls": run.total("denoiser_calls"),
        "pictures": run.total("reward_calls"),
        "minutes": (run.total("seconds") or 0.0) / 60,
        "gains": gains,
        "means": {name: (c.before, c.after) for name, c in changes.items() if c},
        "noise_scale_least": [y for _, y in run.known("noise_scale_least")][-1:],
        "flagged": [epoch for epoch, _ in run.warnings],
    }


def results() -> dict[str, dict[str, Any]]:
    return json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}


def measured(method: str, seed: int, lr: float | None) -> dict[str, Any]:
    """`trained`, or what is known of it already."""
    name = f"{method}, seed {seed}" + (f", lr {lr:g}" if seed == CHOICE else "")
    if name not in results():
        found = trained(method, seed, lr)
        known = results() | {name: found}  # another process may have written
        lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in known.items())
        write_atomic(RESULTS, f"{{\n{lines}\n}}\n".encode())
    return results()[name]


def report() -> None:
    known = results()
    measures = ("composition", "clip", "judge", "referee")
    print(f"| | seeds | lr | calls | pictures | {' | '.join(measures)} | diversity |")
    print("|---" * (6 + len(measures)) + "|")
    for method in METHODS:
        runs = [known[k] for s in SEEDS if (k := f"{method}, seed {s}") in known]
        if not runs:
            continue
        cells = []
        for measure in measures:
            mean, error = clustered([r["gains"][measure] for r in runs])
            cells.append(f"{mean:+.3f} ± {error:.3f}")
        spread = [statistics.fmean(r["means"]["diversity"][k] for r in runs) for k in (0, 1)]
        cells.append(f"{spread[0]:.3f} → {spread[1]:.3f}")
        numbers = [f"{runs[0][k]:,.0f}" for k in ("calls", "pictures")]
        first = [method, str(len(runs)), f"{runs[0]['lr']:g}", *numbers]
        print(f"| {' | '.join([*first, *cells])} |")


def main() -> None:
    for method in (name for name in METHODS if name in sys.argv[1:]):
        lr = None
        if method != "draft":

            def reward(rate: float, method: str = method) -> float:
                return measured(method, CHOICE, rate)["means"]["reward"][1]

            lr = max(RATES, key=reward)
        for seed in SEEDS:
            measured(method, seed, lr)
    report()


if __name__ == "__main__":
    main()
