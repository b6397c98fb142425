"""Feynman-Kac steering: particles that are weighted and resampled on the way (2501.06848)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor

from ..dynamics import Prediction
from ..sampling.rollout import sample_seed
from .base import Count, Share, Step, Steps, Task, Weight, draw, finish

Kind = Literal["diff", "max", "add", "rt"]
Look = Callable[[Sequence[int], Tensor, int, bool], tuple[Prediction, Tensor | None, Tensor | None]]
"""From (prompts of m particles, x (m, *latent), step i, whether rewards are wanted) to the policy's
prediction for x, the reward (m,) that x leads to, and its gradient ∂/∂x for a shifted proposal."""


def ess(log_w: Tensor) -> Tensor:
    """Effective sample size (Σ w)² / Σ w² of log-weights (..., k), from 1 to k: (...)."""
    return (2 * log_w.logsumexp(-1) - (2 * log_w).logsumexp(-1)).exp()


def resample(log_w: Tensor, u: Tensor | float) -> Tensor:
    """Systematic resampling of k particles with log-weights (k,): k indices, in rising order.

    The particles share [0, 1) in proportion to their weights; index j is the particle whose part
    holds the point (j + u) / k. With u uniform in [0, 1) particle i is drawn k w_i / Σ w times on
    average, and every time that number rounded down or up.
    """
    k = len(log_w)
    edges = log_w.double().softmax(0).cumsum(0)
    points = (torch.arange(k, dtype=torch.float64, device=log_w.device) + u) / k
    return torch.searchsorted(edges, points, right=True).clamp(max=k - 1)


def potential(kind: Kind, r: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor]:
    """log G / λ of particles with rewards r (m,), and what to pass as `previous` the next time.

    diff: r - previous reward (0 at first)     max: highest reward so far
    add:  sum of the rewards so far            rt:  r
    """
    if kind == "diff":
        return (r if previous is None else r - previous), r
    if kind == "rt" or previous is None:
        return r, r
    value = torch.maximum(r, previous) if kind == "max" else r + previous
    return value, value


@dataclass(frozen=True)
class Particles:
    """m = n k particles, those of a prompt side by side.

    x: (m, *latent). noise: (m, 1 + S, *latent), from which `draw` makes them. log_w: (m,)
    log-weights since the last resampling. spent: (m,) sum of the log-potentials of the whole
    ancestry. previous: (m,) what `potential` remembers. These three are float64 on the CPU. x0,
    eps, native: the policy's prediction for x. slope: gradient ∂/∂x of the look-ahead's reward.
    """

    x: Tensor
    noise: Tensor
    log_w: Tensor
    spent: Tensor
    previous: Tensor | None = None
    x0: Tensor | None = None
    eps: Tensor | None = None
    native: Tensor | None = None
    slope: Tensor | None = None

    def take(self, index: Tensor, drawn: int) -> Particles:
        """The particles `index` (m,), each with the first `drawn` of its noises, which made it. The
        noises to come stay with the place, or copies would stay equal."""
        own = {k: v[index] for k, v in vars(self).items() if v is not None}
        own["noise"] = torch.cat([self.noise[index, :drawn], self.noise[:, drawn:]], 1)
        return replace(self, **own)


def measured(task: Task, start: float, end: float, interval: float) -> list[int]:
    """The steps whose predictions are scored: every interval K of the K steps, from start K,
    rounded up, to end K. Left out are steps where x is pure noise, and those after the last
    stochastic step, where copies would stay equal. Raises ValueError for a deterministic sampler,
    and if no step is left."""
    sampling, steps = task.sampling, task.sampling.steps
    if not any(sampling.stochastic):
        raise ValueError(
            f"sampler.kernel={sampling.kernel!r} with eta={sampling.eta:g} and steps={steps} draws "
            "nothing on the way, so copies of a particle would stay equal; use ddim with eta=1, or "
            "flow_sde or cps on a flow, and 2 steps or more"
        )
    last = max(i for i in range(steps) if sampling.stochastic[i])
    every = max(1, round(interval * steps))
    first = ceil(start * steps - 1e-9)
    at = range(first, min(round(end * steps), last) + 1, every)
    at = [i for i in at if sampling.levels.alpha[i] > 0]
    if not at:
        raise ValueError(
            f"no step from start={start:g} to end={end:g} of {steps} has begun with the picture "
            "and is followed by chance, so nothing would be steered; lower start, raise end, or "
            "use more steps"
        )
    return at


def steer(
    task: Task,
    k: int,
    strength: float,
    kind: Kind,
    at: Sequence[int],
    threshold: float,
    look: Look,
    gradient: float = 0.0,
    top: int = 0,
) -> Generator[None, None, tuple[Step, Tensor]]:
    """Take k particles per prompt to the end; returns the finished pictures and their log-weights
    (m,).

        log w += λ value                       at each step of `at`, with `potential`'s value
        resample where ESS < threshold k, and set log w = 0; else log w is carried on
        x' = μ(x) + s z + δ,   δ = gradient s²/2 λ ∂/∂x,   log w += -δ·z/s - ‖δ‖²/2s²
        log w += λ R - spent                   of the clean picture

    As k grows, the weighted particles are distributed as p(x) exp(λ R(x)) up to a constant,
    whatever the potentials. top: instead of resampling, the `top` particles of highest reward share
    the k places, a search without that property. λ: strength. The noise of a finished picture
    includes δ. Yields None before every step.
    """
    sampling, n = task.sampling, len(task)
    rows = [i for i in range(n) for _ in range(k)]
    noise = task.noise(rows, [*range(1, k + 1)] * n)
    zero = torch.zeros(len(rows), dtype=torch.float64)  # on the CPU: MPS has no float64
    p, drawn = Particles(noise[:, 0], noise, zero, zero), 1
    chance = [torch.Generator().manual_seed(sample_seed(s, "resample")) for s in task.seeds]
    for i, stochastic in enumerate(sampling.stochastic):
        yield None
        p, r = _looked(task, rows, p, i, i in at, look)
        if r is not None:
            value, previous = potential(kind, r, p.previous)
            gain = strength * value
            p = replace(p, previous=previous, log_w=p.log_w + gain, spent=p.spent + gain)
            u = [torch.rand((), generator=g, dtype=torch.float64).item() for g in chance]
            p = _resampled(p, n, r if top else None, top, threshold, u, drawn)
        assert p.x0 is not None
        assert p.eps is not None
        assert p.native is not None
        step = sampling.step(p.x, Prediction(p.x0, p.eps, p.native), i)
        if not stochastic:
            p = replace(p, x=step.mean)
        else:
            z, std = p.noise[:, drawn], step.std
            if p.slope is not None:
                push = 0.5 * gradient * strength * std * p.slope  # δ / s
                ratio = -(push * z + 0.5 * push.square()).cpu().double().flatten(1).sum(1)
                z = z + push
                p = replace(
                    p,
                    log_w=p.log_w + ratio,
                    noise=torch.cat([p.noise[:, :drawn], z[:, None], p.noise[:, drawn + 1 :]], 1),
                )
            p, drawn = replace(p, x=step.sample(z)), drawn + 1
    final = finish(task, rows, p.noise, p.x)
    return final, p.log_w + strength * final.total.cpu().double().nan_to_num(nan=0) - p.spent


def _looked(
    task: Task, rows: Sequence[int], p: Particles, i: int, wanted: bool, look: Look
) -> tuple[Particles, Tensor | None]:
    parts = [look(rows[b], p.x[b], i, wanted) for b in task.batches(len(rows))]
    seen = [part[0] for part in parts]
    rewards = [part[1] for part in parts if part[1] is not None]
    slopes = [part[2] for part in parts if part[2] is not None]
    p = replace(
        p,
        x0=torch.cat([s.x0 for s in seen]),
        eps=torch.cat([s.eps for s in seen]),
        native=torch.cat([s.native for s in seen]),
        slope=torch.cat(slopes) if slopes else None,
    )
    # NaN: no reward scores the prompt, so that all its particles are equal
    return p, torch.cat(rewards).cpu().double().nan_to_num(nan=0) if rewards else None


def _resampled(
    p: Particles,
    n: int,
    r: Tensor | None,
    top: int,
    threshold: float,
    u: Sequence[float],
    drawn: int,
) -> Particles:
    log_w = p.log_w.view(n, -1).clone()
    k = log_w.shape[1]
    index = torch.arange(n * k, device=log_w.device).view(n, k)
    for g in range(n):
        if r is not None:
            best = r.view(n, k)[g].topk(top).indices
            chosen = best[torch.arange(k, device=best.device) * top // k]
        elif ess(log_w[g]) < threshold * k:
            chosen = resample(log_w[g], u[g])
        else:
            continue
        index[g], log_w[g] = g * k + chosen, 0
    return replace(p.take(index.flatten(), drawn), log_w=log_w.flatten())


def smc(
    task: Task,
    particles: Count = 4,
    strength: Weight = 10.0,
    potential: Kind = "diff",
    interval: Share = 0.05,
    start: Share = 0.05,
    end: Share = 0.3,
    threshold: Weight = 0.5,
) -> Steps:
    """Feynman-Kac steering (arXiv 2501.06848): after the plain sample, k = `particles` others.

    At some steps the pictures of the predicted clean latents are scored, and particles are
    resampled by their weights; see `steer` for the equations, `potential` for the kinds. The k
    finished pictures of each prompt come in one step. Each has its own noise, none that of the
    plain sample.

    strength: λ; the default is meant for ImageReward. interval, start, end: shares of the K steps
    of the sampler; the defaults are steps 5, 10, …, 30 of 100, as published. threshold: resample if
    the effective sample size is below this share of k; the authors' own multinomial variant
    resamples every time (use 1.1 for that). Needs a stochastic kernel.

    Different from the authors' code: weights are kept, not dropped, when resampling is skipped;
    they are not cut off at 1e10; resampling is systematic, not multinomial; the last potential of
    max and add makes the total exp(λ R), not that of the highest reward or of the sum; resampling
    comes before the step, so that copies part at once; "max" starts from the first reward instead
    of 0.
    """
    at = measured(task, start, end, interval)
    return steered(task, particles, strength, potential, at, threshold, denoised(task))


def steered(task: Task, *how: Any) -> Iterator[Step | None]:
    """The plain samples, then the pictures that `steer` finishes."""
    yield draw(task, range(len(task)), task.noise(range(len(task))))
    step, _ = yield from steer(task, *how)
    yield step


def denoised(task: Task) -> Look:
    """Looks ahead with the policy's own prediction of the clean latents."""

    @torch.no_grad()
    def look(rows, x, i, wanted):
        policy, sampling = task.policy, task.sampling
        seen = sampling.predict(policy, x, i, task.cond(rows))
        reward = task.score(policy.decode(seen.x0), rows)[0] if wanted else None
        return seen, reward, None

    return look
