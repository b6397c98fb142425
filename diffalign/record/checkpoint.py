"""The states of a run in folders: nothing trained is lost, and a resumed run is the same run.

RUN/checkpoint-N holds the state after N epochs:

    state.safetensors   all tensors
    state.json          everything else, and where the tensors belong
    SHA256SUMS          the digests of all files, as `sha256sum --check` reads them

Of a denoiser that is divided among processes, state.safetensors has the rows of the main process,
and state-00001.safetensors and so on those of the others, in the order of their ranks.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.decoding import ConfigError
from ..config.files import disk_errors
from ..policies.sharding import Shard

TENSORS, PLAIN, SUMS = FILES = ("state.safetensors", "state.json", "SHA256SUMS")
DIGEST = ".sha256"  # ends the name of what a file's digest is in, until all are there
LATEST = "latest"
OLD = "checkpoint.pt"  # one file, of versions before the folders

_NAME = re.compile(r"(\.old-)?checkpoint-(\d+)")


def found(run_dir: Path) -> list[Path]:
    """The checkpoints in a run folder, the newest first."""
    named = [(m, p) for p in Path(run_dir).glob("*checkpoint-*") if (m := _NAME.fullmatch(p.name))]
    order = sorted(named, key=lambda each: (int(each[0][2]), not each[0][1]), reverse=True)
    return [path for _, path in order]


def named(run_dir: Path, epoch: int) -> Path:
    return run_dir / f"checkpoint-{epoch}"


def save(
    run_dir: Path,
    state: Mapping[str, Any],
    keep: int = 2,
    rank: int = 0,
    world: int = 1,
    token: str = "",
    wait: float = 600.0,
) -> Path:
    """Write `state` (tensors, plain values, lists, tuples, dicts) as checkpoint-N, N being its
    "epoch"; then remove all but the newest `keep`. Returns the folder.

    The folder gets its name when it is whole and on the disk: a kill or a power cut leaves the
    checkpoints that were there. Processes that save at once, as when one of them fails and ends the
    others, do so one after the other. Raises OSError where the disk refuses, ConfigError for a
    value that cannot be kept.

    world: of how many processes each has some rows of tensors (`policies.sharding.Shard`); each
    calls this, in a folder that they share, with the same `token`, new in each run. The others
    return when their rows are written; the main one waits for them, `wait` seconds at most, and
    raises TimeoutError.
    """
    run_dir = Path(run_dir)
    target = named(run_dir, state["epoch"])
    tensors: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    plain = json.dumps(_split(state, "", tensors, rows), indent=0)
    tensors = rows if rank else tensors | rows  # what is whole is alike on all
    seen: set[int] = set()
    for name, tensor in tensors.items():  # a file does not hold two tensors of one memory
        at = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if at in seen else tensor
        seen.add(at)
    partial = run_dir / f".{target.name}{token}.tmp"
    previous = run_dir / f".old-{target.name}"
    run_dir.mkdir(parents=True, exist_ok=True)
    if rank:
        _write(partial, tensors, f"state-{rank:05}.safetensors")
        return target
    with _alone(run_dir):
        for left in run_dir.glob(".checkpoint-*.tmp"):  # by a process that was killed
            if left != partial or not token:
                shutil.rmtree(left, ignore_errors=True)
        try:
            _write(partial, tensors, TENSORS)
            _write(partial, plain, PLAIN)
            _collect(partial, world, wait)
            if target.exists():
                shutil.rmtree(previous, ignore_errors=True)
                target.rename(previous)
            partial.rename(target)
            _flush(run_dir)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise type(error)(error.errno, error.strerror, str(target)) from error
        with suppress(OSError):
            _remove(previous)
            for path in found(run_dir)[keep:]:
                _remove(path)
    return target


def check(state: Mapping[str, Any]) -> None:
    """Raises ConfigError for a value that `save` would not keep."""
    _split(state, "", {}, {})


@contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """Wait until no other process is in this context. Where there are no locks, as on Windows and
    some network disks, do not."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(run_dir, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # and with it the lock, as when the process is killed


def drop(run_dir: Path, after: int) -> None:
    """Remove checkpoints of later epochs, which will be run again."""
    for path in found(run_dir):
        if int(path.name.rpartition("-")[2]) > after:
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint, or a link to one, but no files that no run wrote."""
    if path.is_symlink():
        path.unlink()
        return
    for name in (TENSORS, PLAIN, SUMS, "state-*.safetensors"):
        for file in path.glob(name):
            file.unlink()
    with suppress(OSError):  # somebody's own files are there
        path.rmdir()


def load(place: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The state, tensors on the CPU, in a checkpoint, or in the newest whole one of a run folder;
    `say` is told of those that are damaged.

    Raises FileNotFoundError if there is none, ConfigError if all are damaged.
    """
    damaged: list[str] = []
    for path in found(place) or ([place] if _NAME.fullmatch(place.name) else []):
        try:
            state = _read(path)
        except _Damaged as error:
            damaged.append(f"{path} is damaged: {error}")
            continue
        if damaged:
            say("; ".join(damaged) + f"; going on from {path.name}")
        return state
    if damaged:
        # of one that was asked for the others stand beside it
        older = [p for p in found(place.parent) if p != place] if len(damaged) == 1 else []
        instead = f"--resume {older[0]}" if older else "start anew with --overwrite"
        raise ConfigError("; ".join(damaged) + f"; put back a copy of it, or {instead}")
    raise FileNotFoundError(f"{place} holds no checkpoint")


