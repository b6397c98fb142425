"""Copy trained EmojiWorld models from a build folder to assets/, in half precision.

python -m diffalign.emoji_world.install runs/emoji
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from .scenes import ASSETS

NAMES = {
    "sd": "emoji-sd",
    "clip": "emoji-clip",
    "judge": "emoji-judge",
    "verifier": "emoji-verifier",
}
SKIP = shutil.ignore_patterns("training.pt", "latents.pt", "*.png")


def halve(folder: Path) -> None:
    """Store the weights as float16; the configs go on asking for float32 to be loaded."""
    for path in folder.rglob("*.safetensors"):
        save_file({k: v.half() for k, v in load_file(path).items()}, path, {"format": "pt"})
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text("utf-8"))
        # transformers loads the dtype that the config names
        if "dtype" in config:
            path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n", "utf-8")


def main(build: Path) -> None:
    for source, name in NAMES.items():
        if (build / source).is_dir():
            shutil.copytree(build / source, ASSETS / name, ignore=SKIP, dirs_exist_ok=True)
            halve(ASSETS / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
