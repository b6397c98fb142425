"""The states of a run in folders: nothing trained is lost, and a resumed run is the same run.

RUN/checkpoint-N holds the state after N epochs:

    state.safetensors   all tensors
    state.json          everything else, and where the tensors belong
    SHA256SUMS          the digests of both, as `sha256sum --check` reads them
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config.decoding import ConfigError

TENSORS, PLAIN, SUMS = FILES = ("state.safetensors", "state.json", "SHA256SUMS")
LATEST = "latest"
OLD = "checkpoint.pt"  # one file, of versions before the folders

_NAME = re.compile(r"(\.old-)?checkpoint-(\d+)")


def found(run_dir: Path) -> list[Path]:
    """The checkpoints in a run folder, the newest first."""
    named = [(m, p) for p in Path(run_dir).glob("*checkpoint-*") if (m := _NAME.fullmatch(p.name))]
    order = sorted(named, key=lambda each: (int(each[0][2]), not each[0][1]), reverse=True)
    return [path for _, path in order]


def save(run_dir: Path, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write `state` (tensors, plain values, lists, tuples, dicts) as checkpoint-N, N being its
    "epoch"; then remove all but the newest `keep`. Returns the folder.

    The folder gets its name when it is whole and on the disk: a kill or a power cut leaves the
    checkpoints that were there. Processes that save at once, as when one of them fails and ends the
    others, do so one after the other. Raises OSError where the disk refuses, ConfigError for a
    value that cannot be kept.
    """
    run_dir = Path(run_dir)
    target = run_dir / f"checkpoint-{state['epoch']}"
    tensors: dict[str, Tensor] = {}
    plain = json.dumps(_split(state, "", tensors), indent=0)
    seen: set[int] = set()
    for name, tensor in tensors.items():  # a file does not hold two tensors of one memory
        at = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if at in seen else tensor
        seen.add(at)
    partial = run_dir / f".{target.name}.tmp"
    previous = run_dir / f".old-{target.name}"
    run_dir.mkdir(parents=True, exist_ok=True)
    with _alone(run_dir):
        for left in run_dir.glob(".checkpoint-*.tmp"):  # by a process that was killed
            shutil.rmtree(left)
        try:
            _write(partial, plain, tensors)
            if target.exists():
                shutil.rmtree(previous, ignore_errors=True)
                target.rename(previous)
            partial.rename(target)
            _flush(run_dir)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(error.errno, error.strerror, str(target)) from error
        shutil.rmtree(previous, ignore_errors=True)
        for path in found(run_dir)[keep:]:
            shutil.rmtree(path, ignore_errors=True)
    return target


def check(state: Mapping[str, Any]) -> None:
    """Raises ConfigError for a value that `save` would not keep."""
    _split(state, "", {})


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
            shutil.rmtree(path)


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
        raise ConfigError(
            "; ".join(damaged) + "; put back a copy of it, or start anew with --overwrite"
        )
    raise FileNotFoundError(f"{place} holds no checkpoint")


class _Damaged(Exception):
    pass


def _write(folder: Path, plain: str, tensors: Mapping[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder.mkdir()
    try:
        save_file(dict(tensors), folder / TENSORS)
    except SafetensorError as error:  # which says of the disk's errors the number alone
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error
    (folder / PLAIN).write_text(plain, "utf-8")
    sums = "".join(f"{_digest(folder / name)}  {name}\n" for name in (TENSORS, PLAIN))
    (folder / SUMS).write_text(sums, "utf-8")
    for name in FILES:
        (folder / name).chmod(0o644)  # safetensors makes files that only the owner can read
        _flush(folder / name)
    _flush(folder)


def _read(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    try:
        lines = (folder / SUMS).read_text("utf-8").splitlines()
        known = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        for name in (TENSORS, PLAIN):
            if known.get(name) != _digest(folder / name):
                raise _Damaged(f"{name} is not as the run wrote it")
        tensors = load_file(folder / TENSORS)
        state = _joined(json.loads((folder / PLAIN).read_text("utf-8")), tensors)
    except OSError as error:
        raise _Damaged(f"{Path(error.filename or folder).name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _Damaged(f"{SUMS} is not as the run wrote it") from error
    if not isinstance(state, dict) or not {"epoch", "adapter"} <= state.keys():
        raise _Damaged("it holds no state of a run")
    return state


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


def _split(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON has it; its tensors go to `tensors`, under names that tell where they were.
    Lists and dicts with texts as keys are themselves, all else is {"!kind": ...}."""
    if isinstance(value, Tensor):
        name = where if where not in tensors else f"{where}~{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous()
        return {"!tensor": name}
    if isinstance(value, Mapping):
        items = [
            (k, _split(v, f"{where}.{k}" if where else str(k), tensors)) for k, v in value.items()
        ]
        if all(isinstance(k, str) and not k.startswith("!") for k, _ in items):
            return dict(items)
        return {"!dict": [[_split(k, where, tensors), v] for k, v in items]}
    if isinstance(value, (list, tuple)):
        each = [_split(v, f"{where}.{i}", tensors) for i, v in enumerate(value)]
        return {"!tuple": each} if isinstance(value, tuple) else each
    if value is None or isinstance(value, (bool, int, float, str)):
        return value  # NaN and infinity too, which Python's JSON reads
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # of numpy
        return value.item()
    raise ConfigError(
        f"{where}: a {type(value).__name__} cannot be kept in a checkpoint; a state has tensors, "
        "numbers, texts, None, and lists, tuples and dicts of them"
    )


def _joined(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `_split`."""
    if isinstance(value, list):
        return [_joined(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    kind = next(iter(value), "")
    if not kind.startswith("!"):
        return {k: _joined(v, tensors) for k, v in value.items()}
    inner = value[kind]
    if kind == "!tensor":
        return tensors[inner]
    if kind == "!tuple":
        return tuple(_joined(v, tensors) for v in inner)
    return {_joined(k, tensors): _joined(v, tensors) for k, v in inner}
