"""Make the pictures of README and docs: python benchmarks/pictures.py [NAME ...]

Each is made by the command below it, of runs that are trained first unless they are there. PNGs are
stored with 256 colours. The report is photographed with chromium.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

from diffalign.drawing.grids import save_png

IMAGES = Path("docs/images")
CLIP = """--reward 'clip={"model": "assets/emoji-clip"}'"""
JUDGE = """--reward 'judge={"type": "clip", "weight": 0, "model": "assets/emoji-judge"}'"""
TURBO = "--model assets/emoji-sd --merge-lora assets/emoji-turbo --steps 1 --guidance 1"
PROMPTS = '--prompts "a panda on a pink background" "a strawberry on a gray background"'
RUNS = {
    "runs/demo/counting": "-m diffalign demo runs/demo",
    "runs/emoji_draft_clip": "train.py configs/emoji_draft_clip.yaml",
    "runs/ddpo_jpeg": "train.py configs/emoji_ddpo_jpeg.yaml --log.dir runs/ddpo_jpeg "
    "--eval.every 1",
}
PICTURES = {
    "emoji_wall.png": "benchmarks/emoji_wall.py --out OUT",
    "counting.webp": "-m diffalign film runs/demo/counting --prompts 8 --cell 128",
    "clip_before_after.png": "sample.py --lora runs/emoji_draft_clip --compare --seeds 0-5 "
    '--guidance 1 --steps 10 --prompts "a dog on a yellow background" '
    '"a purple fish on a white background" --grid OUT',
    "reno.png": f"-m diffalign grid {TURBO} --reno 10 50 {CLIP} {JUDGE} --prompts "
    '"a blue car on a green background" "a pink octopus on a white background" '
    '"a burger on a purple background" "a yellow crab on a blue background" --out OUT',
    "scales.png": "-m diffalign grid --runs runs/ddpo_jpeg --lora-scales 0 0.5 1 1.5 "
    f"--reward jpeg {PROMPTS} --out OUT",
    "film.webp": "-m diffalign film runs/ddpo_jpeg --prompts 4 --cell 128",
    "report.png": "-m diffalign report runs/demo/counting",
    "leaderboard.png": "benchmarks/emoji_leaderboard.py --seeds 0 --out runs/pictures",
}
MADE = {  # what a command without OUT writes
    "counting.webp": "runs/demo/counting/film.webp",
    "film.webp": "runs/ddpo_jpeg/film.webp",
    "report.png": "runs/demo/counting/report.html",
    "leaderboard.png": "runs/pictures/leaderboard.png",
}


def python(command: str) -> None:
    print("python", command, flush=True)
    subprocess.run([sys.executable, *shlex.split(command)], check=True)


def make(name: str) -> None:
    out, command = IMAGES / name, PICTURES[name]
    for run, training in RUNS.items():
        if run in command and not (Path(run) / "report.html").exists():
            python(training)
    python(command.replace("OUT", str(out)))
    made = Path(MADE.get(name, out))
    if made.suffix == ".html":
        browser = shutil.which("chromium") or shutil.which("chromium-browser") or "google-chrome"
        how = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1200,2400"]
        subprocess.run([browser, *how, f"--screenshot={out}", made.resolve().as_uri()], check=True)
    elif made != out:
        shutil.copy(made, out)
    if out.suffix == ".png":
        image = Image.open(out).convert("RGB")
        small = image.quantize(palette=image.quantize(256))  # dithered: else colours make bands
        save_png(small, out, {"made by": command})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PICTURES))
    names = parser.parse_args().names or list(PICTURES)
    unknown = [name for name in names if name not in PICTURES]
    if unknown:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(PICTURES)}")
    for name in names:
        make(name)


if __name__ == "__main__":
    main()
