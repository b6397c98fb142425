"""Which steps of a rollout are stochastic and trained, epoch by epoch."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import torch

from ..config import SamplerConfig
from .rollout import Window


def bounds(config: SamplerConfig, stochastic: list[bool]) -> tuple[int, int]:
    """[first, end) of the steps that windows may cover. Raises ValueError if one of them is
    deterministic, or if the window does not fit."""
    end = len(stochastic) - stochastic[::-1].index(True)
    low, high = config.window_range or (0, end)
    silent = [i for i in range(low, high) if not stochastic[i]]
    if silent:
        raise ValueError(
            f"sampler.window_range={[low, high]} covers step {silent[0]}, which is deterministic "
            f"with sampler.kernel={config.kernel}; the others end before {end}"
        )
    if config.window is not None and config.window > high - low:
        raise ValueError(
            f"sampler.window={config.window} is wider than the {high - low} stochastic steps that "
            f"sampler.steps={len(stochastic)} has with sampler.kernel={config.kernel}; use at most "
            f"{high - low}"
        )
    return low, high


def calls_per_sample(
    config: SamplerConfig, stochastic: list[bool], size: int, samples: int
) -> float:
    """Denoiser calls of a rollout per sample, averaged over the places of the window.

    samples: number per process and epoch, in groups of `size`, drawn `config.batch` at a time;
    samples of a group share steps only if they are drawn together.
    """
    low, high = bounds(config, stochastic)
    length, steps = config.window or high - low, len(stochastic)
    places = range(low, high - length + 1)
    cases = [[p] * size for p in places]
    if config.window_schedule == "branch":
        cases = [[low + j % len(places) for j in range(size)]]
    # what is drawn together: the numbers of its samples within their group
    cuts = sorted({*range(0, samples, size), *range(0, samples, config.batch), samples})
    together = [[r % size for r in range(a, b)] for a, b in pairwise(cuts)]
    calls = 0
    for starts in cases:
        last = max(starts) + length
        rest = steps - last
        calls += samples * (rest if config.tail is None else min(rest, config.tail))
        for part in together:
            for i in range(last):
                alone = sum(starts[j] < i for j in part)
                calls += alone + (alone < len(part)) if config.same_noise else len(part)
    return calls / (samples * len(cases))


def window(
    config: SamplerConfig, stochastic: list[bool], epoch: int, seed: int, images: list[int]
) -> Window:
    """The window of every sample in an epoch. images: (n,), each sample's number in its prompt's
    group.

    random: one place for all samples, drawn uniformly (Flow-GRPO-Fast). progressive: one place
    further every `window_epochs` epochs, and from the first again after the last (MixGRPO,
    2507.21802). decay: the same with ceil(window_epochs exp(-0.1 max(0, place - K/2))) epochs per
    place. branch: image j has its one stochastic step at place j mod the number of places
    (TempFlow-GRPO, 2508.04324).
    """
    low, high = bounds(config, stochastic)
    length = config.window or high - low
    places = high - low - length + 1
    if config.window_schedule == "branch":
        return Window(torch.tensor([low + j % places for j in images]), 1, config.tail)
    if config.window_schedule == "random":
        start = low + random.Random(f"{seed}/{epoch}/window").randrange(places)
    else:
        stay = [config.window_epochs] * places
        if config.window_schedule == "decay":
            late = [max(0.0, low + p - len(stochastic) / 2) for p in range(places)]
            stay = [math.ceil(config.window_epochs * math.exp(-0.1 * x)) for x in late]
        rest = epoch % sum(stay)
        start = low
        while rest >= stay[start - low]:
            rest -= stay[start - low]
            start += 1
    return Window(torch.full((len(images),), start), length, config.tail)
