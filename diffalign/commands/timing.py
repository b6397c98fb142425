"""What memory a run needs and how long it takes on this machine, for `--dry-run`: the one from the
configs of its model, the other from one denoiser call.

    python -m diffalign.commands.timing CONFIG.yaml [--section.key VALUE ...]

It runs in its own process, so that the plan is shown at once, and stays if this fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import TrainConfig
from ..training.cost import BACKWARD, Cost

if TYPE_CHECKING:
    from ..training.plan import Plan


@dataclass(frozen=True)
class Measured:
    """Seconds of one sample through the denoiser, of one with its backward pass, and of decoding a
    picture."""

    forward: float
    backward: float
    decoded: float
    batch: int  # pictures per call of the denoiser, when sampling
    device: str

    def describe(self, cost: Cost, gradient: bool) -> str:
        """Two lines of `--dry-run`. gradient: whether training decodes its pictures with
        gradient."""
        free = cost.sampled + cost.learned - cost.carried
        pictures = cost.samples * (1 + BACKWARD * gradient)
        epoch = free * self.forward + cost.carried * self.backward + pictures * self.decoded
        evaluation = cost.evaluated * self.forward + cost.pictures * self.decoded
        further = (cost.evaluations - 1) * cost.distance * self.forward
        evaluations = cost.evaluations * evaluation + further
        whole = cost.epochs * epoch + evaluations
        return (
            f"time       about {words(epoch)} an epoch and {words(evaluation)} an evaluation, "
            f"{words(whole)} in all, {evaluations / whole:.0%} of it evaluation\n"
            f"           measured once on {self.device}: {self.forward * 1000:.3g} ms a denoiser "
            f"call ({self.batch} pictures at a time), {self.backward * 1000:.3g} ms with gradient, "
            f"{self.decoded * 1000:.3g} ms a picture decoded; rewards and loading left out"
        )


def words(seconds: float) -> str:
    """A duration: 0.42 s, 12 s, 3.5 min, 2.1 h."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def measure(plan: Plan) -> Measured:
    """Load the model as the run does, and time one call of each kind, after a first one to warm
    up."""
    import torch

    from rewards.device import default_device

    from .. import policies

    c, device = plan.config, default_device()
    policy = policies.prepared(c.model, c.train.seed, device)
    middle = c.sampler.steps // 2
    level = policy.levels(c.sampler.steps)[middle]
    share = max(1, plan.samples // plan.processes)
    branches = plan.branches[middle]
    guidance = c.sampler.guidance if branches > 1 or not policy.uses_cfg else 0.0
    text = plan.train_prompts[0].text
    policy.encode([text])
    if c.model.free_text_encoders:
        policy.free_text_encoders()

    def timed(work: Callable[[], Any]) -> float:
        for _ in range(2):  # the first call sets up what the others use
            start = time.perf_counter()
            work()
            if device != "cpu":
                getattr(torch, device).synchronize()
        return time.perf_counter() - start

    def call(n: int) -> Any:
        x = torch.randn(n, *policy.latent_shape, device=device)
        return policy.predict(x, level, policy.encode([text] * n), guidance).x0

    batch, rows = min(c.sampler.batch, share), min(c.train.micro_batch, share)
    with torch.no_grad():
        forward = timed(lambda: call(batch)) / (batch * branches)
        latents = call(batch)
        decoded = timed(lambda: policy.decode(latents)) / batch
    backward = timed(lambda: call(rows).square().mean().backward()) / (rows * branches)
    return Measured(forward, backward, decoded, batch, device)


def measured(settings: Sequence[str]) -> str:
    """The lines about memory and time, from a separate process. settings: CONFIG.yaml and the
    options that replace its settings."""
    root = str(Path(__file__).parents[2])  # so that a child process finds this package too
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "diffalign.commands.timing", *settings], stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    found = done.stdout.partition("memory  ")
    return "".join(found[1:]).rstrip() or f"time       not measured: status {done.returncode}"


def main() -> None:
    from ..algorithms import Needs
    from ..training.engine import asked_for
    from ..training.plan import Plan

    plan = Plan.make(TrainConfig.from_file(sys.argv[1], sys.argv[2:]), processes=asked_for())
    try:
        from rewards.device import default_device

        from ..training.memory import need

        print(need(plan, default_device()).describe())
    except Exception as error:  # the plan stands without it
        print(f"memory     not known: {_first(error)}")
    try:
        found = measure(plan)
        print(found.describe(Cost.of(plan), plan.algorithm.needs is Needs.GRADIENT))
    except Exception as error:  # such as too little memory
        print(f"time       not measured: {_first(error)}")


def _first(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


if __name__ == "__main__":
    main()
