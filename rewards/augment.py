"""Reward random views of an image: pixels that fool only one view gain little."""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Reward, own_copies

MOST = 0.2  # largest share of each side of the image that a view crops away
SHADE = 0.1  # largest change of brightness (added) and of contrast (factor - 1)


class Augmented(Reward):
    """R'(u, c) = mean over ``views`` v of R(T_v(u), c).

    T crops at least 0.8 of each side at a random place and resizes back, mirrors half of the views,
    scales contrast about the mean by 1 ± 0.1, shifts brightness by ± 0.1, and clamps to [0, 1].
    Mirroring swaps left and right and reverses text: do not augment rewards that read those.

    The image's bytes seed T, so a score is reproducible and does not depend on the batch, but
    changing any pixel draws new views. Differentiable if R is.
    """

    def __init__(self, reward: Reward, views: int):
        super().__init__()
        self.reward, self.views, self.name = reward, views, reward.name
        self.differentiable, self.gradient_hint = reward.differentiable, reward.gradient_hint
        self.per_group = reward.per_group
        self.freeze()

    def forward(self, images, prompts, metadata=None):
        n = len(images)
        generators = [_generator(image) for image in images]
        values = []
        for _ in range(self.views):
            seen = torch.stack(
                [_view(u, g) for u, g in zip(images.unbind(), generators, strict=True)]
            )
            values.append(self.reward(*own_copies(seen, prompts, metadata)))
        return torch.stack(values).view(self.views, n).mean(0)


def _generator(image: Tensor) -> torch.Generator:
    data = image.detach().float().cpu().contiguous().numpy().tobytes()
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def _view(image: Tensor, generator: torch.Generator) -> Tensor:
    """T(u) of one image (3, H, W)."""
    chance = torch.rand(7, generator=generator).tolist()
    height, width = image.shape[-2:]
    h, w = round(height * (1 - MOST * chance[0])), round(width * (1 - MOST * chance[1]))
    top, left = int(chance[2] * (height - h + 1)), int(chance[3] * (width - w + 1))
    view = image[None, :, top : top + h, left : left + w]
    view = F.interpolate(view, (height, width), mode="bicubic", antialias=True)[0]
    if chance[4] < 0.5:
        view = view.flip(-1)
    contrast, brightness = (1 + SHADE * (2 * chance[5] - 1)), SHADE * (2 * chance[6] - 1)
    mean = view.mean((1, 2), keepdim=True)
    return ((view - mean) * contrast + mean + brightness).clamp(0, 1)
