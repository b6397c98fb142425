"""Draw the picture wall of the README: the same prompts by every pipeline of EmojiWorld.

    python benchmarks/emoji_wall.py [--out docs/images/emoji_wall.png] [--seed 0]

Seed 0 is drawn, whatever it gives: nothing is picked by hand.
"""

from __future__ import annotations

import argparse

from diffalign import policies
from diffalign.drawing.grids import comparison_grid, save_png
from diffalign.emoji_world import evaluate

PROMPTS = [
    "a dog on a blue background", "a flat red car on a white background",
    "a green octopus on a pink background", "a burger on a purple background",
    "a strawberry", "a purple fish on a yellow background",
    "three stars on a blue background", "two cats on a green background",
    "an apple and a yellow bus", "a ladybug below a cat",
]  # fmt: skip
MODELS = {  # name: folder, LoRA merged first, steps, guidance
    "emoji-sd": ("assets/emoji-sd", None, 20, 3.0),
    "emoji-sd3": ("assets/emoji-sd3", None, 20, 3.0),
    "emoji-flux": ("assets/emoji-flux", None, 20, 3.0),
    "emoji-turbo, 1 step": ("assets/emoji-sd", "assets/emoji-turbo", 1, 1.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="docs/images/emoji_wall.png")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    columns = {}
    # a prompt a column is wider than high: rows of the grid are the models
    for name, (folder, merged, steps, guidance) in MODELS.items():
        policy = policies.load(folder, merge_lora=merged)
        columns[name] = list(evaluate.draw(policy, PROMPTS, steps, guidance, args.seed))
    turned = {p: [columns[name][i] for name in MODELS] for i, p in enumerate(PROMPTS)}
    save_png(comparison_grid(turned, list(MODELS), cell=160), args.out, vars(args))


if __name__ == "__main__":
    main()
