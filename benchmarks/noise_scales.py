"""The noise scale of algorithms on three rewards: which of them would a small update suffice for?

emoji-sd at its base weights, LoRA of rank 32, 8 steps, no guidance, updates of 96 pictures (12
prompts of 8, or 96 of one where rewards have gradients). count: the soft composition reward on
counting prompts; clip; jpeg, by its surrogate where gradients are needed. One seed; ± is over the
updates, as `diffalign probe` has it.

    python benchmarks/noise_scales.py           # two hours of one core; resumes

Writes benchmarks/results/noise_scales.json and .md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffalign.commands.bench import temporary
from diffalign.commands.probe import told
from diffalign.config import TrainConfig
from diffalign.training.probe import ALL, Probed, probe

RESULTS = Path(__file__).parent / "results"
UPDATES = 6
PROMPTS = "assets/emoji-world/prompts"
BASE: dict[str, Any] = {
    "model": {"name": "assets/emoji-sd", "lora_rank": 32},
    "sampler": {"steps": 8, "guidance": 1.0, "batch": 32},
    "train": {"micro_batch": 16},
    "eval": {"prompts": None},
}
CPS = {"kernel": "cps", "eta": 0.8, "window": 2}
ALGORITHMS: dict[str, dict[str, Any]] = {  # name: algorithm, sampler
    "DDPO, DDIM η 1, all steps": {"type": "ddpo", "sampler": {"kernel": "ddim", "eta": 1.0}},
    "Flow-GRPO, CPS, all steps": {
        "type": "flow_grpo",
        "log_prob": "cps",
        "sampler": {"kernel": "cps", "eta": 0.8},
    },
    "Flow-GRPO, CPS, 2 of steps 1–3": {
        "type": "flow_grpo",
        "log_prob": "cps",
        "sampler": {**CPS, "window_range": [0, 3], "same_noise": True},
    },
    "Flow-GRPO, CPS, 2 of steps 4–6": {
        "type": "flow_grpo",
        "log_prob": "cps",
        "sampler": {**CPS, "window_range": [3, 6], "same_noise": True},
    },
    "AWM": {"type": "awm"},
    "DiffusionNFT": {"type": "nft"},
    "AlignProp": {"type": "alignprop"},
    "DRaFT, last step": {"type": "draft", "last": 1},
    "DRaFT, all steps": {"type": "draft", "last": None},
}
GRADIENT = ("alignprop", "draft")
COUNT = {"detector": "diffalign.emoji_world.detector:evidence", "soft": True}
REWARDS: dict[str, tuple[dict[str, Any], str]] = {
    "count": ({"composition": COUNT}, "counting_train.jsonl"),
    "clip": ({"clip": {"model": "assets/emoji-clip"}}, "train.txt"),
    "jpeg": ({"jpeg": {"weight": 1.0}}, "train.txt"),
}


def config(algorithm: str, reward: str) -> TrainConfig:
    chosen, (rewards, prompts) = dict(ALGORITHMS[algorithm]), REWARDS[reward]
    sampler = BASE["sampler"] | chosen.pop("sampler", {"kernel": "ode"})
    by_gradient = chosen["type"] in GRADIENT
    if reward == "jpeg" and by_gradient:
        rewards = {"jpeg": {"weight": 1.0, "surrogate": True}}
    groups, size = (96, 1) if by_gradient else (12, 8)
    data = {"prompts": f"{PROMPTS}/{prompts}", "groups": groups, "group_size": size}
    tree = BASE | {"algorithm": chosen, "sampler": sampler, "rewards": rewards, "data": data}
    return TrainConfig.from_dict(tree)


def main() -> None:
    file = RESULTS / "noise_scales.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for reward in REWARDS:
        for algorithm in ALGORITHMS:
            if reward in found.get(algorithm, {}):
                continue
            with temporary(config(algorithm, reward)) as trainer:
                seen = probe(trainer, UPDATES)
            found.setdefault(algorithm, {})[reward] = {
                "seen": seen.seen[ALL],
                "pictures": seen.pictures,
                "seconds": seen.seconds,
            }
            print(algorithm, reward, told(seen, ALL), f"{seen.seconds:.2f} s a picture", flush=True)
            file.write_text(json.dumps(found, indent=1))
            (RESULTS / "noise_scales.md").write_text(table(found))


def table(found: dict[str, Any]) -> str:
    lines = [f"| | {' | '.join(REWARDS)} |", "|---" * (len(REWARDS) + 1) + "|"]
    for algorithm, cells in found.items():
        told_of = [
            told(Probed({ALL: c["seen"]}, c["pictures"], c["seconds"]), ALL) if c else ""
            for c in (cells.get(r) for r in REWARDS)
        ]
        lines.append(f"| {algorithm} | {' | '.join(told_of)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
