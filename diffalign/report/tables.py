"""The tables of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import yaml

from ..record.metrics import _flat
from .charts import letter, number, tone
from .run import MEASURED, Change, Run, epoch_name, mean


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = ()) -> str:
    """A table from heads and rows of finished HTML. The first cell of a row is its heading; `words`
    are the numbers of the text columns."""
    kinds = [' class="words"' if c in words else "" for c in range(len(heads))]

    def line(cells: Sequence[str], tags: Sequence[str]) -> str:
        marked = zip(tags, kinds, cells, strict=True)
        return "<tr>" + "".join(f"<{t}{k}>{c}</{t[:2]}>" for t, k, c in marked) + "</tr>"

    head = line(heads, ['th scope="col"'] * len(heads))
    tags = ['th scope="row"', *["td"] * (len(heads) - 1)]
    body = "".join(line(row, tags) for row in rows)
    # on a narrow page the table scrolls, so the keyboard must be able to reach it
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Table">'
        f"<table><thead>{head}</thead><tbody>{body}</tbody></table></div>"
    )


def about(text: str) -> str:
    return f'<p class="about">{text}</p>'


def run_name(runs: Sequence[Run], i: int) -> str:
    """The name of a run, with its letter where there are several."""
    key = f'<span class="key {tone(i)}">{letter(i)}</span> ' if len(runs) > 1 else ""
    return key + escape(runs[i].name)


def held_out(run: Run) -> str:
    """Every measure of one run, at the first evaluation and the last."""
    rows, errors = [], False
    for name in run.measures:
        found = run.change(name)
        if found is None:
            continue
        errors = errors or bool(found.error)
        gain = _gain(found) if run.epochs else ""
        ends = number(found.before), number(found.after)
        rows.append([escape(name), *ends, gain, _meaning(run, name)])
    if not rows:
        return ""
    first, *_, last = map(epoch_name, run.evaluated * 2)  # which may be one
    heads = ["mean of", first, last, "change", "which is"]
    note = "±: standard error of the change, over the prompts that both evaluations scored."
    note = about(note) if errors else ""
    return table(heads, rows, [4]) + note


def _meaning(run: Run, name: str) -> str:
    if name in MEASURED:
        return MEASURED[name]
    if name == "reward":
        return "what was trained on"
    return "part of the reward" if run.role(name) == "trained" else "a judge, no part of the reward"


def compared(runs: Sequence[Run]) -> str:
    """The last evaluations of several runs, one run per row."""
    names = list(dict.fromkeys(name for run in runs for name in run.measures))
    rows = []
    for i, run in enumerate(runs):
        row = [run_name(runs, i)]
        for name in names:
            found = run.change(name)
            gain = "" if found is None else f"<small>{_gain(found)}</small>"
            row.append("–" if found is None else f"{number(found.after)}<br>{gain}")
        rows.append([*row, _flag(run)])
    if not names:
        return ""
    return table(["run", *map(escape, names), "the guard"], rows) + about(
        "Means at the last evaluation, and below them the change from the first, ± its standard "
        "error over the prompts where the scores of both were kept."
    )


def _flag(run: Run) -> str:
    for epoch, word in run.warnings:
        return f'<span class="warn">{word} from epoch {epoch}</span>'
    return "nothing found" if run.guarded else "–"


def prompts(run: Run) -> str:
    """Every prompt's rewards and judges, first and last evaluation, the largest fall on top."""
    if len(run.shots) < 2 or run.shots[0].prompts != run.shots[-1].prompts:
        return ""
    first, last = run.shots[0], run.shots[-1]
    names = [n for n in run.scored if n in first.scores and n in last.scores]
    if "reward" not in names:
        return ""
    found = []
    for i, prompt in enumerate(first.prompts):
        pairs = [(mean(first.scores[n][i]), mean(last.scores[n][i])) for n in names]
        before, after = pairs[0]
        if before is not None and after is not None:
            texts = [f"{number(a)} → {number(b)}" for a, b in pairs]
            found.append((after - before, [escape(prompt), _signed(after - before), *texts]))
    found.sort(key=lambda row: row[0])
    heads = ["prompt", "change of reward", *map(escape, names)]
    each = len(first.scores["reward"][0])
    return (
        f"<details><summary>{count(len(found), 'prompt')}, means over {count(each, 'picture')} "
        "each, the largest fall first</summary>"
        f"{table(heads, [row for _, row in found], [0])}</details>"
    )


def cost(runs: Sequence[Run]) -> str:
    rows = []
    for i, run in enumerate(runs):
        seconds, judging = run.total("seconds"), run.total("reward_seconds")
        counted = [run.total(name) for name in ("denoiser_calls", "reward_calls")]
        rows.append(
            [
                run_name(runs, i),
                str(run.epochs),
                *("–" if n is None else f"{n:,.0f}" for n in counted),
                _time(seconds),
                _time(seconds / run.epochs if seconds and run.epochs else None),
                f"{judging / seconds:.0%}" if judging is not None and seconds else "–",
            ]
        )
    heads = ["run", "epochs", "denoiser calls", "pictures scored", "time", "an epoch", "rewards"]
    return table(heads, rows) + about(
        "Of training, evaluations left out. rewards: the share of the time that scoring took."
    )


def settings(runs: Sequence[Run]) -> str:
    """The whole configuration of one run, or the settings in which several runs differ."""
    if len(runs) == 1:
        text = yaml.safe_dump(runs[0].config, sort_keys=False, allow_unicode=True)
        whole = f"<details><summary>config.yaml</summary><pre>{escape(text)}</pre></details>"
        return whole if runs[0].config else ""
    flat = [_flat(run.config) for run in runs]
    rows = []
    for key in dict.fromkeys(k for f in flat for k in f if k != "log.dir"):
        values = [str(f.get(key, "–")) for f in flat]
        if len(set(values)) > 1:
            rows.append(map(escape, [key, *values]))
    if not rows:
        return "<p>All runs have the same settings.</p>"
    heads = ["setting", *(run_name(runs, i) for i in range(len(runs)))]
    return about("Those that differ.") + table(heads, [*map(list, rows)], range(len(heads)))


def count(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def _gain(change: Change) -> str:
    """The gain, with its standard error to two digits if it has one."""
    if change.gain is None:
        return "–"
    if not change.error:
        return _signed(change.gain)
    places = max(0, 1 - math.floor(math.log10(change.error)))
    return f"{change.gain:+.{places}f} ± {change.error:.{places}f}".replace("-", "−")


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + number(value)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
