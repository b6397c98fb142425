"""Errors of the benchmarks: changes of the same prompts, with prompts as what varies."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from diffalign.record import pictures


def changes(run: str | Path, name: str) -> list[float]:
    """Of every held-out prompt the mean change of a measure from a run's first evaluation to its
    last; the prompts that both scored."""
    first, *_, last = pictures.load(run)
    pairs = zip(first.scores[name], last.scores[name], strict=True)
    found = []
    for before, after in pairs:
        known = [(a, b) for a, b in zip(before, after, strict=True) if None not in (a, b)]
        if known:
            found.append(statistics.fmean(b - a for a, b in known))
    return found


def clustered(seeds: Sequence[Sequence[float]]) -> tuple[float, float]:
    """(mean, standard error over the prompts) of the changes of one list of prompts, a row a seed:
    those of a prompt are averaged over the seeds first, since they are not independent."""
    prompts = [statistics.fmean(values) for values in zip(*seeds, strict=True)]
    return statistics.fmean(prompts), statistics.stdev(prompts) / len(prompts) ** 0.5
