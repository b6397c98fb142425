"""What the bare calls of a run cost: overhead is the wall time over theirs, of the same shapes.

`Recorder` notes every call of denoiser, decoder and rewards that a run makes, by what its cost
depends on; `replay` makes one call of each kind again, alone, and times it.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .trainer import Trainer


class Kind(NamedTuple):
    """What the cost of a call depends on. rows: samples. gradient: "" (none), "weights" (a backward
    pass to the trained weights) or "input" (to the latents, or pixels, too). base: without a LoRA,
    by the base model or with the LoRA merged. part: denoiser, decoder or reward."""

    phase: str
    part: str
    rows: int
    gradient: str
    base: bool


@dataclass
class Recorder:
    """Counts calls by their kind, and keeps the arguments of the first of each for `replay`.

    seconds: wall time of every phase, rollout, update and evaluation.
    """

    trainer: Trainer
    phase: str = ""
    counts: Counter[Kind] = field(default_factory=Counter)
    again: dict[Kind, Callable[[], Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Calls made inside are noted."""
        policy, reward, trainer = self.trainer.policy, self.trainer.reward, self.trainer
        put: list[tuple[Any, str]] = []

        def replace(owner: Any, name: str, by: Callable[[Any], Any]) -> None:
            setattr(owner, name, by(getattr(owner, name)))
            put.append((owner, name))

        replace(policy, "call", self._denoiser)
        replace(policy, "_decode", self._decoder)
        replace(reward, "score", self._reward)
        if trainer.evaluation.judge is not None:
            replace(trainer.evaluation.judge, "score", self._reward)
        replace(trainer, "_sample", self._in("rollout"))
        for name in ("_from_advantages", "_from_gradients"):
            replace(trainer, name, self._in("update"))
        replace(trainer, "evaluate", self._in("evaluation"))
        try:
            yield
        finally:
            for owner, name in reversed(put):
                delattr(owner, name)  # the class's own is behind it

    def _in(self, phase: str) -> Callable[[Any], Any]:
        def wrap(method: Any) -> Any:
            def timed(*args: Any, **options: Any) -> Any:
                self.phase, start = phase, time.perf_counter()
                try:
                    return method(*args, **options)
                finally:
                    synchronize(self.trainer.policy.device)
                    self.seconds[phase] += time.perf_counter() - start
                    self.phase = ""

            return timed

        return wrap

    def _note(self, part: str, x: Tensor, call: Callable[[Tensor], Tensor], base: bool) -> None:
        gradient = ""
        if torch.is_grad_enabled():
            gradient = "input" if x.requires_grad else "weights" if part == "denoiser" else ""
        kind = Kind(self.phase, part, len(x), gradient, base)
        self.counts[kind] += 1
        if kind not in self.again:
            self.again[kind] = partial(self._once, kind, x.detach().clone(), call)

    def _once(self, kind: Kind, x: Tensor, call: Callable[[Tensor], Tensor]) -> None:
        policy = self.trainer.policy
        with (
            torch.set_grad_enabled(bool(kind.gradient)),
            policy.reference() if kind.base else nullcontext(),
        ):
            out = call(x.requires_grad_(kind.gradient == "input"))
            if kind.gradient:
                out.float().square().mean().backward()

    def _denoiser(self, method: Any) -> Any:
        policy = self.trainer.policy

        def call(x: Tensor, *args: Any) -> Tensor:
            def again(x: Tensor) -> Tensor:
                with policy.autocast():
                    return method(x, *args)

            self._note("denoiser", x, again, not _trained(policy.network))
            return method(x, *args)

        return call

    def _decoder(self, method: Any) -> Any:
        def call(x0: Tensor, vae: Any) -> Tensor:
            self._note("decoder", x0, lambda x: method(x, vae), False)
            return method(x0, vae)

        return call

    def _reward(self, method: Any) -> Any:
        def call(images: Tensor, *args: Any, **options: Any) -> Any:
            self._note("reward", images, lambda x: method(x, *args, **options)[0], False)
            return method(images, *args, **options)

        return call

    def replay(self, repeats: int = 5) -> dict[Kind, float]:
        """Seconds that all recorded calls of each kind take bare: the median of `repeats` times
        their number."""
        found: dict[Kind, list[float]] = {kind: [] for kind in self.again}
        for _ in range(repeats):
            for kind, again in self.again.items():
                synchronize(self.trainer.policy.device)
                start = time.perf_counter()
                again()
                synchronize(self.trainer.policy.device)
                found[kind].append(time.perf_counter() - start)
        self.trainer.optimizer.adamw.zero_grad()
        return {kind: self.counts[kind] * median(times) for kind, times in found.items()}


def _trained(network: Any) -> bool:
    """Whether what was trained is on: False inside of `Policy.reference`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    first = next((m for m in network.modules() if isinstance(m, BaseTunerLayer)), None)
    return first is None or not first.disable_adapters


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
