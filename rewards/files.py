"""Files that rewards read: weights, local or on the hub, and images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .loading import reading

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def check_file(option: str, source: str) -> None:
    """Raise ValueError unless ``fetch`` can make sense of ``source``."""
    if not Path(source).exists() and not re.fullmatch(r"[^./:][^/:]*/[^/:]+:.+", str(source)):
        raise ValueError(
            f"{option}={source!r} does not exist under {Path.cwd()}; give an existing file or a "
            "hub file as ORG/REPO:NAME"
        )


def fetch(source: str, option: str = "checkpoint") -> str:
    """The path of a local file or folder, or of the hub file ORG/REPO:NAME, downloaded once."""
    if Path(source).exists():
        return str(source)
    from huggingface_hub import hf_hub_download

    repository, _, name = str(source).partition(":")
    with reading(f"{option}={source!r}", repository):
        return hf_hub_download(repository, name)


def read_tensors(path: str, option: str) -> Any:
    """What a .safetensors file, or a pickle of tensors, holds; on the CPU."""
    with reading(option, path):
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)


def load_image(path: str | Path) -> Tensor:
    """(1, 3, H, W) float32 in [0, 1], upright, transparency on white."""
    with Image.open(path) as image:
        rgba = ImageOps.exif_transpose(image).convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    rgb = np.array(Image.alpha_composite(white, rgba).convert("RGB"))
    return torch.from_numpy(rgb).permute(2, 0, 1)[None] / 255


def image_files(references: str | Sequence[str]) -> list[str]:
    """The image files meant by a file, a folder or a list of them. Raises ValueError for none."""
    if not isinstance(references, (str, Path)):
        files = [file for reference in references for file in image_files(reference)]
    elif Path(references).is_dir():
        inside = sorted(Path(references).iterdir())
        files = [str(f) for f in inside if f.suffix.lower() in IMAGE_SUFFIXES]
    elif Path(references).is_file():
        files = [str(references)]
    else:
        raise ValueError(f"reference {str(references)!r} does not exist under {Path.cwd()}")
    if not files:
        raise ValueError(f"references={references!r} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return files
