"""What a part of a LoRA gives, and what it costs: EmojiEval by the referee, judge and diversity.

    python benchmarks/lora_scales.py          # a quarter of an hour of one core

assets/emoji-composition on emoji-sd, held-out prompts, two pictures each, 8 steps, no guidance.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

import rewards
from diffalign import policies
from diffalign.emoji_world.evaluate import CATEGORIES, VERIFIERS, draw, load_prompts, scores
from diffalign.policies.run_folder import WEIGHTS
from diffalign.training.guard import diversity, thumbnails

LORA = Path("assets/emoji-composition") / WEIGHTS
_, REFEREE = VERIFIERS
SCALES, SEEDS, BATCH = (0.0, 0.25, 0.5, 0.75, 1.0), (0, 1), 64


@torch.no_grad()
def main() -> None:
    lora, texts = load_file(LORA), load_prompts("held_out")
    judge = rewards.Clip("assets/emoji-judge")
    names = ["overall", *CATEGORIES]
    print(f"| scale | {' | '.join(names)} | judge | diversity |")
    print("|---" * (len(names) + 3) + "|")
    for scale in SCALES:
        with TemporaryDirectory() as folder:
            scaled = {k: v.float() * (scale if "lora_B" in k else 1) for k, v in lora.items()}
            save_file(scaled, Path(folder) / WEIGHTS)
            policy = policies.load("assets/emoji-sd", merge_lora=folder)
        images = torch.cat([draw(policy, texts, 8, 1.0, seed) for seed in SEEDS])
        prompts, groups = texts * len(SEEDS), [*range(len(texts))] * len(SEEDS)
        found = scores(images, prompts, REFEREE)
        parts = zip(images.split(BATCH), range(0, len(prompts), BATCH), strict=True)
        liked = torch.cat([judge(x, prompts[i : i + BATCH]) for x, i in parts]).mean()
        cells = [str(found[name]) for name in names]
        spread = diversity(thumbnails(images), groups)
        print(f"| {scale:g} | {' | '.join(cells)} | {liked:.3f} | {spread:.3f} |", flush=True)


if __name__ == "__main__":
    main()
