"""Classifier-free guidance: how strong, at which noise levels, in which form."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from ..config import SamplerConfig, TrainConfig
from ..dynamics import Levels

FIRST = 4  # steps that are guided in full before a direction is used again


@dataclass(frozen=True)
class Guidance:
    """Guidance f = u + w (c - u) of the outputs for the prompt, c, and the negative prompt, u
    (arXiv 2207.12598), where it is worth its second call; elsewhere f = c.

    scale: w; up to 1 nothing is guided. low, high: it is guided where low < σ/α <= high, the noise
    level of EDM, which is 0 at data and infinite at pure noise (2404.07724). star: f = s u + w (c -
    s u) with s = <c, u> / |u|² of each sample, the scale of CFG-Zero* (2503.18886), whose skipped
    first step is left out. The other two have a memory and act in rollouts alone (`Guide`).
    reuse: m, after the first 4 guided steps u is called for at every m-th of them, and the others
    use the last c - u again, as a simple LinearAG (2312.12487). adaptive: τ, a sample is guided no
    more once (w - 1) |x̂0(c) - x̂0(u)| < τ |x̂0(c)|; Adaptive Guidance (2312.12487) compares the
    angle of the predicted noises, which grows along the trajectories of zero-SNR and flow models.
    Raises ValueError for options out of range.
    """

    scale: float
    low: float = 0.0
    high: float = math.inf
    star: bool = False
    reuse: int | None = None
    adaptive: float | None = None

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low={self.low} and high={self.high} hold no level; use low < high")
        if self.reuse is not None and self.reuse < 1:
            raise ValueError(f"reuse={self.reuse} is no number of steps; use 1 or more")
        if self.adaptive is not None and not self.adaptive > 0:
            raise ValueError(f"adaptive={self.adaptive} is no threshold; use more than 0")

    @classmethod
    def of(cls, guidance: float | Guidance) -> Guidance:
        """A number is a scale that acts everywhere."""
        return guidance if isinstance(guidance, Guidance) else cls(guidance)

    @property
    def everywhere(self) -> bool:
        return self.low <= 0 and self.high == math.inf

    @property
    def remembers(self) -> bool:
        return self.reuse is not None or self.adaptive is not None

    def again(self, n: int) -> bool:
        """Whether the n-th step that is guided calls for the negative prompt, and not only
        reuses."""
        return self.reuse is None or n < FIRST or (n - FIRST) % self.reuse == 0

    def inside(self, level: Levels) -> Tensor:
        """Whether each level is one to guide at, bool, shaped as they are."""
        ratio = level.sigma / level.alpha
        return (ratio > self.low) & (ratio <= self.high)

    def until(self, share: float, levels: Levels) -> Guidance:
        """Guided only in the first `share` of the K steps of `levels` (K + 1,), a cut-off."""
        steps = len(levels) - 1
        first = math.ceil(share * steps - 1e-9)  # that is not guided
        if first >= steps:
            return self
        edge = levels[first]
        return replace(self, low=max(self.low, (edge.sigma / edge.alpha).item()))

    def combine(self, u: Tensor, c: Tensor) -> Tensor:
        """The guided output (n, *latent) of both branches."""
        if self.star:
            dims = tuple(range(1, c.ndim))
            along = (c * u).sum(dims, keepdim=True)
            u = u * (along / (u.square().sum(dims, keepdim=True) + 1e-8))
        return u + self.scale * (c - u)

    def rows(self, level: Levels, n: int) -> slice | Tensor | None:
        """Which of n samples are guided at `level`, one for all or one each: all, some, or none."""
        if self.scale <= 1:
            return None
        if self.everywhere:
            return slice(None)
        inside = self.inside(level)
        if inside.ndim == 0:
            return slice(None) if inside else None
        found = inside.nonzero()[:, 0]
        if len(found) in (0, n):
            return slice(None) if len(found) else None
        return found


def scheduled(c: SamplerConfig) -> bool:
    """Whether guidance is more than a scale that acts everywhere."""
    options = (c.guidance_interval, c.guidance_until, c.guidance_reuse, c.guidance_adaptive)
    return c.guidance_star or options != (None,) * 4


def of_sampler(config: SamplerConfig, levels: Levels, steps: str = "sampler") -> float | Guidance:
    """Guidance of a run's rollouts, over `levels` (K + 1,). Raises ValueError where none of these
    `steps` would be guided."""
    c = config
    if not scheduled(c):
        return c.guidance
    low, high = c.guidance_interval or (0.0, math.inf)
    found = Guidance(c.guidance, low, high, c.guidance_star, c.guidance_reuse, c.guidance_adaptive)
    if c.guidance_until is not None:
        found = found.until(c.guidance_until, levels)
    if not found.inside(levels[:-1]).any():
        ratios = (levels.sigma / levels.alpha)[:-1]
        raise ValueError(
            f"sampler.guidance_interval={c.guidance_interval} and .guidance_until="
            f"{c.guidance_until} hold none of {steps}.steps={len(ratios)}, whose sigma/alpha go "
            f"from {ratios.max():.3g} to {ratios.min():.3g}; widen them, or use {steps}.guidance=1"
        )
    return found


def of_evaluation(config: TrainConfig, levels: Levels) -> float | Guidance:
    """Guidance of a run's evaluations, over `levels` (K + 1,)."""
    e = config.eval
    found = of_sampler(config.sampler, levels, "eval") if e.guidance is None else e.guidance
    if e.guidance_reuse is None and e.guidance_adaptive is None:
        return found
    found = Guidance.of(found)
    return replace(
        found,
        reuse=found.reuse if e.guidance_reuse is None else e.guidance_reuse,
        adaptive=found.adaptive if e.guidance_adaptive is None else e.guidance_adaptive,
    )
