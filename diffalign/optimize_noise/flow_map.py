"""Trajectory tilting with a look-ahead: particles steered by t times the reward they lead to.

After Flow Map Trajectory Tilting (FMTT, arXiv 2511.22688). Not reproduced: there is no code by the
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
    """After the plain sample, k = `particles` others, tilted on the way by r_t(x) = t R(X_t(x)).

        dx = b dt + ε (score + g λ ∇r_t) dt + √(2ε) dW,   weights exp(λ r_t) at each time

    X_t(x): the clean latents to which the flow map takes x at time t = α/(α + σ), 0 at noise and 1
    at data. Weights, resampling and the gradient's importance weights are those of `smc.steer`,
    with the difference of r_t as potential; finished pictures are weighted by R itself. For any
    look-ahead they lead to the same tilted law as weights by the integral of R(X_t) dt along a
    path; only the noise of the weights differs.

    look_ahead: "denoiser" is the policy's own x̂0, which is not a flow map but the mean of where x
    may go. From Python it may be another policy of the same latents and levels, such as a distilled
    one, whose one step is the map; it uses the task's guidance, and its calls count with the
    policy's. top: n above 0 keeps the n particles of highest r_t in place of resampling, a search
    without weights. gradient: g; 1 is the equation above, 0 uses no gradient. Above 0 each
    stochastic step costs one backward pass through the look-ahead. interval, start, end: shares of
    the K steps; weights are updated every interval from start to end. threshold: resample if the
    effective sample size is below this share of k.

    An approximation, not the authors' method: both look-aheads take one step, ε is that of the
    task's kernel (s² = 2 ε dt), and ∇r_t is constant during a step. Maps of 2 or 4 steps are left
    out.
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
    """Looks ahead for r_t and its gradient, with the policy's x̂0 or with that of `other`."""
    policy, sampling = task.policy, task.sampling
    time = (sampling.levels.alpha / (sampling.levels.alpha + sampling.levels.sigma)).tolist()

    @torch.no_grad()
    def predicted(model, rows, x, i):
        cond = model.encode([task.prompts[j].text for j in rows])
        return sampling.predict(model, x, i, cond)

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
