"""Where models run unless told otherwise."""

from __future__ import annotations

import torch

_chosen: str | None = None


def choose_device(device: str | None) -> None:
    """Make `device`, such as cpu or cuda:1, the default of this process; None leaves the choice to
    ``default_device``. Raises ValueError if the device cannot be used."""
    global _chosen
    if device is not None:
        try:
            torch.zeros(1, device=device).tolist()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            first = str(error).partition("\n")[0]
            raise ValueError(
                f"--device {device} cannot be used ({first}); this machine has {default_device()}"
            ) from error
    _chosen = device


def default_device() -> str:
    """The device to use: the one chosen by `choose_device`, else CUDA if available, else MPS
    (Apple) if available, else the CPU."""
    if _chosen is not None:
        return _chosen
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
