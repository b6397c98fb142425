"""Sampling steps as Gaussians: what a rollout samples from and what training scores.

Every model family is a Gaussian path `x = alpha*x0 + sigma*eps`, and one step from a level to the
next (less noisy) one is `p(x' | x) = N(mean, std^2 I)`. The two forms `renoise` and `reverse_sde`
cover every sampler here; `KERNELS` names the published choices of their noise.

Everything is pure and computed in float32, or in float64 where the inputs are float64; half
precision inputs are cast up first. Primes denote the next level.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def _full_precision(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _expand(value: Tensor | float, x: Tensor) -> Tensor:
    """() or (n,) -> (1, 1, ...) or (n, 1, ...), dtype and device of `x` (n, *latent)."""
    # new_full fills on the device; as_tensor would copy a float there and wait for it.
    value = value.to(x) if isinstance(value, Tensor) else x.new_full((), value)
    return value.reshape(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True, eq=False)
class Levels:
    """Noise levels of a Gaussian path, `x = alpha*x0 + sigma*eps`.

    Fields share one shape: (K+1,) for a schedule of K steps from noise to data, (n,) for one level
    per sample, () for a single level. float32 (float64 is kept).

    t: the network's time input. alpha in [0, 1], rising towards the data. sigma >= 0, falling.
    VP models (SD1.x, SD2, SDXL): `alpha^2 + sigma^2 = 1`; flow models: `alpha + sigma = 1`.

    Raises ValueError if the shapes differ.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor

    def __post_init__(self) -> None:
        if not self.t.shape == self.alpha.shape == self.sigma.shape:
            raise ValueError(
                f"t, alpha and sigma must share a shape, got {tuple(self.t.shape)}, "
                f"{tuple(self.alpha.shape)} and {tuple(self.sigma.shape)}"
            )

    def __len__(self) -> int:
        return len(self.sigma)

    def __getitem__(self, index: int | slice | Tensor) -> Levels:
        """An int gives one level (), a slice a shorter schedule, a LongTensor (n,) a batch (n,)."""
        return Levels(self.t[index], self.alpha[index], self.sigma[index])

    def to(self, device: torch.device | str) -> Levels:
        return Levels(self.t.to(device), self.alpha.to(device), self.sigma.to(device))


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a network says about x at a level: `x = alpha*x0 + sigma*eps`, each (n, *latent).

    `native` is the network's own output (eps, v or u), for losses defined on it. The constructors
    take x and that output, (n, *latent), any float dtype, and a level of shape () or (n,).
    """

    x0: Tensor
    eps: Tensor
    native: Tensor

    @classmethod
    def from_epsilon(cls, x: Tensor, eps: Tensor, level: Levels) -> Prediction:
        """`x0 = (x - sigma*eps) / alpha`.

        Needs alpha > 0: at zero terminal SNR a noise prediction says nothing about x0, and x0 is
        not finite.
        """
        x, eps = _full_precision(x), _full_precision(eps)
        return cls((x - _expand(level.sigma, x) * eps) / _expand(level.alpha, x), eps, eps)

    @classmethod
    def from_v(cls, x: Tensor, v: Tensor, level: Levels) -> Prediction:
        """`v = alpha*eps - sigma*x0` (VP): `x0 = alpha*x - sigma*v`, `eps = alpha*v + sigma*x`."""
        x, v = _full_precision(x), _full_precision(v)
        alpha, sigma = _expand(level.alpha, x), _expand(level.sigma, x)
        return cls(alpha * x - sigma * v, alpha * v + sigma * x, v)

    @classmethod
    def from_flow(cls, x: Tensor, u: Tensor, level: Levels) -> Prediction:
        """`u = eps - x0` (flow, alpha = 1 - sigma): `x0 = x - sigma*u`, `eps = x + alpha*u`."""
        x, u = _full_precision(x), _full_precision(u)
        return cls(x - _expand(level.sigma, x) * u, x + _expand(level.alpha, x) * u, u)


def noised(x0: Tensor, noise: Tensor, level: Levels) -> Tensor:
    """`alpha*x0 + sigma*noise`, all (n, *latent), level () or (n,)."""
    return _expand(level.alpha, x0) * x0 + _expand(level.sigma, x0) * noise


def native_target(kind: str, x0: Tensor, noise: Tensor, level: Levels) -> Tensor:
    """What a perfect network of this kind outputs at `noised(x0, noise, level)`, (n, *latent).

    epsilon: noise; v_prediction: alpha*noise - sigma*x0; flow: noise - x0.
    """
    if kind == "epsilon":
        return noise
    if kind == "flow":
        return noise - x0
    return _expand(level.alpha, x0) * noise - _expand(level.sigma, x0) * x0


PREDICTIONS: dict[str, Callable[[Tensor, Tensor, Levels], Prediction]] = {
    "epsilon": Prediction.from_epsilon,
    "v_prediction": Prediction.from_v,
    "flow": Prediction.from_flow,
}
"""The kinds of network, by what they output."""


@dataclass(frozen=True, eq=False)
class Gaussian:
    """`N(mean, std^2 I)`: mean (n, *latent), std (n, 1, ...) or (1, 1, ...), >= 0; 0 is a point."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """`mean + std*noise`, (n, *latent). The caller draws the standard normal noise."""
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        """Log-density of x (n, *latent), reduced over the latent's D elements: (n,).

            mean_D[ -(x - mean)^2 / (2 std^2) - log(std) - log(2 pi)/2 ]

        The published clip ranges of DDPO (2305.13301), Flow-GRPO (2505.05470) and DanceGRPO
        (2505.07818) belong to the mean over D, although the papers write densities: the ratio of
        means is the true ratio to the power 1/D. `reduction="sum"` is the true log-density.

        x is used as given: pass the stored tensor the next network call saw, rounding included.

        std must be > 0. A deterministic step has no density: ValueError on the CPU, non-finite
        values on an accelerator, where a check would stall it (`step_std` tells in advance). Also
        raises ValueError for an unknown reduction.
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        if self.std.device.type == "cpu" and not bool((self.std > 0).all()):
            raise ValueError("log_prob needs std > 0: a step with std 0 is deterministic")
        z = (x - self.mean) / self.std
        log_prob = (-0.5 * z.square() - self.std.log() - 0.5 * math.log(2 * math.pi)).flatten(1)
        return log_prob.mean(1) if reduction == "mean" else log_prob.sum(1)

    def kl(self, other: Gaussian) -> Tensor:
        """KL(self || other) per latent element: (n,).

            mean_D[ log(s'/s) + (s^2 + (mean - mean')^2) / (2 s'^2) - 1/2 ],  primes: other

        which is `mean_D((mean - mean')^2) / (2 s^2)` for equal stds. Both stds must be > 0.

        Flow-GRPO's code divides by the SDE coefficient g^2 rather than s^2 = g^2 |dt|: its beta
        belongs to this KL times |dt|.
        """
        ratio = self.std / other.std
        z = (self.mean - other.mean) / other.std
        return (0.5 * (ratio.square() - 1 + z.square()) - ratio.log()).flatten(1).mean(1)