class _Damaged(Exception):
    pass


def _write(folder: Path, content: Mapping[str, Tensor] | str, name: str) -> None:
    """A file on the disk, and when it is there one with its digest."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    path = folder / name
    with disk_errors(folder):
        if isinstance(content, str):
            path.write_text(content, "utf-8")
        else:
            save_file(dict(content), path)
    path.chmod(0o644)  # safetensors makes files that only the owner can read
    _flush(path)
    digest = folder / f"{name}{DIGEST}.part"
    digest.write_text(f"{_digest(path)}  {name}\n", "utf-8")
    digest.rename(folder / f"{name}{DIGEST}")


def _collect(folder: Path, world: int, wait: float) -> None:
    """Wait for the files of all processes, and write SHA256SUMS of their digests."""
    names = [TENSORS, PLAIN, *(f"state-{i:05}.safetensors" for i in range(1, world))]
    until = time.monotonic() + wait
    while missing := [n for n in names if not (folder / f"{n}{DIGEST}").exists()]:
        if time.monotonic() > until:
            raise TimeoutError(
                errno.ETIMEDOUT, f"{missing[0]} of another process did not come in {wait:g} s", ""
            )
        time.sleep(0.05)
    parts = [folder / f"{n}{DIGEST}" for n in names]
    (folder / SUMS).write_text("".join(p.read_text("utf-8") for p in parts), "utf-8")
    for part in parts:
        part.unlink()
    (folder / SUMS).chmod(0o644)
    _flush(folder / SUMS)
    _flush(folder)


def _read(folder: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        lines = (folder / SUMS).read_text("utf-8").splitlines()
        known = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        for name in sorted({TENSORS, PLAIN, *known}):
            if known.get(name) != _digest(folder / name):
                raise _Damaged(f"{name} is not as the run wrote it")
        names = [TENSORS, *sorted(name for name in known if name.startswith("state-"))]
        files = [safe_open(folder / name, "pt") for name in names]
        state = _joined(json.loads((folder / PLAIN).read_text("utf-8")), files)
    except OSError as error:
        raise _Damaged(f"{Path(error.filename or folder).name}: {error.strerror}") from error
    except (ValueError, KeyError, SafetensorError) as error:
        raise _Damaged(f"its content is not what a run writes ({error!r:.200})") from error
    if not isinstance(state, dict) or not {"epoch", "adapter"} <= state.keys():
        raise _Damaged("it holds no state of a run")
    return state


class Pieces:
    """A tensor of `shape` whose rows lie in several files, of which no more are read than asked
    for."""

    def __init__(self, name: str, files: Sequence[Any], shape: Sequence[int]):
        self.shape = tuple(shape)
        self._parts = [file.get_slice(name) for file in files]

    def __deepcopy__(self, memo: Any) -> Pieces:
        return self  # what is read is new every time

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        found, at = [], 0
        for part in self._parts:
            n = part.get_shape()[0]
            a, b = max(start - at, 0), min(stop - at, n)
            if a < b or (n == 0 and not found):
                found.append(part[a:b] if a < b else part[:])
            at += n
        return torch.cat(found) if found else self._parts[0][:][:0]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Have the disk hold what was written, also if the power fails. Folders on Windows cannot."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _split(value: Any, where: str, tensors: dict[str, Tensor], rows: dict[str, Tensor]) -> Any:
    """`value` as JSON has it; its tensors go to `tensors`, and what is here of divided ones to
    `rows`, under names that tell where they were.
    Lists and dicts with texts as keys are themselves, all else is {"!kind": ...}."""
    if isinstance(value, Tensor):
        name = where if where not in tensors else f"{where}~{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous()
        return {"!tensor": name}
    if isinstance(value, Shard):
        rows[where] = value.rows.contiguous()
        return {"!rows": [where, list(value.shape)]}
    if isinstance(value, Mapping):
        items = [
            (k, _split(v, f"{where}.{k}" if where else str(k), tensors, rows))
            for k, v in value.items()
        ]
        if all(isinstance(k, str) and not k.startswith("!") for k, _ in items):
            return dict(items)
        return {"!dict": [[_split(k, where, tensors, rows), v] for k, v in items]}
    if isinstance(value, (list, tuple)):
        each = [_split(v, f"{where}.{i}", tensors, rows) for i, v in enumerate(value)]
        return {"!tuple": each} if isinstance(value, tuple) else each
    if value is None or isinstance(value, (bool, int, float, str)):
        return value  # NaN and infinity too, which Python's JSON reads
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # of numpy
        return value.item()
    raise ConfigError(
        f"{where}: a {type(value).__name__} cannot be kept in a checkpoint; a state has tensors, "
        "numbers, texts, None, and lists, tuples and dicts of them"
    )


def _joined(value: Any, files: Sequence[Any]) -> Any:
    """The inverse of `_split`."""
    if isinstance(value, list):
        return [_joined(v, files) for v in value]
    if not isinstance(value, dict):
        return value
    kind = next(iter(value), "")
    if not kind.startswith("!"):
        return {k: _joined(v, files) for k, v in value.items()}
    inner = value[kind]
    if kind == "!tensor":
        return files[0].get_tensor(inner)
    if kind == "!rows":
        return Pieces(inner[0], files, inner[1])
    if kind == "!tuple":
        return tuple(_joined(v, files) for v in inner)
    return {_joined(k, files): _joined(v, files) for k, v in inner}
