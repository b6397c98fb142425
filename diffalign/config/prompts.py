"""Prompts, typed and in files, and the order in which a run goes through them."""

from __future__ import annotations

import json
import math
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Union

import numpy as np

from diffalign.config.decoding import suggest
from diffalign.config.text import read_text, unusable


@dataclass(frozen=True)
class Prompt:
    """A prompt and its metadata, which the rewards get too."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels that the metadata ask for by `resolution`, if they do. Raises
        ValueError."""
        asked = self.metadata.get("resolution")
        return None if asked is None else sides(asked, f'"resolution" of {self.text[:40]!r}: ')


def sides(resolution: int | Sequence[int], what: str = "model.resolution=") -> tuple[int, int]:
    """Height and width in pixels; one number is both. Raises ValueError."""
    pair = [resolution] * 2 if isinstance(resolution, int) else resolution
    whole = isinstance(pair, (list, tuple)) and len(pair) == 2
    if not whole or not all(type(side) is int and side > 0 for side in pair):
        raise ValueError(
            f"{what}{resolution!r} is no size; use the side of a square in pixels, or "
            "[height, width]"
        )
    return pair[0], pair[1]


def for_rewards(prompts: Sequence[Prompt]) -> tuple[list[str], list[dict[str, Any]]]:
    """Texts and metadata, as a reward takes them."""
    return [p.text for p in prompts], [p.metadata for p in prompts]


def for_judges(prompts: Sequence[Prompt]) -> tuple[list[str], list[dict[str, Any]]]:
    """As `for_rewards`, for held-out judges, which score every prompt whatever its `rewards`."""
    known = [{k: v for k, v in p.metadata.items() if k != "rewards"} for p in prompts]
    return [p.text for p in prompts], known


SUFFIXES = (".txt", ".jsonl")
MISTAKEN = (".text", ".json", ".jsonlines", ".ndjson", ".csv", ".tsv", ".md", ".yaml", ".yml")
MISTAKEN += (".gz", ".zip", ".xz", ".zst", ".parquet", ".docx", ".rtf")  # files that are not read

Given = Union[str, Prompt, Mapping[str, Any], "os.PathLike[str]"]


def collect(given: Given | Sequence[Given], what: str = "prompts") -> list[Prompt]:
    """The prompts, at least one, that a user typed or passed: one prompt file, or any mixture of
    texts, prompt files, `Prompt`s and mappings with the keys of a .jsonl line.

    A text that ends in .txt or .jsonl is the path of a file, and so is a `Path`. The empty text is
    for unconditional pictures. `what` names the setting in messages. Raises `ValueError`.
    """
    if isinstance(given, str) and not _is_path(given):
        raise ValueError(f"{what}={given[:60]!r} is one text, not a list; write [{given[:60]!r}]")
    single = isinstance(given, (str, os.PathLike, Prompt)) or not isinstance(given, Iterable)
    if isinstance(given, Mapping):
        raise ValueError(f"{what}={str(given)[:60]} is a mapping; give a list of such, or of texts")
    found: list[Prompt] = []
    items: Any = [given] if single else given
    for number, item in enumerate(items):
        if isinstance(item, os.PathLike) or (isinstance(item, str) and _is_path(item)):
            found += load(item)
            continue
        try:
            if isinstance(item, Mapping):
                item = _from_entry(dict(item))
            if not isinstance(item, (str, Prompt)):
                raise ValueError(f"{item!r} is not a text")
            found.append(_checked(item if isinstance(item, Prompt) else Prompt(item.strip())))
        except ValueError as error:
            raise ValueError(f"{what}[{number}]: {error}") from error
    if not found:
        raise ValueError(f"{what} is empty; give at least one text")
    return found


def _is_path(text: str) -> bool:
    """Whether a text is the path of a file, even of one that is no readable prompt file."""
    end = os.path.splitext(text)[1].lower()
    if end in SUFFIXES or (end in MISTAKEN and len(text.split()) == 1):
        return True
    return (os.sep in text or bool(end)) and "\0" not in text and os.path.exists(text)


