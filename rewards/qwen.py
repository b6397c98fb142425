"""What Qwen2-VL and Qwen2.5-VL read: patches of an image with gradient to its pixels, and text."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from .preprocess import CLIP_MEAN, CLIP_STD, quantize_pixels, resize

IMAGE = "<|image_pad|>"  # stands in the text once for every token of the image


def qwen_patches(
    images: Tensor,
    least: int,
    most: int,
    patch: int = 14,
    merge: int = 2,
    frames: int = 2,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    quantize: bool = False,
) -> tuple[Tensor, Tensor]:
    """The patches that Qwen2-VL and Qwen2.5-VL see of each image, and how many there are.

    (n, 3, H, W) RGB in [0, 1] -> ((n h w, 3 frames patch^2), (n, 3)), the first at least float32,
    the second int64 rows 1, h, w on the CPU, where h and w count patches. The image is resized by
    PIL's bicubic filter to sides that are multiples of ``patch`` x ``merge`` pixels, with an area
    of ``least`` to ``most`` pixels as far as such sides exist, and normalised. The patches of a
    square of merge x merge stand together, because the model makes one token of them. Within a
    patch the order is channel, frame, row, column; all ``frames`` are the same image.

    ``quantize`` rounds to 8 bits after each axis as PIL does, with a straight-through gradient: the
    values are then those of transformers' image processors but for a few pixels that are rounded
    otherwise, by at most two of 255 levels, 0.031 after normalisation. Without it a smooth image
    differs by about half a level everywhere, and where bicubic overshoots, it is not clipped.
    Raises ValueError for sides whose ratio exceeds 200, as transformers does.
    """
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    rows, columns = images.shape[-2:]
    height, width = smart_resize(rows, columns, patch * merge, least, most)
    images = resize(quantize_pixels(images) if quantize else images, height, width, quantize)
    # filled on the device: new_tensor would copy them there and wait for it
    mean_, std_ = (
        torch.stack([images.new_full((1, 1), value) for value in values]) for values in (mean, std)
    )
    rows, columns = height // patch, width // patch
    tiles = ((images - mean_) / std_).reshape(
        len(images), 3, rows // merge, merge, patch, columns // merge, merge, patch
    )
    tiles = tiles.permute(0, 2, 5, 3, 6, 1, 4, 7)  # (n, rows, columns, merge, merge, 3, y, x)
    tiles = tiles[..., None, :, :].expand(*[-1] * 6, frames, -1, -1)
    return tiles.flatten(0, 4).flatten(1), torch.tensor([[1, rows, columns]] * len(images))


def image_positions(before: int, rows: int, columns: int, length: int) -> Tensor:
    """The rotary positions (time, row, column) of a text with one image, (3, length) int64.

    ``before`` tokens of text count 0, 1, ... in all three; the ``rows`` x ``columns`` tokens of the
    image have its start plus (0, row, column); the text after it goes on from the start plus the
    longer side. Source: Qwen2-VL (arXiv 2409.12191).
    """
    grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    image = before + torch.stack([torch.zeros_like(grid[0]), *grid]).flatten(1)
    after = before + max(rows, columns) + torch.arange(length - before - rows * columns)
    return torch.cat([torch.arange(before).expand(3, -1), image, after.expand(3, -1)], 1)


def refuse_special_tokens(prompts: Sequence[str]) -> None:
    """Raise ValueError for a prompt that the model would not read as plain text."""
    for prompt in prompts:
        if found := re.search(r"<\|\w+\|>", prompt):
            raise ValueError(
                f"prompt {prompt!r} holds {found[0]}, a special token of the model that reads it; "
                "remove it"
            )
