"""Is an update signal or noise? The gradient noise scale (McCandlish et al., arXiv 1812.06162).

An update of N pictures has the gradient g = Σ_i g_i of its parts i of n_i pictures, w_i = n_i / N.
With G the true gradient and S the trace of the covariance of one picture's, independent parts have

    E (|g|² - Σ |g_i|²) = |G|² (1 - Σ w_i²)        E Σ |g_i|² = |G|² Σ w_i² + S / N

so that both |G|² and S follow from norms that an update has anyway. The noise scale S / |G|² is the
number of pictures at which an update is half signal. The parts are whole prompts, for the pictures
of a prompt are alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator

WINDOW = 20  # epochs that are averaged
TELLING = 5  # epochs after which words are found for it
HOPELESS = 30  # times the pictures of an update, from where nothing was seen to be learnt


class Parts:
    """Norms of the parts of one update's gradient, which accumulates in `parameters`.

    groups: the prompt of each picture, in the order in which they are learnt from. A part ends
    where a micro-batch ends with the last picture of a prompt. scale: of the gradients, in float16.
    Takes memory for three more gradients while it looks, and for one in between; without
    parameters it does nothing.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], groups: Sequence[Any], scale: float):
        self.parameters, self.groups, self.scale = parameters, groups, scale
        self._before, self._done = None, 0
        self._squares: list[Tensor] = []
        self._pictures: list[int] = []

    @torch.no_grad()
    def learnt(self, done: float) -> None:
        """The first `done` pictures are in the gradient, the last of them maybe in part."""
        i, groups = round(done), self.groups
        goes_on = i < len(groups) and groups[i - 1] == groups[i]
        if not self.parameters or i != done or goes_on:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        now = torch.cat([g.flatten() for g in grads])
        own = now if self._before is None else now - self._before
        self._squares.append((torch.linalg.vector_norm(own) / self.scale).square())
        self._pictures.append(i - self._done)
        self._before, self._done = now, i

    def figures(self, norm: Tensor, pictures: int, accelerator: Accelerator) -> dict[str, Tensor]:
        """{"gradient_signal": |G|², "gradient_noise": S}, scalars, unbiased, so that the first may
        be negative; nothing where there is one part. norm: of the gradient of all processes, before
        any scaling; pictures: of all."""
        if not self.parameters or (len(self._squares) < 2 and accelerator.num_processes == 1):
            return {}
        squares = torch.stack(self._squares).sum() if self._squares else norm.new_zeros(())
        shares = squares.new_tensor(sum((n / pictures) ** 2 for n in self._pictures))
        sums: Any = accelerator.reduce(torch.stack([squares, shares]), "sum")
        return signal_and_noise(norm, sums[0], sums[1], pictures)


def signal_and_noise(norm: Tensor, squares: Tensor, shares: Tensor, n: int) -> dict[str, Tensor]:
    """|G|² and S of an update of n pictures by |g|, Σ |g_i|² and Σ w_i²."""
    signal = (norm.square() - squares) / (1 - shares)
    return {"gradient_signal": signal, "gradient_noise": n * (squares - signal * shares)}


@dataclass
class NoiseScale:
    """The noise scale of a run, over its last epochs. pictures: of an update."""

    pictures: int
    seen: list[tuple[float, float]] = field(default_factory=list)  # |G|² and S of an epoch

    def add(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics of the epochs so far: "noise_scale", in pictures, its standard error, and
        "noise_scale_least", what it is at least: S / (|G|² + 2 standard errors). Those that cannot
        be told yet are missing."""
        signal, noise = (metrics.get(f"gradient_{k}", math.nan) for k in ("signal", "noise"))
        if math.isfinite(signal) and math.isfinite(noise):
            self.seen = [*self.seen, (signal, noise)][-WINDOW:]
        return scale(self.seen)

    def worries(self, metrics: Mapping[str, float]) -> list[str]:
        """What to tell the user, once, of a run whose updates are nearly all noise."""
        least = metrics.get("noise_scale_least", 0.0)
        if len(self.seen) != TELLING or least < HOPELESS * self.pictures:
            return []
        about = metrics.get("noise_scale", math.inf)
        known = f"about {about:,.0f}" if about < 3 * least else f"at least {least:,.0f}"
        return [
            f"an update has {self.pictures:,} pictures and its noise scale is {known}: expect no "
            "progress; use more data.groups an update, fewer trained steps (sampler.window), or "
            "a method that needs fewer pictures, such as awm"
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = [(a, b) for a, b in state["seen"]]


def scale(seen: Sequence[tuple[float, float]]) -> dict[str, float]:
    """The metrics of `NoiseScale.add` from independent estimates of |G|² and S."""
    if len(seen) < 2:
        return {}
    pairs = torch.tensor(seen, dtype=torch.double)
    (signal, noise), errors = pairs.mean(0).tolist(), pairs.std(0) / len(seen) ** 0.5
    most = signal + 2 * errors[0].item()
    found = {"noise_scale_least": noise / most} if most > 0 and noise > 0 else {}
    if signal > 0 and noise > 0:
        spread = math.hypot(errors[0].item() / signal, errors[1].item() / noise)
        found |= {"noise_scale": noise / signal, "noise_scale_error": noise / signal * spread}
    return found