def renoise(
    x: Tensor, pred: Prediction, level: Levels, next_level: Levels, std: Tensor | float
) -> Gaussian:
    """Jump to the predicted x0 and noise it again to the next level, keeping part of eps.

        mean = alpha' x0 + sqrt(sigma'^2 - s^2) eps,   std = s

    x, pred: (n, *latent); levels and std: () or (n,); 0 <= s <= sigma'. A larger s is not refused:
    the root is clamped at 0, so that rounding at s = sigma' gives no NaN. `level` is unused, and
    gives all kernels one signature. Any Gaussian path. DDIM, 2010.02502 eq. 12.
    """
    x = _full_precision(x)
    s = _expand(std, x)
    keep = (_expand(next_level.sigma, x).square() - s.square()).clamp(min=0).sqrt()
    return Gaussian(_expand(next_level.alpha, x) * pred.x0 + keep * pred.eps, s)


def reverse_sde(
    x: Tensor, pred: Prediction, level: Levels, next_level: Levels, g: Tensor | float
) -> Gaussian:
    """One Euler-Maruyama step of the reverse-time SDE of a flow model.

        mean = x + u dt - g^2/2 score dt,   std = g sqrt(|dt|)
        u = eps - x0,  score = -eps/sigma,  dt = sigma' - sigma < 0

    x, pred: (n, *latent); levels and g: () or (n,). g = 0 is the Euler step of the ODE. Needs flow
    levels (alpha = 1 - sigma; `step_std` checks) and sigma > 0. Flow-GRPO, 2505.05470, written with
    the score.
    """
    x = _full_precision(x)
    g, sigma = _expand(g, x), _expand(level.sigma, x)
    dt = _expand(next_level.sigma, x) - sigma
    mean = x + (pred.eps - pred.x0 + 0.5 * g.square() * pred.eps / sigma) * dt
    return Gaussian(mean, g * dt.abs().sqrt())


