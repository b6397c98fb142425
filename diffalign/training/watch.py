"""Ends a run whose main thread cannot: it waits for a process that is gone, or for a reward that
does not return.

A thread beside the loop looks, several times a second, for a reward that has taken too long, for a
signal, and for what another process has announced in the store that all of them share. It raises
the reason in the main thread. Where that does not react, since a call of a library keeps it, the
thread saves what is to be saved and ends the process.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, NoReturn

from rewards import RewardError

from .stopping import Interrupted, Signals, TrainingStopped

POLL = 0.2  # seconds between looks
REACTS = 6.0  # seconds that the main thread gets to end by itself
ANSWERS = 15.0  # seconds to wait for what the main process has saved


class Watch:
    """Use as a context around the training of one process.

    store: of all processes, None where there is one. running: {reward: when it was called, by
    time.monotonic()}; limit: seconds that one may take, None = any. last_words: saves, and returns
    what to print, in the place of a main thread that does not react.
    """

    def __init__(
        self,
        signals: Signals,
        store: Any,
        running: Callable[[], Mapping[str, float]],
        limit: float | None,
        last_words: Callable[[BaseException], str],
    ):
        self.signals, self.store, self.last_words = signals, store, last_words
        self.running, self.limit = running, limit
        self._over, self._ending = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._told: bool | None = None

    def __enter__(self) -> Watch:
        # a signal writes its number, also while no handler can run
        self._bell, self._rope = socket.socketpair()
        self._bell.setblocking(False)
        self._rope.setblocking(False)
        self._before = -1
        if self.signals.installed:
            self._before = signal.set_wakeup_fd(self._rope.fileno(), warn_on_full_buffer=False)
            if self._before != -1:  # somebody's own, such as an event loop's
                signal.set_wakeup_fd(self._before)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self.signals.installed and self._before == -1:
            signal.set_wakeup_fd(-1)
        self._thread.join()
        self._bell.close()
        self._rope.close()

    def ending(self) -> None:
        """The main thread ends the run itself."""
        self._ending.set()

    def announce(self, error: BaseException, ruined: bool = False) -> bool:
        """Tell the other processes why this one ends, and whether the weights are `ruined`. Returns
        whether it is the first to, which then speaks for all."""
        if self._told is not None or self.store is None:
            return self._told or self.store is None
        signum = getattr(error, "signum", 0)
        # a token makes it that of no other process
        what = json.dumps([secrets.token_hex(4), signum, ruined, str(error)])
        try:
            first = self.store.compare_set("why", "", what).decode() == what
        except Exception:  # the process that keeps the store is gone
            first = True
        self._told = first
        return first

    def answer(self, words: str) -> None:
        """Of the main process: what it has saved."""
        if self.store is not None:
            try:
                self.store.set("saved", words)
            except Exception:
                return

    def answered(self) -> str:
        """What the main process has saved."""
        try:
            self.store.wait(["saved"], timedelta(seconds=ANSWERS))
            return self.store.get("saved").decode()
        except Exception:
            return (
                "the main process did not say what it saved; --resume goes on from the newest state"
            )

    def _look(self) -> None:
        while not self._over.wait(POLL):
            number = self._rung()
            error = Interrupted(number) if number is not None else self._reason()
            if error is None:
                continue
            if number is None:
                self.signals.interrupt(error)
            if self._ending.wait(REACTS) or self._over.is_set() or not self.signals.installed:
                return
            # one process that somebody looks at may be in a long call, and Ctrl-C be tried again
            if number == signal.SIGINT and self.store is None:
                continue
            self._leave(error)

    def _rung(self) -> int | None:
        """The signal that has come, if one has."""
        try:
            return next((n for n in self._bell.recv(64) if n in self.signals.installed), None)
        except BlockingIOError:
            return None

    def _reason(self) -> BaseException | None:
        why = self._announced()
        if why:
            _, signum, ruined, text = json.loads(why)
            if signum:
                return Interrupted(signum)
            return TrainingStopped(text, quiet=True, ruined=ruined)
        now = time.monotonic()
        for name, since in dict(self.running()).items():
            if self.limit is not None and now - since > self.limit:
                return RewardError(
                    f"the reward {name!r} has not returned for {now - since:.0f} s; mend it, or "
                    f"raise train.reward_timeout={self.limit:g}",
                    name,
                )
        return None

    def _announced(self) -> str:
        if self.store is None or self._told is not None:
            return ""
        try:
            return self.store.get("why").decode() if self.store.check(["why"]) else ""
        except Exception:  # the process that keeps the store is gone; the launcher ends the others
            return ""

    def _leave(self, error: BaseException) -> NoReturn:
        words = self.last_words(error)
        if words:
            print(f"\nerror: {words}", file=sys.stderr, flush=True)  # a progress bar is there
        os._exit(128 + error.signum if isinstance(error, Interrupted) else 1)
