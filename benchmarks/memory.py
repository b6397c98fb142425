"""The memory that `--dry-run` prints, against what a run of the same config holds.

Measured are the tensors of a real run, under a reward that takes none: those alive when training
starts, without those of rewards, and the most that are alive beside them during two epochs, counted
at every operation. Also given is by how much the process grew meanwhile (its largest resident set),
which has what the allocator keeps for later, and the scratch memory of kernels.

    OMP_NUM_THREADS=1 python benchmarks/memory.py       # 3 minutes

Writes benchmarks/results/memory.json and .md.
"""

from __future__ import annotations

import gc
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from diffalign.config import TrainConfig
from diffalign.training.memory import MIB, Peak, need
from diffalign.training.trainer import Trainer

RESULTS = Path(__file__).parent / "results"
MODELS = ("emoji-sd", "emoji-sd3", "emoji-flux")
CONFIGS = ("emoji_ddpo_jpeg", "emoji_awm", "emoji_draft_clip")


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measured(*sys.argv[1:])))
        return
    found: dict[str, Any] = {}
    for config in CONFIGS:
        for model in MODELS:
            found[f"{config} {model}"] = alone(config, model)
            print(config, model, found[f"{config} {model}"], flush=True)
    (RESULTS / "memory.json").write_text(json.dumps(found, indent=1))
    (RESULTS / "memory.md").write_text(table(found))


def alone(config: str, model: str) -> dict[str, float]:
    """`measured`, in a process that holds no other tensors."""
    command = [sys.executable, __file__, config, model]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def settings(config: str, model: str, folder: str) -> TrainConfig:
    options = {
        "model.name": f"assets/{model}",
        "sampler.guidance": 3.0,
        "data.groups": 2,
        "data.group_size": 8,
        "eval.prompts": "null",
        "log.dir": f"{folder}/run",
    }
    if config == "emoji_ddpo_jpeg" and model != "emoji-sd":
        options["sampler.kernel"] = "flow_sde"
    if config == "emoji_draft_clip":  # the activations of a reward are its own affair
        options["rewards"] = "{against_trl:darkness: 1.0}"
    words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    return TrainConfig.from_file(f"configs/{config}.yaml", words)


def alive(tensors: Any) -> int:
    """Bytes of the storages of tensors, each counted once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def measured(config: str, model: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(settings(config, model, folder))
        expected = need(trainer.plan, "cpu")
        gc.collect()
        real = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
        rewards = alive([*trainer.reward.parameters(), *trainer.reward.buffers()])
        before, rss = alive(real) - rewards, resident()
        del real
        with Peak() as peak:
            for epoch in range(2):
                trainer.run_epoch(epoch)
        return {
            "expected": expected.peak / MIB,
            "measured": (before + peak.peak) / MIB,
            "process": resident() - rss,
        }


def resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def table(found: dict[str, Any]) -> str:
    lines = ["| run | --dry-run, MiB | measured, MiB | ratio | process grew by, MiB |"]
    lines.append("|---|---|---|---|---|")
    for name, f in found.items():
        cells = [f"{f[k]:.0f}" for k in ("expected", "measured")]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {f['expected'] / f['measured']:.2f} "
            f"| {f['process']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
