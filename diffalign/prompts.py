"""Prompt files, and the order in which a run goes through them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.decoding import suggest


@dataclass(frozen=True)
class Prompt:
    """A prompt and what is known of it (passed on to the rewards)."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


def for_rewards(prompts: Sequence[Prompt]) -> tuple[list[str], list[dict[str, Any]]]:
    """Texts and metadata, as a reward is called with them."""
    return [p.text for p in prompts], [p.metadata for p in prompts]


def for_judges(prompts: Sequence[Prompt]) -> tuple[list[str], list[dict[str, Any]]]:
    """The same for held-out judges, which score every prompt whatever its `rewards` are."""
    known = [{k: v for k, v in p.metadata.items() if k != "rewards"} for p in prompts]
    return [p.text for p in prompts], known


def load(path: str | os.PathLike[str]) -> list[Prompt]:
    """Reads a prompt file, UTF-8, with or without BOM, any line ends; never empty.

    `.txt` has one prompt a line; blank lines and lines that start with # are skipped. `.jsonl` has
    one object a line, its "prompt" the text and its other keys the metadata. Raises `ValueError`
    that names the file, the line and the remedy.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path}: prompts are read from .txt or .jsonl, not '{path.suffix}'")
    parse = _parse_txt if path.suffix == ".txt" else _parse_jsonl
    # Not splitlines(): that also breaks at U+2028 and others, which are valid inside JSON strings.
    lines = _read(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = parse(line.strip())
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        if prompt is not None:
            if "\0" in prompt.text:
                raise ValueError(f"{path}:{number}: the prompt holds a NUL character; remove it")
            prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} has no prompts; write one a line")
    return prompts


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        folder = path.parent
        there = [p.name for p in folder.glob("*") if p.suffix in (".txt", ".jsonl")]
        hint = (
            suggest(path.name, sorted(there)) if there else f"; there is no such file in {folder}"
        )
        raise ValueError(f"prompt file {path} does not exist{hint}") from error
    except OSError as error:
        raise ValueError(f"cannot read prompt file {path}: {error.strerror or error}") from error
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line}: byte {data[error.start]:#04x} at offset {error.start} is not UTF-8; "
            f"convert the file, e.g. iconv -f latin1 -t utf-8 {path.name}"
        ) from error


def _parse_txt(line: str) -> Prompt | None:
    return None if line.startswith("#") else Prompt(line)


def _parse_jsonl(line: str) -> Prompt:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON at column {error.colno}: {error.msg}") from error
    if not isinstance(entry, dict):
        raise ValueError(f'{line[:40]} is not an object; write {{"prompt": "..."}}')
    if "prompt" not in entry:
        raise ValueError(f'no "prompt" among the keys {", ".join(entry) or "(none)"}')
    text = entry.pop("prompt")
    if not isinstance(text, str):
        raise ValueError(f'"prompt" is {text!r}, not a string')
    if not text.strip():
        raise ValueError('"prompt" is empty; write a text or remove the line')
    return Prompt(text.strip(), entry)


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

    def share(self, k: int, rank: int, world: int) -> list[int]:
        """The ids of epoch k that process `rank` of `world` has, the same number on each."""
        ids = self.epoch(k)
        size = len(ids) // world
        return ids[rank * size : (rank + 1) * size]

    def seen(self, epochs: Iterable[int], rank: int, world: int) -> set[int]:
        """The ids that a process has in any of the epochs."""
        ids: set[int] = set()
        for k in epochs:
            ids |= set(self.share(k, rank, world))
            if len(ids) == self.n:
                break
        return ids

    def _order(self, turn: int) -> list[int]:
        """The permutation of pass `turn`.

        An epoch that takes `before` ids from the end of one pass takes `after` from the front of
        the next, which must differ; so an order depends on the one before it. It does so only back
        to the last pass that began with an epoch, at most `groups` passes ago.
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
