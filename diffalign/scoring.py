"""Scoring the pictures of an epoch in a thread, while the next ones are sampled."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from rewards import WeightedSum

from .diagnostics import thumbnails
from .policies import Policy
from .prompts import Prompt, for_rewards


@dataclass(frozen=True)
class Scores:
    """Of n pictures, in their order: total reward (n,), its raw parts (n,) each, thumbnails for
    `diagnostics.diversity`; the pictures on the CPU where a reward learns from them, else none."""

    total: Tensor
    parts: dict[str, Tensor]
    small: Tensor
    images: list[Tensor]


class Scorer:
    """One epoch's pictures: decoded as their latents come, scored by one thread in that order.

    group: pictures of a prompt. They stay in one call where a reward compares them. Use as a
    context: leaving it early drops what is not yet scored. `finish` waits, and raises what a
    reward raised.
    """

    def __init__(self, policy: Policy, reward: WeightedSum, prompts: Sequence[Prompt], group: int):
        self.policy, self.reward, self.prompts = policy, reward, prompts
        self.group = group if reward.per_group else 1
        self._waiting: list[Tensor] = []  # decoded, not yet whole groups
        self._done = 0  # pictures handed to the thread
        self._small: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._futures: list[Future] = []
        self._thread = ThreadPoolExecutor(1, "scorer", initializer=self._use_device)

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _use_device(self) -> None:
        if self.policy.device.type == "cuda":  # a thread starts on the first GPU
            torch.cuda.set_device(self.policy.device)

    @torch.no_grad()
    def add(self, latents: Tensor) -> None:
        """The next clean latents (n, *latent). Raises what a reward raised on earlier ones."""
        for future in self._futures:
            if future.done():
                future.result()
        images = self.policy.decode(latents, tiny=True)
        self._small.append(thumbnails(images))
        if self.reward.learns:
            self._kept += images.cpu()
        self._waiting.append(images)
        ready = torch.cat(self._waiting)
        whole = len(ready) // self.group * self.group
        self._waiting = [ready[whole:]] if whole < len(ready) else []
        if whole:
            batch = self.prompts[self._done : self._done + whole]
            self._futures.append(self._thread.submit(self._score, ready[:whole], batch))
            self._done += whole

    @torch.no_grad()  # of its own: threads do not inherit it
    def _score(self, images: Tensor, batch: Sequence[Prompt]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.reward.score(images, *for_rewards(batch))

    def finish(self) -> Scores:
        results = [future.result() for future in self._futures]
        totals, parts = zip(*results, strict=True)
        return Scores(
            torch.cat(totals),
            {name: torch.cat([p[name] for p in parts]) for name in parts[0]},
            torch.cat(self._small),
            self._kept,
        )
