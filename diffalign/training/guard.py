"""What a run says about itself: diversity, and whether it is over-optimised or went wrong."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..verdict import level, paired_change

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
    """Says after every evaluation whether a run is over-optimised, has collapsed or failed.

    The scores are compared with earlier ones of the same prompts and noise (`paired_change`). A
    judge fell if it is lower than at its own best, or than on the base model, by more than chance
    explains; the diversity fell if it is below `least` of the base model's. The verdict is

    - over_optimised: a judge or the diversity fell, and the mean reward is above the base model's;
    - collapsed: a judge or the diversity fell, and the reward is not, or cannot be compared;
    - failed: neither fell, but the reward is lower than the base model's beyond chance;
    - improved: neither fell, and the reward is higher than the base model's beyond chance;
    - "": no significant change.

    drop: what one look would have to show, in standard errors of a normal distribution. All judges,
    all evaluations and the choice of the best are allowed for (`level`), so that a run in which the
    expected scores change nowhere is flagged with probability Φ(-drop) at most: 0.023 for 2. The
    diversity is not tested: its share is a plain threshold.
    """

    drop: float
    least: float
    judges: Sequence[str]
    base: dict[str, Any] = field(default_factory=dict)
    peaks: dict[str, list[float]] = field(default_factory=dict)  # of every judge, at its own best
    height: float = -math.inf  # of the evaluation that the judges together liked best
    looks: int = 0  # evaluations after the base model's
    verdict: str = ""
    is_best: bool = False

    def see(
        self,
        scores: Mapping[str, Sequence[float]],
        spread: float | None,
        prompts: Sequence[Hashable] | None = None,
    ) -> list[str]:
        """Scores of every held-out picture, "reward" and the judges, and their diversity; the first
        are the base model's. NaN: not scored; compared is what has a score in both evaluations.

        prompts: which prompt every picture is of. Without them up to eight neighbours are taken for
        one prompt's pictures, which is right for 1, 2, 4 and 8 a prompt, and finds less.

        Returns what is wrong, in words; empty where nothing is. `verdict` holds it in a word.
        `is_best` says whether the judges' mean change from the base model, each over its standard
        deviation there, has the highest sum yet; judges without any there do not count.
        """
        now = {k: [float(x) for x in scores[k]] for k in ("reward", *self.judges)}
        n, first, self.verdict = len(now["reward"]), not self.base, ""
        if prompts is None:
            size = max(1, min(8, n // 8))  # eight groups are the least to find anything by
            prompts = [i // size for i in range(n)]
        if first:
            self.base = {"scores": now, "diversity": spread}
            self.peaks = {j: now[j] for j in self.judges}
        base = self.base["scores"]
        changes = {k: paired_change(base[k], now[k], prompts) for k in now}
        spreads = {j: _deviation(base[j]) for j in self.judges}
        heights = [changes[j].mean / s for j, s in spreads.items() if s > 0]
        self.is_best = bool(heights) and sum(heights) > self.height
        if self.is_best:
            self.height = sum(heights)
        if first:
            return []
        self.looks += 1
        # a judge is compared with the best of as many evaluations as there are looks
        enough = level(self.drop, self.looks, 1 + len(self.judges))
        wrong = []
        for judge in self.judges:
            from_best = paired_change(self.peaks[judge], now[judge], prompts)
            found = {"its best": from_best, "the base model's": changes[judge]}
            where = min(found, key=lambda k: found[k].by_chance())
            if found[where].by_chance() < enough / self.looks:
                wrong.append(f"{judge} fell by {found[where].fall} from {where}")
            if from_best.mean > 0:
                self.peaks[judge] = now[judge]
        before = self.base["diversity"]
        if spread is not None and before and spread < self.least * before:
            wrong.append(f"diversity fell to {spread / before:.0%} of the base model's")
        reward = changes["reward"]
        failed = reward.by_chance() < enough
        if wrong:
            self.verdict = "over_optimised" if reward.mean > 0 else "collapsed"
        elif failed:
            self.verdict = "failed"
        elif (-reward).by_chance() < enough:
            self.verdict = "improved"
        if failed:
            wrong.append(f"the reward fell by {reward.fall} from the base model's")
        elif self.verdict == "collapsed":
            same = "did not rise" if reward.prompts else "cannot be compared over the run"
            wrong.append(f"the reward {same}")
        return wrong

    def state_dict(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("base", "peaks", "height", "looks")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self.state_dict():
            setattr(self, name, state[name])


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation of the finite values; 0 of fewer than two."""
    known = np.asarray(values)[np.isfinite(values)]
    return float(known.std(ddof=1)) if len(known) > 1 else 0.0
