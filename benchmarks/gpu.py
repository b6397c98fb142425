"""What training costs on this GPU: random weights in the real architectures, no hub, no data.

    python benchmarks/gpu.py --minutes 9     # as many rows as fit; run it again to go on
    python benchmarks/gpu.py --report        # the table of what is there
    python benchmarks/gpu.py --toy --out runs/gpu.json     # tiny, on a CPU: whether it works

A row is one epoch after a first one that warms up: 2 prompts x 2 pictures, 8 steps, a LoRA of rank
16, bfloat16; of ReNO 4 iterations of one step. "trajectory" is DDPO for UNets and Flow-GRPO for
flows. Rollouts include decoding. Every row is written as soon as it is there, and none is made
twice.

overhead: seconds of the epoch over those of its bare calls: denoiser and decoder, forward and where
there is gradient backward, as often and with as many rows as the epoch calls them, in the same run.
of the peak: the denoiser's floating-point operations in the epoch (one bare call counted by
`torch.utils.flop_counter`, recomputation included) over its seconds and the operations a second of
a large bfloat16 matrix product.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from architectures import MODELS, Architecture, build, save_configs
from torch.utils.flop_counter import FlopCounterMode

import rewards
from diffalign import TrainConfig, Trainer, policies
from diffalign.algorithms import Needs
from diffalign.config.decoding import ConfigError
from diffalign.config.files import write_atomic
from diffalign.config.prompts import Prompt
from diffalign.optimize_noise import Budget, Task, search
from diffalign.optimize_noise.reno import reno
from diffalign.policies import Policy
from diffalign.sampling.rollout import Sampling
from rewards.device import default_device

PROMPTS, IMAGES, ITERATIONS = ["a cat", "a dog"], 2, 4  # pictures a prompt; steps of ReNO
METHODS = ("trajectory", "awm", "draft", "reno")
# options of the section `model`; xformers is refused, in its row, where it is not installed
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compile": {"compile": True},
    **{kernel: {"attention": kernel} for kernel in ("flash", "efficient", "cudnn", "xformers")},
}
KEY = ("device", "model", "side", "method", "variant")


def redness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """A reward that costs nothing."""
    return images[:, 0].mean((1, 2))


redness.differentiable = True  # type: ignore[attr-defined]


class Call(NamedTuple):
    """One call of denoiser or decoder. weights, pixels: whether gradient goes to the LoRA, and to
    what the call is given."""

    part: str
    rows: int
    weights: bool
    pixels: bool


class Bench:
    """Where and what to measure."""

    def __init__(self, toy: bool):
        self.toy, self.device = toy, torch.device(default_device())
        self.steps, self.times = (3, 1) if toy else (8, 3)
        cuda = self.device.type == "cuda"
        self.name = torch.cuda.get_device_name() if cuda else self.device.type
        self.tflops = self.matmul(256 if toy else 8192)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, work: Callable[[], object], times: int) -> float:
        """Median seconds, after one call that is not counted."""
        work()
        seconds = []
        for _ in range(times):
            start = self.now()
            work()
            seconds.append(self.now() - start)
        return statistics.median(seconds)

    def matmul(self, n: int) -> float:
        """Measured peak: 10^12 operations a second of a product of two n x n matrices."""
        a, b = torch.randn(2, n, n, device=self.device, dtype=torch.bfloat16)
        return 2 * n**3 / self.timed(lambda: a @ b, 10) / 1e12

    @contextmanager
    def model(self, model: Architecture) -> Iterator[Path]:
        """A folder with the model's configs, as `model.name`; its weights are random."""
        read = policies.pipeline

        def pipeline(name: str, merge_lora: str | None = None, **options: Any) -> Any:
            return build(model, self.device, options["torch_dtype"]["default"], self.toy)

        with tempfile.TemporaryDirectory() as folder:
            save_configs(model, Path(folder) / "model", self.toy)
            policies.pipeline = pipeline
            try:
                yield Path(folder)
            finally:
                policies.pipeline = read

    def know_prompts(self, policy: Policy, model: Architecture) -> None:
        """Random text embeddings of the right shapes in place of the text encoders' work."""
        shapes = model.text_shapes(policy.network.config, self.toy)
        for text in (*PROMPTS, ""):
            embedding = {k: torch.randn(v, dtype=policy.dtype) for k, v in shapes.items()}
            policy._prompts[text] = embedding

    def measure(self, name: str, side: int, method: str, variant: str) -> dict[str, Any]:
        """The figures of a row."""
        model = MODELS[name]
        rows = model.rows * (4 if side <= 512 else 1)
        with self.model(model) as folder:
            options = {"name": str(folder / "model"), "resolution": side, "dtype": "bfloat16"}
            options |= {"lora_rank": 16, "gradient_checkpointing": model.checkpointing}
            options |= VARIANTS[variant]
            if method == "reno":
                return self.search(model, options)
            run = self.settings(model, options, method, rows, folder / "run")
            return {"rows": rows, **self.train(model, run)}

    def settings(
        self, model: Architecture, options: dict[str, Any], method: str, rows: int, folder: Path
    ) -> TrainConfig:
        """The run of a row, with `rows` in a call of the denoiser."""
        algorithm: dict[str, Any] = {"type": method}
        sampler: dict[str, Any] = {"kernel": "ode", "eta": 0.0}
        if method == "trajectory":
            algorithm = {"type": "flow_grpo" if model.is_flow else "ddpo"}
            sampler = {"kernel": "flow_sde", "eta": 0.7} if model.is_flow else {}
        elif method == "awm":
            algorithm["times"] = min(rows, 6)  # which one call must hold
        sampler |= {"steps": self.steps, "guidance": model.guidance, "batch": rows}
        return TrainConfig.from_dict({
            # there are none, and what they would make comes later
            "model": options | {"free_text_encoders": False},
            "algorithm": algorithm,
            "sampler": sampler,
            "data": {"groups": len(PROMPTS), "group_size": IMAGES},
            "train": {"epochs": 2, "micro_batch": rows},
            "eval": {"prompts": None},
            "log": {"dir": str(folder)},
        })  # fmt: skip

    def train(self, model: Architecture, config: TrainConfig) -> dict[str, Any]:
        """An epoch of training."""
        trainer = Trainer(config, rewards={redness: 1.0}, prompts=PROMPTS)
        policy, sample, spent = trainer.policy, trainer._sample, []
        self.know_prompts(policy, model)

        def sampled(epoch: int) -> Any:
            start = self.now()
            data = sample(epoch)
            spent.append(self.now() - start)
            return data

        trainer._sample = sampled  # type: ignore[method-assign]
        trainer.run_epoch(0)
        updates = trainer.optimizer.updates
        spent.clear()
        figures = self.loop(policy, config.sampler.guidance, lambda: trainer.run_epoch(1))
        images, drawing = len(PROMPTS) * IMAGES, sum(spent)
        if trainer.algorithm.needs is Needs.GRADIENT:
            drawing = 0.0  # the updates draw their own
        learning = figures["seconds"] - drawing
        return figures | {
            "rollout_images_per_s": images / drawing if drawing else None,
            "updates_per_s": (trainer.optimizer.updates - updates) / learning,
            "images_per_s": images / figures["seconds"],
        }

    def search(self, model: Architecture, options: dict[str, Any]) -> dict[str, Any]:
        """Iterations of ReNO on one picture; the LoRA that is there does not train."""
        config = TrainConfig.from_dict({"model": options})
        policy = policies.prepared(config.model, 0, self.device)
        self.know_prompts(policy, model)
        policy.network.requires_grad_(False)
        guidance = 1.0 if policy.uses_cfg else model.guidance
        how = Sampling(policy.levels(1), "ode", 0.0, guidance)
        reward, prompts = rewards.build({redness: 1.0}), [Prompt(PROMPTS[0])]
        task = Task(policy, reward, prompts, how, seeds=[0], batch=1)

        def work() -> None:
            search(task, reno(task, ITERATIONS), Budget())

        work()
        figures = self.loop(policy, guidance, work)
        return figures | {"images_per_s": ITERATIONS / figures["seconds"]}

    def loop(self, policy: Policy, guidance: float, work: Callable[[], object]) -> dict[str, Any]:
        """Seconds and peak memory of `work`, and how they compare to its bare calls."""
        cuda = self.device.type == "cuda"
        with recorded(policy) as calls:
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            start = self.now()
            work()
            seconds = self.now() - start
            peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
        bare, operations = 0.0, 0
        for call, times in calls.items():
            one = bare_call(policy, call, guidance)
            bare += times * self.timed(one, self.times)
            if call.part == "predict":
                with FlopCounterMode(display=False) as counter:
                    one()
                operations += times * counter.get_total_flops()
        return {
            "seconds": seconds,
            "peak_gib": peak,
            "overhead": seconds / bare,
            "of_peak": operations / seconds / 1e12 / self.tflops,
            "calls": {" ".join(map(str, call)): times for call, times in calls.items()},
        }


