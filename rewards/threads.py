"""Threads for rewards: a reward that hangs cannot keep the process alive."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from threading import Thread
from typing import Any

GRACE = 5.0  # seconds that running calls get at the end of the process

_running: set[Future] = set()


class Worker:
    """A thread that runs submitted calls in order.

    Unlike the threads of a ThreadPoolExecutor it is a daemon: the interpreter does not wait for a
    call that never returns. The thread ends with the object.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[Any] = SimpleQueue()
        weakref.finalize(self, self._calls.put, None)
        Thread(target=_work, args=(self._calls,), name="reward", daemon=True).start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """The future result of `function(*arguments)`; can be cancelled until the call starts."""
        future: Future = Future()
        self._calls.put((future, function, arguments))
        return future


def _work(calls: SimpleQueue[Any]) -> None:
    while (call := calls.get()) is not None:
        future, function, arguments = call
        if future.set_running_or_notify_cancel():
            _running.add(future)
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)
            _running.discard(future)
        # otherwise the last call's arguments would stay alive until the next call
        del call, future, function, arguments


# killing a daemon thread inside torch's C++ can abort the whole process
atexit.register(lambda: wait(set(_running), GRACE))