def _check_eta(kernel: str, eta: float, most: float = math.inf) -> None:
    if not 0 <= eta <= most:
        raise ValueError(f"{kernel} needs eta in [0, {most:g}], got {eta}")


def ddim(x: Tensor, pred: Prediction, level: Levels, next_level: Levels, eta: float) -> Gaussian:
    """`renoise` with eta times the std of the DDPM posterior (DDIM, 2010.02502; used by DDPO).

        s^2 = eta^2 sigma'^2 (1 - (alpha sigma' / (alpha' sigma))^2)

    The posterior of x' given x and x0 has this variance on every Gaussian path. For VP levels with
    a = alpha^2 it is the usual `(1 - a')/(1 - a) (1 - a/a')`; this form also serves flow levels, is
    `eta sigma'` at alpha = 0 (zero terminal SNR), and 0 at sigma' = 0. eta in [0, 1] (else
    ValueError): 0 is deterministic, 1 ancestral sampling. Needs sigma > 0, alpha' > 0.
    """
    _check_eta("ddim", eta, 1)
    ratio = level.alpha * next_level.sigma / (next_level.alpha * level.sigma)
    std = eta * next_level.sigma * (1 - ratio.square()).clamp(min=0).sqrt()
    return renoise(x, pred, level, next_level, std)


def ode(x: Tensor, pred: Prediction, level: Levels, next_level: Levels, eta: float = 0) -> Gaussian:
    """`alpha' x0 + sigma' eps`, std 0: DDIM at eta = 0 and, on flow levels, the Euler step.

    eta is ignored, so that a window method can swap this in for the steps it does not train.
    """
    return renoise(x, pred, level, next_level, 0.0)


def flow_sde(
    x: Tensor, pred: Prediction, level: Levels, next_level: Levels, eta: float
) -> Gaussian:
    """`reverse_sde` with `g = eta sqrt(sigma / (1 - sigma))` (Flow-GRPO, 2505.05470). eta >= 0.

    At sigma = 1, where g diverges, the next level's sigma stands in the denominator, as in the
    authors' code. ValueError for eta < 0.
    """
    _check_eta("flow_sde", eta)
    denominator = torch.where(level.alpha > 0, level.alpha, next_level.alpha)
    return reverse_sde(x, pred, level, next_level, eta * (level.sigma / denominator).sqrt())


def dance_sde(
    x: Tensor, pred: Prediction, level: Levels, next_level: Levels, eta: float
) -> Gaussian:
    """`reverse_sde` with constant `g = eta` (DanceGRPO, 2505.07818). ValueError for eta < 0."""
    _check_eta("dance_sde", eta)
    return reverse_sde(x, pred, level, next_level, eta)


