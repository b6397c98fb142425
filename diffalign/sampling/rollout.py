"""Sampling: trajectories without gradient, and the exact gradient of a reward through them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..dynamics import (
    KERNELS,
    SDES,
    Gaussian,
    Levels,
    Prediction,
    dpm_solver_2m,
    noised,
    ode,
    step_std,
)
from ..policies.base import Cond, Policy


def sample_seed(*parts: int | str) -> int:
    """A seed below 2^63 from (run seed, epoch, prompt id, sample index), alike on any machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class Sampling:
    """How trajectories are drawn: `levels` (K + 1,), a kernel of `dynamics`, eta, CFG scale."""

    levels: Levels
    kernel: str
    eta: float
    guidance: float

    @property
    def steps(self) -> int:
        return len(self.levels) - 1

    @cached_property
    def stds(self) -> Tensor:
        """Standard deviation of every transition, (K,); those with 0 are the ODE's.

        The last step of a flow SDE is one of them: the references do not train it either. So is a
        step with less than a hundredth of the largest: SD3's schedule goes to sigma = 0.001 before
        it ends, and the ratios of a transition that narrow would rule all others.
        """
        stds = step_std(self.kernel, self.eta, self.levels)
        if self.kernel in SDES:
            stds[-1] = 0
        return stds.where(stds >= stds.max() / 100, 0)

    @cached_property
    def stochastic(self) -> list[bool]:
        """Whether each of the K steps is drawn from its kernel; the others are the ODE's."""
        return (self.stds > 0).tolist()

    def sensitivity(self, policy: Policy) -> Tensor:
        """|∂mean/∂output| of every step, (K,): how far the network's output moves it."""
        x, one = torch.zeros_like(self.stds), torch.ones_like(self.stds)
        seen = policy.parametrize(x, one, self.levels[:-1])
        levels = self.levels[:-1], self.levels[1:]
        return KERNELS[self.kernel](x, seen, *levels, self.eta).mean.abs()

    def transition(self, policy: Policy, x: Tensor, index: int | Tensor, cond: Cond) -> Gaussian:
        """p_θ(x' | x) of step `index`: an int, or stochastic steps, one a sample (n,)."""
        return self.step(x, policy.predict(x, self.levels[index], cond, self.guidance), index)

    def step(self, x: Tensor, seen: Prediction, index: int | Tensor) -> Gaussian:
        """The transition of step `index` given what the network says of x."""
        drawn = isinstance(index, Tensor) or self.stochastic[index]
        kernel = KERNELS[self.kernel] if drawn else ode
        return kernel(x, seen, self.levels[index], self.levels[index + 1], self.eta)


@dataclass(frozen=True)
class Window:
    """The steps start … start + length - 1 of each sample that are stochastic and stored.

    start: (n,) long, on the CPU; equal for all or not. tail: steps after the window to integrate in
    its place, with DPM-Solver++(2M) over a subset of the levels; None = every one, with the ODE.
    """

    start: Tensor
    length: int
    tail: int | None = None

    @classmethod
    def whole(cls, n: int, steps: int) -> Window:
        return cls(torch.zeros(n, dtype=torch.long), steps)