def load(path: str | os.PathLike[str]) -> list[Prompt]:
    """Reads a prompt file in UTF-8, or UTF-16 or UTF-32 with a byte order mark, with any line ends.

    `.txt` has one prompt per line; blank lines and lines that start with # are skipped. `.jsonl`
    has one object per line: "prompt" is the text, and the other keys are the metadata. Raises
    `ValueError` that names the file, the line and the remedy; also for a file without prompts.
    """
    path = Path(path).expanduser()
    if not os.path.isfile(path):
        raise ValueError(_missing(path))
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: prompts are read from .txt or .jsonl, not '{suffix}'; rename or convert the "
            'file: .txt has one prompt a line, .jsonl one {"prompt": ...} a line'
        )
    parse = _parse_txt if suffix == ".txt" else _parse_jsonl
    # Not splitlines(): that also breaks at U+2028 and others, which are valid inside JSON strings.
    lines = read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = parse(line.strip())
            if prompt is not None:
                prompts.append(_checked(prompt))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    if not prompts:
        raise ValueError(f"{path} has no prompts; write one a line")
    return prompts


def _missing(path: Path) -> str:
    if os.path.lexists(path):
        kind = "a folder" if os.path.isdir(path) else "no regular file (a device, a broken link)"
        return f"prompt file {path} is {kind}; give a .txt or .jsonl file"
    there = [p.name for p in path.parent.glob("*") if p.suffix.lower() in SUFFIXES]
    hint = suggest(path.name, sorted(there)) if there else f"; there is none in {path.parent}"
    return f"prompt file {path} does not exist{hint}"


def _checked(prompt: Prompt) -> Prompt:
    """Returns the prompt. Raises `ValueError` for a text that cannot be shown or saved."""
    strange = [c for c in prompt.text if unicodedata.category(c) == "Cc" and c not in "\t\n\r\0"]
    whole = json.dumps([prompt.text, prompt.metadata], ensure_ascii=False, default=str)
    if problem := unusable(prompt.text) or unusable(whole):
        raise ValueError(f"the prompt {prompt.text[:60]!r} {problem}")
    if strange:
        raise ValueError(
            f"the prompt {prompt.text[:60]!r} holds the control character U+{ord(strange[0]):04X}; "
            "remove it, and if the file is UTF-16, convert it to UTF-8"
        )
    return prompt


def _parse_txt(line: str) -> Prompt | None:
    return None if line.startswith("#") else Prompt(line)


