"""Where the time of a run goes, `diffalign bench CONFIG`: its calls, alone and in the loop."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..config import TrainConfig
from ..record import folder
from ..training import saving
from ..training.bare import Kind, Recorder, synchronize
from ..training.trainer import Trainer
from .timing import words

PHASES = ("rollout", "update", "evaluation", "rest")
TRAINING = ("rollout", "update", "rest")
WHAT = {"": "forward", "weights": "with backward", "input": "with backward to the input"}


@dataclass(frozen=True)
class Round:
    """One epoch, and right after it the same calls alone: seconds by phase, and by kind of call."""

    wall: dict[str, float]
    bare: dict[Kind, float]

    def overhead(self, phases: Sequence[str]) -> float:
        """Wall time over that of the calls alone; 0 where there are none."""
        alone = sum(s for kind, s in self.bare.items() if kind.phase in phases)
        return sum(self.wall.get(p, 0.0) for p in phases) / alone if alone else 0.0


def measure(config: TrainConfig, rounds: int) -> list[Round]:
    """Train `rounds` epochs after one to warm up, in a folder that is then removed; the first of
    them is evaluated. After each its calls are made again, alone, so that a slow moment of the
    machine slows both."""
    config.train.epochs = max(config.train.epochs, rounds + 1)  # or the schedule ends at 0
    with temporary(config) as trainer:
        return _rounds(trainer, rounds)


@contextmanager
def temporary(config: TrainConfig) -> Iterator[Trainer]:
    """The trainer of a config, in a folder that is then removed."""
    with tempfile.TemporaryDirectory() as place:
        config.log.dir, config.log.trackers = f"{place}/run", []
        trainer = Trainer(config)
        try:
            yield trainer
        finally:
            trainer.tracker.close()
            folder.release(trainer.dir)


def _rounds(trainer: Trainer, rounds: int) -> list[Round]:
    trainer.run_epoch(0)
    found = []
    for epoch in range(1, rounds + 1):
        recorder = Recorder(trainer)
        with recorder.recording():
            start = time.perf_counter()
            metrics = trainer.run_epoch(epoch)
            trainer.tracker.log(epoch, metrics)
            trainer.complete = saving.state(trainer)
            synchronize(trainer.policy.device)
            whole = time.perf_counter() - start
            recorder.seconds["rest"] = whole - sum(recorder.seconds.values())
            if epoch == 1 and trainer.plan.eval_prompts:
                trainer.evaluate(f"epoch {epoch}")
        found.append(Round(dict(recorder.seconds), recorder.replay()))
    return found


def overheads(rounds: Sequence[Round]) -> dict[str, tuple[float, float, float]]:
    """Of each phase, and of an epoch (rollout, update and rest), the wall time over that of the
    same calls alone: median over the rounds, least and most. Phases without calls are left out."""
    found = {}
    for name, phases in {**{p: (p,) for p in PHASES[:3]}, "epoch": TRAINING}.items():
        values = [v for r in rounds if (v := r.overhead(phases))]
        if values:
            found[name] = statistics.median(values), min(values), max(values)
    return found


def table(rounds: Sequence[Round]) -> str:
    """One screen: the calls alone, what they take of the time, and what the loop adds."""
    epoch = sum(_median(r.wall.get(phase) for r in rounds) for phase in TRAINING)
    lines = [f"{'':<11}{'calls alone':<38}{'rows':>5}{'seconds':>9}{'of an epoch':>13}"]
    kinds = sorted({k for r in rounds for k in r.bare}, key=lambda k: PHASES.index(k.phase))
    for kind in kinds:
        seconds = _median(r.bare.get(kind) for r in rounds)
        name = f"{kind.part}, {WHAT[kind.gradient]}" + (", without LoRA" if kind.base else "")
        share = f"{seconds / epoch:>13.0%}" if kind.phase in TRAINING else ""
        lines.append(f"{kind.phase:<11}{name:<38}{kind.rows:>5}{seconds:>9.3g}{share}")
    lines += ["", f"{'':<11}{'in the loop':<43}{'seconds':>9}{'of an epoch':>13}   over the calls"]
    found = overheads(rounds)
    for name in (*PHASES, "epoch"):
        seconds = epoch if name == "epoch" else _median(r.wall.get(name) for r in rounds)
        if not seconds:
            continue
        share = f"{seconds / epoch:>13.0%}" if name in TRAINING else " " * 13
        over = "   {:.3f} [{:.3f}, {:.3f}]".format(*found[name]) if name in found else ""
        lines.append(f"{name:<54}{seconds:>9.3g}{share}{over}")
    return "\n".join(lines)


def _median(values: Iterable[float | None]) -> float:
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else 0.0


def run(config: TrainConfig, rounds: int) -> str:
    """The table of a config on this machine, with what it was measured on."""
    start = time.perf_counter()
    found = measure(config, rounds)
    took = words(time.perf_counter() - start)
    return (
        f"{config.model.name}, {config.algorithm['type']}: median of {rounds} epochs "
        f"[least, most], {torch.get_num_threads()} thread(s), measured in {took}\n\n{table(found)}"
    )
