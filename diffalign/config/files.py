"""Writing files: checks before the work, atomic writes, and JSON."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .decoding import ConfigError


def write_atomic(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new, never a part.

    Missing parent folders are made. Raises `OSError` with the original errno and with `path`.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(data)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error


def check_file(path: str | os.PathLike[str], option: str) -> None:
    """Refuse, before the work, a file that cannot be written. Raises `ConfigError`."""
    if Path(path).is_dir():
        raise ConfigError(f"{option} {str(path)!r} is a folder; give the name of a file in it")
    check_folder(Path(path).parent, option)


def check_folder(path: str | os.PathLike[str], option: str) -> None:
    """Refuse a folder that cannot be made or cannot be written to. Raises `ConfigError`."""
    there = next(p for p in (Path(path).absolute(), *Path(path).absolute().parents) if p.exists())
    if not there.is_dir():
        raise ConfigError(f"{option}: {there} is a file, and no folder to write to; choose another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{option}: the folder {there} cannot be written to; choose another")


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON of a value; NaN and infinity, which JSON lacks, become null, other objects strings."""
    return json.dumps(_finite(value), indent=indent, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Raises OSError for what safetensors cannot write: of the disk's errors it says the number
    alone."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error
