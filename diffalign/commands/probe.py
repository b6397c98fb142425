"""Whether a run's updates would be signal or noise, `diffalign probe CONFIG`."""

from __future__ import annotations

import math

from ..algorithms.base import Needs
from ..config import TrainConfig
from ..training.cost import Cost
from ..training.noise_scale import HOPELESS
from ..training.plan import Plan
from ..training.probe import ALL, Probed, probe
from .bench import temporary
from .timing import words


def run(config: TrainConfig, epochs: int) -> str:
    """What `diffalign probe` prints: the noise scale at the base weights, by the trained step, and
    what an update takes that is half signal."""
    plan = Plan.make(config)
    with temporary(config) as trainer:
        found = probe(trainer, epochs)
        levels = trainer.sampling.levels
        ratios = (levels.sigma / levels.alpha).tolist()
    n, what = found.pictures, plan.algorithm.needs
    lines = [
        f"{config.model.name}, {config.algorithm['type']}: {epochs} updates of {n} pictures "
        f"({config.data.groups} prompts) at the base weights",
        "",
        f"{'':<28}noise scale, pictures",
    ]
    labels = {ALL: "all that is trained"}
    if what is Needs.TRAJECTORY:
        fixed = config.sampler.window is None
        first = plan.stochastic.index(True) if fixed else 0
        for k in sorted(found.seen)[1:]:
            at = f", sigma/alpha {ratios[first + k]:.3g}" if fixed else " of the window"
            labels[k] = f"step {first + k}{at}"
    lines += [f"{label:<28}{told(found, k)}" for k, label in labels.items() if k in found.seen]
    return "\n".join([*lines, "", *advice(found, config, Cost.of(plan))])


def told(found: Probed, step: int) -> str:
    """A noise scale in words."""
    figures = found.scale(step)
    if not figures:
        return "not known from one update"
    least = figures.get("noise_scale_least")
    if "noise_scale" not in figures:
        return "not known: all is noise" if least is None else f"more than {least:,.0f}"
    about, error = figures["noise_scale"], figures["noise_scale_error"]
    if error > about / 2 and least is not None:
        return f"about {about:,.0f}, more than {least:,.0f}"
    return f"{about:,.0f} ± {error:,.0f}"


def advice(found: Probed, config: TrainConfig, cost: Cost) -> list[str]:
    """What the noise scale says of an update, and the price of one that is half signal."""
    figures, n = found.scale(), found.pictures
    about = figures.get("noise_scale", figures.get("noise_scale_least"))
    if about is None:
        return ["no signal was found; probe with more --epochs or data.groups"]
    update = n // config.train.updates_per_epoch
    share = update / (update + about)
    lines = [f"an update of {update:,} pictures is about {share:.1%} signal"]
    if about > HOPELESS * update:
        lines[0] += ": expect no progress"
    groups = math.ceil(about / config.data.group_size) * config.train.updates_per_epoch
    pictures = groups * config.data.group_size
    calls = (cost.sampled + cost.learned) * pictures / n
    took = words(pictures * found.seconds)
    lines.append(
        f"one of {about:,.0f} is half: --data.groups {groups} makes an epoch of {pictures:,} "
        f"pictures, {calls:,.0f} denoiser calls, about {took} here"
    )
    return lines
