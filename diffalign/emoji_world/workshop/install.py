"""Copy trained EmojiWorld models from a build folder to assets/, in half precision.

python -m diffalign.emoji_world.workshop.install runs/emoji

The pipelines share one VAE and one CLIP text tower: emoji-sd holds them, the others link to it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from ..scenes import ASSETS
from . import open_clip_format

NAMES = {
    "sd": "emoji-sd",
    "sd3": "emoji-sd3",
    "flux": "emoji-flux",
    "turbo": "emoji-turbo",
    "clip": "emoji-clip",
    "preference": "emoji-pickscore",
    "aesthetic": "emoji-aesthetic",
    "verifier": "emoji-verifier",
    "referee": "emoji-referee",
}
SHARED = {"sd3": ("vae",), "flux": ("vae", "text_encoder")}
SKIP = shutil.ignore_patterns("*.pt", "*.png")


def halve(folder: Path) -> None:
    """Store the weights as float16; the configs go on asking for float32 to be loaded."""
    for path in folder.rglob("*.safetensors"):
        save_file({k: v.half() for k, v in load_file(path).items()}, path, {"format": "pt"})
        path.chmod(0o644)  # safetensors writes for the owner alone
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text("utf-8"))
        # transformers loads the dtype that the config names
        if "dtype" in config:
            path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n", "utf-8")


def main(build: Path) -> None:
    for source, name in NAMES.items():
        if not (build / source / ".").is_dir():
            continue
        target = ASSETS / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(build / source, target, ignore=SKIP)
        halve(target)
        for part in SHARED.get(source, ()):
            shutil.rmtree(target / part)
            (target / part).symlink_to(Path("..") / NAMES["sd"] / part)
    if (build / "judge").is_dir():
        shutil.rmtree(ASSETS / "emoji-judge", ignore_errors=True)
        open_clip_format.main(build / "judge", ASSETS / "emoji-judge")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("build", type=Path)
    main(parser.parse_args().build)
