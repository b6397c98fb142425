"""What a run says about itself: diversity, and whether its reward is being over-optimised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 32  # pixels a side at which pictures are compared


def thumbnails(images: Tensor) -> Tensor:
    """(n, 3, H, W) -> (n, 3, 32, 32) on the CPU, by area."""
    return F.interpolate(images.detach().float(), size=(SIDE, SIDE), mode="area").cpu()


def diversity(small: Tensor, groups: Sequence[int] | Tensor) -> float | None:
    """Mean distance of two pictures of the same prompt, in [0, 1].

    The distance is the root mean square over the values of `thumbnails` (n, 3, 32, 32); the mean is
    over the pairs of a group first. None where no group has two pictures.
    """
    groups, means = torch.as_tensor(groups).cpu(), []
    for group in groups.unique():
        rows = small[groups == group].flatten(1)
        if len(rows) > 1:
            means.append(torch.pdist(rows).mean().item() / rows.shape[1] ** 0.5)
    return sum(means) / len(means) if means else None


@dataclass
class Guard:
    """Notices that the training reward rises while what it stands for falls.

    After every evaluation the scores of the same prompts and noise are compared with the base
    model's and with the best seen so far: over-optimised means that the mean reward is above the
    base's, and that a judge fell from its best by more than `drop` standard errors of the paired
    difference, or that the diversity fell below `least` of the base's.
    """

    drop: float
    least: float
    judges: Sequence[str]
    base: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)

    def see(self, scores: Mapping[str, Sequence[float]], spread: float | None) -> list[str]:
        """Scores of every held-out picture, "reward" and the judges, and their diversity.

        Returns what is wrong, in words; empty where nothing is. `is_best` afterwards says whether
        the judges' mean, each over its spread on the base model, is the highest yet; judges without
        spread there do not count.
        """
        # one picture has no spread to compare with
        judges = self.judges if len(scores["reward"]) > 1 else []
        now = {k: torch.tensor(scores[k], dtype=torch.float64) for k in ("reward", *self.judges)}
        first = not self.base
        if first:
            self.base = {"scores": now, "diversity": spread}
        spreads = {j: float(self.base["scores"][j].std()) for j in judges}
        height = sum(float(now[j].mean()) / s for j, s in spreads.items() if s > 0)
        self.is_best = bool(judges) and (first or height > self.best["height"])
        if self.is_best:
            self.best = {"scores": now, "height": height}
        # NaN, where no reward can be compared over a run, has not risen either
        if first or not now["reward"].mean() > self.base["scores"]["reward"].mean():
            return []
        wrong = []
        for judge in judges:
            change = now[judge] - self.best["scores"][judge]
            error = change.std() / len(change) ** 0.5
            if change.mean() < -self.drop * error and change.mean() < 0:
                wrong.append(f"{judge} fell by {-change.mean():.3g} ± {error:.2g} from its best")
        before = self.base["diversity"]
        if spread is not None and before and spread < self.least * before:
            wrong.append(f"diversity fell to {spread / before:.0%} of the base model's")
        return wrong

    def state_dict(self) -> dict[str, Any]:
        return {"base": self.base, "best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.base, self.best = dict(state["base"]), dict(state["best"])
