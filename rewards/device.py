"""Where models run unless told otherwise."""

from __future__ import annotations

import torch


def default_device() -> str:
    """The device type to use: CUDA where there is one, then MPS (Apple), else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
