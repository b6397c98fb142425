"""ReNO: the initial noise of a one-step model, by gradient ascent (arXiv 2406.04312)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .base import Count, Positive, Share, Step, Task, Weight
from .gradients import descend


def chi_regularizer(noise: Tensor) -> Tensor:
    """½‖ε‖² - (d - 1) log‖ε‖ of each sample of noise (n, ...), d its number of elements: (n,).

    Up to a constant this is the negative log-density of the norm of d standard normals (χ_d); its
    minimum is at ‖ε‖² = d - 1.
    """
    norm = noise.flatten(1).norm(dim=1)
    return 0.5 * norm.square() - (noise[0].numel() - 1) * norm.log()


def reno(
    task: Task,
    iterations: Count = 50,
    lr: Positive = 5.0,
    momentum: Share = 0.9,
    clip: Positive = 0.1,
    regularization: Weight = 0.01,
    checkpoint: bool = False,
) -> Iterator[Step]:
    """Optimise the initial noise ε for the reward (ReNO, arXiv 2406.04312).

        min_ε  -Σ_k w_k R_k(decode(x_K(ε)), c) + λ (½‖ε‖² - (d - 1) log‖ε‖)

    by SGD with Nesterov momentum, after clipping the gradient's norm. Each prompt gets `iterations`
    pictures, the first of them the plain sample; the best is chosen by reward alone. ε is float32
    whatever the model's dtype, and noise that a stochastic kernel adds later stays the same. The
    method is meant for one-step models; several steps are differentiated by an adjoint sweep, with
    twice the calls. The rewards are differentiated one after another.

    The paper's settings are for d = 16384 (SD-Turbo), where a step moves ε by lr clip / (1 -
    momentum) at most, 4 % of its norm √d; with smaller latents the same lr moves a larger share.

    regularization: λ. checkpoint: keep the graphs of denoiser, decoder and rewards one after
    another, not together, at the cost of one more pass through the first two.

    Left out: Adam and LBFGS, options of the authors' code. That code optimizes one prompt at a
    time, in half precision. Raises ValueError for a reward without gradient.
    """
    task.reward.require_differentiable()

    def penalty(z: Tensor) -> Tensor:
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            return regularization * torch.autograd.grad(chi_regularizer(z).sum(), z)[0]

    rule = partial(torch.optim.SGD, lr=lr, momentum=momentum, nesterov=momentum > 0)
    return descend(task, rule, penalty, clip, iterations, True, checkpoint)
