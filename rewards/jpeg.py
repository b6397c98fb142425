"""JPEG file size: the compressibility and incompressibility rewards of DDPO."""

from __future__ import annotations

import functools
import io
import math

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .base import Reward

# Annex K of the JPEG standard (ITU-T T.81), the tables libjpeg scales by quality.
_LUMA = """16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56
14 17 22 29 51 87 80 62 18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92
49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"""
_CHROMA = (
    """17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99
47 66 99 99 99 99 99 99 """
    + "99 " * 32
)


# Bits per unit of log2 magnitude, per non-zero AC coefficient, per block.
FACTORS = (1.40, 3.53, 5.23)


def quantization_tables(quality: int) -> tuple[Tensor, Tensor]:
    """Luma and chroma divisors, (8, 8) float64 each, with libjpeg's integer quality scaling."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality

    def scaled(table: str) -> Tensor:
        values = torch.tensor([int(v) for v in table.split()]).view(8, 8)
        return ((values * scale + 50) // 100).clamp(1, 255).double()

    return scaled(_LUMA), scaled(_CHROMA)


def jpeg_kilobytes(images: Tensor, quality: int = 95) -> Tensor:
    """Size in kB (1000 bytes) of each image saved by PIL as JPEG. No gradient.

    (n, 3, H, W) in [0, 1] -> (n,) float32. Pixels are round(255 u); PIL's other defaults (4:2:0
    chroma, baseline, standard Huffman tables) are kept, as in ddpo-pytorch.
    """
    pixels = images.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    sizes = []
    for image in pixels.permute(0, 2, 3, 1).cpu().numpy():
        with io.BytesIO() as buffer:
            Image.fromarray(image).save(buffer, "JPEG", quality=quality)
            sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32, device=images.device)


def _dct_blocks(plane: Tensor) -> Tensor:
    """Orthonormal DCT of the 8x8 blocks: (n, c, H, W) -> (n, c, H/8 * W/8, 64), raster order."""
    n, c, h, w = plane.shape
    k = torch.arange(8, dtype=torch.float64)
    dct = torch.cos((2 * k + 1) * k[:, None] * math.pi / 16) / 2
    dct[0] /= math.sqrt(2)
    dct = dct.to(plane)
    blocks = plane.view(n, c, h // 8, 8, w // 8, 8)
    return torch.einsum("ui,ncaibj,vj->ncabuv", dct, blocks, dct).reshape(n, c, -1, 64)


def jpeg_kilobytes_surrogate(images: Tensor, quality: int = 95) -> Tensor:
    """Differentiable estimate of ``jpeg_kilobytes``: (n, 3, H, W) -> (n,), at least float32.

    With q the DCT coefficients of level-shifted YCbCr (4:2:0) over the quantisation table, *not*
    rounded, and with the DC coefficients replaced by their differences from block to block,

        8000 kB = 8 * 623 + 1.40 sum log2(1 + q^2) / 2 + 3.53 sum' q^4 / (q^4 + 1/16) + 5.23 blocks

    header, magnitude bits, Huffman codes of the non-zero AC coefficients (sum'), fixed cost of a
    block. The three factors are a least-squares fit of the relative error on synthetic noise,
    blurred noise, flat shapes and gradients of 32x32 to 160x208 at qualities 95, 75 and 50;
    `pytest tests/test_rewards.py -k surrogate -rP` refits them and prints the figures. On held-out
    images of these kinds (64x64 to 256x256, quality 95 and 50) the mean relative error is 1 to 3 %
    and the Spearman correlation with the true size, within one geometry and quality, 0.98 to 1.00.
    Nearest-neighbour enlargements (pixel art) are underestimated, by up to a third: isolated large
    coefficients cost more than the factors say. Always report the true size.
    """
    factors = images.new_tensor(FACTORS, dtype=torch.promote_types(images.dtype, torch.float32))
    return (8 * 623 + torch.stack(_terms(images, quality), 1) @ factors) / 8000


def _terms(images: Tensor, quality: int) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitude bits, non-zero AC coefficients and blocks of each image, (n,) each."""
    pixels = images.to(torch.promote_types(images.dtype, torch.float32)) * 255
    height, width = pixels.shape[-2:]
    pixels = F.pad(pixels, (0, -width % 16, 0, -height % 16), mode="replicate")
    red, green, blue = pixels.split(1, dim=1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    chroma = torch.cat([(blue - luma) / 1.772, (red - luma) / 1.402], 1)
    magnitude, nonzero, blocks = pixels.new_zeros(3, len(pixels))
    planes = (luma - 128, F.avg_pool2d(chroma, 2))
    for plane, table in zip(planes, quantization_tables(quality), strict=True):
        q = _dct_blocks(plane) / table.to(plane).flatten()
        dc, ac = q[..., 0].diff(dim=-1), q[..., 1:]
        magnitude = magnitude + torch.log2(1 + ac**2).sum((1, 2, 3)) / 2
        magnitude = magnitude + torch.log2(1 + dc**2).sum((1, 2)) / 2
        nonzero = nonzero + (ac**4 / (ac**4 + 1 / 16)).sum((1, 2, 3))
        blocks = blocks + q.shape[1] * q.shape[2]
    return magnitude, nonzero, blocks


class Jpeg(Reward):
    """Minus the JPEG size in kB (compressibility), or plus it with ``incompressible``.

        R(u) = -bytes(JPEG(round(255 u), quality)) / 1000

    Not differentiable, unless ``surrogate=True`` replaces the size by a smooth estimate of it
    (``jpeg_kilobytes_surrogate``). Source: DDPO (arXiv 2305.13301), ddpo-pytorch/rewards.py.
    """

    name = "jpeg"
    gradient_hint = "use rewards.{name}.surrogate=true, a differentiable estimate of the size"

    def __init__(self, quality: int = 95, incompressible: bool = False, surrogate: bool = False):
        self.check_options(quality=quality)
        super().__init__()
        self.quality = quality
        self.sign = 1 if incompressible else -1
        self.differentiable = surrogate

    @classmethod
    def has_gradient(cls, surrogate=False, **options):
        return surrogate

    @classmethod
    def check_options(cls, quality=95, **options):
        if not isinstance(quality, int) or not 1 <= quality <= 100:
            raise ValueError(f"quality={quality!r} is not an integer from 1 to 100")

    def forward(self, images, prompts, metadata=None):
        size = jpeg_kilobytes_surrogate if self.differentiable else jpeg_kilobytes
        return self.sign * size(images, self.quality)


incompressibility = functools.partial(Jpeg, incompressible=True)
