"""Trajectory tilting with a look-ahead: particles steered by t times the reward of where they go.

After Flow Map Trajectory Tilting (FMTT, arXiv 2511.22688). Not reproduced: there is no code of the
authors, and their hyper-parameters were not known here.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch

from ..policies import Policy
from .base import Bounds, Count, Share, Steps, Task, Weight
from .guidance import slope
from .smc import Look, measured, steered


def flow_map(
    task: Task,
    particles: Count = 4,
    strength: Weight = 10.0,
    interval: Share = 0.05,
    start: Share = 0.0,
    end: Share = 0.99,
    threshold: Weight = 0.9,
    top: Annotated[int, Bounds(0)] = 0,
    gradient: Weight = 0.0,
    *,
    look_ahead: Policy | Literal["denoiser"] = "denoiser",
) -> Steps:
    """After the plain sample k = `particles` others, tilted on the way by r_t(x) = t R(X_t(x)).

        dx = b dt + ε (score + g λ ∇r_t) dt + √(2ε) dW,   weights exp(λ r_t) at each time

    X_t(x): where the flow map takes x at time t = α/(α + σ), from noise 0 to data 1. Weights, their
    resampling and the gradient's importance weights are those of `smc.steer`, with the difference
    of r_t as potential, and the end weighted by R itself: they lead to the same tilted law as the
    integral of R(X_t) dt along a path, for any look-ahead, by weights with other noise.

    look_ahead: "denoiser" is the policy's own x̂0, which is no flow map but the mean of where x may
    go; or, from Python, another policy of the same latents and levels, such as a distilled one,
    whose one step is the map (CFG as the task has it, and its calls counted with the policy's).
    top: n above 0 keeps the n particles of highest r_t instead, a search without
    weights. gradient: g, 1 the equation above, 0 none; one backward pass through the look-ahead at
    every stochastic step. interval, start, end: parts of the K steps at which weights are updated.
    threshold: the part of k below which the effective sample size leads to resampling.

    Approximate, and not the authors' method: both look-aheads are one step, ε is what the kernel of
    the task has (s² = 2 ε dt), and ∇r_t is held during a step. Maps of 2 or 4 steps are left out.
    """
    if top > particles:
        raise ValueError(
            f"flow_map.top={top} keeps more than particles={particles}; use {particles} or less"
        )
    if gradient:
        task.reward.require_differentiable()
    at = measured(task, start, end, interval)
    other = None if look_ahead == "denoiser" or look_ahead is task.policy else look_ahead
    look = looking(task, other, gradient > 0)
    return steered(task, particles, strength, "diff", at, threshold, look, gradient, top)


def looking(task: Task, other: Policy | None, gradient: bool) -> Look:
    """r_t and its gradient by the policy's x̂0, or by that of another."""
    policy, sampling = task.policy, task.sampling
    time = (sampling.levels.alpha / (sampling.levels.alpha + sampling.levels.sigma)).tolist()

    @torch.no_grad()
    def predicted(model, rows, x, i):
        cond = model.encode([task.prompts[j].text for j in rows])
        return model.predict(x, sampling.levels[i], cond, sampling.guidance)

    def look(rows, x, i, wanted):
        model, steep = other or policy, gradient and sampling.stochastic[i]
        seen = ahead = reward = grad = None
        before = model.calls
        if steep:
            ahead, reward, grad = slope(task, model, rows, x, i, "denoiser")
            grad = time[i] * grad
        elif wanted or other is None:
            ahead = predicted(model, rows, x, i)
            if wanted:
                with torch.no_grad():
                    reward = task.score(policy.decode(ahead.x0), rows)[0]
        if other is None:
            seen = ahead
        else:
            policy.calls += model.calls - before
            seen = predicted(policy, rows, x, i)
        assert seen is not None
        return seen, time[i] * reward if wanted and reward is not None else None, grad

    return look
