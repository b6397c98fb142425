"""Guidance of the sampler by the reward's gradient (universal guidance, arXiv 2302.07121)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from ..dynamics import Prediction
from ..policies import Policy
from .base import Bounds, Count, Step, Steps, Task, Weight, draw, finish
from .gradient_free import forward_noising
from .gradients import pulled_back, reward_gradient

Through = Literal["denoiser", "x0"]
MOST = 0.9**2 / 0.1  # σ²/α of a flow at σ = 0.9


def slope(
    task: Task, model: Policy, rows: Sequence[int], x: Tensor, i: int, through: Through
) -> tuple[Prediction, Tensor, Tensor]:
    """The prediction of `model` for x (m, *latent) at level i, the reward (m,) of its x0, and the
    gradient of the reward with respect to x, through the denoiser, or to x0. Weights get no
    gradient."""
    whole, sampling = through == "denoiser", task.sampling
    x = x.detach().requires_grad_(whole)
    cond = model.encode([task.prompts[j].text for j in rows])
    with torch.set_grad_enabled(whole):
        seen = sampling.predict(model, x, i, cond)
    _, total, _, grad = reward_gradient(task, rows, seen.x0)
    if whole:
        grad = pulled_back(seen.x0, x, grad)
    return Prediction(seen.x0.detach(), seen.eps.detach(), seen.native.detach()), total, grad


def corrected(seen: Prediction, alpha: Tensor, sigma: Tensor, change: Tensor) -> Prediction:
    """The prediction for the same x with x0 + `change` (m, *latent) as its clean latents.

    x̂0' = x̂0 + Δ,   ε̂' = ε̂ - (α/σ) Δ,   so that α x̂0' + σ ε̂' = x;  alpha, sigma: ()
    """
    return Prediction(seen.x0 + change, seen.eps - alpha / sigma * change, seen.native)


def rate(alpha: Tensor, sigma: Tensor, strength: float) -> Tensor:
    """η = s min(σ²/α, 8.1): x̂0 changes by η ∇R when ε̂ changes by -s σ ∇R. It is cut off at its
    value for a flow's σ = 0.9, as it diverges towards σ = 1."""
    return strength * (sigma.square() / alpha.clamp(min=1e-8)).clamp(max=MOST)


def universal_guidance(
    task: Task,
    strength: Weight = 1.0,
    through: Through = "denoiser",
    normalize: Literal["none", "unit"] = "none",
    first: Annotated[int, Bounds(0)] = 0,
    last: Annotated[int, Bounds(-1)] = -1,
    recurrence: Count = 1,
) -> Steps:
    """After the plain sample, one more of each prompt from the same noise by a corrected sampler.

        x̂0' = x̂0 + η(σ) ∇R(decode(x̂0(x))),   η = s min(σ²/α, 8.1)

    This is the forward guidance of arXiv 2302.07121, ε̂' = ε̂ - s σ ∇R, as long as σ²/α <= 8.1 (on
    Stable Diffusion's schedule t < 896). At higher noise η is cut off, as on a flow σ²/α has a
    singularity at σ = 1.

    strength: s; it depends on the scale of the reward, so try powers of ten. through: "denoiser"
    takes ∇ with respect to x, through network and decoder; "x0" takes it with respect to x̂0,
    through the decoder alone, which is cheaper. normalize: "unit" divides ∇ of each sample by its
    norm. first, last: the first and the last guided step, counted from 0; last = -1 is the
    sampler's last. recurrence: how many times each guided step is made. Before every repeat x is
    noised back (`forward_noising`); that noise and the noise of the repeated step are fresh.

    Left out: backward guidance, and a reference norm taken from classifier-free guidance. The noise
    of a picture is the one it started from; `draw` makes the plain sample from it. Raises
    ValueError for a reward without gradient or a window that holds no step.
    """
    task.reward.require_differentiable()
    steps = task.sampling.steps
    window = range(first, steps if last == -1 else min(last + 1, steps))
    if not window:
        raise ValueError(
            f"universal_guidance.first={first} and .last={last} hold none of the {steps} steps 0 "
            "and up; lower first, or raise last (-1 is the last step)"
        )
    return _guided(task, strength, through, normalize, window, recurrence)


def _guided(
    task: Task, strength: float, through: Through, normalize: str, window: range, recurrence: int
) -> Iterator[Step | None]:
    sampling, rows = task.sampling, range(len(task))
    noise = task.noise(rows)
    yield draw(task, rows, noise)
    x, drawn = noise[:, 0], 1
    for i, stochastic in enumerate(sampling.stochastic):
        level, following = sampling.levels[i], sampling.levels[i + 1]
        repeats = recurrence if i in window else 1
        for n in range(repeats):
            yield None
            z = noise[:, drawn] if stochastic else None
            if n:
                again = task.noise(rows, 1 + i * recurrence + n)
                x = forward_noising(x, again[:, 0], following, level)
                z = again[:, drawn] if stochastic else None
            states = []
            for part in task.batches(len(rows)):
                own = x[part]
                if i in window:
                    seen, _, grad = slope(task, task.policy, rows[part], own, i, through)
                    if normalize == "unit":
                        norm = grad.flatten(1).norm(dim=1).clamp(min=1e-12)
                        grad = grad / norm.view(-1, *[1] * (grad.ndim - 1))
                    change = rate(level.alpha, level.sigma, strength) * grad
                    seen = corrected(seen, level.alpha, level.sigma, change)
                else:
                    with torch.no_grad():
                        cond = task.cond(rows[part])
                        seen = sampling.predict(task.policy, own, i, cond)
                step = sampling.step(own, seen, i)
                states.append(step.mean if z is None else step.sample(z[part]))
            x = torch.cat(states)
        drawn += stochastic
    yield replace(finish(task, rows, noise, x), redraws=False)
