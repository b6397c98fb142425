"""Where models run unless told otherwise."""

from __future__ import annotations

import torch


def default_device() -> str:
    """The device type to use: CUDA where there is one, then MPS (Apple), else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_of(name: str | None) -> str:
    """The device that an option --device names, the default where it is None. Raises ValueError
    for one that is not there."""
    try:
        torch.empty(0, device=name or default_device())
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"--device {name} is not there ({why}); leave it out, or use cpu, cuda, cuda:1 or mps"
        ) from error
    return name or default_device()