@contextmanager
def recorded(policy: Policy) -> Iterator[Counter[Call]]:
    """Counts the calls of the denoiser and of the decoder meanwhile."""
    calls: Counter[Call] = Counter()
    predict, decode = policy.predict, policy.decode

    def predicted(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        on = torch.is_grad_enabled()
        learns = on and bool(policy.trainable_parameters())
        calls[Call("predict", len(x), learns, on and x.requires_grad)] += 1
        return predict(x, *args, **kwargs)

    def decoded(x0: torch.Tensor, differentiable: bool = False, tiny: bool = False) -> Any:
        calls[Call("decode", len(x0), False, differentiable)] += 1
        return decode(x0, differentiable, tiny)

    policy.predict, policy.decode = predicted, decoded  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        del policy.predict, policy.decode


def bare_call(policy: Policy, call: Call, guidance: float) -> Callable[[], None]:
    """The network alone on inputs of the shapes of `call`, and the backward pass if it has one."""
    rows, size = call.rows, policy.decode_batch
    x = torch.randn(rows, *policy.latent_shape, device=policy.device)
    cond, level = policy.encode([PROMPTS[0]] * rows), policy.levels(1)[0]
    text, t = cond.positive, level.t.expand(rows)
    if call.part == "predict" and policy.uses_cfg and guidance > 1:
        x, t = torch.cat([x, x]), torch.cat([t, t])
        text = {k: torch.cat([cond.negative[k], v]) for k, v in text.items()}
    x.requires_grad_(call.pixels)

    def run() -> None:
        with torch.set_grad_enabled(call.weights or call.pixels):
            if call.part == "predict":
                with policy.autocast():
                    out = policy.call(x, t, text, guidance)
            else:
                parts = (z.to(policy.vae.dtype) for z in x.split(size))
                out = torch.cat([policy.vae.decode(z).sample for z in parts])
            if out.requires_grad:
                out.sum().backward()

    return run


def report(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    heads = (
        *KEY, "rollout, images/s", "updates/s", "images/s", "peak GiB", "of the peak", "overhead",
    )  # fmt: skip
    figures = (
        ("rollout_images_per_s", "{:.2f}"), ("updates_per_s", "{:.3f}"), ("images_per_s", "{:.2f}"),
        ("peak_gib", "{:.1f}"), ("of_peak", "{:.0%}"), ("overhead", "{:.2f}"),
    )  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [str(row[name]) for name in KEY]
        if "error" in row:
            cells += [row["error"]] + [""] * (len(figures) - 1)
        else:
            values = ((row.get(name), how) for name, how in figures)
            cells += ["" if value is None else how.format(value) for value, how in values]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="all; plain if --toy")
    parser.add_argument("--sides", type=int, nargs="+", help="pixels; 512 and 1024")
    parser.add_argument("--minutes", type=float, default=9, help="start no row that may not fit")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--toy", action="store_true", help="tiny networks, 64 pixels")
    parser.add_argument("--report", action="store_true", help="the table of what is there")
    args = parser.parse_args(arguments)
    rows = json.loads(args.out.read_text("utf-8")) if args.out.exists() else []
    if args.report:
        print(report(rows))
        return
    start, longest, bench = time.monotonic(), 0.0, Bench(args.toy)
    sides = args.sides or ([64] if args.toy else [512, 1024])
    variants = args.variants or (["plain"] if args.toy else list(VARIANTS))
    asked = product([bench.name], args.models, sides, args.methods, variants)
    for key in asked:
        if any(tuple(row[name] for name in KEY) == key for row in rows):
            continue
        begun = time.monotonic()
        if begun - start + longest > 60 * args.minutes:
            print(f"{args.minutes:g} minutes are over; run again to go on")
            break
        try:
            found = bench.measure(*key[1:])
        except torch.OutOfMemoryError:
            found = {"error": "out of memory"}
        except ConfigError as error:
            found = {"error": str(error)}
        gc.collect()  # models are cycles
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        measured = {"torch": torch.__version__, "matmul_tflops": bench.tflops, "toy": args.toy}
        rows.append(dict(zip(KEY, key, strict=True)) | measured | found)
        write_atomic(args.out, (json.dumps(rows, indent=1) + "\n").encode())
        longest = max(longest, time.monotonic() - begun)
        print(*key[1:], {k: v for k, v in found.items() if k != "calls"}, flush=True)
    print(report(rows))


if __name__ == "__main__":
    main()
