"""The charts of a report, and their legend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from .charts import Line, chart, letter, number, tone
from .run import Point, Run, epoch_name

BAND = "shaded: ± 2 standard errors of the change from the first evaluation, over the prompts"
ROLES = {"trained": "trained on", "judge": "judge, no part of the reward", "other": "measured"}


def legend(runs: Sequence[Run]) -> str:
    """What colors mean: roles of measures for one run, runs if there are several."""
    if len(runs) == 1:
        shown = {"trained", *map(runs[0].role, runs[0].measures)}
        items = [f'<li class="{k}"><i></i>{text}</li>' for k, text in ROLES.items() if k in shown]
    else:
        items = [
            f'<li class="{tone(i)}"><i></i><span><b>{letter(i)}</b> {escape(run.name)}</span></li>'
            for i, run in enumerate(runs)
        ]
        if any(run.flagged for run in runs):
            items.append('<li class="warn"><i class="ring"></i>flagged by the guard</li>')
    if any(error for run in runs for name in run.measures for _, error in run.gains(name).values()):
        items.append(f"<li>{BAND}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def curves(runs: Sequence[Run]) -> Iterator[str]:
    """One chart each for the reward in training (one run only) and every held-out measure."""
    alone, costs = len(runs) == 1, [run.cost() for run in runs]
    # an epoch of one run may cost as much as many of another
    by_cost = not alone and all(costs)
    warning = next(iter(runs[0].warnings), None) if alone else None
    names = dict.fromkeys(f"eval/{name}" for run in runs for name in run.measures)
    # rewards in training cannot be compared: the runs may use different samplers
    for name in ["reward_mean", *names] if alone else names:
        held_out, lines = name.startswith("eval/"), []
        for i, run in enumerate(runs):
            points = run.column(name)
            tips = [_tip(runs, i, x, y) for x, y in points]
            ringed = [k for k, (x, _) in enumerate(points) if held_out and x in run.flagged]
            if by_cost:
                points = [(costs[i].get(x, 0.0), y) for x, y in points]
            role = run.role(name[5:]) if held_out else "trained"
            known = run.gains(name[5:]) if held_out else {}
            found = [known[x][1] if x in known else None for x, _ in run.column(name)]
            errors = [None if error is None else 2 * error for error in found]
            how = (role, "", ()) if alone else (tone(i), letter(i), ringed)
            lines.append(Line(points, tips, *how, errors))
        title = f"held-out {name[5:]}" if held_out else "reward in training"
        yield chart(title, lines, "denoiser calls" if by_cost else "epoch", warning)


def against_kl(runs: Sequence[Run]) -> Iterator[str]:
    """The reward, its parts and the judges against the distance to the base model."""
    for name in dict.fromkeys(name for run in runs for name in run.scored):
        lines = []
        for i, run in enumerate(runs):
            distances = {x: max(y, 0.0) ** 0.5 for x, y in run.known("eval/kl")}
            known = [(x, y) for x, y in run.known(f"eval/{name}") if x in distances]
            points: list[Point] = [(distances[x], y) for x, y in known]
            tips = [f"{_tip(runs, i, x, y)} at {number(distances[x])}" for x, y in known]
            ringed = [k for k, (x, _) in enumerate(known) if x in run.flagged]
            end = f"{known[-1][0]:g}" if known else ""
            how = (run.role(name), end) if len(runs) == 1 else (tone(i), letter(i))
            lines.append(Line(points, tips, *how, ringed))
        if any(len(line.points) > 1 for line in lines):
            yield chart(f"held-out {name}", lines, "root mean square distance (√kl)")


SIGNAL = {  # lines of `signal`
    "trained": "noise scale, where its standard error is smaller than itself",
    "judge": "what it is at least",
    "other": "pictures of an update",
}


def signal(run: Run) -> tuple[list[str], str]:
    """The chart of the noise scale of updates beside the pictures that they had, and its legend;
    no chart where it was not measured."""
    errors, least = dict(run.known("noise_scale_error")), run.known("noise_scale_least")
    if not least:
        return [], ""
    known = [(x, y) for x, y in run.known("noise_scale") if errors.get(x, y) < y]
    size = run.setting("data.groups", 0) * run.setting("data.group_size", 0)
    had = [(x, size / run.setting("train.updates_per_epoch", 1)) for x, _ in least if size]
    told = dict(known)
    lines = {
        "trained": [(x, told.get(x)) for x, _ in run.known("noise_scale")] if known else [],
        "judge": least,
        "other": had,
    }
    shown = [
        Line(
            points,
            [f"epoch {x:g}: {SIGNAL[tone].split(',')[0]}: {number(y)}" for x, y in points],
            tone,
        )
        for tone, points in lines.items()
        if points
    ]
    items = "".join(f'<li class="{x.tone}"><i></i>{SIGNAL[x.tone]}</li>' for x in shown)
    legend = f'<ul class="legend">{items}</ul>'
    return [chart("pictures", shown, "epoch", log=True)], legend


def _tip(runs: Sequence[Run], i: int, epoch: float, value: float | None) -> str:
    who = f"{runs[i].name}, " if len(runs) > 1 else ""
    return f"{who}{epoch_name(epoch)}: {number(value, 4)}"
