"""Load weights through libraries: turn their errors into one sentence, refuse random weights."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

PREPROCESSING = ("preprocessor_config.json", "processor_config.json")
POINTER = b"version https://git-lfs"
NO_FILE = (
    r"no file named|not appear to have (a|any) file|no such file|entry not found"
    r"|not the path to a directory containing"
)
OFFLINE = r"connect to|offline mode|not fully cached|outgoing traffic|name resolution|timed out"
DAMAGED = r"deserializing|PytorchStreamReader|central directory|git-lfs|unsupported operand|unpickl"
SHAPES = r"size mismatch|expected shape|shapes? (did|do) not match|ignore_mismatched_sizes"
TOKENIZERS = r"sentencepiece|tiktoken|protobuf"


class LoadingError(ValueError):
    """Weights are missing or do not fit; the message can be shown to the user unchanged."""


def pretrained(
    load: Callable[..., T], option: str, source: str, unused: str = "$^", **options: Any
) -> T:
    """Call a from_pretrained as `load(source, **options)` under `reading`. If the folder or hub id
    has only weights of the variant fp16, load these."""
    with reading(option, source, unused) as said:
        try:
            return load(source, **options)
        except (OSError, ValueError) as error:
            if not re.search(NO_FILE, _texts(error), re.I):
                raise
            said.clear()
            try:
                return load(source, variant="fp16", **options)
            except (OSError, ValueError):
                raise error from None


def optional(load: Callable[..., T], option: str, source: str, files: tuple[str, ...]) -> T | None:
    """`load(source)` under `reading`; None if the folder or repository has none of `files`."""
    folder = Path(source)
    if folder.is_dir() and not any((folder / file).exists() for file in files):
        return None
    with reading(option, source):
        try:
            return load(source)
        except OSError as error:
            texts = _texts(error)
            if folder.is_dir() or re.search(OFFLINE, texts, re.I):
                raise
            if not re.search(NO_FILE, texts, re.I):
                raise
    return None


@contextmanager
def reading(option: str, source: str, unused: str = "$^") -> Iterator[dict[str, logging.LogRecord]]:
    """A context in which a library reads weights from `source`, a file, folder or hub id.

    Any exception but running out of memory becomes a LoadingError that begins with `option`, such
    as "model='org/clip'", and then tells the cause and the remedy. A logged warning that some
    weights were missing and are random becomes one too, unless their names match `unused`. Yields
    the library's log records, which are held back until the end.
    """
    with _warnings() as said:
        try:
            yield said
        except (LoadingError, MemoryError):
            raise
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError":  # torch's
                raise
            others = [k for text in said for k in _random(text)]
            said.clear()
            raise LoadingError(f"{option} {_why(error, source, others)}") from error
        missing = [k for text in said for k in _random(text) if not re.search(unused, k)]
        if missing:
            said.clear()
            raise LoadingError(
                f"{option} has no weights for {missing[0]}"
                + (f" and {len(missing) - 1} others" if missing[1:] else "")
                + ", which would be random; its weights and its config are of different models"
            )


@contextmanager
def _warnings() -> Iterator[dict[str, logging.LogRecord]]:
    """Hold back what transformers and diffusers log; log what the caller left of it at the end."""
    said: dict[str, logging.LogRecord] = {}
    holder = logging.Handler()
    holder.emit = lambda record: said.update({record.getMessage(): record})
    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    before = [(one, one.handlers, one.level, one.propagate) for one in loggers]
    for one in loggers:
        # the warning about random weights must reach us even if the user logs only errors
        one.handlers, one.propagate = [holder], False
        one.setLevel(min(one.level or logging.WARNING, logging.WARNING))
    try:
        yield said
    finally:
        for one, handlers, level, propagate in before:
            one.handlers, one.propagate = handlers, propagate
            one.setLevel(level)
    for record in said.values():
        logger = logging.getLogger(record.name.partition(".")[0])
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)


def _random(text: str) -> list[str]:
    """The names of the weights that are random according to a library's warning."""
    listed = re.search(r"newly initialized: \[([^\]]*)\]", text)  # diffusers
    if listed:
        return re.findall(r"'([^']+)'", listed[1])
    rows = re.findall(r"^(\S+)\s*\|\s*(?:\x1b\[\d+m)*(?:MISSING|MISMATCH)", text, re.M)
    return rows or (["some of its layers"] if "newly initialized" in text else [])


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _texts(error: BaseException) -> str:
    return "\n".join(str(e) for e in _chain(error))


