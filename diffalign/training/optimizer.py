"""The optimiser step: gradients summed over processes, scaled, clipped; schedule and averages."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..config import OptimConfig
from ..config.decoding import ConfigError
from ..policies import Policy
from ..policies.sharding import alike, all_of, local
from .stopping import IN_A_ROW, NotFinite, unusable_gradient

if TYPE_CHECKING:
    from accelerate import Accelerator


def check_optimizer(name: str) -> None:
    """Raises ConfigError for the 8-bit AdamW where bitsandbytes is missing."""
    if name == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "train.optimizer=adamw8bit needs bitsandbytes; pip install bitsandbytes, or use adamw"
        )


def make_optimizer(config: OptimConfig, *groups: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, or its 8-bit form of bitsandbytes, of groups of weights."""
    check_optimizer(config.optimizer)
    adamw: Any = torch.optim.AdamW
    if config.optimizer == "adamw8bit":
        adamw = importlib.import_module("bitsandbytes.optim").AdamW8bit
    parts = [{"params": list(group)} for group in groups if group]
    return adamw(parts, config.lr, weight_decay=config.weight_decay)


class Buckets:
    """The gradients of weights that every process has whole, as views of a few buffers, so that
    they are summed in place and in large pieces."""

    LARGEST = 2**25  # bytes

    def __init__(self, parameters: Iterable[nn.Parameter], accelerator: Accelerator):
        self.buffers: list[Tensor] = []
        self._views: list[tuple[nn.Parameter, Tensor]] = []
        groups: list[list[nn.Parameter]] = []
        for p in parameters:
            last = groups[-1] if groups else []
            held = sum(other.nbytes for other in last) + p.nbytes
            if last and held <= self.LARGEST and last[0].dtype == p.dtype:
                last.append(p)
            else:
                groups.append([p])
        for group in groups:
            buffer = torch.zeros(
                sum(p.numel() for p in group), dtype=group[0].dtype, device=accelerator.device
            )
            self.buffers.append(buffer)
            parts = buffer.split([p.numel() for p in group])
            for p, g in zip(group, parts, strict=True):
                # in the order in memory that the weight has, as autograd wants it
                channels_last = p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last)
                plain = torch.empty(p.shape, device="meta").stride()
                strides = p.stride() if channels_last else plain
                self._views.append((p, g.as_strided(p.shape, strides)))
        self.clear()

    @torch.no_grad()
    def sum(self) -> None:
        """Over all processes."""
        for p, view in self._views:
            if p.grad is not view:  # somebody gave it another
                view.copy_(cast(Tensor, p.grad))
                p.grad = view
        works = [torch.distributed.all_reduce(b, async_op=True) for b in self.buffers]
        for work in works:
            cast(Any, work).wait()

    def clear(self) -> None:
        for buffer in self.buffers:
            buffer.zero_()
        for p, view in self._views:
            p.grad = view


