r"""The time and memory of a run, against TRL 0.23.1, the last release with DDPO and AlignProp.

Both train a LoRA of rank 4 on the attention of emoji-sd, with the same prompts, steps, batches,
guidance, reward function, optimizer and number of threads. Runs alternate, each in a process of its
own: the ratios are those of neighbours. Time is that of an epoch, without set-up, evaluation and
saving, after epochs to warm up. Memory is the peak of the process (its largest resident set).

    pip install --no-deps --target ~/trl trl==0.23.1 datasets multiprocess dill xxhash pyarrow \
        pandas
    OMP_NUM_THREADS=1 python benchmarks/against_trl.py --trl ~/trl            # 30 minutes; resumes
    OMP_NUM_THREADS=1 python benchmarks/against_trl.py --trl ~/trl --curve    # 10 minutes

What is changed so that both compute the same: the scheduler ends at the first training timestep, as
Stable Diffusion's does (with emoji-sd's own TRL divides by a standard deviation of 0 in the last
step); AlignProp is truncated at a fixed step; both trainers take the prompts in the same order.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PROMPTS = ("a red heart", "a blue star", "a green leaf", "a yellow sun")
STEPS, PICTURES, BATCH, LAST, LR = 10, 16, 8, 4, 3e-4

DDPO: dict[str, Any] = {
    "algorithm": {"type": "ddpo", "clip_range": 1e-4},
    "rewards": {"against_trl:darkness": 1.0},
    "advantage": {"baseline": "tracker", "buffer_size": 16, "min_count": 16, "clip": 5.0},
    "sampler": {"steps": STEPS, "guidance": 3.0, "kernel": "ddim", "eta": 1.0, "batch": BATCH},
    "data": {"groups": len(PROMPTS), "group_size": PICTURES // len(PROMPTS)},
    "train": {"epochs": 1000, "micro_batch": BATCH, "checkpoint_every": 0},
    "model": {"lora_rank": 4},
}
ALIGNPROP = {
    **DDPO,
    "algorithm": {"type": "draft", "last": LAST},
    "advantage": {},
    "data": {"groups": len(PROMPTS), "group_size": BATCH // len(PROMPTS)},
}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {  # name: (what TRL runs, what ours has beside it)
    "DDPO, float32": ("ddpo", {}),
    "DDPO, float32, compile": ("ddpo", {"model.compile": True}),
    "DDPO, bfloat16, compile": ("ddpo", {"model.compile": True, "model.dtype": "bfloat16"}),
    "AlignProp, float32": ("alignprop", {}),
    "AlignProp, float32, compile": ("alignprop", {"model.compile": True}),
    "AlignProp, bfloat16, compile": (
        "alignprop",
        {"model.compile": True, "model.dtype": "bfloat16", "model.vae_dtype": "bfloat16"},
    ),
    "DDPO, window of 5 steps, compile": ("ddpo", {"model.compile": True, "sampler.window": 5}),
}
CURVES: dict[str, tuple[str, dict[str, Any]]] = {  # name: (who, what ours has beside it)
    "ours": ("ours", {}),
    "ours, bfloat16, compile": ("ours", ROWS["AlignProp, bfloat16, compile"][1]),
    "TRL": ("trl", {}),
}
CURVE_EPOCHS, CURVE_LR, GOAL = 18, 3e-3, 0.5
SAME_DTYPE = {"DDPO, bfloat16, compile", "AlignProp, bfloat16, compile"}  # of TRL, a second row


def darkness(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
    """1 - mean pixel, in [0, 1]: a reward that costs nothing, and that both can learn."""
    return 1 - images.float().flatten(1).mean(1)


darkness.differentiable = True  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trl", default="~/trl", help="folder that TRL was installed into")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2, help="that are timed, after a warm-up")
    parser.add_argument("--curve", action="store_true", help="rewards by epoch, three seeds")
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(json.loads(args.child))
    file = RESULTS / "against_trl.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    work = curves if args.curve else pairs
    for _ in work(args, found):
        file.write_text(json.dumps(found, indent=1))
        (RESULTS / "against_trl.md").write_text(table(found))
    print(table(found))


def pairs(args: argparse.Namespace, found: dict[str, Any]) -> Any:
    for name in args.rows:
        what, options = ROWS[name]
        done = found.setdefault("pairs", {}).setdefault(name, [])
        while len(done) < args.pairs:
            job = {"what": what, "options": options, "epochs": args.epochs, "seed": 0}
            half = name in SAME_DTYPE
            pair = {"ours": run(args.trl, job | {"who": "ours"})}
            pair["trl"] = run(args.trl, job | {"who": "trl", "dtype": "no"})
            if half:
                pair["trl_bf16"] = run(args.trl, job | {"who": "trl", "dtype": "bf16"})
            done.append(pair)
            print(name, json.dumps(pair), flush=True)
            yield


def curves(args: argparse.Namespace, found: dict[str, Any]) -> Any:
    """Reward by epoch of AlignProp, which learns in a few minutes."""
    for seed in range(3):
        for name, (who, options) in CURVES.items():
            done = found.setdefault("curves", {}).setdefault(name, {})
            if str(seed) not in done:
                job = {"what": "alignprop", "options": options, "epochs": CURVE_EPOCHS}
                job |= {"who": who, "seed": seed, "dtype": "no", "lr": CURVE_LR}
                done[str(seed)] = run(args.trl, job)
                print("curve", name, seed, done[str(seed)]["rewards"], flush=True)
                yield


def run(trl: str, job: dict[str, Any]) -> dict[str, Any]:
    """One run in a process of its own: seconds of an epoch, peak MB, rewards, denoiser rows."""
    with tempfile.TemporaryDirectory() as folder:
        job |= {"folder": folder}
        model = shutil.copytree(ROOT / "assets/emoji-sd", Path(folder) / "model")
        config = model / "scheduler/scheduler_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"set_alpha_to_one": False}))
        (Path(folder) / "prompts.txt").write_text("\n".join(PROMPTS))
        path = [str(ROOT), str(ROOT / "benchmarks"), os.path.expanduser(trl)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "--child", json.dumps(job)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise SystemExit(f"{job}: {done.stderr[-3000:]}")
        return json.loads(done.stdout.strip().splitlines()[-1])


def child(job: dict[str, Any]) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    epoch, denoiser = (ours if job["who"] == "ours" else theirs)(job)
    rows = {"forward": 0, "gradient": 0}

    def count(module: Any, args: Any, kwargs: Any) -> None:
        rows["gradient" if torch.is_grad_enabled() else "forward"] += len(args[0])

    rewards, seconds = [], []
    for i in range(job["epochs"] + 1):  # the first is to warm up
        if i == 1:
            hook = denoiser.register_forward_pre_hook(count, with_kwargs=True)
        start = time.perf_counter()
        rewards.append(epoch(i))
        seconds.append(time.perf_counter() - start)
        if i == 1:
            hook.remove()  # a hook would have the network compiled again
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = {"seconds": seconds[1:], "first": seconds[0], "peak_mb": peak, "rewards": rewards}
    print(json.dumps(found | {"rows": rows}))


def config(job: dict[str, Any]) -> Any:
    """The config of our run."""
    from diffalign.config import TrainConfig

    plain = json.loads(json.dumps(DDPO if job["what"] == "ddpo" else ALIGNPROP))
    plain["model"]["name"] = f"{job['folder']}/model"
    plain["data"]["prompts"] = f"{job['folder']}/prompts.txt"
    plain["train"] |= {"seed": job["seed"], "lr": job.get("lr", LR)}
    plain |= {"eval": {"prompts": None}, "log": {"dir": f"{job['folder']}/run"}}
    for key, value in job["options"].items():
        section, name = key.split(".")
        plain[section][name] = value
    return TrainConfig.from_dict(plain)


def ours(job: dict[str, Any]) -> tuple[Any, Any]:
    from diffalign.training.trainer import Trainer

    trainer = Trainer(config(job))

    def epoch(i: int) -> float:
        return trainer.run_epoch(i)["reward_mean"]

    return epoch, trainer.policy.network


def theirs(job: dict[str, Any]) -> tuple[Any, Any]:
    import trl
    from accelerate import PartialState

    PartialState(cpu=True)
    prompts = iter(PROMPTS[i % len(PROMPTS)] for i in range(10**9))
    pipe = trl.DefaultDDPOStableDiffusionPipeline(f"{job['folder']}/model", use_lora=True)
    pipe.set_progress_bar_config(disable=True)
    common = {
        "seed": job["seed"],
        "mixed_precision": job["dtype"],
        "sample_num_steps": STEPS,
        "sample_guidance_scale": 3.0,
        "train_batch_size": BATCH,
        "train_learning_rate": job.get("lr", LR),
        "save_freq": 10**9,
        "accelerator_kwargs": {"cpu": True},
        "project_kwargs": {"project_dir": job["folder"]},
    }
    means: list[float] = []

    def reward(images: Any, texts: Any, metadata: Any) -> tuple[Tensor, dict]:
        images = images if isinstance(images, Tensor) else torch.stack(list(images))
        value = darkness(images, texts, metadata)
        means.append(value.detach().mean().item())
        return value, {}

    if job["what"] == "ddpo":
        kind, settings = trl.DDPOTrainer, trl.DDPOConfig(
            sample_batch_size=BATCH,
            sample_num_batches_per_epoch=PICTURES // BATCH,
            train_gradient_accumulation_steps=PICTURES // BATCH,
            train_timestep_fraction=(STEPS - 1) / STEPS,  # ours leaves out the last, all but exact
            per_prompt_stat_tracking=True,
            **common,
        )  # fmt: skip
    else:
        kind, settings = trl.AlignPropTrainer, trl.AlignPropConfig(
            truncated_backprop_rand=False,
            truncated_backprop_timestep=STEPS - LAST,
            **common,
        )  # fmt: skip
    trainer = kind(settings, reward, lambda: (next(prompts), {}), pipe)

    def epoch(i: int) -> float:
        means.clear()
        trainer.step(i, i)
        return statistics.mean(means)

    return epoch, pipe.unet


def ratios(done: list[dict[str, Any]], other: str) -> list[float]:
    """Of every pair, the other's median epoch over ours."""
    return [
        statistics.median(p[other]["seconds"]) / statistics.median(p["ours"]["seconds"])
        for p in done
    ]


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def table(found: dict[str, Any]) -> str:
    lines = [
        "| run | pairs | ours, s an epoch | TRL, s | TRL over ours | TRL bf16 over ours "
        "| peak MB, ours / TRL | first epoch, ours / TRL, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, done in found.get("pairs", {}).items():
        if not done:
            continue
        mine, theirs_ = (
            [statistics.median(p[who]["seconds"]) for p in done] for who in ("ours", "trl")
        )
        half = spread(ratios(done, "trl_bf16")) if "trl_bf16" in done[0] else "–"
        peak, first = (
            [statistics.median(p[who][key] for p in done) for who in ("ours", "trl")]
            for key in ("peak_mb", "first")
        )
        cells = (
            name, len(done), spread(mine), spread(theirs_), spread(ratios(done, "trl")), half,
            f"{peak[0]:.0f} / {peak[1]:.0f} = {peak[0] / peak[1]:.2f}",
            f"{first[0]:.1f} / {first[1]:.1f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n" + curve_table(found.get("curves", {}))


def curve_table(curves: dict[str, Any]) -> str:
    """Mean reward [lowest, highest seed] by epoch, and what it takes to reach the goal."""
    if not curves:
        return ""
    rows: dict[str, list[str]] = {"epoch": [], "---": []}
    rows |= {str(i): [] for i in range(0, CURVE_EPOCHS + 1, 3)}
    rows |= {f"epochs to {GOAL}": [], "seconds, without the first epoch": [], "that epoch": []}
    for name, runs in curves.items():
        of_seeds = [run["rewards"] for run in runs.values()]
        first = [next(i for i, r in enumerate(seed) if r >= GOAL) for seed in of_seeds]
        seconds = [sum(run["seconds"][:n]) for run, n in zip(runs.values(), first, strict=True)]
        columns = [name, "---"]
        columns += [spread([seed[i] for seed in of_seeds]) for i in range(0, CURVE_EPOCHS + 1, 3)]
        columns += [spread(first), spread(seconds), spread([run["first"] for run in runs.values()])]
        for row, cell in zip(rows.values(), columns, strict=True):
            row.append(cell)
    lines = ("| " + " | ".join([name, *cells]) + " |" for name, cells in rows.items())
    return "\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
