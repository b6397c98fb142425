"""Cut EmojiWorld's sprites from two emoji packages and write assets/emoji-world/sprites.

    python -m diffalign.emoji_world.workshop.build_sprites FOLDER

FOLDER is an empty folder; `npm pack` fetches the packages into it:
emoji-datasource-google 16.0.0 (Noto, Apache-2.0) -> "glossy", and
@iconify-json/fluent-emoji-flat 1.2.6 (MIT, SVG rendered by resvg) -> "flat".
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tarfile
from pathlib import Path

import resvg_py
from PIL import Image

from ..scenes import OBJECTS, SPRITES

GOOGLE, FLUENT = "emoji-datasource-google@16.0.0", "@iconify-json/fluent-emoji-flat@1.2.6"


def codepoints(char: str) -> str:
    return "-".join(f"{ord(c):04x}" for c in char)


def fetch(package: str, folder: Path) -> tarfile.TarFile:
    name = package.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz"
    if not (folder / name).exists():
        subprocess.run(["npm", "pack", package], cwd=folder, check=True, capture_output=True)
    return tarfile.open(folder / name)


def glossy(folder: Path) -> dict[str, Image.Image]:
    tar = fetch(GOOGLE, folder)
    files = {m.name.rsplit("/", 1)[-1]: m for m in tar.getmembers() if "/google/64/" in m.name}
    images = {}
    for name, char in OBJECTS.items():
        member = files.get(f"{codepoints(char)}.png") or files[f"{codepoints(char)}-fe0f.png"]
        images[name] = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGBA")  # type: ignore[union-attr]
    return images


def flat(folder: Path) -> dict[str, Image.Image]:
    tar = fetch(FLUENT, folder)
    icons = json.load(tar.extractfile("package/icons.json"))["icons"]  # type: ignore[arg-type]
    chars = json.load(tar.extractfile("package/chars.json"))  # type: ignore[arg-type]
    images = {}
    for name, char in OBJECTS.items():
        body = icons[chars.get(codepoints(char)) or chars[codepoints(char) + "-fe0f"]]["body"]
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{body}</svg>'
        png = resvg_py.svg_to_bytes(svg_string=svg, width=64, height=64)
        images[name] = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return images


def main(folder: Path) -> None:
    SPRITES.mkdir(parents=True, exist_ok=True)
    (SPRITES / "index.json").write_text(json.dumps(list(OBJECTS)), "utf-8")
    for style, images in (("glossy", glossy(folder)), ("flat", flat(folder))):
        sheet = Image.new("RGBA", (8 * 64, -(-len(images) // 8) * 64))
        for i, image in enumerate(images.values()):
            # trim to the drawing: the two sets pad differently, and `size` means the drawing's size
            image = image.crop(image.getchannel("A").point([0] * 9 + [255] * 247).getbbox())
            image.thumbnail((64, 64), Image.Resampling.LANCZOS)
            scale = 64 / max(image.size)
            image = image.resize([round(s * scale) for s in image.size], Image.Resampling.LANCZOS)
            sheet.paste(
                image,
                (64 * (i % 8) + (64 - image.width) // 2, 64 * (i // 8) + (64 - image.height) // 2),
            )
        sheet.save(SPRITES / f"{style}.png", optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    main(parser.parse_args().folder)
