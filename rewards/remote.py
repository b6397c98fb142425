"""A reward that a reward server computes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .base import Reward
from .http import (
    PROTOCOL,
    START_PATIENCE,
    Http,
    addresses,
    check_http,
    check_whole,
    in_threads,
    png_base64,
    token_from,
)


class Remote(Reward):
    """R(u, c) = R_name(round(255 u) / 255, c), computed by the server at ``url``.

    Images travel as 8-bit PNG, so the values equal those of the local reward on the 8-bit image
    (on the same device, with the same ``batch``). A request holds ``batch`` images, in order.
    The server is ``rewards.server``; ``name`` is one of its rewards. ``url`` may be a list of
    servers of the same reward: each gets a request at a time, and when one is away the others take
    its share. ``token_env`` names the environment variable that holds the token, so no file of a
    run shows it. ``timeout``, of a reply, and ``patience``, with servers that are away, are in
    seconds, as in ``Http.ask``. Safe to call from several threads.

    The constructor asks every server once and raises ValueError if one does not answer within
    seconds, refuses the token, lacks the reward or takes fewer images per request. Scoring raises
    RuntimeError with the address, the status, the server's message, the number of attempts and
    the seconds.
    """

    name = "remote"
    gradient_hint = "it runs on a server; choose an algorithm that needs no reward gradient"

    def __init__(
        self,
        url: str | Sequence[str],
        name: str,
        token_env: str | None = None,
        timeout: float = 180.0,
        patience: float = 600.0,
        batch: int = 16,
    ):
        check_http(url, timeout, patience, token_env)
        check_whole(1, batch=batch)
        super().__init__()
        token = token_from(token_env)
        self.http = Http(url, token, timeout, patience)
        self.remote_name, self.batch = name, batch
        for one in addresses(url):
            self._check_server(Http(one, token, timeout, min(patience, START_PATIENCE)))

    def _check_server(self, http: Http) -> None:
        try:
            health = http.ask("/health")
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        known = health if isinstance(health, dict) else {}
        kinds = {"version": int, "rewards": dict, "max_images": int}
        told = all(isinstance(known.get(key), kind) for key, kind in kinds.items())
        if not told or known["version"] != PROTOCOL:
            raise ValueError(f"{http.url} is not a reward server of version {PROTOCOL}: {health}")
        if self.remote_name not in health["rewards"]:
            known = ", ".join(health["rewards"])
            name = f"name={self.remote_name!r}"
            raise ValueError(f"{name} is not a reward of {http.url}. It has: {known}")
        if self.batch > (most := health["max_images"]):
            raise ValueError(f"batch={self.batch} is more than {http.url} takes: {most}")

    @classmethod
    def check_options(cls, url="", timeout=1.0, patience=0.0, batch=1, token_env=None, **options):
        check_http(url, timeout, patience, token_env)
        check_whole(1, batch=batch)

    def forward(self, images, prompts, metadata=None):
        def score(start: int) -> list[float]:
            rows = slice(start, start + self.batch)
            return self._score(
                {
                    "images": png_base64(images[rows]),
                    "prompts": prompts[rows],
                    "metadata": metadata and metadata[rows],
                    "names": [self.remote_name],
                }
            )

        starts = range(0, len(images), self.batch)
        chunks = in_threads(score, starts, len(self.http.addresses))
        values = [value for chunk in chunks for value in chunk]
        return torch.tensor(values, dtype=torch.float32, device=images.device)

    def _score(self, payload: dict) -> list[float]:
        reply = self.http.ask("/score", payload)
        try:
            values = [float(v) for v in reply["scores"][self.remote_name]]
        except (KeyError, TypeError, ValueError):
            values = []
        if len(values) != len(payload["images"]) or not all(map(math.isfinite, values)):
            raise RuntimeError(f"{self.http.url}/score: unexpected reply {str(reply)[:500]}")
        return values
