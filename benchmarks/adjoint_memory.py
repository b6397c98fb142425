"""Peak memory of a reward gradient through the last K steps: the adjoint sweep against autograd,
and against autograd that calls the denoiser again for each step (checkpointing).

    python benchmarks/adjoint_memory.py              # assets/emoji-sd, 16 pictures, 1 to 10 steps
    python benchmarks/adjoint_memory.py --model assets/emoji-sd3 --batch 32

All compute the same gradient of the LoRA; how far its norms are apart is printed. Each
measurement is a process of its own. "peak" is its largest resident memory (on CUDA the largest
allocation) less what it held before the gradient.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffalign import policies
from diffalign.emoji_world.evaluate import load_prompts
from diffalign.sampling.adjoint import Surrogate, adjoint_sweep
from diffalign.sampling.rollout import Sampling, rollout
from rewards.device import default_device

WAYS = ("sweep", "autograd", "checkpointing")


def held(device: str) -> int:
    """Peak bytes so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gradient(model: str, batch: int, steps: int, active: int, how: str) -> dict[str, float]:
    """Peak bytes and norm of the gradient of Σ x_K through the last `active` of `steps` steps."""
    device = default_device()
    policy = policies.load(model, device)
    policy.add_lora(rank=8)
    cond = policy.encode(load_prompts("train")[:batch])
    sampling = Sampling(policy.levels(steps), "ode", 0.0, 1.0)
    paths = rollout(policy, cond, sampling, range(batch), batch=1)
    before, first = held(device), steps - active
    if how == "sweep":
        plan = Surrogate(tuple(range(first, steps)))
        ones = torch.ones_like(paths.final)
        adjoint_sweep(policy, cond, sampling, paths.states, ones, plan)
    else:
        x = paths.states[:, first]
        for i in range(first, steps):

            def step(x: Tensor, i: int = i) -> Tensor:
                return sampling.transition(policy, x, i, cond).mean

            again = how == "checkpointing"
            x = checkpoint(step, x, use_reentrant=False) if again else step(x)
        x.sum().backward()
    grads = [p.grad.flatten() for p in policy.trainable_parameters() if p.grad is not None]
    return {"peak": held(device) - before, "norm": torch.cat(grads).norm().item()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="assets/emoji-sd")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--active", type=int, nargs="+", default=[1, 2, 4, 10])
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(gradient(args.model, args.batch, args.steps, args.active[0], args.one)))
        return
    same = ["--model", args.model, "--batch", str(args.batch), "--steps", str(args.steps)]
    print("| steps with gradient | " + ", MiB | ".join(WAYS) + ", MiB | norms differ by |")
    print("|---" * 5 + "|")
    for active in args.active:
        found = {}
        for how in WAYS:
            command = [sys.executable, __file__, *same, "--active", str(active), "--one", how]
            found[how] = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
        norms = [found[how]["norm"] for how in WAYS]
        apart = max(norms) / min(norms) - 1
        sizes = " | ".join(f"{found[how]['peak'] / 2**20:.0f}" for how in WAYS)
        print(f"| {active} | {sizes} | {apart:.0e} |", flush=True)


if __name__ == "__main__":
    main()
