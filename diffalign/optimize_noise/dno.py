"""DNO: all the noise of a many-step sampler, by gradient ascent (arXiv 2405.18881)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Annotated

import torch
from torch import Tensor

from .base import Bounds, Count, Positive, Step, Task, Weight
from .gradients import descend


def implausibility(noise: Tensor, block: int = 4) -> Tensor:
    """How implausible noise (n, d) is as n draws of N(0, I_d): (n,), 2 log 2 or more.

        z = noise as m = d // k vectors of k = `block`,   μ = mean z,   C = mean z zᵀ
        -min(-m ‖μ‖² / 2k, -log 2) - min(-m max(√(1 + ‖C - I‖₂) - 1 - √(k/m), 0)² / 2, -log 2)

    The two terms are the logarithms of tail bounds on ‖μ‖ and ‖C - I‖₂ (arXiv 2405.18881), cut off
    where the bounds say nothing; the gradient is 0 there. For normal noise the second term is
    always cut off, the first in three of four draws (k = 4). The last d - m k numbers are ignored.
    """
    m = noise.shape[1] // block
    z = noise[:, : m * block].unflatten(1, (m, block))
    second = z.mT @ z / m - torch.eye(block).to(z)
    spread = torch.linalg.eigvalsh(second).abs().amax(1)
    excess = ((1 + spread).sqrt() - 1 - math.sqrt(block / m)).clamp(min=0)
    logs = -m * z.mean(1).square().sum(1) / (2 * block), -m * excess.square() / 2
    return -torch.stack(logs).clamp(max=-math.log(2)).sum(0)


def dno(
    task: Task,
    iterations: Count = 100,
    lr: Positive = 0.01,
    clip: Positive = 1.0,
    regularization: Weight = 1.0,
    block: Count = 4,
    permutations: Annotated[int, Bounds(0)] = 100,
    initial_only: bool = False,
    checkpoint: bool = False,
) -> Iterator[Step]:
    """Optimise every noise z of a sampler for the reward (DNO, arXiv 2405.18881).

        min_z  -Σ_k w_k R_k(decode(x_K(z)), c) + γ (P(z) + mean over permutations π of P(π z))

    P is `implausibility` of z, in the order in which z is used and in random orders. It hardly acts
    as long as z looks like a draw of N(0, I). The optimizer is Adam, after clipping the norm of the
    gradient. Each prompt gets `iterations` pictures, the first of them the plain sample; the best
    is chosen by reward alone. With a deterministic kernel z is the initial noise alone.

    The gradient is exact; it takes the memory of one denoiser step (`gradients.adjoint`) and twice
    the calls of a picture. regularization: γ, 1 as in the authors' example (their code has it off
    by default). block: k. permutations: number of random orders; 0 = only the order of use.
    initial_only: leave the noise of the stochastic steps as it is. checkpoint: keep the graphs of
    decoder and rewards one after the other, not together, at the cost of one more decoding.

    Left out: the authors' gradient-free variant, and optimising only the last steps. Their AdamW
    decays the noise by 1 % of lr per step; Adam here does not. Raises ValueError for a reward
    without gradient, and for a block larger than the noise.
    """
    task.reward.require_differentiable()
    noises = 1 if initial_only else 1 + sum(task.sampling.stochastic)
    d = noises * math.prod(task.policy.latent_shape)
    if block > d:
        raise ValueError(
            f"dno.block={block} exceeds the {d} numbers of the noise; use a small part of them, "
            "such as 4"
        )
    generator = torch.Generator().manual_seed(0)  # the same orders for any number of prompts

    def penalty(z: Tensor) -> Tensor:
        if not regularization:
            return torch.zeros_like(z)
        flat = z.detach().flatten(1).requires_grad_()
        orders = [torch.randperm(flat.shape[1], generator=generator) for _ in range(permutations)]
        grad = torch.zeros_like(flat)
        # one order at a time: together they would hold `permutations` copies of the noise
        for order in [None, *orders]:
            with torch.enable_grad():
                seen = flat if order is None else flat[:, order.to(flat.device)]
                share = regularization if order is None else regularization / permutations
                grad += share * torch.autograd.grad(implausibility(seen, block).sum(), flat)[0]
        return grad.view_as(z)

    rule = partial(torch.optim.Adam, lr=lr)
    return descend(task, rule, penalty, clip, iterations, initial_only, checkpoint)
