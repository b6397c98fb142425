"""A request to the reward server: checked before anything is decoded, then decoded."""

from __future__ import annotations

import base64
import io
import json
import struct

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"


def parse(
    body: bytes | bytearray, known: list[str], max_images: int, max_pixels: int
) -> tuple[Tensor, list[str], list[dict] | None, list[str]]:
    """Images (n, 3, H, W) uint8, prompts, metadata and reward names of a request to /score.

    A pixel counts once for every reward that scores it. Raises ValueError that names whatever is
    malformed or too large.
    """
    most = 10_000 + 1_000 * max_images  # lists and the like, each of which is an object in memory
    if (parts := sum(body.count(mark) for mark in (b"[", b"{", b","))) > most:
        raise ValueError(f"the body has {parts} brackets and commas; a request holds up to {most}")
    try:
        data = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError("the body is not a JSON object")
    images, prompts, metadata, names = (
        data.pop(key, None) for key in ("images", "prompts", "metadata", "names")
    )
    if data:
        raise ValueError(
            f"unknown {', '.join(map(repr, data))}; known: images, prompts, metadata, names"
        )
    names = known if names is None else names
    for label, items, kind in (
        ("images", images, str),
        ("prompts", prompts, str),
        ("metadata", [] if metadata is None else metadata, dict),
        ("names", names, str),
    ):
        if not isinstance(items, list) or not all(isinstance(item, kind) for item in items):
            noun = "texts" if kind is str else "objects"
            raise ValueError(f"{label} is not a list of {noun}")
    if not 1 <= len(images) <= max_images:
        raise ValueError(f"{len(images)} images; a request holds from 1 to {max_images}")
    for label, items in (("prompts", prompts), ("metadata", metadata)):
        if items is not None and len(items) != len(images):
            raise ValueError(f"{len(items)} {label} for {len(images)} images; give one per image")
    if not 1 <= len(names) <= len(known):
        raise ValueError(f"{len(names)} names; a request holds from 1 to {len(known)}, or null")
    for name in names:
        if name not in known:
            raise ValueError(f"no reward {name!r}; there are: {', '.join(known)}")
        if names.count(name) > 1:
            raise ValueError(f"names has {name!r} {names.count(name)} times; give it once")
    return decode(images, max_pixels, len(names)), prompts, metadata, names


def _no_constant(text: str):
    raise ValueError(f"{text} is not a JSON number")


def decode(images: list[str], max_pixels: int, times: int = 1) -> Tensor:
    """Base64 PNGs of one size as (n, 3, H, W) uint8; reads all headers before any pixels.

    Raises ValueError, naming the image, if it is not base64 of an 8-bit RGB PNG, or if the images
    up to it, each counted ``times`` times, have more than ``max_pixels``.
    """
    files, sizes = [], []
    for index, text in enumerate(images):
        try:
            files.append(base64.b64decode(text, validate=True))
            sizes.append(_png_size(files[-1]))
        except ValueError as error:
            raise ValueError(f"image {index}: {error}") from error
        if sizes[-1] != sizes[0]:
            raise ValueError(f"image {index} is {sizes[-1]} pixels, image 0 {sizes[0]}")
        if (pixels := (index + 1) * sizes[-1][0] * sizes[-1][1] * times) > max_pixels:
            counted = f"; each counts for {times} rewards" if times > 1 else ""
            raise ValueError(
                f"image {index}: {pixels} pixels with it, the limit is {max_pixels}{counted}"
            )
    arrays = []
    for index, file in enumerate(files):
        try:
            with Image.open(io.BytesIO(file), formats=["PNG"]) as image:
                # A second header chunk would override the one that was checked.
                if image.mode != "RGB" or image.size != sizes[0]:
                    raise ValueError(f"decodes as {image.mode}, {image.size} pixels")
                arrays.append(np.array(image))
        except Exception as error:  # PIL raises half a dozen kinds for a damaged file
            raise ValueError(f"image {index}: not a PNG that decodes ({error})") from error
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def _png_size(file: bytes) -> tuple[int, int]:
    if not file.startswith(PNG_START) or not file.endswith(PNG_END):
        raise ValueError("not a whole PNG file")
    width, height, depth, color = struct.unpack_from(">IIBB", file, len(PNG_START))
    if (depth, color) != (8, 2):
        raise ValueError(f"not an 8-bit RGB PNG (bit depth {depth}, colour type {color})")
    if not width or not height:
        raise ValueError(f"is {width}x{height}")
    return width, height
