"""A reward that a reward server computes."""

from __future__ import annotations

import math

import torch

from .base import Reward
from .http import PROTOCOL, Http, check_http, check_whole, png_base64, token_from


class Remote(Reward):
    """R(u, c) = R_name(round(255 u) / 255, c), computed by the server at ``url``.

    Images travel as 8-bit PNG, so the values equal those of the local reward on the 8-bit image
    (on the same device, with the same ``batch``). A request holds ``batch`` images, in order.
    The server is ``rewards.server``; ``name`` is one of its rewards. ``token_env`` names the
    environment variable that holds the token, so no file of a run shows it. ``timeout`` is in
    seconds, ``retries`` as in ``Http.ask``. Safe to call from several threads.

    The constructor asks the server once and raises ValueError if it does not answer, refuses
    the token, lacks the reward or takes fewer images per request. Scoring raises RuntimeError
    with the address, the status, the server's message and the number of attempts.
    """

    name = "remote"
    gradient_hint = "it runs on a server; choose an algorithm that needs no reward gradient"

    def __init__(
        self,
        url: str,
        name: str,
        token_env: str | None = None,
        timeout: float = 180.0,
        retries: int = 5,
        batch: int = 16,
    ):
        options = {"timeout": timeout, "retries": retries, "batch": batch}
        self.check_options(url=url, token_env=token_env, **options)
        super().__init__()
        self.http = Http(url, token_from(token_env), timeout, retries)
        self.remote_name, self.batch = name, batch
        try:
            health = self.http.ask("/health")
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        known = health if isinstance(health, dict) else {}
        kinds = {"version": int, "rewards": dict, "max_images": int}
        told = all(isinstance(known.get(key), kind) for key, kind in kinds.items())
        if not told or known["version"] != PROTOCOL:
            raise ValueError(f"{url} is not a reward server of version {PROTOCOL}: {health}")
        if name not in health["rewards"]:
            known = ", ".join(health["rewards"])
            raise ValueError(f"name={name!r} is not a reward of {url}. It has: {known}")
        if batch > health["max_images"]:
            raise ValueError(f"batch={batch} is more than {url} takes: {health['max_images']}")

    @classmethod
    def check_options(cls, url="", timeout=1.0, retries=0, batch=1, token_env=None, **options):
        check_http(url, timeout, retries, token_env)
        check_whole(1, batch=batch)

    def forward(self, images, prompts, metadata=None):
        values = []
        for start in range(0, len(images), self.batch):
            rows = slice(start, start + self.batch)
            values += self._score(
                {
                    "images": png_base64(images[rows]),
                    "prompts": prompts[rows],
                    "metadata": metadata and metadata[rows],
                    "names": [self.remote_name],
                }
            )
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
