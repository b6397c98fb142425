"""The guard's verdict on a run from its held-out scores: the statistics, and the words."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

# what may be wrong with a run: {name in the metrics: name for people}
WARNINGS = {"over_optimised": "over-optimised", "collapsed": "collapsed", "failed": "failed"}
VERDICTS = (*WARNINGS, "improved")  # a run has at most one; none means no significant change


def warning(row: Mapping[str, Any]) -> str | None:
    """The one of WARNINGS that a row of metrics carries, or None."""
    return next((name for name in WARNINGS if row.get(name)), None)


class Change(NamedTuple):
    """Mean change of a score, its standard error, and the number of prompts behind both."""

    mean: float
    error: float
    prompts: int

    def by_chance(self) -> float:
        """Probability of a mean this low if the expected change is 0: Student's t, one-sided.

        1 for fewer than two prompts, which allow no conclusion.
        """
        if self.prompts < 2:
            return 1.0
        if not self.error:
            return 0.0 if self.mean < 0 else 1.0
        return t_tail(-self.mean / self.error, self.prompts - 1)

    @property
    def fall(self) -> str:
        return f"{-self.mean:.3g} ± {self.error:.2g}"

    def __neg__(self) -> Change:
        return self._replace(mean=-self.mean)


def paired_change(
    before: Sequence[float], after: Sequence[float], prompts: Sequence[Hashable]
) -> Change:
    """Change of the scores of the same pictures, with errors clustered by prompt.

    d_p = mean of (after_i - before_i) over the pictures i of prompt p that have a finite score in
    both; mean = mean_p d_p, error = std_p(d_p) / √m over the m prompts that have such pictures.
    Prompts are taken as an independent sample; pictures of one prompt are not independent. All
    three sequences have length n. The mean is NaN for m = 0, the error for m < 2.
    """
    difference = np.asarray(after, float) - np.asarray(before, float)
    known = np.isfinite(difference)
    _, which = np.unique(np.asarray(prompts)[known], return_inverse=True)
    counts = np.bincount(which)
    means = np.bincount(which, difference[known]) / counts
    m = len(means)
    error = float(means.std(ddof=1)) / math.sqrt(m) if m > 1 else math.nan
    return Change(float(means.mean()) if m else math.nan, error, m)


def t_tail(t: float, df: int) -> float:
    """P(T > t) of Student's t with `df` = 1, 2, ... degrees of freedom, to 1e-15.

    The finite series of Abramowitz & Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle, odd = math.atan(t / math.sqrt(df)), df % 2
    cosine, total = math.cos(angle), 0.0
    term = cosine if odd else 1.0
    for k in range(2 + odd, df + 1, 2):
        total += term
        term *= (k - 1) / k * cosine**2
    inside = math.sin(angle) * total  # P(|T| < t)
    if odd:
        inside = 2 / math.pi * (angle + inside)
    return max(0.0, (1 - inside) / 2)


def level(drop: float, look: int, comparisons: int) -> float:
    """Significance level of each of `comparisons` at the evaluation `look` = 1, 2, ....

    Φ(-drop) / (comparisons · look (look + 1)). As Σ 1 / (k (k + 1)) = 1, a run of any length has a
    false alarm with probability Φ(-drop) at most, however its comparisons depend on each other
    (Bonferroni; the level is spent over the looks as in Lan & DeMets, Biometrika 70, 1983).
    """
    return NormalDist().cdf(-drop) / (comparisons * look * (look + 1))
