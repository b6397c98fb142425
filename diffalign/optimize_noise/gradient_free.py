"""Searches that need no gradient: best-of-N, and those of Ma et al. (arXiv 2501.09732)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated

import torch
from torch import Tensor

from ..dynamics import Levels, ode
from .base import Bounds, Count, Positive, Share, Step, Steps, Task, Weight, draw, finish

Cosine = Annotated[float, Bounds(-1, 1)]


def best_of_n(task: Task, n: Count = 16) -> Iterator[Step]:
    """n independent pictures of each prompt, the plain sample among them.

    A step draws as many pictures of each prompt as fit in a batch and as the budget allows.
    """
    yield _fresh(task, [0])
    yield from _independent(task, range(1, n))


def random_search(task: Task, rounds: Count = 4) -> Iterator[Step]:
    """After the plain sample, 2^r fresh pictures of each prompt in round r = 1 … `rounds`.

    This is tt-scale-flux's schedule for the random search of arXiv 2501.09732. It equals best-of-N
    for N = 2^(rounds + 1) - 1.
    """
    yield _fresh(task, [0])
    for r in range(1, rounds + 1):
        yield from _independent(task, range(2**r - 1, 2 ** (r + 1) - 1))


def _independent(task: Task, draws: range) -> Iterator[Step]:
    while draws:
        rows = task.account.open()
        size = task.affordable(rows, min(len(draws), max(1, task.batch // len(task))))
        yield _fresh(task, draws[:size])
        draws = draws[size:]


def _fresh(task: Task, draws: Sequence[int]) -> Step:
    rows = [i for i in range(len(task)) for _ in draws]
    return draw(task, rows, task.noise(rows, [*draws] * len(task)))


def neighbor(noise: Tensor, fresh: Tensor, cosine: float) -> Tensor:
    """Noise (n, ...) turned towards `fresh` (n, ...) until its cosine with the given noise is τ.

    ε' = ‖ε‖ (τ u + √(1 - τ²) w),   u = ε/‖ε‖,   w the part of `fresh` normal to u, of norm 1
    """
    u, w = noise.flatten(1), fresh.flatten(1)
    norm = u.norm(dim=1, keepdim=True)
    u = u / norm
    w = w - (w * u).sum(1, keepdim=True) * u
    w = w / w.norm(dim=1, keepdim=True)
    return (norm * (cosine * u + (1 - cosine**2) ** 0.5 * w)).view_as(noise)


def zero_order(
    task: Task,
    rounds: Count = 8,
    neighbors: Count = 4,
    cosine: Cosine = 0.95,
    restart: bool = True,
) -> Iterator[Step]:
    """Hill climbing in noise (arXiv 2501.09732): the best neighbor of a base replaces it if it is
    better; otherwise a new base is drawn, as in tt-scale-flux.

    The first base is the noise of the plain sample. A neighbor has the base's norm and the given
    cosine with it. A base is drawn once, a new one along with its first neighbors, and its reward
    is remembered. Each prompt has its own base. restart: False keeps a base that no neighbor beats.
    All noises of a sampler are turned as one vector; tt-scale-flux turns the initial noise alone.
    """
    step = _fresh(task, [0])
    base, reward = list(step.noise), step.total.tolist()
    known = [True] * len(task)
    yield step
    for r in range(rounds):
        draws = range(1 + r * (neighbors + 1), 1 + (r + 1) * (neighbors + 1))
        groups = {}
        for i in task.account.open():  # after a restart a prompt draws its new base as well
            fresh = task.noise([i] * (neighbors + 1), draws)
            if not known[i]:
                base[i] = fresh[-1]
            near = neighbor(base[i].expand_as(fresh[:-1]), fresh[:-1], cosine)
            groups[i] = near if known[i] else torch.cat([base[i][None], near])
        sizes = [len(group) for group in groups.values()]
        step = draw(task, [i for i in groups for _ in groups[i]], torch.cat([*groups.values()]))
        yield step
        for i, totals in zip(groups, step.total.split(sizes), strict=True):
            if not known[i]:
                reward[i] = totals[0].item()
            best = int(totals[-neighbors:].argmax()) - neighbors
            better = totals[best].item() > reward[i]
            if better:
                base[i], reward[i] = groups[i][best], totals[best].item()
            known[i] = better or not restart


def forward_noising(x: Tensor, noise: Tensor, level: Levels, noisier: Levels) -> Tensor:
    """x (n, *latent) at level i of a Gaussian path, noised to a noisier level j, each ().

        x_j = (α_j/α_i) x_i + √(σ_j² - (α_j/α_i)² σ_i²) z

    Needs α_i > 0. x_j has the marginal distribution of level j if x_i has that of level i.
    """
    ratio = noisier.alpha / level.alpha
    variance = noisier.sigma.square() - (ratio * level.sigma).square()
    return ratio * x + variance.clamp(min=0).sqrt() * noise


def itinerary(
    levels: Levels, start: float, forward: float, backward: float
) -> list[tuple[int, int, int]]:
    """The (i, j, k) of each round of a search over paths: x is noised from level i to j < i and
    denoised to k > i. This k is the next round's i; the last k is the last level.

    Lengths are in time u = σ/(α + σ): on a flow its σ, and on a VP schedule the σ of a flow with
    the same SNR. The first i is the first level with u <= start; j is the first with u <= u_i +
    forward; k is the first with u <= u_j - backward. Where the schedule is too coarse for that, j
    or k is the level next to i. Raises ValueError for a schedule of a single step.
    """
    time = (levels.sigma / (levels.alpha + levels.sigma)).tolist()
    last = len(time) - 1
    if last < 2:
        raise ValueError(
            "a search over paths turns round inside the schedule, and sampler.steps=1 has no "
            "inside; use 2 steps or more, or another method"
        )

    def first(u: float) -> int:
        return next(k for k, t in enumerate(time) if t <= max(u, time[-1]) + 1e-6)

    rounds, i = [], min(max(first(start), 1), last - 1)
    while i < last:
        j = min(first(time[i] + forward), i - 1)
        k = max(first(time[j] - backward), i + 1)
        rounds.append((i, j, k))
        i = k
    return rounds


def paths(
    task: Task,
    keep: Count = 2,
    children: Count = 4,
    start: Share = 0.12,
    forward: Weight = 0.78,
    backward: Positive = 0.81,
) -> Steps:
    """Search over paths (arXiv 2501.09732): N = `keep` paths per prompt, each of which branches by
    noise into M = `children` in every round.

        x_i from N noises;  then, until x is clean:
        x_j given x_i, M times (`forward_noising`);  the ODE from j to k;  keep the N best x̂0(x_k)

    The rounds (i, j, k) are those of `itinerary`. Steps after the plain samples are ODE steps,
    whatever the kernel of the task. Only the last round finishes pictures, N M of each prompt; if
    the budget ends before it, the result is the plain sample.

    The defaults of start, forward and backward are those of the implementation in KAIST's RBF code.
    """
    rounds = itinerary(task.sampling.levels, start, forward, backward)
    return _walk(task, keep, children, rounds)


def _walk(
    task: Task, keep: int, children: int, rounds: Sequence[tuple[int, int, int]]
) -> Iterator[Step | None]:
    levels = task.sampling.levels
    yield _fresh(task, [0])
    rows = [i for i in range(len(task)) for _ in range(keep)]
    noise = task.noise(rows, [*range(keep)] * len(task))
    x = _integrate(task, rows, noise[:, 0], 0, rounds[0][0])
    rows = [i for i in rows for _ in range(children)]
    for r, (i, j, k) in enumerate(rounds):
        yield None
        fresh = range(keep + r * keep * children, keep + (r + 1) * keep * children)
        z = task.noise(rows, [*fresh] * len(task))[:, 0]
        noise, x = (v.repeat_interleave(children, 0) for v in (noise, x))
        x = _integrate(task, rows, forward_noising(x, z, levels[i], levels[j]), j, k)
        last = k == len(levels) - 1
        step = finish(task, rows, noise, x if last else _clean(task, rows, x, k))
        if last:
            yield replace(step, redraws=False)
        best = step.total.view(len(task), -1).topk(keep).indices
        best = (best + torch.arange(len(task)).to(best)[:, None] * keep * children).flatten()
        noise, x = noise[best], x[best]


@torch.no_grad()
def _integrate(task: Task, rows: Sequence[int], x: Tensor, first: int, last: int) -> Tensor:
    """x (m, *latent), taken along the ODE from level `first` to level `last`."""
    policy, sampling, parts = task.policy, task.sampling, []
    for part in task.batches(len(rows)):
        now, cond = x[part], task.cond(rows[part])
        for i in range(first, last):
            level, following = sampling.levels[i], sampling.levels[i + 1]
            seen = sampling.predict(policy, now, i, cond)
            now = ode(now, seen, level, following).mean
        parts.append(now)
    return torch.cat(parts)


@torch.no_grad()
def _clean(task: Task, rows: Sequence[int], x: Tensor, i: int) -> Tensor:
    """The clean latents predicted from x (m, *latent) at level i."""
    policy, sampling = task.policy, task.sampling
    return torch.cat(
        [
            sampling.predict(policy, x[part], i, task.cond(rows[part])).x0
            for part in task.batches(len(rows))
        ]
    )
