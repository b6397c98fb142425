"""Trajectories, sampled without gradient and stored.

`Sampling` holds the levels and the kernel. Every sample starts from `Noise` of its own seed and
takes K steps, each one call of the denoiser. The steps in its `Window` are drawn from the kernel's
Gaussian and stored with the log-probability of the draw; all other steps follow the ODE.
`Trajectories` hold the result. What an algorithm uses of them depends on its `Needs`:

    TRAJECTORY  states before and after every stored step, their log-probabilities, perhaps means
    FINAL       the clean latents alone
    GRADIENT    all states, for the sweep of `adjoint`, which calls the denoiser again with gradient
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..dynamics import (
    KERNELS,
    SDES,
    Gaussian,
    Levels,
    Prediction,
    dpm_solver_2m,
    ode,
    step_std,
)
from ..policies.base import Policy
from ..policies.cond import Cond
from ..policies.guidance import Guidance
from .guide import Guide


def sample_seed(*parts: int | str) -> int:
    """A seed below 2^63 from (run seed, epoch, prompt id, sample index), the same on every
    machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class Sampling:
    """How trajectories are drawn: `levels` (K + 1,), a kernel of `dynamics`, eta, and guidance, a
    scale or what `policies.guidance` makes of it."""

    levels: Levels
    kernel: str
    eta: float
    guidance: float | Guidance

    @property
    def steps(self) -> int:
        return len(self.levels) - 1

    @cached_property
    def stds(self) -> Tensor:
        """Standard deviation of every transition, (K,); a step with 0 follows the ODE.

        The last step of a flow SDE gets 0: the references do not train it either. So does a step
        with less than a hundredth of the largest: SD3's schedule goes to sigma = 0.001 before it
        ends, and the probability ratios of so narrow a transition would dominate all others.
        """
        stds = step_std(self.kernel, self.eta, self.levels)
        if self.kernel in SDES:
            stds[-1] = 0
        return stds.where(stds >= stds.max() / 100, 0)

    @cached_property
    def stochastic(self) -> list[bool]:
        """Whether each of the K steps is drawn from the kernel; the others follow the ODE."""
        return (self.stds > 0).tolist()

    def guided(self, family: type[Policy]) -> list[bool]:
        """Whether classifier-free guidance acts at each of the K steps of a model with CFG."""
        how = family.weighed(self.guidance)
        return [inside and how.scale > 1 for inside in self._inside]

    @cached_property
    def _inside(self) -> list[bool]:
        # kept, since to ask waits for the device
        return Guidance.of(self.guidance).inside(self.levels[:-1]).tolist()

    def branches(self, family: type[Policy]) -> list[int]:
        """Calls that a sample takes at each of the K steps of a model with CFG; at most, where
        guidance adapts."""
        again, on = Guidance.of(self.guidance).again, self.guided(family)
        return [1 + (guided and again(sum(on[:i]))) for i, guided in enumerate(on)]

    @cached_property
    def drawn(self) -> Tensor:
        """The stochastic steps, (S,) long on the device of the levels, so that looking them up in a
        loss waits for nothing, as a mask would."""
        return (self.stds > 0).nonzero()[:, 0]

    def sensitivity(self, policy: Policy) -> Tensor:
        """|∂mean/∂output| of every step, (K,): how far the network's output moves it."""
        x, one = torch.zeros_like(self.stds), torch.ones_like(self.stds)
        seen = policy.parametrize(x, one, self.levels[:-1])
        levels = self.levels[:-1], self.levels[1:]
        return KERNELS[self.kernel](x, seen, *levels, self.eta).mean.abs()

    def transition(self, policy: Policy, x: Tensor, index: int | Tensor, cond: Cond) -> Gaussian:
        """p_θ(x' | x) of step `index`: an int, or one stochastic step per sample (n,). Raises
        ValueError for guidance that remembers, see `stateless`."""
        self.stateless()
        return self.step(x, self.predict(policy, x, index, cond), index)

    def stateless(self) -> None:
        """Raises ValueError where a step depends on more than its state, so that it can be neither
        scored nor differentiated by itself."""
        if Guidance.of(self.guidance).remembers:
            raise ValueError(
                f"{self.guidance} depends on earlier steps, which are not known where a step is "
                "scored or differentiated again; use guidance without reuse and adaptive"
            )

    def predict(self, policy: Policy, x: Tensor, index: int | Tensor, cond: Cond) -> Prediction:
        """The guided prediction for x at step `index`: an int, or one per sample (n,)."""
        how = self.guidance
        if isinstance(how, Guidance) and isinstance(index, int) and policy.uses_cfg:
            # known here, where to compare levels would wait for the device
            how = replace(how, low=0.0, high=math.inf) if self._inside[index] else 0.0
        return policy.predict(x, self.levels[index], cond, how)

    def step(self, x: Tensor, seen: Prediction, index: int | Tensor) -> Gaussian:
        """The transition of step `index`, given the network's prediction `seen` for x."""
        drawn = isinstance(index, Tensor) or self.stochastic[index]
        kernel = KERNELS[self.kernel] if drawn else ode
        return kernel(x, seen, self.levels[index], self.levels[index + 1], self.eta)


