"""The folder of a run: one run uses it at a time, and no run is overwritten unasked."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..config.decoding import ConfigError
from ..policies.lora import WEIGHTS
from . import checkpoint

LOCK = ".lock"
DENOISERS = ("unet", "transformer")
TRAINED = (checkpoint.OLD, WEIGHTS, "best", *DENOISERS)
"""Names of files that only training makes: a folder with one of them holds a run."""

_WEIGHTS = (
    *(WEIGHTS, "kohya_lora.safetensors"),
    *(f"{d}/{f}" for d in DENOISERS for f in ("config.json", "diffusion_pytorch_model*")),
)
WRITTEN = (
    *(f"*checkpoint-*/{name}" for name in (*checkpoint.FILES, "state-*.safetensors", "*.sha256")),
    *(checkpoint.OLD, "config.yaml", "metrics.csv", "metrics.jsonl", "metrics.previous.*"),
    *("curve.png", "grid.png", "grids/eval_*.png", "pictures/epoch_*", "failed_reward.png"),
    *("report.html", *_WEIGHTS, *(f"best/{name}" for name in _WEIGHTS)),
    "diffalign/**/events.out.tfevents.*",  # TensorBoard's
)
"""Patterns of the files that a run writes and `clear` removes."""

# errors of a disk that is full, read-only or lost
DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG),
    *(errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ESTALE),
)

Resume = bool | str | os.PathLike[str]

_held: dict[str, IO[str]] = {}  # the locks of this process, by folder


def lock(run_dir: Path) -> None:
    """Make the folder, and keep every other process from training in it until `release`.

    The kernel drops the lock when the process ends, however it ends. Raises ConfigError if another
    process holds the lock, OSError if the folder cannot be written.
    """
    if _key(run_dir) in _held:
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    file = (run_dir / LOCK).open("a+", encoding="utf-8")
    if not _locked(file):
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise ConfigError(
            f"log.dir={str(run_dir)!r} is in use by {owner}, and two runs would write over each "
            "other; stop that one, or choose another --log.dir"
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held[_key(run_dir)] = file


def release(run_dir: Path) -> None:
    """Let other processes train in the folder again."""
    file = _held.pop(_key(run_dir), None)
    if file is not None:
        file.close()


def check(run_dir: Path, resume: Resume, overwrite: bool) -> None:
    """Refuse to start in a folder that holds a run, unless to resume or overwrite it. A run that
    finished no epoch does not count. `resume` is True, "latest", which takes a folder that holds
    nothing too, or the path of a checkpoint of the run.

    Raises ConfigError, or FileNotFoundError if there is nothing to resume."""
    begun = (run_dir / "config.yaml").exists()
    states = checkpoint.found(run_dir)
    found = [p.name for p in states[:1]] + [n for n in TRAINED if (run_dir / n).exists()]
    where = f"log.dir={str(run_dir)!r}"
    if (run_dir / "model_index.json").exists() and not begun:
        raise ConfigError(f"{where} is a pipeline, whose weights a run would write over")
    if resume and not states and checkpoint.OLD in found:
        raise ConfigError(
            f"{where} holds the {checkpoint.OLD} of an earlier version, which this one does not "
            "read; go on with that version, or start anew with --overwrite"
        )
    if resume is True and not begun and not states:
        raise FileNotFoundError(
            f"{where} holds no checkpoint: nothing to resume; start without --resume, or with "
            f"--resume {checkpoint.LATEST}, which goes on where it can"
        )
    if resume and resume is not True and resume != checkpoint.LATEST:
        asked = Path(resume).expanduser()
        if not asked.is_dir():
            raise ConfigError(
                f"--resume {str(resume)!r} is no folder; give {checkpoint.LATEST}, or a checkpoint "
                "of the run"
            )
        if asked.resolve() not in [p.resolve() for p in states]:
            there = ", ".join(p.name for p in states) or "none"
            raise ConfigError(
                f"--resume {str(resume)!r} is not among the checkpoints in {where} ({there}); set "
                "--log.dir to its run, or start from what that run trained by model.name or "
                "model.merge_lora"
            )
    if found and not resume and not overwrite:
        raise ConfigError(
            f"{where} already holds a run; go on with --resume, start anew with --overwrite, or "
            "choose another --log.dir"
        )
    if found and overwrite and not begun:
        raise ConfigError(
            f"{where} holds {found[0]} but no config.yaml, so it is not the folder of a run; "
            "choose another --log.dir"
        )


def clear(run_dir: Path) -> None:
    """Remove the files that a run wrote, and subfolders that this empties; nothing else."""
    for path in [path for pattern in WRITTEN for path in run_dir.glob(pattern)]:
        path.unlink()
        for parent in path.parents:
            if parent == run_dir or any(parent.iterdir()):
                break
            parent.rmdir()


@contextmanager
def writing(run_dir: Path) -> Iterator[None]:
    """Turn an OSError of the disk into a ConfigError."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        why = (error.strerror or str(error)).removeprefix("cannot be written: ")
        if error.filename and Path(error.filename) != run_dir:
            why = f"{why}: {error.filename}"
        raise ConfigError(
            f"log.dir={str(run_dir)!r} cannot be written: {why}; mend that, or choose another "
            "--log.dir"
        ) from error


def _locked(file: IO[str]) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows has none
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _key(run_dir: Path) -> str:
    return str(run_dir.resolve())
