"""The composition reward of a detector's probabilities, which carry gradient to the pixels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SURPLUS, DOUBT = 0.5, 0.1  # weights of what nobody asked for, and of what is neither there nor not
SLOPE = 0.1  # of the picture's side: how fast a relation becomes true; 0.05 is flat where it is not


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


def soft_scores(
    seen: Sequence[Evidence],
    classes: Sequence[list[str]],
    known: Sequence[dict[str, Any]],
    margin: float,
) -> Tensor:
    """The soft scores of n pictures, (n,); `Composition` says what they are made of. Pictures of
    which the same is asked, but for the objects, colors and numbers, are computed at once."""
    groups = defaultdict(list)
    for i, (evidence, meta) in enumerate(zip(seen, known, strict=True)):
        asked = [("color" in c, *c.get("position", ())) for c in meta["include"]]
        groups[(evidence.shares.shape, *asked)].append(i)
    rows = [i for group in groups.values() for i in group]
    found = [
        _alike([seen[i] for i in g], [classes[i] for i in g], [known[i] for i in g], margin)
        for g in groups.values()
    ]
    order = torch.tensor(rows).argsort().to(found[0].device)
    return torch.cat(found)[order]


def _alike(
    seen: list[Evidence], classes: list[list[str]], known: list[dict[str, Any]], margin: float
) -> Tensor:
    """The scores of pictures whose clauses ask for the same relations, and for colors or none."""
    like = seen[0].shares
    mass = like.new_tensor([e.mass for e in seen])
    clauses = [[meta["include"][k] for meta in known] for k in range(len(known[0]["include"]))]
    named = [dict(zip(c, e.shares, strict=True)) for e, c in zip(seen, classes, strict=True)]
    share = [  # (n, m), of the class of each clause
        torch.stack([shares[c["class"]] for shares, c in zip(named, own, strict=True)])
        for own in clauses
    ]
    number = [s.sum(1) / mass for s in share]
    boxes, values = torch.stack([e.boxes for e in seen]), []
    for k, own in enumerate(clauses):
        n = like.new_tensor([clause["count"] for clause in own])
        values.append(1 - (number[k] - n).abs() / n)
        if "color" in own[0]:
            color = torch.stack([_color(e, clause) for e, clause in zip(seen, own, strict=True)])
            values.append(((share[k] * color).sum(1) / mass / n).clamp(max=1))
        if "position" in own[0]:
            relation, target = own[0]["position"]
            present = (number[k] / n).clamp(max=1) * number[target].clamp(max=1)
            values.append(present * _held(relation, boxes, share[k], share[target], margin))
    asked = [{c["class"]: c["count"] for c in meta["include"]} for meta in known]
    whole = mass * like.new_tensor([sum(each.values()) for each in asked])
    others = torch.stack([e.others for e in seen])
    heat = (others + torch.stack([e.shares.sum(0) for e in seen])).clamp(max=1)
    doubt = (heat * (1 - heat)).sum(1) / whole
    return torch.stack(values).mean(0) - SURPLUS * others.sum(1) / whole - DOUBT * doubt


def _color(seen: Evidence, clause: dict[str, Any]) -> Tensor:
    if clause["color"] not in seen.colors:
        raise ValueError(
            f"a {clause['color']} {clause['class']} is asked for and the detector tells no such "
            "color; use `soft: false` with `clip`, or prompts without colors"
        )
    return seen.colors[clause["color"]]


def _held(relation: str, boxes: Tensor, a: Tensor, b: Tensor, margin: float) -> Tensor:
    """How far the objects at the places `a` (n, m) are in a relation to those at `b`: the mean over
    pairs, weighted by both shares, of a sigmoid in place of `composition.holds`; (n,)."""
    from .composition import RELATIONS

    axis, sign = RELATIONS[relation]
    center = (boxes[..., :2] + boxes[..., 2:]) / 2
    size = boxes[..., axis + 2] - boxes[..., axis]
    offset = center[:, :, None] - center[:, None]  # of a from b, (n, m, m, 2)
    distance = (offset.square().sum(-1) + 1e-8).sqrt()
    beyond = sign * offset[..., axis] - margin * (size[:, :, None] + size[:, None]) - distance / 2
    weight = a[:, :, None] * b[:, None]
    return (weight * (beyond / SLOPE).sigmoid()).sum((1, 2)) / (weight.sum((1, 2)) + 1e-6)