def _why(error: BaseException, source: str, others: Sequence[str] = ()) -> str:
    """Cause and remedy of an error that a library raised while it read `source`. others: names of
    weights whose shape does not fit."""
    kinds = {kind.__name__ for e in _chain(error) for kind in type(e).__mro__}
    texts, path = _texts(error), Path(source).expanduser()
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    said = f"{type(error).__name__}: {first.split('. ')[0][:200]}".rstrip(":. ")
    again = "copy it again" if path.exists() else "delete it from the hub's cache, and try again"
    if path.exists():
        if broken := damaged(path):
            return f"is damaged: {broken}; {again}"
    elif "GatedRepoError" in kinds or " 403 " in texts:
        return (
            f"is gated on the hub; accept its terms at huggingface.co/{source}, and log in with "
            "`hf auth login` or HF_TOKEN"
        )
    elif "RepositoryNotFoundError" in kinds or "RevisionNotFoundError" in kinds:
        return (
            "is neither a local path nor on the hub; check the spelling, or if it is private log "
            "in with `hf auth login` or HF_TOKEN"
        )
    elif "HFValidationError" in kinds:
        return "is neither the folder or file of a model nor a hub id, ORG/NAME; check the spelling"
    elif kinds & {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError"} or (
        kinds & {"ConnectError", "TimeoutException"} or re.search(OFFLINE, texts, re.I)
    ):
        off = os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "off", "no")
        why = "HF_HUB_OFFLINE is set" if off else "the hub cannot be reached"
        hint = f" (hf download {source})" if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else ""
        return (
            f"is not on this machine, and {why}; give a local folder, or download it first where "
            f"there is a network{hint}"
        )
    if re.search(r"Unsupported (global|class)", texts, re.I):
        return (
            "holds Python objects beside tensors, which could run code and are not read; give its "
            "state dict, best as .safetensors"
        )
    if kinds & {"SafetensorError", "UnpicklingError", "EOFError", "BadZipFile"} or (
        re.search(DAMAGED, texts, re.I) or kinds & {"JSONDecodeError", "UnicodeDecodeError"}
    ):
        return f"is damaged ({said}); {again}"
    if "ImportError" in kinds or re.search(TOKENIZERS, first, re.I):
        needed = "sentencepiece protobuf" if re.search(TOKENIZERS, texts, re.I) else ""
        return f"needs {f'pip install {needed}' if needed else 'a package'} ({said})"
    if "PermissionError" in kinds:
        return f"may not be read ({said}); change its permissions"
    if re.search(SHAPES, texts, re.I):
        said = f"{others[0]} is of another shape" if others else said
        return f"has weights that do not fit its config ({said}); they are of different models"
    if re.search(NO_FILE, texts, re.I) or "FileNotFoundError" in kinds:
        return f"is incomplete ({said}); give a complete folder or hub id"
    return f"cannot be loaded ({said})"


def damaged(path: Path) -> str | None:
    """What is wrong with a file, or with the first damaged file of a folder; None if nothing is.
    Checks safetensors headers, Git LFS pointers and JSON files, but no weights."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        if not file.is_file() or file.suffix not in (".safetensors", ".bin", ".pt", ".json"):
            continue
        try:
            with file.open("rb") as opened:
                start = opened.read(len(POINTER))
            if start == POINTER:
                return f"{file} is a Git LFS pointer and not the file itself (git lfs pull)"
            if file.suffix == ".json":
                found = json.loads(file.read_bytes())
                if not isinstance(found, dict) and file.stem.endswith(("config", "index")):
                    return f"{file} holds no settings"
            if file.suffix == ".safetensors":
                header(file)
        except OSError:
            continue  # whoever reads the file will report the error
        except ValueError as error:
            return f"{file} {error}" if file.suffix != ".json" else f"{file} is no JSON ({error})"
    return None


def header(file: str | Path) -> dict[str, Any]:
    """The header of a safetensors file: {tensor: {"dtype", "shape", "data_offsets"}}, and
    "__metadata__" where there is one. Raises ValueError for a file that is damaged or cut short."""
    size = Path(file).stat().st_size
    with Path(file).open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError("is cut short or no safetensors file")
        try:
            found: Any = json.loads(opened.read(length))
            tensors = [v for k, v in found.items() if k != "__metadata__"]
            end = max((tensor["data_offsets"][1] for tensor in tensors), default=0)
        except (ValueError, AttributeError, KeyError, TypeError, IndexError):
            raise ValueError("has a damaged header") from None
    if 8 + length + end != size:
        raise ValueError(f"has {size} bytes and should have {8 + length + end}")
    return found
