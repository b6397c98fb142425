"""What a run keeps of itself: its state, how it is taken up, what is saved when it ends early."""

from __future__ import annotations

import copy
import platform
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rewards import RewardError
from rewards.redaction import redact

from .. import __version__, report
from ..config import TrainConfig
from ..config.decoding import ConfigError
from ..drawing import grids
from ..policies.sharding import Shard, taken
from ..record import checkpoint, folder, pictures
from ..record.metrics import Tracker
from . import identity, stopping
from .stopping import NotFinite, Signals, TrainingStopped
from .watch import Watch

if TYPE_CHECKING:
    from .trainer import Trainer

LAST_WAIT = 12.0  # seconds for the other processes' rows when a run ends early

DEPENDS = {
    "guard": ("eval.", "rewards."),
    "history": ("data.", "rewards.", "advantage.baseline", "advantage.buffer_size"),
    "reward": ("rewards.",),
    "algorithm": ("algorithm.",),
    "optimisation": ("algorithm.type", "train.optimizer"),
    "noise_scale": ("algorithm.", "rewards.", "data.", "sampler."),
}
"""The settings that give a part's state its meaning: where one changed, the part starts anew."""


def open_run(
    trainer: Trainer, resume: folder.Resume, overwrite: bool, force: bool
) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """Take the run folder for this process; returns the state to go on from, and the settings that
    differ from that run's. Raises what `folder.check`, `folder.lock` and `checkpoint.load` do, and
    ConfigError for settings that differ without `force`."""
    if overwrite and resume:
        raise ConfigError("overwrite starts anew and resume goes on; give one of them")
    if force and not resume:
        raise ConfigError("force is for going on with other settings; give resume as well")
    with folder.writing(trainer.dir):
        folder.check(trainer.dir, resume, overwrite)
        if trainer.main:
            folder.lock(trainer.dir)
    # a run that was killed before its first checkpoint has none: resuming is starting anew
    if not resume or not checkpoint.found(trainer.dir):
        return None, {}
    place = trainer.dir
    if not isinstance(resume, bool) and resume != checkpoint.LATEST:
        place = Path(resume).expanduser()
    state = checkpoint.load(place, trainer.say)
    changed = identity.changes(trainer.dir, state, trainer.plan)
    if changed and not force:
        raise ConfigError(
            f"the run in {trainer.dir} had other settings ({identity.words(changed)}); give them "
            "as they were, start anew with --overwrite or another --log.dir, or insist with --force"
        )
    return state, changed


def open_record(trainer: Trainer, resume: bool, overwrite: bool) -> Tracker:
    """Prepare the run folder for the epochs to come, and return the writer of its metrics.

    `overwrite` removes an earlier run; rows, pictures and checkpoints of epochs that will be run
    again go too.
    Writes config.yaml.
    """
    config = trainer.config
    with folder.writing(trainer.dir):
        if overwrite and trainer.main:
            folder.clear(trainer.dir)
        tracker = Tracker(
            trainer.dir,
            config.log.trackers,
            config.to_dict(),
            trainer.accelerator,
            resume_step=trainer.epoch if resume else None,
        )
        if trainer.main:
            pictures.drop(trainer.dir, after=trainer.epoch)
            checkpoint.drop(trainer.dir, after=trainer.epoch)
            resolved(trainer).save(trainer.dir / "config.yaml")
    return tracker


def resolved(trainer: Trainer) -> TrainConfig:
    """The config with the rewards that the trainer was given, by name."""
    config = copy.deepcopy(trainer.config)
    config.rewards = identity.named(trainer.plan.rewards)
    return config


def save(trainer: Trainer, wait: float = 600.0) -> None:
    """See `Trainer.save`. wait: seconds for the rows that other processes write. Raises what
    `checkpoint.save` and `checkpoint.load` do."""
    divided = trainer.policy.sharding is not None
    if not (trainer.main or divided):
        return
    state, keep = trainer.complete, trainer.config.log.keep_checkpoints
    if not divided:
        checkpoint.save(trainer.dir, state, keep)
    elif state["epoch"] != trainer.written:  # the main process may still be collecting the rows
        trainer.written = state["epoch"]
        ranks = trainer.rank, trainer.world, f"-{trainer.token}"
        checkpoint.save(trainer.dir, state, keep, *ranks, wait=wait)
    if not trainer.main:
        return
    if divided:  # what the others hold is read again
        state = checkpoint.load(checkpoint.named(trainer.dir, state["epoch"]))
    ema = trainer.config.train.ema
    trainer.policy.save(trainer.dir, state=state["copies"]["ema"] if ema else state["adapter"])
    trainer.tracker.curve(trainer.dir / "curve.png")


def report_on(trainer: Trainer) -> None:
    """Write report.html. An error in it is printed and does not end the run."""
    try:
        if trainer.main:
            report.write([trainer.dir])
    except Exception as error:
        trainer.say(f"epoch {trainer.epoch}: no {report.NAME}, {error!r}")


