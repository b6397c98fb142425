"""JSON over HTTP with retries, and images as PNG, for rewards that run on another machine."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import random
import re
import time
from typing import Any
from urllib.parse import urlsplit

import torch
from PIL import Image
from torch import Tensor

PROTOCOL = 1  # of rewards/server.py and rewards/remote.py
RETRIED = (429, 502, 503, 504)
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds
_jitter = random.Random()  # separate: a retry must not advance the training run's generator


class Http:
    """A JSON API below ``url``, safe to use from several threads; ``token`` is sent as Bearer."""

    def __init__(self, url: str, token: str | None, timeout: float, retries: int):
        import httpx

        self.url, self.retries = url.rstrip("/"), retries
        headers = {"Content-Type": "application/json"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        self.client = httpx.Client(headers=headers, timeout=timeout)

    def ask(self, path: str, payload: Any = None) -> Any:
        """The JSON reply to a POST of ``payload``, or to a GET without one.

        A connection error, a timeout and the statuses 429, 502, 503 and 504 are tried again up to
        ``retries`` times, after min(30, 0.5 * 2^k) s times a uniform number in [0.5, 1], or after
        the reply's Retry-After if that is longer. Raises RuntimeError with the address, what went
        wrong and the number of attempts; ValueError for a payload that JSON cannot hold.
        """
        import httpx

        address = self.url + path
        method = "GET" if payload is None else "POST"
        content = None if payload is None else json.dumps(payload, allow_nan=False).encode()
        for attempt in range(1, self.retries + 2):
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)) * _jitter.uniform(0.5, 1)
            try:
                response = self.client.request(method, address, content=content)
            except httpx.TransportError as error:
                reason = f"{type(error).__name__}: {error}"
            else:
                if response.is_success:
                    return _decoded(response, address)
                reason = f"status {response.status_code}: {response.text[:500]}"
                after = response.headers.get("retry-after", "")
                if after.isdecimal():  # the other form, a date, is rare
                    wait = max(wait, min(LONGEST_WAIT, float(after)))
                if response.status_code not in RETRIED:
                    break
            if attempt <= self.retries:
                time.sleep(wait)
        raise RuntimeError(f"{address}: {reason} (attempt {attempt} of {self.retries + 1})")


def _decoded(response: Any, address: str) -> Any:
    try:
        return response.json()
    except ValueError as error:
        raise RuntimeError(f"{address}: the reply is not JSON: {response.text[:500]}") from error


def check_http(
    url: str, timeout: float = 1.0, retries: int = 0, token_env: str | None = None
) -> None:
    """Raise ValueError for settings with which no request could succeed. Sends nothing."""
    if importlib.util.find_spec("httpx") is None:
        raise ValueError("this reward needs httpx: pip install httpx")
    try:
        parts = urlsplit(str(url))
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        usable = False
    if not usable or parts.query or parts.fragment:
        raise ValueError(f"url={url!r} is not an address such as http://127.0.0.1:8000")
    if "@" in parts.netloc:
        raise ValueError("url holds a password, which logs would show; use an environment variable")
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
        raise ValueError(f"timeout={timeout!r} is not a positive number of seconds")
    check_whole(0, retries=retries)
    token_from(token_env)


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
