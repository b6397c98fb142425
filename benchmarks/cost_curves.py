"""What a run costs as it grows: time by images, steps, micro-batch and prompts; memory by prompts
and epochs; one process against two.

Times are those of an epoch of DDPO on emoji-flux (no guidance, 6 steps, 32 images of 8 prompts, in
micro-batches of 16), one quantity varied at a time: the median of `--epochs` after one to warm up,
in rounds over all values, so that a slow moment is spread over them. A line is fitted to the times.

    OMP_NUM_THREADS=1 python benchmarks/cost_curves.py           # 12 minutes
    python benchmarks/cost_curves.py --quick                     # toy size, to see that it runs

Writes benchmarks/results/cost_curves.json and .md; resumes curve by curve.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from diffalign import policies
from diffalign.config import TrainConfig
from diffalign.config.prompts import PromptSampler
from diffalign.training.memory import MIB, Peak
from diffalign.training.trainer import Trainer

RESULTS = Path(__file__).parent / "results"
WHOLE = {
    "images": [16, 32, 64, 128],
    "steps": [3, 6, 12, 24],
    "micro-batch": [4, 8, 16, 32],
    "prompts": [2, 4, 8, 16],
}
QUICK = {"images": [4, 8]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", default=str(RESULTS))
    parser.add_argument("--process", help=argparse.SUPPRESS)  # of two, the folder of the run
    args = parser.parse_args()
    if args.process:
        seconds = epoch_times({"images": 32}, 3, args.process)
        if os.environ["RANK"] == "0":
            print(json.dumps(seconds))
        return
    file = Path(args.out) / "cost_curves.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    epochs = 1 if args.quick else args.epochs
    work: dict[str, Any] = {
        name: lambda name=name, values=values: times(name, values, epochs)
        for name, values in (QUICK if args.quick else WHOLE).items()
    }
    work["memory by prompts"] = lambda: prompts(
        [10, 20] if args.quick else [100, 1000, 10**4, 10**5]
    )
    work["memory by epochs"] = lambda: flat(2 if args.quick else 20)
    if not args.quick:
        work["processes"] = processes
    for name, measure in work.items():
        if name not in found:
            found[name] = measure()
            print(name, found[name], flush=True)
            file.write_text(json.dumps(found, indent=1))
    (Path(args.out) / "cost_curves.md").write_text(table(found))


def trainer(folder: str, **given: int) -> Trainer:
    """given: images, steps, micro_batch, prompts (an epoch's)."""
    images, groups = given.get("images", 32), given.get("prompts", 8)
    groups = min(groups, max(1, images // 2))
    config = TrainConfig.from_dict(
        {
            "model": {"name": "assets/emoji-flux", "lora_rank": 4},
            "algorithm": {"type": "flow_grpo"},
            "sampler": {"steps": given.get("steps", 6), "kernel": "flow_sde", "eta": 0.7},
            "rewards": {"jpeg": 1.0},
            "data": {"groups": groups, "group_size": images // groups},
            "train": {"epochs": 1000, "micro_batch": given.get("micro-batch", 16)},
            "eval": {"prompts": None},
            "log": {"dir": f"{folder}/run"},
        }
    )
    made = Trainer(config, overwrite=True)
    made.policy.encode([p.text for p in made.plan.train_prompts])
    made.policy.free_text_encoders()
    return made


def epoch_times(given: dict[str, int], epochs: int, folder: str) -> list[float]:
    made, seconds = trainer(folder, **given), []
    for epoch in range(epochs + 1):
        start = time.perf_counter()
        made.run_epoch(epoch)
        seconds.append(time.perf_counter() - start)
    made.tracker.close()
    return seconds[1:]


def times(name: str, values: list[int], epochs: int) -> dict[str, Any]:
    """Median seconds of an epoch for each value, and the line through them."""
    with tempfile.TemporaryDirectory() as place:
        made = [trainer(f"{place}/{v}", **{name: v}) for v in values]
        seconds: list[list[float]] = [[] for _ in values]
        for epoch in range(epochs + 1):
            for one, found in zip(made, seconds, strict=True):
                start = time.perf_counter()
                one.run_epoch(epoch)
                found.append(time.perf_counter() - start)
        for one in made:
            one.tracker.close()
    medians = [median(s[1:]) for s in seconds]
    x = [1 / v for v in values] if name == "micro-batch" else values  # what a call costs by itself
    return {"values": values, "seconds": medians, **line(x, medians)}


def line(x: Sequence[float], y: list[float]) -> dict[str, float]:
    """Least squares of y = intercept + slope x, and R²."""
    a, b = torch.tensor(x, dtype=torch.double), torch.tensor(y, dtype=torch.double)
    slope = ((a - a.mean()) * (b - b.mean())).sum() / (a - a.mean()).square().sum()
    rest = b - b.mean() - slope * (a - a.mean())
    fit = 1 - rest.square().sum() / (b - b.mean()).square().sum()
    return {
        "slope": slope.item(),
        "intercept": (b.mean() - slope * a.mean()).item(),
        "r2": fit.item(),
    }


def prompts(numbers: list[int]) -> dict[str, Any]:
    """MiB of the prompt cache, and seconds to encode and to plan an epoch, by distinct prompts."""
    policy, found = policies.load("assets/emoji-flux"), []
    for n in numbers:
        policy._prompts.clear()
        texts = [f"a red heart number {i}" for i in range(n)]
        start = time.perf_counter()
        for i in range(0, n, 1024):  # what is returned is of the device, and let go
            policy.encode(texts[i : i + 1024])
        encoded = time.perf_counter() - start
        size = sum(t.nbytes for kept in policy._prompts.values() for t in kept.values())
        start = time.perf_counter()
        PromptSampler(n, 8, 0).epoch(5)
        found.append([n, size / MIB, encoded, time.perf_counter() - start])
    return {"rows": found}


def flat(epochs: int) -> dict[str, Any]:
    """MiB of tensors that an epoch leaves behind and has at its peak."""
    with tempfile.TemporaryDirectory() as place:
        made, left, peaks = trainer(place, images=8, prompts=2), [], []
        for epoch in range(epochs):
            with Peak() as peak:
                made.run_epoch(epoch)
            left.append(peak.alive / MIB)
            peaks.append(peak.peak / MIB)
        made.tracker.close()
    return {"left": left, "peaks": peaks}


def processes() -> dict[str, Any]:
    """Median seconds of an epoch of 32 images, by one process and by two of a thread each."""
    found = {}
    for n in (1, 2):
        with tempfile.TemporaryDirectory() as place:
            run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command = [*run, f"--nproc_per_node={n}", __file__, "--process", place]
            root = str(Path(__file__).parents[1])
            env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
            env["PYTHONPATH"] = root
            out = subprocess.run(
                command, env=env, capture_output=True, text=True, check=True
            ).stdout
            lines = [line for line in out.splitlines() if line.startswith("[")]
            found[str(n)] = median(json.loads(lines[0]))
    return found


def table(found: dict[str, Any]) -> str:
    lines = ["| by | values | seconds of an epoch | line | R² |", "|---|---|---|---|---|"]
    for name, f in found.items():
        if "slope" in f:
            seconds = ", ".join(f"{s:.2f}" for s in f["seconds"])
            by = "/ n" if name == "micro-batch" else "× n"
            fit = f"{f['intercept']:+.3f} s {f['slope']:+.4f} s {by}"
            values = ", ".join(map(str, f["values"]))
            lines.append(f"| {name} | {values} | {seconds} | {fit} | {f['r2']:.4f} |")
    if rows := found.get("memory by prompts", {}).get("rows"):
        lines += ["", "| distinct prompts | cache, MiB | encoded in, s | an epoch drawn in, s |"]
        lines.append("|---|---|---|---|")
        lines += [f"| {n:,} | {mib:.1f} | {s:.1f} | {drawn:.3f} |" for n, mib, s, drawn in rows]
    if epochs := found.get("memory by epochs"):
        first, last = epochs["peaks"][1], epochs["peaks"][-1]
        lines.append(
            f"\nPeak of the tensors of an epoch: {first:.1f} MiB in the second, {last:.1f} MiB in "
            f"the {len(epochs['peaks'])}th."
        )
    if two := found.get("processes"):
        lines.append(
            f"\nAn epoch of 32 images: {two['1']:.2f} s by one process, {two['2']:.2f} s by two "
            f"on two cores, {two['1'] / two['2']:.2f} times as fast."
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
