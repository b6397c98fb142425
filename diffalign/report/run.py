"""A run folder as its report reads it: settings, metrics, pictures; no model."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from rewards.redaction import redact

from ..config import TrainConfig
from ..config.decoding import ConfigError, decode_value, field_types, setting_types
from ..config.reading import read_sections
from ..record import pictures
from ..record.metrics import read_metrics
from ..record.pictures import Evaluated
from ..verdict import WARNINGS, warning

Point = tuple[float, float | None]

TYPES = field_types(TrainConfig) | setting_types(TrainConfig)

MEASURED = {
    "kl": "mean square difference of the network's outputs to the base model's",
    "diversity": "mean distance of two pictures of a prompt, 0 to 1",
}


class Change(NamedTuple):
    """Means of a measure at the first and the last evaluation. gain: mean change, of the prompts
    that both scored where their scores were kept. error: its standard error over those."""

    before: float | None
    after: float | None
    gain: float | None
    error: float | None


@dataclass(frozen=True)
class Run:
    """One run. name: differs from those of the other runs. rows: those of metrics.jsonl. alike: all
    runs of the report have the same rewards and weights, so their totals can be compared."""

    dir: Path
    name: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    shots: list[Evaluated]
    alike: bool = True

    def setting(self, key: str, default: Any = None) -> Any:
        """The value of a dotted setting; `default` if it is missing, null or of another type, as
        in configs of other versions."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        try:
            return default if value is None else decode_value(TYPES[key], value, key)
        except ConfigError:
            return default

    def column(self, name: str) -> list[Point]:
        """(epoch, value) of the rows that have the metric."""
        return [(row["step"], row[name]) for row in self.rows if name in row]

    def known(self, name: str) -> list[tuple[float, float]]:
        """As `column`, without values that were not finite."""
        return [(x, y) for x, y in self.column(name) if y is not None]

    def total(self, name: str) -> float | None:
        values = [y for _, y in self.known(name)]
        return sum(values) if values else None

    def cost(self) -> dict[float, float]:
        """{epoch: denoiser calls of training up to its end}; empty if they were not counted."""
        spent, so_far = {0.0: 0.0}, 0.0
        for x, y in self.known("denoiser_calls"):
            so_far += y
            spent[x] = so_far
        return spent if so_far else {}

    @property
    def epochs(self) -> int:
        return max((row["step"] for row in self.rows), default=0)

    @property
    def evaluated(self) -> list[int]:
        return [row["step"] for row in self.rows if any(k.startswith("eval/") for k in row)]

    @property
    def measures(self) -> list[str]:
        """Names of what was measured on held-out prompts: the reward, its parts, judges, others. A
        part that equals the reward is left out; if the runs are not `alike`, the reward is left out
        instead."""
        names = dict.fromkeys(k[5:] for row in self.rows for k in row if k.startswith("eval/"))
        whole = self.column("eval/reward")
        if self.alike:
            parts = [n for n in names if n == "reward" or self.column(f"eval/{n}") != whole]
        else:
            parts = [n for n in names if n != "reward"]
        roles = ("trained", "judge", "other")
        return sorted(parts, key=lambda n: (n != "reward", roles.index(self.role(n))))

    @property
    def scored(self) -> list[str]:
        """The measures that each picture has by itself."""
        return [name for name in self.measures if name not in MEASURED]

    def role(self, name: str) -> str:
        """trained | judge | other: whether a measure was trained on, judges the run, or neither."""
        if name == "reward" or name in self.setting("rewards", {}):
            return "trained"
        return "other" if name in MEASURED else "judge"

    @property
    def warnings(self) -> list[tuple[int, str]]:
        """(epoch, the guard's warning in a word) of the evaluations that the guard flagged."""
        found = [(row["step"], warning(row)) for row in self.rows]
        return [(epoch, WARNINGS[name]) for epoch, name in found if name]

    @property
    def flagged(self) -> list[int]:
        return [epoch for epoch, _ in self.warnings]

    @property
    def guarded(self) -> int:
        """Number of evaluations that the guard saw."""
        return len(self.known("over_optimised"))

    def change(self, name: str) -> Change | None:
        """How a measure changed from the run's first evaluation to its last; None where neither has
        it."""
        epochs, known = self.evaluated, dict(self.known(f"eval/{name}"))
        if not epochs or known.keys().isdisjoint({epochs[0], epochs[-1]}):
            return None
        before, after = known.get(epochs[0]), known.get(epochs[-1])
        gain, error = self.gains(name).get(epochs[-1], (None, None))
        if gain is None and before is not None and after is not None:
            gain = after - before
        return Change(before, after, gain, error)

    def gains(self, name: str) -> dict[float, tuple[float, float | None]]:
        """{epoch: a measure's mean change from the first evaluation on, and its standard error over
        the prompts (None for one)}, of prompts whose scores of both evaluations were kept; without
        evaluations of other prompts."""
        first = [s for s in self.shots[:1] if [s.epoch] == self.evaluated[:1] and name in s.scores]
        base = first[0] if first else None
        found: dict[float, tuple[float, float | None]] = {}
        for shot in self.shots:
            if base is None or name not in shot.scores or shot.prompts != base.prompts:
                continue
            pairs = zip(map(mean, base.scores[name]), map(mean, shot.scores[name]), strict=True)
            gains = [b - a for a, b in pairs if a is not None and b is not None]
            if gains:
                error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
                found[float(shot.epoch)] = statistics.fmean(gains), error
        return found


def epoch_name(epoch: float) -> str:
    return f"epoch {epoch:g}" if epoch else "base"


def short_names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [Path(p).resolve().parts for p in paths]
    for k in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-k:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"{' '.join(map(str, paths))}: one is given twice; leave it out")


def read(dirs: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Read the runs in folders. Raises FileNotFoundError for a folder without metrics, ValueError
    for files that cannot be read or a folder given twice."""
    names = short_names([str(d) for d in dirs])
    runs = [_read(Path(d), name) for d, name in zip(dirs, names, strict=True)]
    alike = all(run.setting("rewards") == runs[0].setting("rewards") for run in runs)
    return [replace(run, alike=alike) for run in runs]


def _read(folder: Path, name: str) -> Run:
    path = folder / "config.yaml"
    # a config written by another version may hold secrets
    config = redact(read_sections(path)) if path.exists() else {}
    return Run(folder, name, config, read_metrics(folder), pictures.load(folder))


def mean(values: Iterable[float | None]) -> float | None:
    known = [x for x in values if x is not None]
    return sum(known) / len(known) if known else None