class Optimizer:
    """Everything that moves weights: those of the policy, and an algorithm's own beside them.

    steps: optimiser steps of the whole run, for the schedule.
    """

    def __init__(
        self,
        policy: Policy,
        extra: Iterable[nn.Parameter],
        config: OptimConfig,
        accelerator: Accelerator,
        dtype: str,
        steps: int,
    ):
        from diffusers.optimization import get_scheduler

        self.policy, self.config, self.accelerator = policy, config, accelerator
        self.trained = policy.trainable_parameters()
        self.extra = list(extra)
        self.parameters = self.trained + self.extra
        # two groups: those of a divided denoiser cannot be updated in one call with whole ones
        self.adamw = make_optimizer(config, self.trained, self.extra)
        whole = self.extra if policy.sharding else self.parameters
        self.buckets = Buckets(whole, accelerator) if accelerator.num_processes > 1 else None
        # only the factor over the steps is taken: a rate is then a function of `updates` alone
        schedule: Any = get_scheduler(
            config.lr_schedule,
            self.adamw,
            num_warmup_steps=config.warmup,
            num_training_steps=steps,
        )
        self.factor = schedule.lr_lambdas[0]
        # the smallest gradients vanish in float16 unless they are scaled up
        on = dtype == "float16"
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=on)
        self.updates, self.lr = 0, config.lr  # steps made, and the rate of the last one
        self.skipped = self.made = 0  # steps of this session
        self.dtype = dtype
        # asked, if steps must be skipped, what made the gradient infinite; None = not this
        self.suspects: list[Callable[[], str | None]] = []
        self._hopeless = 0  # skipped steps in a row that no smaller loss scale could have saved
        if config.ema:
            policy.add_copy("ema")

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self) -> Tensor:
        """One step from the accumulated gradients; returns their norm before clipping, a scalar.

        Where the norm is NaN or infinite no weight, average or optimizer state changes, on any
        process: it is taken after the sum over all of them. Raises NotFinite after five such steps
        in a row (in float16 once the loss scale is down to 1), and for weights that are no longer
        finite.

        Gradients of whole weights are summed over processes here rather than by wrapping the
        network: processes may run different numbers of backward passes, and the adjoint sweep runs
        several per sample. Of divided weights every process has its rows of the sum already.
        """
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.buckets is not None:
            self.buckets.sum()
        if self.policy.sharding is not None:
            for p in self.trained:  # FSDP2 takes the mean over the processes
                local(cast(Tensor, p.grad)).mul_(self.accelerator.num_processes)
        n, warmup = self.updates, self.config.warmup
        # diffusers' warm-up would waste the first step on a rate of 0
        self.lr = self.config.lr * ((n + 1) / warmup if n < warmup else self.factor(n))
        for group in self.adamw.param_groups:
            group["lr"] = self.lr
            group["weight_decay"] = self.config.weight_decay
        self.scaler.unscale_(self.adamw)
        norm, extra = (
            all_of(torch.nn.utils.clip_grad_norm_(part, self.config.max_grad_norm))
            for part in (self.trained, self.extra)
        )
        finite = bool((norm + extra).isfinite())  # waits for the device once
        if finite:
            self.scaler.step(self.adamw)
        self.scaler.update()  # in float16 a smaller scale, where a gradient has overflown
        self.adamw.zero_grad()
        if self.buckets is not None:
            self.buckets.clear()
        self._made() if finite else self._skip()
        return norm

    def _made(self) -> None:
        self.updates += 1
        self.made, self._hopeless = self.made + 1, 0
        self.suspects.clear()
        parts = self.trained, self.extra
        if not all(all_of(torch.nn.utils.get_total_norm(part)).isfinite() for part in parts):
            raise NotFinite(
                f"the weights are not finite after an update with train.lr={self.lr:g} "
                f"({self.dtype}): lower train.lr"
            )
        if self.config.ema:
            n = self.updates
            self.follow("ema", min(self.config.ema, (1 + n) / (10 + n)))

    def _skip(self) -> None:
        self.skipped += 1
        self._hopeless += self.scaler.get_scale() <= 1  # 1 where there is none
        if self._hopeless >= IN_A_ROW:
            raise self._stuck(f"{self._hopeless} updates in a row were")

    def check_made(self) -> None:
        """Raises NotFinite where steps were tried and every one was skipped."""
        if self.skipped and not self.made:
            raise self._stuck(f"all {self.skipped} update(s) were")

    def _stuck(self, skipped: str) -> NotFinite:
        scale = self.scaler.get_scale()
        blame = next((found for ask in self.suspects if (found := ask())), None)
        return unusable_gradient(skipped, blame, self.config.lr, self.dtype, scale)

    @torch.no_grad()
    def follow(self, name: str, decay: float) -> None:
        """copy <- decay copy + (1 - decay) θ, of the policy's copy `name`."""
        for copy, p in zip(self.policy.weights(name), self.policy.weights(), strict=True):
            local(copy).lerp_(local(p).to(local(copy)), 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        # the name in checkpoints, which must stay readable
        parts = {"optimiser": self.adamw, "scaler": self.scaler}
        return {k: part.state_dict() for k, part in parts.items()} | {"updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates = state["updates"]
        saved, parameters = state["optimiser"], list(enumerate(self.parameters))
        moments = {
            i: {k: alike(p, v) for k, v in saved["state"][i].items()}
            for i, p in parameters
            if i in saved["state"]
        }
        self.adamw.load_state_dict({**saved, "state": moments})
        if state["scaler"]:  # nothing where the dtype needs none
            self.scaler.load_state_dict(state["scaler"])