@dataclass(frozen=True)
class Window:
    """The steps start … start + length - 1 of each sample that are stochastic and stored.

    start: (n,) long, on the CPU; may differ between samples. tail: number of DPM-Solver++(2M)
    steps, over a subset of the levels, that replace the ODE steps after the window; None = all ODE
    steps.
    """

    start: Tensor
    length: int
    tail: int | None = None

    @classmethod
    def whole(cls, n: int, steps: int) -> Window:
        return cls(torch.zeros(n, dtype=torch.long), steps)

    @property
    def end(self) -> int:
        """The first step after the windows of all samples."""
        return int(self.start.max()) + self.length


class Noise:
    """Standard normal noise with one CPU generator per sample.

    A sample's noise depends on its seed alone, not on its batch nor on the number of processes.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device | str):
        self.generators = [torch.Generator().manual_seed(s) for s in seeds]
        self.shape, self.device = tuple(shape), device

    def draw(self, rows: Sequence[int] | None = None) -> Tensor:
        """The next (n, *shape) draw of all samples or of `rows`, float32."""
        chosen = self.generators if rows is None else [self.generators[i] for i in rows]
        noise = torch.stack([torch.randn(self.shape, generator=g) for g in chosen])
        if torch.cuda.is_available():  # a copy from pinned memory does not wait for the device
            return noise.pin_memory().to(self.device, non_blocking=True)
        return noise.to(self.device)


@dataclass(frozen=True)
class Trajectories:
    """What a rollout stores of n samples, float32.

    start: (n,) the first step of each sample's window. states: (n, W + 1, *latent), before and
    after each of its W steps. log_prob: (n, W), 0 for a deterministic step, which has none. means:
    (n, W, *latent) of the transitions, if asked for. final: clean latents (n, *latent).
    """

    start: Tensor
    states: Tensor
    log_prob: Tensor
    final: Tensor
    means: Tensor | None = None


@dataclass(frozen=True)
class _Wanted:
    """The arguments of `rollout` for n samples. end: number of steps that are drawn one by one, the
    same for all chunks. finish: whether the deterministic steps after them follow."""

    cond: Cond
    seeds: Sequence[int]
    window: Window
    initial: Sequence[int] | None
    means: bool
    store: bool
    end: int
    finish: bool

    def __getitem__(self, part: slice) -> _Wanted:
        """A chunk of the samples."""
        return replace(
            self,
            cond=self.cond[part],
            seeds=self.seeds[part],
            window=replace(self.window, start=self.window.start[part]),
            initial=None if self.initial is None else self.initial[part],
        )


@torch.no_grad()
def rollout(
    policy: Policy,
    cond: Cond,
    sampling: Sampling,
    seeds: Sequence[int],
    batch: int,
    window: Window | None = None,
    initial: Sequence[int] | None = None,
    means: bool = False,
    until: int | None = None,
    store: bool = True,
    each: Callable[[Tensor], None] | None = None,
    chunks: int = 0,
) -> Trajectories:
    """Sample one trajectory per row of `cond` in chunks of `batch`.

    A stored state is the very tensor that the next denoiser call saw, so scoring it again gives the
    same log-probability, but for rounding where `policy.merged` merges a LoRA: 3e-7 on EmojiWorld's
    models (benchmarks/calls.py), as much as another batch size makes. window: the steps to draw
    from the kernel, while the others follow the ODE; None = all steps. initial: seeds of the
    initial noise, if it is not that of `seeds`. Samples with the same initial seed must have the
    same prompt; they share denoiser calls up to the first step of their windows. means: also keep
    the means of the transitions. until: take only
    this many steps, all stochastic; `final` is then the state after them. store: False keeps only
    the final latents. each: called with the final latents of every chunk as soon as they are drawn.
    chunks: draw at least as many; further ones are of the last sample, and left out. Processes with
    unequal numbers of samples that share a divided denoiser must call it equally often.
    """
    steps = sampling.steps if until is None else until
    window = window or Window.whole(len(seeds), steps)
    finish = steps == sampling.steps
    wanted = _Wanted(cond, seeds, window, initial, means, store, window.end, finish)
    parts = []
    for i in range(0, len(seeds), batch):
        with policy.merged():
            parts.append(_chunk(policy, sampling, wanted[i : i + batch]))
        if each is not None:
            each(parts[-1].final)
    for _ in range(chunks - len(parts)):
        with policy.merged():
            _chunk(policy, sampling, wanted[len(seeds) - 1 :])
    return Trajectories(
        torch.cat([p.start for p in parts]),
        torch.cat([p.states for p in parts]),
        torch.cat([p.log_prob for p in parts]),
        torch.cat([p.final for p in parts]),
        torch.cat([p.means for p in parts if p.means is not None]) if means else None,
    )


def _chunk(policy: Policy, sampling: Sampling, wanted: _Wanted) -> Trajectories:
    """Trajectories of one chunk, whose samples share the calls of the denoiser."""
    device, window = policy.device, wanted.window
    n, kept = len(wanted.seeds), window.length if wanted.store else 0
    noise = Noise(wanted.seeds, policy.latent_shape, device)
    initial = wanted.initial
    x = noise.draw() if initial is None else Noise(initial, policy.latent_shape, device).draw()
    states = x.new_zeros(n, kept + 1, *x.shape[1:])
    states[:, 0] = x  # the only state if no step is stored
    means = x.new_zeros(n, kept, *x.shape[1:]) if wanted.means else None
    log_prob = x.new_zeros(n, kept)
    start, guide = window.start.tolist(), Guide(policy, sampling)
    if Guidance.of(sampling.guidance).remembers:
        initial = None  # what is remembered is of every sample
    for i in range(wanted.end):
        level, following = sampling.levels[i], sampling.levels[i + 1]
        rows, copies = _distinct(initial, [s >= i for s in start], device)
        seen = guide(x[rows], i, wanted.cond[rows])
        inside = [j for j, s in enumerate(start) if s <= i < s + window.length]
        drawn, where, k = sampling.stochastic[i] and bool(inside), slice(None), i - start[0]
        if len(inside) < n or len(set(start)) > 1:  # in most runs nothing is looked up
            where = torch.tensor(inside, dtype=torch.long, device=device)
            k = i - window.start.to(device)[where]
        mean = x_next = x
        if not drawn or len(inside) < n:
            mean = x_next = ode(x[rows], seen, level, following).mean[copies]
        if drawn:
            chance = KERNELS[sampling.kernel](x[rows], seen, level, following, sampling.eta)
            step = Gaussian(chance.mean[copies][where], chance.std)
            sample = step.sample(noise.draw(inside))
            mean, x_next = _put(mean, where, step.mean), _put(x_next, where, sample)
            if wanted.store:
                log_prob[where, k] = step.log_prob(sample)
        if wanted.store:
            states[where, k], states[where, k + 1] = x[where], x_next[where]
        if means is not None and wanted.store:
            means[where, k] = mean[where]
        x = x_next
    if wanted.finish and wanted.end < sampling.steps:
        x = _finish(guide, x, wanted)
    return Trajectories(window.start, states, log_prob, x, means)


Rows = slice | Tensor


def _put(x: Tensor, rows: Rows, values: Tensor) -> Tensor:
    """x (n, *latent) with other `values` in some rows, or in all."""
    return values if isinstance(rows, slice) else x.index_copy(0, rows, values)


def _distinct(
    initial: Sequence[int] | None, shared: list[bool], device: torch.device
) -> tuple[Rows, Rows]:
    """Rows that all differ, and for every row the position of its equal among them. Rows that are
    still `shared` are equal if their initial noise is."""
    if initial is None or not any(shared):
        return slice(None), slice(None)
    rows, copies, seen = [], [], {}
    for j, (seed, alike) in enumerate(zip(initial, shared, strict=True)):
        key = (seed,) if alike else (seed, j)
        if key not in seen:
            seen[key] = len(rows)
            rows.append(j)
        copies.append(seen[key])
    return torch.tensor(rows, device=device), torch.tensor(copies, device=device)


def _finish(guide: Guide, x: Tensor, wanted: _Wanted) -> Tensor:
    """The deterministic steps after the windows: all of them, or the `tail` that replaces them."""
    steps, levels = guide.sampling.steps, guide.sampling.levels
    first, cond, tail = wanted.end, wanted.cond, wanted.window.tail
    if tail is None:
        for i in range(first, steps):
            x = ode(x, guide(x, i, cond), levels[i], levels[i + 1]).mean
        return x
    index = torch.linspace(first, steps, min(tail, steps - first) + 1).round().long()
    levels, before = levels[index], None
    for i, step in enumerate(index[:-1].tolist()):
        seen = guide(x, step, cond)
        x, before = dpm_solver_2m(seen, x, before, levels, i), seen.x0
    return x