class Noise:
    """Standard normal noise with one CPU generator a sample.

    A sample's noise depends on its seed alone, not on its batch nor on the number of processes.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device | str):
        self.generators = [torch.Generator().manual_seed(s) for s in seeds]
        self.shape, self.device = tuple(shape), device

    def draw(self, rows: Sequence[int] | None = None) -> Tensor:
        """The next (n, *shape) draw of all samples or of `rows`, float32."""
        chosen = self.generators if rows is None else [self.generators[i] for i in rows]
        return torch.stack([torch.randn(self.shape, generator=g) for g in chosen]).to(self.device)


@dataclass(frozen=True)
class Trajectories:
    """What a rollout stores of n samples, float32.

    start: (n,) the first step of each sample's window. states: (n, W + 1, *latent), before and
    after each of its W steps. log_prob: (n, W), 0 for a deterministic step, which has none.
    means: (n, W, *latent) of the transitions, where asked for. final: clean latents (n, *latent).
    """

    start: Tensor
    states: Tensor
    log_prob: Tensor
    final: Tensor
    means: Tensor | None = None


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
) -> Trajectories:
    """Sample one trajectory per row of `cond` in chunks of `batch`.

    A stored state is the very tensor that the next denoiser call saw, so scoring it again gives the
    same log-probability. window: where the kernel is stochastic, elsewhere the ODE; None = all
    steps. initial: seeds of the initial noise, where it is not that of `seeds`; of samples that
    share it, and so the prompt, the denoiser is called once for all up to their windows' first
    step. means: keep those of the transitions. until: only this many steps, all stochastic; `final`
    is the state after them. store: False keeps the final latents alone. each: called with the final
    latents of every chunk as soon as they are there.
    """
    until = sampling.steps if until is None else until
    window = window or Window.whole(len(seeds), until)
    last = int(window.start.max()) + window.length  # alike for all, and so is a tail
    parts = []
    for i in range(0, len(seeds), batch):
        part = _rollout(
            policy,
            cond[slice(i, i + batch)],
            sampling,
            seeds[i : i + batch],
            Window(window.start[i : i + batch], window.length, window.tail),
            initial[i : i + batch] if initial is not None else None,
            means,
            last,
            until == sampling.steps,
            store,
        )
        parts.append(part)
        if each is not None:
            each(part.final)
    return Trajectories(
        torch.cat([p.start for p in parts]),
        torch.cat([p.states for p in parts]),
        torch.cat([p.log_prob for p in parts]),
        torch.cat([p.final for p in parts]),
        torch.cat([p.means for p in parts if p.means is not None]) if means else None,
    )


def _rollout(
    policy, cond, sampling, seeds, window, initial, keep_means, last, finish, store
) -> Trajectories:
    n, length, device = len(seeds), window.length, policy.device
    kept = length if store else 0
    noise = Noise(seeds, policy.latent_shape, device)
    x = noise.draw() if initial is None else Noise(initial, policy.latent_shape, device).draw()
    states = x.new_zeros(n, kept + 1, *x.shape[1:])
    states[:, 0] = x  # all there is where no step is asked for
    means = x.new_zeros(n, kept, *x.shape[1:]) if keep_means else None
    log_prob = x.new_zeros(n, kept)
    for i in range(last):
        level, following = sampling.levels[i], sampling.levels[i + 1]
        rows, copies = _distinct(initial, (window.start >= i).tolist(), device)
        seen = policy.predict(x[rows], level, cond[rows], sampling.guidance)
        mean = x_next = ode(x[rows], seen, level, following).mean[copies]
        inside = ((window.start <= i) & (i < window.start + length)).nonzero()[:, 0]
        k, inside = i - window.start[inside].to(device), inside.to(device)
        if sampling.stochastic[i] and len(inside):
            chance = KERNELS[sampling.kernel](x[rows], seen, level, following, sampling.eta)
            step = Gaussian(chance.mean[copies][inside], chance.std)
            drawn = step.sample(noise.draw(inside.tolist()))
            mean = mean.index_copy(0, inside, step.mean)
            x_next = x_next.index_copy(0, inside, drawn)
            if store:
                log_prob[inside, k] = step.log_prob(drawn)
        if store:
            states[inside, k], states[inside, k + 1] = x[inside], x_next[inside]
        if means is not None and store:
            means[inside, k] = mean[inside]
        x = x_next
    if finish:
        x = _finish(policy, cond, sampling, x, last, window.tail)
    return Trajectories(window.start, states, log_prob, x, means)


def _distinct(initial, shared: list[bool], device) -> tuple[Any, Any]:
    """Rows that stand for all, and for every row the position of the one that stands for it: rows
    still `shared` are alike where their initial noise is."""
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


def _finish(policy, cond, sampling, x, first, tail) -> Tensor:
    """The deterministic steps from `first` on, all or `tail` of them."""
    if first == sampling.steps:
        return x
    levels = sampling.levels
    if tail is None:
        for i in range(first, sampling.steps):
            seen = policy.predict(x, levels[i], cond, sampling.guidance)
            x = ode(x, seen, levels[i], levels[i + 1]).mean
        return x
    index = torch.linspace(first, sampling.steps, min(tail, sampling.steps - first) + 1)
    levels, before = levels[index.round().long()], None
    for i in range(len(levels) - 1):
        seen = policy.predict(x, levels[i], cond, sampling.guidance)
        x, before = dpm_solver_2m(seen, x, before, levels, i), seen.x0
    return x


@dataclass(frozen=True)
class Surrogate:
    """The differentiable stand-in for a trajectory that a GRADIENT algorithm learns from.

    active: steps whose denoiser call carries gradient. at: the reward sees the x0 predicted at this
    step; None = the final latent. detach: every denoiser call sees sg[x], so that gradient crosses
    a step by its linear part alone. renoised: copies of the final latent that are noised to the
    last level again and denoised in one step, the reward averaged over them and the original.
    """

    active: tuple[int, ...]
    at: int | None = None
    detach: bool = False
    renoised: int = 0


@torch.no_grad()
def reward_input(
    policy: Policy, cond: Cond, sampling: Sampling, states: Tensor, plan: Surrogate
) -> Tensor:
    """The latents (n, *latent) that the reward decodes, of states (n, K + 1, *latent)."""
    if plan.at is None:
        return states[:, -1]
    x, level = states[:, plan.at], sampling.levels[plan.at]
    return policy.predict(x, level, cond, sampling.guidance).x0


def renoise_last(
    policy: Policy, cond: Cond, sampling: Sampling, states: Tensor, noise: Tensor
) -> Tensor:
    """`states` (n, K + 1, *latent) with the last two replaced: the final latent noised by `noise`
    (n, *latent) to the last level, and what one step makes of it (DRaFT-LV)."""
    last = sampling.steps - 1
    x = noised(states[:, -1], noise, sampling.levels[last])
    with torch.no_grad():
        x_next = sampling.transition(policy, x, last, cond).mean
    return torch.cat([states[:, :last], x[:, None], x_next[:, None]], 1)


def adjoint_sweep(
    policy: Policy,
    cond: Cond,
    sampling: Sampling,
    states: Tensor,
    grad: Tensor,
    plan: Surrogate,
    penalty: Callable[[Tensor, Prediction, int], Tensor] | None = None,
) -> None:
    """Back-propagate g = dL/d(reward input) through a surrogate, one denoiser graph at a time.

        g_K = g,   ∇θ L += (∂μ_i/∂θ)ᵀ g_{i+1},   g_i = (∂μ_i/∂x_i)ᵀ g_{i+1}    i = K-1 … min(active)

    μ_i is the mean of step i at the stored x_i; the noise added to it is a constant. Where step i
    is not active its denoiser call is a constant too, so that only the linear part of μ_i counts,
    and with `plan.detach` that is all that reaches x_i. With `plan.at` = e the sweep starts at x̂0
    of step e in place of μ_e. The result equals autograd through the whole surrogate, at the memory
    of one denoiser step however long the chain.

    states: (n, K + 1, *latent) of a rollout; grad: (n, *latent). penalty: (what the denoiser was
    shown, its prediction, step) to a scalar added to L at every active step. Adds to the `.grad` of
    the policy's weights.
    """
    first = min(plan.active)
    top = sampling.steps - 1 if plan.at is None else plan.at
    for i in reversed(range(first, top + 1)):
        # nobody needs the gradient with respect to the earliest state
        x = states[:, i].detach().requires_grad_(i > first)
        level = sampling.levels[i]
        with torch.enable_grad():
            inner = x.detach() if plan.detach else x
            if i in plan.active:
                seen = policy.predict(inner, level, cond, sampling.guidance)
                if plan.detach:
                    seen = policy.parametrize(x, seen.native, level)
            else:  # x̂0 and noise are affine in x, whatever the constant output
                seen = policy.parametrize(x, torch.zeros_like(x), level)
            out = seen.x0 if i == plan.at else sampling.step(x, seen, i).mean
            extra = penalty(inner, seen, i) if penalty is not None and i in plan.active else None
        outputs = [out] if extra is None else [out, extra]
        torch.autograd.backward(outputs, [grad, None][: len(outputs)])
        if i > first:
            assert x.grad is not None
            grad = x.grad
