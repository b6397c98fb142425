"""JSON over HTTP with retries, and images as PNG, for rewards that run on another machine."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import logging
import math
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Event, Lock
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
from PIL import Image
from torch import Tensor

from .threads import Worker

PROTOCOL = 1  # of rewards/server.py and rewards/remote.py
RETRIED = (429, 502, 503, 504)
FIRST_WAIT, LONGEST_WAIT, LOG_EVERY, CONNECTING = 0.5, 30.0, 30.0, 10.0  # seconds
EXAMPLE = "http://127.0.0.1:8000"
START_PATIENCE = 5.0  # seconds; at the start it is rather a wrong address
T = TypeVar("T")
R = TypeVar("R")
_jitter = random.Random()  # separate: a retry must not advance the training run's generator
_logger = logging.getLogger(__name__)


class Unavailable(Exception):
    """A request failed in a way that may pass: why, and how long the server asks to be left alone
    (seconds, 0 if it does not say)."""

    def __init__(self, reason: str, after: float = 0.0):
        super().__init__(reason)
        self.reason, self.after = reason, after


@dataclass(eq=False)
class _Address:
    """One of the servers: how many requests it has now, how often it failed since it last answered,
    and until when, by the monotonic clock, it is left alone."""

    url: str
    busy: int = 0
    failures: int = 0
    rests: float = 0.0


class Http:
    """A JSON API below ``url``, safe to use from several threads; ``token`` is sent as Bearer.

    ``url`` may be a list of addresses that serve the same. A request then goes to the one with the
    fewest in flight, and if that is away, at once to another. ``timeout`` is for one reply, and
    ``patience`` for a server that is away; both in seconds.
    """

    def __init__(
        self, url: str | Sequence[str], token: str | None, timeout: float, patience: float
    ):
        import httpx

        self.addresses = [_Address(one.rstrip("/")) for one in addresses(url)]
        self.url = ", ".join(one.url for one in self.addresses)
        self.timeout, self.patience = timeout, patience
        headers = {"Content-Type": "application/json"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        limits = httpx.Timeout(timeout, connect=min(timeout, CONNECTING))
        self.client = httpx.Client(headers=headers, timeout=limits)
        self._lock = Lock()
        self._logged = -math.inf

    def ask(self, path: str, payload: Any = None) -> Any:
        """The JSON reply to a POST of ``payload``, or to a GET without one.

        A connection error, a timeout and the statuses 429, 502, 503 and 504 are tried again until
        ``patience`` seconds after the first failure, whatever the clock on the wall says. An
        address that failed k times in a row is left alone for min(30, 0.5 * 2^(k - 1)) s times a
        uniform number in [0.5, 1], or for the reply's Retry-After if that is longer, at most 30 s.
        Waiting is logged at its start and every 30 s.

        Raises RuntimeError with the address, what went wrong, the number of attempts and the
        seconds; ValueError for a payload that JSON cannot hold.
        """
        content = None if payload is None else json.dumps(payload, allow_nan=False).encode()
        failed: set[_Address] = set()
        start, end, attempt = time.monotonic(), math.inf, 0
        while True:
            address = self._free(end, failed)
            attempt += 1
            try:
                reply = self._once(address.url + path, content)
            except Unavailable as error:
                reason = error.reason
                self._rest(address, error.after)
            except RuntimeError as error:
                raise RuntimeError(f"{error} ({_spent(attempt, start)})") from None
            else:
                address.failures, address.rests = 0, 0.0
                return reply
            finally:
                with self._lock:
                    address.busy -= 1
            failed.add(address)
            now = time.monotonic()
            end = min(end, now + self.patience)
            if now >= end and len(failed) == len(self.addresses):
                raise RuntimeError(f"{address.url}{path}: {reason} ({_spent(attempt, start)})")
            self._log(f"{address.url}{path}: {reason}", now - end + self.patience)

    def _once(self, address: str, content: bytes | None) -> Any:
        """Raises Unavailable for what may pass and RuntimeError for what will not."""
        import httpx

        method, body = "GET" if content is None else "POST", bytearray()
        end = time.monotonic() + self.timeout  # httpx's own is for each read
        try:
            with self.client.stream(method, address, content=content) as response:
                for chunk in response.iter_bytes():
                    body += chunk
                    if time.monotonic() > end:
                        raise Unavailable(f"the reply took longer than {self.timeout:g} s")
        except httpx.TransportError as error:
            raise Unavailable(f"{type(error).__name__}: {error}") from None
        except httpx.RequestError as error:  # such as a reply that cannot be unpacked
            raise RuntimeError(f"{address}: {type(error).__name__}: {error}") from None
        if response.is_success:
            return _decoded(body, address)
        reason = f"status {response.status_code}: {_shown(body)}"
        if response.status_code in RETRIED:
            after = response.headers.get("retry-after", "")
            # the header's other form, a date, is rare
            raise Unavailable(reason, float(after) if after.isdecimal() else 0.0)
        raise RuntimeError(f"{address}: {reason}")

    def _free(self, end: float, failed: set[_Address]) -> _Address:
        """The least busy address, counted as busy; if all rest, the first that wakes, after waiting
        for it, though not beyond ``end``. After ``end`` only one that has not failed yet."""
        with self._lock:
            now = time.monotonic()
            left = [a for a in self.addresses if now < end or a not in failed]
            found = min(left, key=lambda a: (max(a.rests - now, 0.0), a.busy))
            found.busy += 1
        time.sleep(max(0.0, min(found.rests, end) - now))
        return found

    def _rest(self, address: _Address, after: float) -> None:
        with self._lock:
            now = time.monotonic()
            if now < address.rests:
                return  # requests that fail at once are one failure
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2**address.failures) * _jitter.uniform(0.5, 1)
            address.failures = min(address.failures + 1, 20)  # 2^20 is past LONGEST_WAIT
            address.rests = now + max(wait, min(LONGEST_WAIT, after))

    def _log(self, text: str, waited: float) -> None:
        with self._lock:
            now = time.monotonic()
            if now - self._logged < LOG_EVERY:
                return
            self._logged = now
        elsewhere = "; others are asked meanwhile" if len(self.addresses) > 1 else ""
        _logger.warning(
            f"{text}; trying again, {waited:.0f} of {self.patience:g} s have passed{elsewhere}"
        )


def _spent(attempts: int, start: float) -> str:
    return f"attempts: {attempts}, seconds: {time.monotonic() - start:.0f}"


def in_threads(function: Callable[[T], R], items: Iterable[T], threads: int) -> list[R]:
    """The results in the order of the items; raises the first error as it comes.

    The threads are daemons: a call that waits for a server does not keep the process alive. After
    an error no further item is begun.
    """
    todo: SimpleQueue[tuple[int, T]] = SimpleQueue()
    for pair in enumerate(items):
        todo.put(pair)
    results: dict[int, R] = {}
    failed = Event()

    def work() -> None:
        with suppress(Empty):
            while not failed.is_set():
                index, item = todo.get_nowait()
                results[index] = function(item)

    calls = [Worker().submit(work) for _ in range(min(threads, todo.qsize()))]
    try:
        for call in wait(calls, return_when=FIRST_EXCEPTION).done:
            call.result()
    finally:
        failed.set()
    return [results[index] for index in sorted(results)]


def _decoded(body: bytearray, address: str) -> Any:
    try:
        return json.loads(body)
    except ValueError as error:
        raise RuntimeError(f"{address}: the reply is not JSON: {_shown(body)}") from error


def _shown(body: bytearray) -> str:
    return body.decode("utf-8", "replace")[:500]


def addresses(url: str | Sequence[str]) -> list[str]:
    """The one address, or the several."""
    return [url] if isinstance(url, str) else list(url)


def check_http(
    url: str | Sequence[str],
    timeout: float = 1.0,
    patience: float = 0.0,
    token_env: str | None = None,
) -> None:
    """Raise ValueError for settings with which no request could succeed. Sends nothing."""
    if importlib.util.find_spec("httpx") is None:
        raise ValueError("this reward needs httpx: pip install httpx")
    if not isinstance(url, (str, list, tuple)) or not url:
        raise ValueError(f"url={url!r} is not an address such as {EXAMPLE}, nor a list of them")
    for one in addresses(url):
        _check_address(one)
    if not _number(timeout) or not timeout > 0:
        raise ValueError(f"timeout={timeout!r} is not a positive number of seconds")
    if not _number(patience) or not 0 <= patience < math.inf:
        raise ValueError(f"patience={patience!r} is not a number of seconds, 0 or more")
    token_from(token_env)


def _check_address(url: str) -> None:
    try:
        parts = urlsplit(str(url))
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        usable = False
    if not usable or parts.query or parts.fragment:
        raise ValueError(f"url={url!r} is not an address such as {EXAMPLE}")
    if "@" in parts.netloc:
        raise ValueError("url holds a password, which logs would show; use an environment variable")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_whole(least: int, **options: Any) -> None:
    """Raise ValueError for the first option that is not a whole number of at least ``least``."""
    for option, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{option}={value!r} is not a whole number of at least {least}")


def token_from(variable: str | None) -> str | None:
    """The secret in an environment variable; None without a variable. Raises ValueError if it is
    empty or holds characters that an HTTP header cannot."""
    if variable is None:
        return None
    if not isinstance(variable, str) or not re.fullmatch(r"[A-Za-z_]\w*", variable, re.ASCII):
        raise ValueError(
            "what should be the name of an environment variable is none, such as MY_TOKEN; export "
            "the secret under a name and give that"
        )
    token = os.environ.get(variable, "").strip()
    if not token:
        raise ValueError(f"environment variable {variable} is not set; it must hold the token")
    if not (token.isascii() and token.isprintable()):
        raise ValueError(f"environment variable {variable} holds more than printable ASCII")
    return token


def png_base64(images: Tensor) -> list[str]:
    """(n, 3, H, W) images u in [0, 1], rounded to round(255 u), as lossless base64 PNG."""
    pixels = images.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    texts = []
    for image in pixels.permute(0, 2, 3, 1).cpu().numpy():
        with io.BytesIO() as buffer:
            Image.fromarray(image).save(buffer, "PNG", compress_level=1)
            texts.append(base64.b64encode(buffer.getvalue()).decode())
    return texts
