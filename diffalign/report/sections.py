"""A report's heading and its sections in order; every text from a run is escaped."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from rewards.files import open_image

from ..record.pictures import spread
from . import film, graphs, tables
from .charts import number
from .run import Run
from .viewer import columns_of, data_uri, viewer

MEANINGS = {  # of the guard's warnings
    "over-optimised": "a judge or the diversity fell while the reward was above the base model’s",
    "collapsed": "a judge or the diversity fell, and the reward did not rise",
    "failed": "the reward fell below the base model’s",
}
KEPT = {  # by whether there are judges, and diversities
    (True, True): ", and neither a judge nor the diversity was found to fall",
    (True, False): ", and no judge was found to fall",
    (False, True): ", and the diversity did not fall",
    (False, False): "",
}
FRAMES, FILM = 20, (6, 96)  # of a film: most evaluations; prompts, and px of a picture
GRIDS = 8  # most runs whose grid.png is shown if there are no single pictures


def build(runs: Sequence[Run]) -> str:
    """The body of a report on one run, or on several."""
    alone = len(runs) == 1
    return "\n".join(
        [
            _header(runs),
            section("Pictures", *_pictures(runs)),
            section(
                "Held-out prompts", tables.held_out(runs[0]) if alone else tables.compared(runs)
            ),
            section("Curves", charted(film_and_curves(runs), graphs.legend(runs))),
            section(
                "Distance to the base model",
                charted(graphs.against_kl(runs)),
                "What the reward was bought with: the further from the base model for the same "
                "reward, the likelier it is that something else was lost."
                + (" At the end of a line is its epoch." if alone else "")
                + (" Ringed: flagged by the guard." if any(run.flagged for run in runs) else ""),
            ),
            section(
                "Signal or noise",
                charted(*graphs.signal(runs[0])) if alone else "",
                "The noise scale is the number of pictures at which an update’s gradient is half "
                "signal and half noise, by the last twenty epochs. It is told where it is small "
                "enough to be known, so what is shown is rather too low. An update of far fewer "
                "pictures is mostly noise, and a run learns slowly.",
            ),
            section("Every held-out prompt", tables.prompts(runs[0]) if alone else ""),
            section("Cost", tables.cost(runs)),
            section("Settings", tables.settings(runs)),
        ]
    )


def section(heading: str, body: str, about: str = "") -> str:
    """Finished HTML under a heading and a text about it; nothing where there is no body."""
    if not body:
        return ""
    about = tables.about(about) if about else ""
    head = f"<h2>{escape(heading)}</h2>" if heading else ""
    return f"<section>{head}{about}{body}</section>"


def charted(charts: Iterable[str], legend: str = "") -> str:
    """Charts side by side under their legend."""
    shown = "".join(charts)
    return f'{legend}<div class="charts">{shown}</div>' if shown else ""


def film_and_curves(runs: Sequence[Run]) -> Iterator[str]:
    """The film of one run beside its curves."""
    shots = runs[0].shots if len(runs) == 1 else []
    shots = spread([s for s in shots if s.prompts == shots[-1].prompts], FRAMES)
    if len(shots) > 2:
        data = base64.b64encode(film.webp(shots, *FILM)).decode()
        still = data_uri(film.frame(shots[-1], *FILM), 1000)
        yield (
            '<details class="film" open><summary>Film, evaluation by evaluation</summary><picture>'
            f'<source media="(prefers-reduced-motion: reduce)" srcset="{still}">'
            f'<img src="data:image/webp;base64,{data}" alt="Held-out pictures over the epochs">'
            "</picture></details>"
        )
    yield from graphs.curves(runs)


def _header(runs: Sequence[Run]) -> str:
    """The name, verdict and settings of a run; for several, the settings they share."""
    first, *others = [_facts(run) for run in runs]
    facts = {k: v for k, v in first.items() if v and all(other[k] == v for other in others)}
    known = "".join(f"<dt>{k}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    name = f"{len(runs)} runs" if others else escape(runs[0].name)
    verdict = "" if others else f'<div class="verdict">{_verdict(runs[0])}</div>'
    return f"<header><h1>{name}</h1>{verdict}<dl>{known}</dl></header>"


def _verdict(run: Run) -> str:
    """The first two paragraphs: how the reward changed, and what the guard found."""
    found, said = run.change("reward"), f"{_progress(run)}."
    if found and run.epochs:
        said = f"Held-out reward {number(found.before)} → {number(found.after)} in {said}"
    return f"<p>{escape(said)}</p>{guarded(run)}"


def guarded(run: Run) -> str:
    """The paragraph of what the guard found."""
    tone = ' class="warn"' if run.warnings else ""
    return f"<p{tone}>{escape(guard(run))}</p>"


def guard(run: Run) -> str:
    """What the guard found over the run, and at its last evaluation, in sentences."""
    seen = [row for row in run.rows if row.get("over_optimised") is not None]
    if not seen:
        return "Over-optimisation has not been looked for."
    looks, said = tables.count(len(seen), "evaluation"), []
    for word in dict.fromkeys(word for _, word in run.warnings):
        epochs = [epoch for epoch, other in run.warnings if other == word]
        many = f"{len(epochs)} of {looks}"
        said.append(f"{word.capitalize()} from epoch {epochs[0]} ({many}): {MEANINGS[word]}.")
    judged = bool(run.setting("eval.rewards"))
    if "improved" not in seen[-1]:  # by a version that looked for nothing else
        said = said or [f"Not found over-optimised in {looks}."]
    elif seen[-1]["step"] not in run.flagged:
        verdict, reward = (
            "No significant change",
            "neither rose nor fell by more than chance explains",
        )
        if seen[-1]["improved"]:
            verdict, reward = "Improved", "rose by more than chance explains"
        elif not run.known("eval/reward"):
            reward = "cannot be compared over the run"
        kept = KEPT[judged, bool(run.known("eval/diversity"))]
        said.append(f"{verdict} (at the last of {looks}): the held-out reward {reward}{kept}.")
    if not judged:
        said.append("No judge watched; eval.rewards names those that notice over-optimisation.")
    return " ".join(said)


def _progress(run: Run) -> str:
    planned, most = run.setting("train.epochs"), run.setting("train.max_denoiser_calls")
    if most is not None and (run.total("denoiser_calls") or 0) >= most:
        return f"{tables.count(run.epochs, 'epoch')}, ended after {most:,} denoiser calls"
    if planned is not None and planned > run.epochs:
        return f"{run.epochs} of {planned} epochs"
    return tables.count(run.epochs, "epoch")


def _facts(run: Run) -> dict[str, str]:
    algorithm = dict(run.setting("algorithm", {}))
    kind = algorithm.pop("type", "")
    options = ", ".join(f"{k} {v}" for k, v in algorithm.items() if v is not None)
    model, rank = run.setting("model.name", ""), run.setting("model.lora_rank")
    if run.setting("model.merge_lora"):
        model += f" with {run.setting('model.merge_lora')}"
    if rank is not None:
        model += f", LoRA of rank {rank}" if rank else ", all weights of the denoiser"
    groups, size = run.setting("data.groups"), run.setting("data.group_size")
    epoch = f", {groups} × {size} pictures an epoch" if groups and size else ""
    return {
        "Algorithm": f"{kind} ({options})" if options else kind,
        "Model": model,
        "Reward": " + ".join(_weighted(k, v) for k, v in run.setting("rewards", {}).items()),
        "Judges": ", ".join(run.setting("eval.rewards", {})),
        "Prompts": f"{run.setting('data.prompts', '')}{epoch}",
        "Held-out prompts": str(run.setting("eval.prompts", "")),
        "Learning rate": str(run.setting("train.lr", "")),
        "Seed": str(run.setting("train.seed", "")),
        "Folder": str(run.dir),
    }


def _weighted(name: str, value: Any) -> str:
    weight = value.get("weight", 1) if isinstance(value, Mapping) else value
    return name if weight == 1 else f"{str(weight).removesuffix('.0')} × {name}"


def _pictures(runs: Sequence[Run]) -> tuple[str, str]:
    """The viewer and a text about it; for runs without single pictures, their grid.png."""
    prompts, columns = columns_of(runs)
    if prompts:
        which = " that all runs have" if len(runs) > 1 else ""
        noise = ", from the same noise" if len({r.setting("train.seed") for r in runs}) == 1 else ""
        names = dict.fromkeys(name for run in runs for name in run.scored)
        how = (
            " Choose what is left and right, and how they are compared: side by side, flipped "
            "(hold a picture, or press the button, to see the right one in its place), or divided "
            "(drag over a picture, or move the slider)."
        )
        about = f"Held-out prompts{which}{noise}.{how if len(columns) > 1 else ''}"
        return viewer(prompts, columns, list(names)), about
    found = [(run, run.dir / "grid.png") for run in runs if (run.dir / "grid.png").exists()]
    grids = "".join(
        f'<figure><img src="{data_uri(open_image(path), 2400)}" '
        f'alt="Held-out prompts of {escape(run.name)}, before and after">'
        f"<figcaption>{escape(run.name)}</figcaption></figure>"
        for run, path in found[:GRIDS]
    )
    if not grids:
        return "", ""
    return f'<div class="grids">{grids}</div>', "The grids of the last evaluation."
