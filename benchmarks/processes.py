"""How far the weights of several processes are from those of one, on CPUs.

    python benchmarks/processes.py        # writes benchmarks/results/processes.md; ten minutes

All weights of emoji-sd, 4 epochs of 2 updates of 4 pictures, one seed. `one, contiguous` is one
process with the order in memory that FSDP2 needs: the distance to it is what dividing changes.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from diffalign import TrainConfig, Trainer
from diffalign.policies import base, weights
from diffalign.policies.sharding import whole
from diffalign.record import checkpoint

OUT = Path(__file__).parent / "results" / "processes.md"
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}
RUNS = {  # processes, environment, the order in memory
    "one": (1, {}, torch.channels_last),
    "one, contiguous": (1, {}, torch.contiguous_format),
    "2 replicas": (2, {}, torch.channels_last),
    "3 replicas": (3, {}, torch.channels_last),
    "FSDP2, 2": (2, FSDP, torch.contiguous_format),
}
CASES = (("awm", "ode", 1e-4), ("awm", "ode", 1e-3), ("ddpo", "ddim", 1e-4), ("draft", "ode", 1e-4))


def train(folder: str, kind: str, kernel: str, lr: str, run: str) -> None:
    """One process of a run."""
    base.LAYOUT = weights.LAYOUT = RUNS[run][2]
    config = TrainConfig.from_dict(
        {
            "model": {"lora_rank": 0},
            "algorithm": {"type": kind, **({"last": 2} if kind == "draft" else {})},
            "sampler": {"steps": 3, "kernel": kernel, "batch": 3},
            "rewards": {"clip": {"model": "assets/emoji-clip"}},
            "data": {"groups": 2, "group_size": 4},
            "train": {"epochs": 4, "updates_per_epoch": 2, "micro_batch": 3, "lr": float(lr)},
            "eval": {"prompts": None},
            "log": {"dir": folder},
        }
    )
    Trainer(config).train()


def launched(run: str, folder: Path, *case: object) -> dict[str, torch.Tensor]:
    """The weights that a run ends with."""
    n, environ, _ = RUNS[run]
    command = [sys.executable, __file__, str(folder), *map(str, case), run]
    if n > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(n)]
        command[1:1] = [*torchrun, "--master_port", port]
        environ = environ | {"ACCELERATE_USE_CPU": "true"}
    path = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env={**os.environ, **path, **environ}, check=True)
    return {k: whole(v) for k, v in checkpoint.load(folder)["adapter"].items()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """|a - b| / |a| of all weights."""
    apart = sum((a[k] - b[k]).square().sum().item() for k in a)
    return (apart / sum(v.square().sum().item() for v in a.values())) ** 0.5


def main() -> None:
    others = list(RUNS)[2:]
    lines = [
        "| | lr | " + " | ".join(others) + " | FSDP2 against one, contiguous | contiguous |",
        "|---" * (len(others) + 4) + "|",
    ]
    with tempfile.TemporaryDirectory() as place:
        for i, case in enumerate(CASES):
            found = {
                run: launched(run, Path(place) / f"{i}-{j}", *case) for j, run in enumerate(RUNS)
            }
            one, contiguous = found["one"], found["one, contiguous"]
            values = [distance(one, found[run]) for run in others]
            values += [distance(contiguous, found["FSDP2, 2"]), distance(one, contiguous)]
            lines.append(
                f"| {case[0]} | {case[2]:g} | " + " | ".join(f"{v:.1e}" for v in values) + " |"
            )
    OUT.write_text("\n".join(lines) + "\n")
    print(OUT.read_text())


if __name__ == "__main__":
    train(*sys.argv[1:]) if len(sys.argv) > 1 else main()
