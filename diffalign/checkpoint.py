"""Saving and restoring a run: nothing trained is lost, and a resumed run is the same run."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from .decoding import write_atomic

NAME = "checkpoint.pt"


def save(run_dir: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, plain values) in one step: a kill leaves the old file or the new."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(run_dir / NAME, buffer.getvalue())


def load(run_dir: Path) -> dict[str, Any]:
    """The state of the last `save`, tensors on the CPU; FileNotFoundError if there is none."""
    path = run_dir / NAME
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: nothing to resume; start without --resume")
    return torch.load(path, map_location="cpu", weights_only=True)
