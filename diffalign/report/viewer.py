"""The pictures of a report: any two evaluations or runs, divided, flipped or side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

from ..record.pictures import Evaluated, spread
from .charts import number
from .run import Run, epoch_name

PICTURES = 3_000_000  # characters of a report that its pictures may take
SIDES = (256, 192, 128, 96, 64)  # px; uses the largest at which all pictures fit into that
EXACT = 128  # px; pictures up to this side are lossless if they fit, as they are shown enlarged
EPOCHS, EXTREMES, OTHERS = 7, 4, 8  # most evaluations, best or worst prompts, other prompts


@dataclass(frozen=True)
class Column:
    """A choice for the left or the right side of the pictures."""

    label: str
    shot: Evaluated
    rows: list[int]  # numbers of its pictures, one per prompt in common


def columns_of(runs: Sequence[Run]) -> tuple[list[str], list[Column]]:
    """The prompts that all runs with pictures share, and the columns to choose from: evaluations of
    one run, or the base and last evaluations of several."""
    seen = [run for run in runs if run.shots]
    if not seen:
        return [], []
    if len(runs) == 1:
        shots = [(epoch_name(s.epoch), s) for s in _shots(runs[0])]
    else:
        shots = []
        for run in seen:
            base = run.shots[0]
            # runs of one model and seed begin with the same pictures
            if not any(base.sheet.read_bytes() == s.sheet.read_bytes() for _, s in shots):
                shots.append((f"{run.name}: {epoch_name(base.epoch)}", base))
        if len(shots) == 1:
            shots = [(epoch_name(seen[0].shots[0].epoch), shots[0][1])]
        shots += [(f"{r.name}: {epoch_name(r.shots[-1].epoch)}", r.shots[-1]) for r in seen]
    prompts = [
        p for p in dict.fromkeys(shots[0][1].prompts) if all(p in s.prompts for _, s in shots)
    ]
    return prompts, [Column(k, s, [s.prompts.index(p) for p in prompts]) for k, s in shots]


HOW = {"beside": "side by side", "flip": "flipped", "cut": "divided"}  # at first, the first


def viewer(prompts: Sequence[str], columns: Sequence[Column], names: Sequence[str]) -> str:
    """The controls, and the pictures of every prompt shown, above their scores of the `names`."""
    groups = _groups(len(prompts), columns, "reward" in names)
    sources = _encoded(columns, [i for _, rows in groups for i in rows])
    last = len(columns) - 1
    views = "".join(f'<option value="{k}">{v}</option>' for k, v in HOW.items())
    choices = [_choice("Left", columns, 0), _choice("Right", columns, last)]
    parts = ['<div class="viewer" data-how="beside">']
    if last:
        parts.append(
            f'<form class="controls">{choices[0]}{choices[1]}'
            '<label>View<select aria-label="How they are compared" class="how">'
            f"{views}</select></label>"
            '<label class="cut">Divide<input type="range" min="0" max="100" value="50" aria-label='
            '"Where the left picture ends and the right one begins, in percent"></label>'
            '<button type="button" class="swap" aria-pressed="false">Swap</button></form>'
        )
    for heading, rows in groups:
        if heading:
            parts.append(f"<h3>{escape(heading)}</h3>")
        parts.append('<div class="pictures">')
        parts += [_figure(prompts[i], i, columns, sources, names) for i in rows]
        parts.append("</div>")
    return "".join(parts) + "</div>"


def _choice(side: str, columns: Sequence[Column], chosen: int) -> str:
    options = "".join(
        f'<option value="{c}"{" selected" if c == chosen else ""}>{escape(column.label)}</option>'
        for c, column in enumerate(columns)
    )
    return f'<label>{side}<select aria-label="{side} picture">{options}</select></label>'


def _figure(
    prompt: str,
    i: int,
    columns: Sequence[Column],
    sources: Mapping[tuple[int, int], str],
    names: Sequence[str],
) -> str:
    """The pictures of one prompt in a stack; the classes left and right mark the visible ones."""
    last = len(columns) - 1
    chosen = [("left " if c == 0 else "") + ("right" if c == last else "") for c in range(last + 1)]
    scores = [column.shot.notes(column.rows[i]) for column in columns]
    stack = "".join(
        f'<img data-column="{c}" class="{chosen[c]}" src="{sources[c, i]}" draggable="false" '
        f'alt="{escape(f"{prompt}, {column.label}")}">'
        for c, column in enumerate(columns)
    )
    lines = "".join(
        f"<li>{escape(name)} "
        + "".join(
            f'<span data-column="{c}" class="{chosen[c]}">{number(found.get(name))}</span>'
            for c, found in enumerate(scores)
        )
        + "</li>"
        for name in names
        if any(name in found for found in scores)
    )
    return (
        f'<figure><div class="stack">{stack}</div>'
        f'<figcaption><div class="prompt">{escape(prompt)}</div><ul>{lines}</ul></figcaption>'
        "</figure>"
    )


def _shots(run: Run) -> list[Evaluated]:
    """Some of a run's evaluations, evenly spaced, and the first that the guard flagged."""
    shown = spread(run.shots, EPOCHS)
    shown += [s for s in run.shots if run.flagged[:1] == [s.epoch] and s not in shown]
    return sorted(shown, key=lambda s: s.epoch)


def _groups(n: int, columns: Sequence[Column], ranked: bool) -> list[tuple[str, list[int]]]:
    """(heading, rows) of the pictures with the best and the worst change of the reward, if they are
    `ranked` by it, and of the first other pictures."""
    first, last = columns[0], columns[-1]
    gains = {}
    for i in range(n if ranked else 0):
        before, after = (c.shot.notes(c.rows[i]).get("reward") for c in (first, last))
        if before is not None and after is not None:
            gains[i] = after - before
    order = sorted(gains, key=lambda i: gains[i])
    most = min(EXTREMES, len(order) // 2)
    worst, best = order[:most], order[::-1][:most]
    rest = [i for i in range(n) if i not in (*worst, *best)][:OTHERS]
    if not most or first is last:
        return [("", list(range(min(n, OTHERS + 2 * EXTREMES))))]
    over = f"from {first.label} to {last.label}"
    groups = [
        (f"Best pictures: the reward rose most {over}", best),
        (f"Worst pictures: the reward fell most, or rose least, {over}", worst),
    ]
    return groups + ([("Other prompts, in the order of their file", rest)] if rest else [])


def _encoded(columns: Sequence[Column], rows: Sequence[int]) -> dict[tuple[int, int], str]:
    """{(column, row): data URI}, at the largest size at which all of them fit."""
    sources: dict[tuple[int, int], str] = {}
    small = max(columns[0].shot.size) <= EXACT
    for side, lossless in [*([(EXACT, True)] if small else []), *((s, False) for s in SIDES)]:
        sources = {
            (c, i): data_uri(column.shot.pictures[column.rows[i]], side, lossless)
            for c, column in enumerate(columns)
            for i in rows
        }
        if sum(map(len, sources.values())) <= PICTURES:
            break
    return sources


def data_uri(image: Image.Image, side: int, lossless: bool = False) -> str:
    small, data = image.copy(), io.BytesIO()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    small.save(data, "WEBP", quality=85, lossless=lossless)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()
