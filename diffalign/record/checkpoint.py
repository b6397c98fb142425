"""The state of a run in a file: nothing trained is lost, and a resumed run is the same run."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..config.decoding import ConfigError
from ..config.files import write_atomic

NAME = "checkpoint.pt"

MARK = b"diffalign sha256 "
_COMMENT = len(MARK) + 64  # bytes
_END = b"PK\5\6"  # starts the last 22 bytes of a zip file without a comment


def save(run_dir: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, plain values) in one step: a kill leaves the old file or the new.

    The file is the zip that `torch.save` writes, with the SHA-256 of all bytes before the digest as
    the zip's comment; `torch.load(path, weights_only=True)` reads it like any other.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(-22, io.SEEK_END)
    if buffer.read(4) == _END:
        buffer.seek(-2, io.SEEK_END)
        buffer.write(_COMMENT.to_bytes(2, "little"))
        digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
        buffer.write(MARK + digest.encode())
    write_atomic(run_dir / NAME, buffer.getbuffer())


def load(run_dir: Path) -> dict[str, Any]:
    """The state of the last `save`, tensors on the CPU.

    Raises FileNotFoundError if there is no checkpoint, ConfigError if a byte of it has changed."""
    path = Path(run_dir) / NAME
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: nothing to resume; start without --resume")
    try:
        with open(path, "rb") as file:
            whole = _is_whole(file)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True) if whole else None
    except Exception:  # torch raises many kinds for an unreadable file
        state = None
    if not isinstance(state, dict) or not {"epoch", "adapter"} <= state.keys():
        raise ConfigError(
            f"{path} is damaged: it is not as the run wrote it; put back a copy of it, or start "
            "anew with --overwrite"
        )
    return state


def _is_whole(file: BinaryIO) -> bool:
    """Whether the file ends with the digest of the rest. Also true for a zip without a comment, as
    written by versions before the digest."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 22))
    if file.read().startswith(_END):
        return True
    file.seek(max(0, size - _COMMENT))
    comment = file.read()
    file.seek(0)
    digest, left = hashlib.sha256(), size - _COMMENT
    while left > 0:
        chunk = file.read(min(left, 2**20))
        digest.update(chunk)
        left -= len(chunk)
    return comment == MARK + digest.hexdigest().encode()
