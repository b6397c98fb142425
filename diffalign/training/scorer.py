"""Scoring the pictures of an epoch in a thread, while the next ones are sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from rewards import WeightedSum
from rewards.threads import Worker

from ..config.prompts import Prompt, for_rewards
from ..policies import Policy
from .guard import thumbnails


@dataclass(frozen=True)
class Scores:
    """Of n pictures, in their order: total reward (n,), its raw parts (n,) each, thumbnails for
    `guard.diversity`; the pictures on the CPU where a reward learns from them, else none."""

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
        self._worker = Worker()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *error: object) -> None:
        for future in self._futures:
            future.cancel()

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
            self._futures.append(self._worker.submit(self._score, ready[:whole], batch))
            self._done += whole

    @torch.no_grad()  # of its own: threads do not inherit it
    def _score(self, images: Tensor, batch: Sequence[Prompt]) -> tuple[Tensor, dict[str, Tensor]]:
        if self.policy.device.type == "cuda":  # a thread starts on the first GPU
            torch.cuda.set_device(self.policy.device)
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


def summary(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean, std, best and worst of the total reward "" and of its raw parts, from those of all
    processes, (n,) each; NaN is of prompts that a reward does not score."""
    metrics = {}
    for name, found in values.items():
        found = found[~found.isnan()]
        if not len(found):
            continue
        prefix = f"reward/{name}" if name else "reward"
        metrics[f"{prefix}_mean"] = found.mean().item()
        metrics[f"{prefix}_std"] = found.std(correction=0).item()
        metrics[f"{prefix}_best"] = found.max().item()
        metrics[f"{prefix}_worst"] = found.min().item()
    return metrics


def teach(reward: WeightedSum, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Let rewards that learn do so from the pictures of an epoch, those of all processes, so that
    they remain alike on them."""
    learned = reward.learn(images, *for_rewards(prompts))
    return {f"reward/{name}/{k}": v for name, part in learned.items() for k, v in part.items()}


def constrain(reward: WeightedSum, metrics: Mapping[str, float]) -> dict[str, float]:
    """Move the multipliers of rewards with a bound by their means over the epoch."""
    names = [k for k in reward.floors if f"reward/{k}_mean" in metrics]
    reward.adapt({k: metrics[f"reward/{k}_mean"] for k in names})
    return {f"multiplier/{k}": reward.weights[k] for k in reward.floors}
