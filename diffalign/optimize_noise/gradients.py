"""The reward's gradient with respect to noise, and descent along it, for ReNO and DNO."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .base import Step, Task, chain, joined


def reward_gradient(
    task: Task, rows: Sequence[int], x0: Tensor, checkpoint: bool = False
) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """Pictures of clean latents x0 (m, *latent), total reward R (m,), its parts, and ∂R/∂x0.

    The graphs of the rewards exist one after another and are freed before the decoder is
    differentiated. checkpoint: build the decoder's graph only then, by decoding once more, so that
    it is never in memory together with a reward's.
    """
    x0 = x0.detach().requires_grad_()
    images = task.policy.decode(x0, differentiable=not checkpoint)
    total, parts, slope = task.slope(images.detach(), rows)
    if checkpoint:
        images = task.policy.decode(x0, differentiable=True)
    return images.detach(), total, parts, pulled_back(images, x0, slope)


def pulled_back(y: Tensor, x: Tensor, grad: Tensor) -> Tensor:
    """(∂y/∂x)ᵀ grad (n, ...), where each sample of y (n, ...) depends on its own x alone. Each
    sample's gradient is scaled to a maximum of 1 on the way, as small ones would vanish in
    float16."""
    size = grad.flatten(1).abs().amax(1).clamp(min=torch.finfo(grad.dtype).tiny)
    size = size.view(-1, *[1] * (grad.ndim - 1))
    (found,) = torch.autograd.grad(y, x, grad / size)
    return found * size.view(-1, *[1] * (found.ndim - 1))


def adjoint(task: Task, rows: Sequence[int], states: Sequence[Tensor], grad: Tensor) -> Tensor:
    """∂R/∂z (m, 1 + S, *latent) for the noises that led to the states x_0 … x_K, given g_K =
    ∂R/∂x_K.

        x_{i+1} = μ_i(x_i) + s_i z_i:   ∂R/∂z_i = s_i g_{i+1},   g_i = (∂μ_i/∂x_i)ᵀ g_{i+1}

    and g_0 is the gradient for the initial noise, which is x_0 itself. s_i depends on the schedule
    alone in every kernel of `dynamics`. Only one denoiser step has its graph at a time; the result
    equals autograd through the chain.
    """
    cond, sampling, grads = task.cond(rows), task.sampling, []
    for i in reversed(range(sampling.steps)):
        x = states[i].detach().requires_grad_()
        with torch.enable_grad():
            step = sampling.transition(task.policy, x, i, cond)
        if sampling.stochastic[i]:
            grads.append(step.std.detach() * grad)
        grad = pulled_back(step.mean, x, grad)
    return torch.stack([grad, *reversed(grads)], 1)


def noise_gradient(
    task: Task, rows: Sequence[int], noise: Tensor, checkpoint: bool = False
) -> tuple[Step, Tensor]:
    """The pictures of `draw(task, rows, noise)` and ∂R/∂noise (m, 1 + S, *latent).

    The pictures are bit for bit the same, as long as a backend's kernels do not depend on whether a
    gradient is wanted; on the CPU they do not. Sampling keeps no graph, so the adjoint sweep calls
    the denoiser a second time. If there is a single step, its graph is kept and one call is enough.
    With `checkpoint` it is not: the graphs of denoiser, decoder and rewards then exist one after
    another. The weights get no gradient.
    """
    keep = task.sampling.steps == 1 and not checkpoint
    steps, grads = [], []
    for part in task.batches(len(rows)):
        own, z = rows[part], noise[part].detach().requires_grad_(keep)
        with torch.set_grad_enabled(keep):
            states = list(chain(task.policy, task.cond(own), task.sampling, z))
        images, total, parts, grad = reward_gradient(task, own, states[-1], checkpoint)
        grad = pulled_back(states[-1], z, grad) if keep else adjoint(task, own, states, grad)
        steps.append(Step(own, images, z.detach(), total, parts))
        grads.append(grad)
    return joined(steps), torch.cat(grads)


def descend(
    task: Task,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    penalty: Callable[[Tensor], Tensor],
    clip: float,
    iterations: int,
    initial_only: bool,
    checkpoint: bool,
) -> Iterator[Step]:
    """Minimize -R + penalty over the noise of all prompts at once, starting from the plain samples.

    Each prompt has its own objective, and its gradient is clipped to the norm `clip` separately, so
    with an elementwise optimizer it takes the path that it would take alone. penalty: a function
    from z (n, k, *latent) to the penalty's gradient. initial_only: the noise of the stochastic
    steps stays as it is (k = 1, else 1 + S).
    """
    rows = range(len(task))
    plain = task.noise(rows)
    z = plain[:, :1].clone() if initial_only else plain.clone()
    k, rule = z.shape[1], optimizer([z])
    for i in range(iterations):
        step, grad = noise_gradient(task, rows, torch.cat([z, plain[:, k:]], 1), checkpoint)
        yield step
        if i + 1 == iterations:
            break
        z.grad = clipped(penalty(z) - grad[:, :k], clip)
        rule.step()


def clipped(grad: Tensor, most: float) -> Tensor:
    """Each sample of grad (n, ...) scaled down to the norm `most` where it is longer; the 1e-6 is
    that of `torch.nn.utils.clip_grad_norm_`."""
    norm = grad.flatten(1).norm(dim=1).view(-1, *[1] * (grad.ndim - 1))
    return grad * (most / (norm + 1e-6)).clamp(max=1)