def cps(x: Tensor, pred: Prediction, level: Levels, next_level: Levels, eta: float) -> Gaussian:
    """`renoise` with `s = sigma' sin(eta pi/2)` (Flow-CPS, 2509.05952). eta in [0, 1].

    For every eta the coefficients of x0 and of noise are those of the next level, so no noise is
    left at the end. Any Gaussian path. The authors' code scores with `-mean_D((x' - mean)^2)`: this
    Gaussian's log-prob times 2 s^2 up to a constant. Published clip ranges belong to that score.
    ValueError for eta outside [0, 1].
    """
    _check_eta("cps", eta, 1)
    return renoise(x, pred, level, next_level, next_level.sigma * math.sin(eta * math.pi / 2))


def dpm_solver_2m(
    pred: Prediction, x: Tensor, before: Tensor | None, levels: Levels, index: int
) -> Tensor:
    """Step `index` of the deterministic solver DPM-Solver++(2M) (2211.01095), (n, *latent).

        h = λ' - λ, r = (λ - λ_before) / h, λ = log(alpha/sigma)
        D = x0 + (x0 - x0_before) / 2r,   x' = (sigma'/sigma) x - alpha' (exp(-h) - 1) D

    before: the x0 predicted at step index - 1, None for the first step. The step to sigma' = 0 is
    of first order, as in diffusers with `lower_order_final`. Any Gaussian path.
    """
    x = _full_precision(x)
    level, following = levels[index], levels[index + 1]
    d = pred.x0
    if before is not None:
        log_snr = (levels.alpha / levels.sigma).log()
        h, h_before = (log_snr[i + 1] - log_snr[i] for i in (index, index - 1))
        # infinite or NaN where h is infinite, at sigma' = 0; looking at sigma' would stall a GPU
        ratio = (h / h_before).nan_to_num(nan=0.0, posinf=0.0)  # and 0 after zero SNR
        d = d + 0.5 * ratio * (d - before)
    # exp(-h) = alpha sigma' / (sigma alpha'), which is 0 at the clean end
    shrink = level.alpha * following.sigma / (level.sigma * following.alpha)
    keep = following.sigma / level.sigma
    return _expand(keep, x) * x + _expand(following.alpha * (1 - shrink), x) * d


Kernel = Callable[[Tensor, Prediction, Levels, Levels, float], Gaussian]
KERNELS: dict[str, Kernel] = {
    "ddim": ddim,
    "ode": ode,
    "flow_sde": flow_sde,
    "dance_sde": dance_sde,
    "cps": cps,
}


SDES = ("flow_sde", "dance_sde")
"""The kernels that discretize an SDE with std g sqrt(|dt|); the others `renoise`."""


def step_std(kernel: str, eta: float, levels: Levels) -> Tensor:
    """The std of each of the K transitions of a schedule `levels` (K+1,): (K,), the levels' dtype.

    Transitions with std 0 have no log-prob, and those with a tiny std (the last one of a flow
    schedule) have exploding ratios: neither should be trained on.

    Raises ValueError for an unknown kernel, an eta out of the kernel's range, or a flow-only kernel
    (flow_sde, dance_sde) on levels that are not `alpha + sigma = 1`.
    """
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}, expected one of {', '.join(KERNELS)}")
    if kernel in SDES and not torch.allclose(
        levels.alpha + levels.sigma, torch.ones_like(levels.sigma), atol=1e-4
    ):
        raise ValueError(
            f"{kernel} needs a flow model (alpha + sigma = 1); use ddim or cps instead"
        )
    # A std depends on the levels alone, so asking the kernel itself keeps one definition of it.
    x = torch.zeros_like(levels.sigma[1:])
    gaussian = KERNELS[kernel](x, Prediction(x, x, x), levels[:-1], levels[1:], eta)
    return gaussian.std.expand_as(x).clone()
