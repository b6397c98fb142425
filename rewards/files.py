"""Files that rewards read: weights, local or on the hub, and images."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .loading import reading

if TYPE_CHECKING:
    from torch import Tensor

MOST_PIXELS = 2**26  # of a picture; each takes 12 bytes as a tensor
_TOO_LARGE = f"is too large, the limit is {MOST_PIXELS:,} pixels; scale it down"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def check_file(option: str, source: str) -> None:
    """Raise ValueError unless ``source`` exists or looks like a hub file that ``fetch`` takes."""
    if not Path(source).exists() and not re.fullmatch(r"[^./:][^/:]*/[^/:]+:.+", str(source)):
        raise ValueError(
            f"{option}={source!r} does not exist under {Path.cwd()}; give an existing file or a "
            "hub file as ORG/REPO:NAME"
        )


def expand_user(value: Any) -> Any:
    """Nested mappings and lists with a ~ at the start of a text expanded to the home directory."""
    if isinstance(value, str):
        return os.path.expanduser(value)
    if type(value) in (list, tuple):
        return type(value)(map(expand_user, value))
    if type(value) is dict:
        return {k: expand_user(v) for k, v in value.items()}
    return value


def fetch(source: str, option: str = "checkpoint") -> str:
    """The path of a local file or folder, or of the hub file ORG/REPO:NAME, downloaded once."""
    if Path(source).exists():
        return str(source)
    from huggingface_hub import hf_hub_download

    repository, _, name = str(source).partition(":")
    with reading(f"{option}={source!r}", repository):
        return hf_hub_download(repository, name)


def read_tensors(path: str, option: str) -> Any:
    """The contents of a .safetensors file, or of a pickle of tensors, on the CPU."""
    with reading(option, path):
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        import torch

        return torch.load(path, map_location="cpu", weights_only=True)


def open_image(path: str | Path) -> Image.Image:
    """A picture file as 8-bit RGB: turned upright, on white where transparent, 16-bit channels
    rounded to 8 bits, only the first frame of an animation. Raises ValueError, naming the file, if
    it cannot be read or has more than ``MOST_PIXELS``."""
    with _named(path), _opened(path) as image:
        return flat(ImageOps.exif_transpose(image))


class _Unfit(ValueError):
    """An error whose message already names the file."""


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    try:
        yield
    except _Unfit:
        raise
    except Exception as error:  # PIL raises half a dozen kinds for a damaged file
        raise ValueError(f"{path} cannot be read as a picture ({error}); remove it") from error


def _opened(path: str | Path) -> Image.Image:
    if not os.path.isfile(path):  # opening a pipe would block
        kind = "is not a file" if os.path.lexists(path) else "does not exist"
        raise _Unfit(f"picture {path} {kind}")
    with warnings.catch_warnings():  # PIL warns above its limit, and raises above twice that
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(path)
        except Image.DecompressionBombError as error:
            raise _Unfit(f"{path} {_TOO_LARGE}") from error
        except UnidentifiedImageError as error:
            raise ValueError("no known format") from error
    if image.width * image.height > MOST_PIXELS:
        image.close()
        raise _Unfit(f"{path} {_TOO_LARGE}")
    return image


def flat(image: Image.Image) -> Image.Image:
    """A picture of any mode as 8-bit RGB, transparency on white. Integers are taken to range from 0
    to 65535, and floats from 0 to 1. Raises ValueError for values outside."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode[0] in "IF":
        values, top = np.asarray(image, dtype=np.float64), 1.0 if image.mode == "F" else 65535.0
        if not (values.min() >= 0 and values.max() <= top):
            raise ValueError(f"values from {values.min():g} to {values.max():g}, not 0 to {top:g}")
        clear = image.info.get("transparency")  # the transparent value of a gray PNG
        if isinstance(clear, int):
            values = np.where(values == clear, top, values)
        return Image.fromarray(np.rint(values / top * 255).astype(np.uint8)).convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def load_image(path: str | Path) -> Tensor:
    """The picture of ``open_image`` as (1, 3, H, W) float32 in [0, 1]."""
    import torch

    rgb = np.array(open_image(path))
    return torch.from_numpy(rgb).permute(2, 0, 1)[None] / 255


def image_files(references: str | Sequence[str]) -> list[str]:
    """The image files of a file, a folder or a list of these. Raises ValueError if none exist."""
    if not isinstance(references, (str, Path)):
        files = [file for reference in references for file in image_files(reference)]
    elif Path(references).is_dir():
        inside = sorted(Path(references).iterdir())
        files = [str(f) for f in inside if f.suffix.lower() in IMAGE_SUFFIXES and not f.is_dir()]
    elif Path(references).is_file():
        files = [str(references)]
    else:
        raise ValueError(f"reference {str(references)!r} does not exist under {Path.cwd()}")
    if not files:
        raise ValueError(f"references={references!r} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return files


def check_images(references: str | Sequence[str]) -> None:
    """Raise ValueError as ``image_files`` and ``open_image`` do, but read only the headers."""
    for file in image_files(references):
        with _named(file):
            _opened(file).close()
