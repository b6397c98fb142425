"""Pictures of scenes as tensors, for the models that learn from them or judge them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from .scenes import Scene, render


def pixels(scenes: Iterable[Scene]) -> Tensor:
    """Pictures of `scenes` as one uint8 tensor (n, 3, 64, 64)."""
    return torch.from_numpy(np.stack([np.asarray(render(s)) for s in scenes])).permute(0, 3, 1, 2)