@contextmanager
def kept(trainer: Trainer) -> Iterator[Signals]:
    """The context that a run trains in. A signal ends the run as Ctrl-C does. However the run ends,
    `end` saves the epochs done, on all processes, and the folder is unlocked."""
    rewards = [r for r in (trainer.reward, trainer.evaluation.judge) if r is not None]
    with (
        Signals() as signals,
        Watch(
            signals,
            _store(trainer),
            lambda: {name: since for r in rewards for name, since in [*r.running.items()]},
            trainer.config.train.reward_timeout,
            lambda error: _words(trainer, watch, error),
        ) as watch,
    ):
        try:
            try:
                yield signals
            finally:
                signals.deliver()
        except BaseException as error:
            watch.ending()
            signals.hold()
            end(trainer, watch, error)
            raise
        finally:
            watch.ending()
            trainer.tracker.close()
            if trainer.main:
                folder.release(trainer.dir)


def _store(trainer: Trainer) -> Any:
    """What the processes of a run tell each other in beside their collectives; None for one."""
    if trainer.world == 1:
        return None
    from torch import distributed

    default = distributed.distributed_c10d._get_default_store()
    # a connection of its own: the main thread may be waiting in the other
    return distributed.PrefixStore(f"diffalign/{trainer.token}", default.clone())


def _words(trainer: Trainer, watch: Watch, error: BaseException) -> str:
    """What to print of a run whose main thread does not react, once it is saved."""
    try:
        end(trainer, watch, error)
    except TrainingStopped as stopped:
        return "" if stopped.quiet else str(stopped)
    return ""


def parts(trainer: Trainer) -> dict[str, Any]:
    """The objects whose state changes from epoch to epoch, by their names in checkpoints."""
    return {
        "optimisation": trainer.optimizer,
        "history": trainer.history,
        "algorithm": trainer.algorithm,
        "guard": trainer.evaluation.guard,
        "reward": trainer.reward,
        "noise_scale": trainer.noise_scale,
    }


def state(trainer: Trainer) -> dict[str, Any]:
    """All that a run needs to go on, and the settings that it was made with; of a divided denoiser,
    what this process holds.

    Raises NotFinite where weights or optimizer state are not finite: such a state must not be
    saved.
    """
    found = {name: _copied(part.state_dict()) for name, part in parts(trainer).items()} | {
        "epoch": trainer.epoch,
        "calls": trainer.calls,
        "adapter": trainer.policy.state_dict(),
        "copies": {name: trainer.policy.state_dict(name) for name in _copies(trainer)},
        "run": {
            "digest": identity.digest(trainer.settings),
            "settings": trainer.settings,
            "config": redact(resolved(trainer).to_dict()),
            "versions": versions(),
        },
    }
    bad = _infinite(found)
    if bad:
        raise NotFinite(
            f"{' and '.join(bad)} are not finite after epoch {trainer.epoch} with train.lr="
            f"{trainer.config.train.lr:g} ({trainer.config.model.dtype}): lower train.lr"
        )
    return found


def kept_state(trainer: Trainer) -> dict[str, Any]:
    """The `state` where this process may have to write it: on the main one, and on all that hold
    some rows of the weights. On others only the number of epochs."""
    if trainer.main or trainer.policy.sharding is not None:
        return state(trainer)
    return {"epoch": trainer.epoch}


def restore(
    trainer: Trainer,
    state: Mapping[str, Any],
    changed: Mapping[str, str] | None = None,
    force: bool = False,
) -> list[str]:
    """Load a `state` into a trainer. With `force` parts that cannot be loaded start anew, and the
    returned lines name them.

    changed: settings that differ from those of the run (`identity.changes`). Raises ConfigError
    where the weights do not fit, or without `force` anything else.
    """
    trainer.epoch, trainer.calls = state["epoch"], state.get("calls", 0.0)
    try:
        trainer.policy.load_state_dict(state["adapter"])
        for name in _copies(trainer):  # one that is new starts from what was trained
            trainer.policy.load_state_dict(state["copies"].get(name, state["adapter"]), name)
    except (KeyError, RuntimeError, ValueError) as error:
        why = identity.words(changed or {}) or str(error).splitlines()[0]
        raise ConfigError(
            f"the weights of epoch {state['epoch']} in {trainer.dir} do not fit this model "
            f"({why}); no --force helps: give those settings as they were, or choose another "
            "--log.dir"
        ) from error
    anew = []
    for name, part in parts(trainer).items():
        moved = [key for key in changed or {} if key.startswith(DEPENDS[name])]
        fresh = copy.deepcopy(part.state_dict())
        try:
            if not moved:
                # checkpoints from before it was measured have no noise scale
                saved = state.get(name, fresh) if name == "noise_scale" else state[name]
                part.load_state_dict(copy.deepcopy(saved))
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            if not force:
                raise ConfigError(
                    f"{trainer.dir}, epoch {state['epoch']}: the state of the {name} cannot be "
                    f"taken up ({error!r}); it was written by {_wrote(state)}: --force starts it "
                    "anew"
                ) from error
            part.load_state_dict(fresh)
            moved = ["it does not fit"]
        if moved:
            anew.append(f"--force: the {name} starts anew, as {', '.join(moved)} changed")
    return anew


