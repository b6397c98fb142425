"""The composition reward of a detector's probabilities, which carry gradient to the pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SURPLUS, DOUBT = 0.5, 0.1  # weights of what nobody asked for, and of what is neither there nor not
SLOPE = 0.05  # of the picture's side: how fast a relation becomes true


@dataclass(frozen=True)
class Evidence:
    """What a detector holds possible in one picture, at m places.

    shares: (C, m) in [0, 1], whether the place shows each of the C asked classes. others: (m,), any
    other class. boxes: (m, 4), x0, y0, x1, y1 in units of the picture's sides. colors: (m,) for
    each color's name, whether what is at the place has it; empty if the detector names no colors.
    mass: what the shares of one object add up to.
    """

    shares: Tensor
    others: Tensor
    boxes: Tensor
    colors: dict[str, Tensor]
    mass: float


SoftDetector = Callable[[Tensor, list[list[str]]], list[Evidence]]


def score(seen: Evidence, classes: list[str], known: dict[str, Any], margin: float) -> Tensor:
    """The soft score of one picture, a scalar; `Composition` says what it is made of."""
    values, numbers = [], seen.shares.sum(1) / seen.mass
    share = {name: seen.shares[k] for k, name in enumerate(classes)}
    number = {name: numbers[k] for k, name in enumerate(classes)}
    clauses = known["include"]
    for clause in clauses:
        name, n = clause["class"], clause["count"]
        values.append(1 - (number[name] - n).abs() / n)
        if "color" in clause:
            if clause["color"] not in seen.colors:
                raise ValueError(
                    f"a {clause['color']} {name} is asked for and the detector tells no such "
                    "color; use `soft: false` with `clip`, or prompts without colors"
                )
            right = (share[name] * seen.colors[clause["color"]]).sum() / seen.mass
            values.append((right / n).clamp(max=1))
        if "position" in clause:
            relation, target = clause["position"]
            other = clauses[target]["class"]
            present = (number[name] / n).clamp(max=1) * number[other].clamp(max=1)
            held = _held(relation, seen.boxes, share[name], share[other], margin)
            values.append(present * held)
    asked = sum({c["class"]: c["count"] for c in clauses}.values())
    heat = (seen.others + seen.shares.sum(0)).clamp(max=1)
    surplus = seen.others.sum() / seen.mass / asked
    doubt = (heat * (1 - heat)).sum() / seen.mass / asked
    return torch.stack(values).mean() - SURPLUS * surplus - DOUBT * doubt


def _held(relation: str, boxes: Tensor, a: Tensor, b: Tensor, margin: float) -> Tensor:
    """How far the objects at the places `a` (m,) are in a relation to those at `b`: the mean over
    pairs, weighted by both shares, of a sigmoid in place of `composition.holds`."""
    from .composition import RELATIONS

    axis, sign = RELATIONS[relation]
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    size = boxes[:, axis + 2] - boxes[:, axis]
    offset = center[:, None] - center[None]  # of a from b, (m, m, 2)
    distance = (offset.square().sum(-1) + 1e-8).sqrt()
    beyond = sign * offset[..., axis] - margin * (size[:, None] + size[None]) - distance / 2
    weight = a[:, None] * b[None]
    return (weight * (beyond / SLOPE).sigmoid()).sum() / (weight.sum() + 1e-6)
