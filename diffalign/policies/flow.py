"""What rectified flows share: levels as diffusers' Euler scheduler sets them, 2×2 packing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dynamics import Levels
from . import schedulers
from .base import Policy

ODD = (
    "invert_sigmas", "stochastic_sampling",
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
)  # fmt: skip
"""Settings of the Euler scheduler that do more than shift the levels; they are refused."""

PATCH = 2  # side of a token in latents, in SD3, FLUX.1, Qwen-Image and Z-Image

JOINT_ATTENTION = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip
"""Attention of picture and text together, as diffusers names it in SD3, FLUX.1 and Qwen-Image."""


class FlowPolicy(Policy):
    """A rectified flow, x = (1 - sigma) x0 + sigma noise, whose network gets t = 1000 sigma; 1000
    is the scheduler's number of training timesteps."""

    predicts = "flow"

    def at(self, time: Tensor) -> Levels:
        t = self.schedule_config["num_train_timesteps"] * time
        return Levels(t, 1 - time, time).to(self.device)


def flow_levels(
    config: dict[str, Any],
    steps: int,
    shape: tuple[int, ...],
    linspace: bool | Sequence[float],
    patch: int = PATCH,
    mu: float | None = None,
) -> Levels:
    """Levels (steps + 1,) with alpha = 1 - sigma and t = 1000 sigma; the last has sigma = 0.

    The sigmas are shifted, sigma -> s sigma / (1 + (s - 1) sigma), where s is the constant `shift`.
    With `use_dynamic_shifting` s is e^mu or mu (`time_shift_type`), and mu is linear in the number
    of image tokens unless given. The sigmas are then stretched to end at `shift_terminal`, if that
    is set. linspace: before the shift they run from 1 to 1 / steps, as in FluxPipeline; else over
    the scheduler's own range, as in SD3's pipeline; or they are these. patch: side of a token in
    latents. Raises ValueError for any scheduler but the plain Euler one.
    """
    name = config["_class_name"]
    odd = [f" with {k}" for k in ODD if config.get(k)]
    if name != "FlowMatchEulerDiscreteScheduler" or odd:
        raise ValueError(
            f"the scheduler {name}{''.join(odd)} of this flow model is not supported; save the "
            "pipeline with a plain FlowMatchEulerDiscreteScheduler (any solver integrates the same "
            "flow)"
        )
    tokens = shape[1] // patch * (shape[2] // patch)
    sigma = schedulers.flow_sigmas(config, steps, tokens, linspace, mu)
    n = config.get("num_train_timesteps", schedulers.FLOW["num_train_timesteps"])
    sigma = torch.cat([sigma, torch.zeros(1)])
    return Levels(sigma * n, 1 - sigma, sigma)


def packed(x: Tensor) -> Tensor:
    """Latents (n, C, H, W) as tokens of 2×2, (n, H W / 4, 4 C), as FLUX.1 and Qwen-Image take
    them."""
    n, channels, height, width = x.shape
    x = x.view(n, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(n, height * width // PATCH**2, -1)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `packed`: latents (n, C, height, width)."""
    n, rows, columns = len(tokens), height // PATCH, width // PATCH
    grid = tokens.view(n, rows, columns, -1, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(n, -1, height, width)
