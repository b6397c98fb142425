"""Merge the pixel gradients of several rewards into one ascent direction per picture."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def merge(gradients: Tensor, weights: Tensor, how: str = "sum") -> Tensor:
    """(n, k, ...) gradients g_k of k rewards, (k,) weights w_k -> (n, ...), per picture.

        sum         Σ w_k g_k
        normalized  Σ w_k g_k / |g_k|, times the mean |g_k|: steep rewards do not dominate
        pcgrad      each w_k g_k loses its component along every w_j g_j that it conflicts with
                    (negative inner product), in the order of the rewards; then the sum
                    (2001.06782, which shuffles the order)
        min_norm    the shortest vector in the convex hull of the g_k / |g_k|, times the mean |g_k|;
                    weight 0 leaves a g_k out and a negative weight flips it. To first order no
                    reward falls along this vector. It is 0 where one reward can rise only at the
                    cost of another (MGDA, 1810.04650)

    A zero gradient, such as a missing reward's, is left out of means and hulls. float32 or float64.
    min_norm is exact: it tries all 2^k - 1 faces of the hull, so use it for a handful of rewards.
    The papers merge gradients of the model's weights over a batch; this merges those of the pixels.
    """
    shape, g = gradients[:, 0].shape, gradients.flatten(2) * weights[None, :, None]
    if how == "sum" or g.shape[1] == 1:
        return g.sum(1).view(shape)
    if how == "pcgrad":
        return _pcgrad(g).view(shape)
    raw = gradients.flatten(2).norm(dim=2) * (weights != 0)  # (n, k)
    present = raw > 0
    scale = raw.sum(1) / present.sum(1).clamp(min=1)
    unit = g / g.norm(dim=2, keepdim=True).clamp(min=torch.finfo(g.dtype).tiny)
    if how in ("normalized", "normalised"):  # the second is the former spelling
        merged = (unit * weights.abs()[None, :, None]).sum(1)
    else:
        merged = (unit * _hull(unit, present)[..., None]).sum(1)
    return (merged * scale[:, None]).view(shape)


def _pcgrad(g: Tensor) -> Tensor:
    """(n, k, d) -> (n, d)."""
    total = torch.zeros_like(g[:, 0])
    square = g.square().sum(2).clamp(min=torch.finfo(g.dtype).tiny)
    for k in range(g.shape[1]):
        own = g[:, k]
        for j in range(g.shape[1]):
            if j != k:
                conflict = (own * g[:, j]).sum(1).clamp(max=0) / square[:, j]
                own = own - conflict[:, None] * g[:, j]
        total = total + own
    return total


def _hull(unit: Tensor, present: Tensor) -> Tensor:
    """Convex weights (n, k) of the shortest vector in the convex hull of the `present` rows of unit
    (n, k, d). Tries all faces of the hull to find the one with the vector."""
    n, k, _ = unit.shape
    # small; on the CPU because MPS has no float64
    gram, present = torch.einsum("nad,nbd->nab", unit, unit).cpu().double(), present.cpu()
    best = torch.full((n,), torch.inf, dtype=torch.float64)
    weights = torch.zeros(n, k, dtype=torch.float64)
    for size in range(1, k + 1):
        for face in itertools.combinations(range(k), size):
            rows = torch.tensor(face)
            inner = gram[:, rows][:, :, rows]
            # the shortest vector of the plane through the face: inner a + μ = 0, sum a = 1
            system = F.pad(inner, (0, 1, 0, 1), value=1.0)
            system[:, -1, -1] = 0
            a = torch.linalg.pinv(system, hermitian=True)[:, :-1, -1]
            length = torch.einsum("na,nab,nb->n", a, inner, a)
            inside = (a >= -1e-9).all(1) & present[:, rows].all(1)
            better = inside & (length < best - 1e-12)
            best = torch.where(better, length, best)
            whole = torch.zeros_like(weights).index_copy(1, rows, a)
            weights = torch.where(better[:, None], whole, weights)
    return weights.to(unit)
