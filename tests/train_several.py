"""Trains one run for each algorithm and kind of weights, for tests with several processes.

    python tests/train_several.py FOLDER MODEL ALGORITHM,... [contiguous]

contiguous: the order in memory that FSDP2 needs, for one process to be compared with.
"""

import sys

import torch

from diffalign import TrainConfig, Trainer
from diffalign.policies import base, weights
from diffalign.training import engine

KERNELS = {"ddpo": "ddim", "awm": "ode", "draft": "ode"}
OPTIONS = {"ddpo": {}, "awm": {}, "draft": {"last": 2, "kl_weight": 0.1}}


def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].square().mean((1, 2, 3))


redness.differentiable = True


def main(folder: str, model: str, algorithms: str, contiguous: bool) -> None:
    if contiguous:
        base.LAYOUT = weights.LAYOUT = torch.contiguous_format
    for algorithm in algorithms.split(","):
        for rank in (0, 4):
            config = TrainConfig.from_dict(
                {
                    "model": {"name": model, "resolution": 16, "lora_rank": rank},
                    "algorithm": {"type": algorithm, **OPTIONS[algorithm]},
                    "sampler": {"steps": 3, "kernel": KERNELS[algorithm], "batch": 2},
                    "data": {"groups": 2, "group_size": 4},
                    "train": {
                        "epochs": 4, "updates_per_epoch": 2, "micro_batch": 3, "ema": 0.5,
                        "lr": 1e-4 if rank else 1e-5,
                    },
                    "eval": {"prompts": None},
                    "log": {"dir": f"{folder}/{algorithm}-{rank}"},
                }
            )  # fmt: skip
            if rank and engine.asked_to_divide():
                continue
            Trainer(config, rewards={redness: 1.0}).train()


if __name__ == "__main__":
    main(*sys.argv[1:4], "contiguous" in sys.argv[4:])
