"""Write EmojiWorld's prompt sets: train, and held out by combination.

    python -m diffalign.emoji_world.write_prompts

Three training prompts per object ("a dog", "a dog on a blue background", "a red dog on a pink
background") and one held-out prompt with a colour and a background that no training prompt pairs
with that object.
"""

from __future__ import annotations

import random

from .scenes import ASSETS, BACKGROUNDS, COLOURS, OBJECTS, article


def main() -> None:
    rng = random.Random(0)
    train, held_out = [], []
    for name in OBJECTS:
        # no colour on a background of its own name, which would hide the object
        pairs = [(c, b) for c in COLOURS for b in BACKGROUNDS if c != b]
        (c1, b1), (_, b2) = rng.sample(pairs, 2)
        c3, b3 = rng.choice([(c, b) for c, b in pairs if c != c1 and b not in (b1, b2)])
        train += [article(name), f"{article(name)} on {article(b2)} background"]
        train.append(f"{article(f'{c1} {name}')} on {article(b1)} background")
        held_out.append(f"{article(f'{c3} {name}')} on {article(b3)} background")
    rng.shuffle(held_out)  # the first few are the rows of the grid
    folder = ASSETS / "emoji-world" / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.txt").write_text("\n".join(train) + "\n", "utf-8")
    (folder / "held_out.txt").write_text("\n".join(held_out) + "\n", "utf-8")


if __name__ == "__main__":
    main()