def end(trainer: Trainer, watch: Watch, error: BaseException) -> None:
    """Save the epochs done when `error` ends a run early. Raises TrainingStopped for a reward that
    failed, a number that is not finite, a disk that refuses, and a process that is gone; returns
    for any other error.

    Of several processes the first that fails says why, and the main one saves; each that holds rows
    of the weights writes them.
    """
    lines, ruined = [str(error)], False
    if isinstance(error, RewardError) and error.image is not None:
        path = trainer.dir / "failed_reward.png"
        with suppress(OSError):
            grids.save_png(grids.to_pil(error.image), path, {"prompt": error.prompt})
            lines.append(f"picture: {path}")
        if not error.image.isfinite().all():
            updates = trainer.optimizer.updates
            lines.append(stopping.no_pictures(trainer.config, updates))
            # in float16 a single picture may overflow; elsewhere the weights are at fault
            ruined = updates > 0 and trainer.config.model.dtype != "float16"
    if _lost(error):
        lines = ["a process of this run was lost, and the others cannot go on without it"]
    ruined = ruined or getattr(error, "ruined", False)
    first = watch.announce(error, ruined)
    saves = trainer.main or trainer.policy.sharding is not None
    kept = _keep(trainer, ruined) if saves else ""
    if trainer.main:
        watch.answer(kept)
    if isinstance(error, OSError) and error.errno in folder.DISK:
        why = (error.strerror or str(error)).removeprefix("cannot be written: ")
        lines = [f"{error.filename or trainer.dir} cannot be written: {why}"]
    elif not isinstance(error, (RewardError, NotFinite, TrainingStopped)) and not _lost(error):
        if first:  # if it left before the main process has saved, the launcher would end that
            print(f"\n{kept if trainer.main else watch.answered()}", flush=True)
        return
    if first and not trainer.main:
        kept = watch.answered()
    raise TrainingStopped("\n".join(filter(None, [*lines, kept])), quiet=not first) from error


def _lost(error: BaseException) -> bool:
    """Whether a collective failed, as when a process was killed."""
    from torch import distributed

    gone = getattr(distributed, "DistError", ())
    return isinstance(error, gone) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _keep(trainer: Trainer, ruined: bool) -> str:
    """Save the epochs done, but not `ruined` weights over good ones; says what there is now."""
    done = trainer.complete["epoch"]
    before = "what was saved before is whole; " * bool(checkpoint.found(trainer.dir))
    if not done:
        return "epochs done: 0, nothing to save; start again"
    if ruined:
        how = f"{before}--resume goes on from there" if before else "start again"
        return f"epochs done: {done}, and these weights are not saved; {how}"
    try:
        # for who goes on with the trainer: its weights are those that are saved
        if trainer.world == 1 and threading.current_thread() is threading.main_thread():
            restore(trainer, trainer.complete)
        save(trainer, LAST_WAIT)
    except Exception as error:  # what ended the run matters more
        return f"epochs done: {done}, not saved ({error}); {before}mend that and use --resume"
    return f"epochs done: {done}, saved in {trainer.dir}; --resume goes on"


def _copied(value: Any) -> Any:
    """A copy that training does not change, its tensors in the main memory."""
    if isinstance(value, Tensor):
        return taken(value)
    if isinstance(value, Mapping):
        return {k: _copied(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_copied, value))
    return copy.deepcopy(value)


def versions() -> dict[str, str]:
    """Of the programs whose versions a state may depend on."""
    names = ("torch", "diffusers", "transformers", "peft", "accelerate")
    own = {"diffalign": __version__, "python": platform.python_version()}  # may not be installed
    return own | {name: metadata.version(name) for name in names}


def _wrote(state: Mapping[str, Any]) -> str:
    known = state.get("run", {}).get("versions", {})
    return ", ".join(f"{name} {known[name]}" for name in ("diffalign", "torch") if name in known)


def _copies(trainer: Trainer) -> list[str]:
    return [*trainer.copies, *(["ema"] if trainer.config.train.ema else [])]


def _infinite(state: Mapping[str, Any]) -> list[str]:
    """The parts of a run's state whose tensors hold NaN or inf: weights, copies, optimizer."""

    def tensors(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Shard):
            value = value.rows
        if isinstance(value, Mapping):
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            for part in value:
                yield from tensors(part)
        elif isinstance(value, Tensor) and value.is_floating_point():  # 8-bit states are integers
            yield value

    def finite(value: Any) -> bool:
        # one wait for the device, not one for every tensor
        return bool(torch.nn.utils.get_total_norm([t.float() for t in tensors(value)]).isfinite())

    parts = {"weights": "adapter", "averages": "copies", "optimizer": "optimisation"}
    return [name for name, key in parts.items() if not finite(state.get(key))]
