"""How a run ends early: by a signal, or because nothing finite can be computed any more."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, cast

from ..config import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

    from ..config.prompts import Prompt

IN_A_ROW = 5  # updates without a finite gradient that end a run
AGAIN = 5.0  # seconds after which a signal counts as a new one


class TrainingStopped(RuntimeError):
    """Training cannot go on: a reward failed, gradients or weights are not finite, or the run
    folder cannot be written. The message says why, what was saved, and the remedy.

    quiet: of several processes another one says it. ruined: the weights are not worth saving.
    """

    def __init__(self, message: str, quiet: bool = False, ruined: bool = False):
        super().__init__(message)
        self.quiet, self.ruined = quiet, ruined


class NotFinite(ValueError):
    """Gradients, or what was trained, are NaN or infinite. The same on all processes."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to end; `signum` is its number."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Signals:
    """Inside this context SIGTERM and SIGHUP do what Ctrl-C does: raise `Interrupted`, which is a
    KeyboardInterrupt, in the main thread.

    Outside the main thread nothing changes; signals that are ignored (nohup) or that have a handler
    of someone else's keep it. The handlers are put back on leaving.
    """

    def __init__(self) -> None:
        self.last: int | None = None
        self._when = float("-inf")
        self._holding = False
        self._before: dict[int, Any] = {}
        self._error: BaseException | None = None

    @property
    def installed(self) -> Collection[int]:
        """The signals that are received here."""
        return self._before.keys()

    def interrupt(self, error: BaseException) -> None:
        """Have the main thread raise `error`, from another thread. It does so at once where it
        sleeps or waits in Python, and else when the call that it is in returns."""
        self._error, number = error, next(iter(self._before), None)
        if number is None:
            return
        if hasattr(signal, "pthread_kill"):
            signal.pthread_kill(cast(int, threading.main_thread().ident), number)
        else:  # on Windows, where it does not wake a thread that sleeps
            _thread.interrupt_main(signal.Signals(number))

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                ours = (signal.SIG_DFL, signal.default_int_handler)
                if number is not None and signal.getsignal(number) in ours:
                    self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _received(self, number: int, frame: Any) -> None:
        if self._error is not None:
            if not self._holding:
                raise self._error
            return
        # torchrun sends a SIGTERM after the terminal's SIGINT: one request, not two
        self.last = self.last or number
        again = time.monotonic() - self._when > AGAIN
        if again and not self._holding:
            self._when = time.monotonic()
            raise Interrupted(number)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Signals wait inside; on leaving, one that did, or that whatever ran before has swallowed,
        is raised."""
        self._holding = True
        yield
        self._holding = False
        if self._error is not None:
            raise self._error
        if self.last is not None:
            raise Interrupted(self.last)

    def deliver(self) -> None:
        """Does nothing. A signal that came while a library's call did not return, such as a
        collective whose other end is gone, is received at the latest when this is called."""

    def hold(self) -> None:
        """From here on signals wait: what was trained is being saved."""
        self._holding = True


def exit_status(error: KeyboardInterrupt) -> int:
    """128 + the number of the signal, as shells have it: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + getattr(error, "signum", signal.SIGINT)


def leave(status: int) -> NoReturn:
    """End the process. After a signal it waits for no thread, as a reward in one may hang."""
    if status > 128:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)


def blame(finite: Tensor, rewards: Sequence[str], batch: Sequence[Prompt]) -> str | None:
    """What to say where the rewards' gradients to the pictures of a batch are not all `finite`
    (n,). Read when a step is given up: to look at once would wait for the device."""
    if finite.all():
        return None
    return (
        f"the gradient of the reward {' or '.join(map(repr, rewards))} to the pixels is NaN or "
        f"infinite for the prompt {batch[finite.tolist().index(False)].text!r}"
    )


def unusable_gradient(
    skipped: str, blame: str | None, lr: float, dtype: str, scale: float
) -> NotFinite:
    """What to say of updates that had to be skipped. blame: what is known to be at fault; scale:
    that of the loss in float16."""
    if blame is not None:
        why = f"{blame}; mend it (sqrt and norm have no gradient at 0: add 1e-8 inside)"
    elif dtype == "float16":
        why = (
            f"float16 overflows even with the loss scaled by {scale:g}; use model.dtype=bfloat16 "
            f"or float32, or lower train.lr={lr:g}"
        )
    else:
        why = f"lower train.lr={lr:g}, or look for what in the loss or a reward is not finite"
    return NotFinite(f"{skipped} skipped, as the gradient was not finite: {why}")


def no_pictures(config: TrainConfig, updates: int) -> str:
    """Why pictures of the model being trained are not finite."""
    dtype = config.model.dtype
    half = ", or use model.dtype=bfloat16 or float32" if dtype == "float16" else ""
    if updates:
        return (
            f"after {updates} update(s) with train.lr={config.train.lr:g} ({dtype}) the model "
            f"draws NaN or inf: lower train.lr{half}"
        )
    return f"{config.model.name} draws NaN or inf in {dtype} before any update" + (
        half.replace(", or", ":") or ": its weights, or the LoRA in it, are damaged"
    )
