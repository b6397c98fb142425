"""Differentiable image preprocessing, written once for every reward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def quantize_pixels(images: Tensor) -> Tensor:
    """Clamp to [0, 1], round half up (as PIL) to multiples of 1/255; straight-through gradient."""
    images = images.clamp(0, 1)
    return images + ((images * 255 + 0.5).floor() / 255 - images).detach()


def resize(images: Tensor, height: int, width: int, quantize: bool = False) -> Tensor:
    """Antialiased bicubic resize (n, 3, H, W) -> (n, 3, height, width), at least float32.

    The filter is PIL's. An axis that already has its size is left untouched, bit for bit.
    ``quantize`` rounds to 8 bits after each axis, horizontal first, as PIL does.
    """
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    for size in ((images.shape[-2], width), (height, width)):
        if tuple(images.shape[-2:]) != size:
            images = F.interpolate(
                images, size, mode="bicubic", antialias=True, align_corners=False
            )
            images = quantize_pixels(images) if quantize else images
    return images


def pad_square(images: Tensor, size: int) -> Tensor:
    """Longest side resized to ``size``, the other centred between black borders.

    (n, 3, H, W) in [0, 1] -> (n, 3, size, size), at least float32, not normalised. The shorter
    side becomes round(short * size / long); an odd border has its extra pixel right or bottom.
    """
    scale = size / max(images.shape[-2:])
    height, width = (round(n * scale) for n in images.shape[-2:])
    top, left = (size - height) // 2, (size - width) // 2
    borders = (left, size - width - left, top, size - height - top)
    return F.pad(resize(images, height, width), borders)


def clip_pixels(
    images: Tensor,
    size: int = 224,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    crop: bool = True,
    quantize: bool = False,
    shortest: int | None = None,
) -> Tensor:
    """CLIP's preprocessing, (x - mean) / std of the resized and centre-cropped image.

    (n, 3, H, W) RGB in [0, 1] -> (n, 3, size, size), float32 (float64 for float64 images). The
    shortest side becomes ``shortest`` (default ``size``), the other int(shortest * long / short);
    the crop starts at (n - size) // 2, as in transformers' image processor. (torchvision's
    CenterCrop rounds half to even, so open_clip's crop can sit one pixel further when the excess
    is odd.)
    ``crop=False`` ignores the aspect ratio and resizes both sides to ``size``.

    ``quantize`` is for evaluation that must agree with a PIL pipeline; leave it off for training.
    It rounds the images to 8 bits first, and clamps and rounds after every resizing pass as PIL
    does (bicubic overshoots, PIL clips), with a straight-through gradient.
    """
    images = quantize_pixels(images) if quantize else images
    height, width = images.shape[-2:]
    if crop:
        short, target = min(height, width), shortest or size
        images = resize(images, int(target * height / short), int(target * width / short), quantize)
        top, left = ((n - size) // 2 for n in images.shape[-2:])
        images = images[..., top : top + size, left : left + size]
    else:
        images = resize(images, size, size, quantize)
    # filled on the device: new_tensor would copy them there and wait for it
    mean_, std_ = (
        torch.stack([images.new_full((1, 1), value) for value in values]) for values in (mean, std)
    )
    return (images - mean_) / std_