def _parse_jsonl(line: str) -> Prompt:
    try:
        entry = json.loads(line, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        lone = line in "[]" or line.startswith("[{")
        remedy = "; .jsonl has no list around its lines, one object a line" if lone else ""
        raise ValueError(f"invalid JSON at column {error.colno}: {error.msg}{remedy}") from error
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error
    if not isinstance(entry, dict):
        raise ValueError(f'{line[:40]} is not an object; write {{"prompt": "..."}}')
    prompt = _from_entry(entry)
    if not prompt.text and "image" not in prompt.metadata:  # a picture needs no prompt
        raise ValueError('"prompt" is empty; write a text or remove the line')
    return prompt


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _from_entry(entry: dict[str, Any]) -> Prompt:
    if "prompt" not in entry:
        raise ValueError(f'no "prompt" among the keys {", ".join(entry) or "(none)"}')
    text = entry.pop("prompt")
    if not isinstance(text, str):
        raise ValueError(f'"prompt" is {text!r}, not a string')
    return Prompt(text.strip(), entry)


def divided(n: int, parts: int, unit: int = 1) -> list[range]:
    """n things, of which each `unit` stay together, in `parts` of neighbors, as even as can be."""
    few, more = divmod(n // unit, parts)
    ends = [unit * (i * few + min(i, more)) for i in range(parts + 1)]
    return [range(a, b) for a, b in pairwise(ends)]


class PromptSampler:
    """Which prompts an epoch uses: a pure function of (seed, epoch), so resuming needs no state.

    The epochs walk through one fresh permutation of the prompts after another: every prompt is
    used equally often, and none twice in an epoch.

    Raises `ValueError` unless 1 <= groups <= n.
    """

    def __init__(self, n: int, groups: int, seed: int = 0) -> None:
        if not 1 <= groups <= n:
            raise ValueError(
                f"data.groups={groups} prompts per epoch cannot be drawn from a file of {n} "
                f"without repeats; use 1 to {n}, or add prompts"
            )
        self.n, self.groups, self.seed = n, groups, seed

    def epoch(self, k: int) -> list[int]:
        """The `groups` distinct prompt ids, in [0, n), of epoch k >= 0."""
        turn, offset = divmod(k * self.groups, self.n)
        ids = self._order(turn)[offset : offset + self.groups]
        if len(ids) < self.groups:
            ids += self._order(turn + 1)[: self.groups - len(ids)]
        return ids

    def _order(self, turn: int) -> list[int]:
        """The permutation of pass `turn`.

        An epoch may take the ids `before` from the end of one pass and its other `after` ids from
        the front of the next. All must differ, so a permutation depends on the previous one, but
        only back to the last pass that began together with an epoch, at most `groups` passes ago.
        """
        order: list[int] = []
        for p in range(turn - turn % (self.groups // math.gcd(self.n, self.groups)), turn + 1):
            fresh = np.random.default_rng((self.seed, p)).permutation(self.n).tolist()
            after = -p * self.n % self.groups
            before = set(order[len(order) - (self.groups - after) :]) if after else set()
            if before.isdisjoint(fresh[:after]):
                order = fresh
            else:
                front = [i for i in fresh if i not in before][:after]
                taken = set(front)
                order = front + [i for i in fresh if i not in taken]
        return order


class Buckets:
    """Which prompts an epoch uses, all of one size; with prompts of one size a `PromptSampler`.

    Sizes alternate as evenly as their shares of the prompts allow. A pure function of (seed,
    epoch). Raises ValueError for a size with fewer prompts than an epoch
    takes.
    """

    def __init__(self, prompts: Sequence[Prompt], groups: int, seed: int = 0):
        sizes = [p.size for p in prompts]
        ids: dict[tuple[int, int] | None, list[int]] = {}
        for i, size in enumerate(sizes):
            ids.setdefault(size, []).append(i)
        few = [size for size, own in ids.items() if len(own) < groups]
        if few and len(ids) > 1:
            raise ValueError(
                f"an epoch takes data.groups={groups} prompts of one size, and of {few[0]} there "
                f"are {len(ids[few[0]])}; use fewer groups, or add prompts of that size"
            )
        self.n, self.ids = len(sizes), ids
        self.samplers = {size: PromptSampler(len(own), groups, seed) for size, own in ids.items()}
        self._turns: list[tuple[int, int] | None] = []
        self._counts = dict.fromkeys(ids, 0)
        self._places: list[int] = []  # of each epoch among those of its size

    def size(self, k: int) -> tuple[int, int] | None:
        """Of the pictures of epoch k >= 0."""
        while len(self._turns) <= k:
            due = {
                size: len(own) / self.n * (len(self._turns) + 1) - self._counts[size]
                for size, own in self.ids.items()
            }
            turn = max(due, key=lambda size: due[size])
            self._places.append(self._counts[turn])
            self._counts[turn] += 1
            self._turns.append(turn)
        return self._turns[k]

    def epoch(self, k: int) -> list[int]:
        """The distinct prompt ids of epoch k >= 0."""
        size = self.size(k)
        return [self.ids[size][i] for i in self.samplers[size].epoch(self._places[k])]

    def seen(self, epochs: Iterable[int], places: slice) -> set[int]:
        """The ids at these places of any of the epochs."""
        ids: set[int] = set()
        for k in epochs:
            ids |= set(self.epoch(k)[places])
            if len(ids) == self.n:
                break
        return ids
