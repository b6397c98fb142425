"""The training loop of EmojiWorld's own models: AdamW, cosine rate, weight averaging, resume."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def unit(images: Tensor) -> Tensor:
    """uint8 (n, 3, H, W) -> float32 in [-1, 1], as AutoencoderKL sees pictures."""
    return images.float() / 127.5 - 1


def save(state: Any, path: Path) -> None:
    """torch.save that keeps the old file until the new one is whole: it is hours of training."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    torch.save(state, part)
    part.replace(path)


def fit(
    modules: dict[str, nn.Module],
    loss: Callable[[int], Tensor],
    steps: int,
    lr: float,
    checkpoint: Path,
    ema: float = 0.999,
    weight_decay: float = 0.01,
    report: Callable[[int], dict] | None = None,
    report_every: int = 500,
    minutes: float = math.inf,
) -> dict:
    """Minimise `loss(step)` for `steps` steps, or as many as `minutes` allow, under bf16 autocast;
    `modules` end with averaged weights.

    The rate warms up over 3 % of the steps, or minutes, and falls to zero along a cosine. The state
    is written every `report_every` steps and an interrupted run goes on from it. Returns the last
    report with "steps", "minutes" and "loss".
    """
    params = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    average = [p.detach().clone() for p in params]
    device, start, seconds, figures = params[0].device, 0, 0.0, {}
    if checkpoint.exists():
        state = torch.load(checkpoint, device, weights_only=True)
        start, seconds = state["step"], state["seconds"]
        optimizer.load_state_dict(state["optimiser"])
        for p, a, saved_p, saved_a in zip(
            params, average, state["params"], state["average"], strict=True
        ):
            p.data.copy_(saved_p)
            a.copy_(saved_a)

    def swap() -> None:
        for p, a in zip(params, average, strict=True):
            p.data, a.data = a.data, p.data

    clock, mean = time.time() - seconds, 0.0
    for step in range(start, steps):
        torch.manual_seed(step)
        done = max(step / steps, (time.time() - clock) / 60 / minutes)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, done / 0.03) * (1 + math.cos(math.pi * done)) / 2
        with torch.autocast(device.type, torch.bfloat16):
            value = loss(step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in params], 1 - decay)
        mean += (value.item() - mean) / min(step - start + 1, 200)
        last = step + 1 == steps or done >= 1
        if (step + 1) % report_every == 0 or last:
            seconds = time.time() - clock
            swap()
            figures = {
                "steps": step + 1,
                "minutes": round(seconds / 60, 1),
                "loss": round(mean, 5),
            } | (report(step + 1) if report else {})
            swap()
            print(json.dumps(figures), flush=True)
            state = {
                "step": step + 1,
                "seconds": seconds,
                "optimiser": optimizer.state_dict(),
                "params": [p.data for p in params],
                "average": average,
            }
            save(state, checkpoint)
        if last:
            break
    swap()
    return figures
