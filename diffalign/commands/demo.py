"""`diffalign demo`, by `make demo`: a search, a training run and a hacked run, on one page."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

import rewards as reward_library

from .. import policies, report
from ..config import TrainConfig
from ..config.files import check_folder, write_atomic
from ..config.prompts import load as load_prompts
from ..drawing.grids import comparison_grid, to_pil
from ..emoji_world.detector import metadata
from ..emoji_world.scenes import ASSETS
from ..emoji_world.verifier import findings, load
from ..optimize_noise import build, sampling_for
from ..optimize_noise.base import Result, Task, search
from ..optimize_noise.options import Budget
from ..record.pictures import spread
from ..report import film, graphs, tables
from ..report.run import Run, read
from ..report.sections import charted, film_and_curves, guard, section
from ..report.viewer import columns_of, data_uri, viewer
from ..training.trainer import Trainer
from . import arguments as arguments_of

CONFIGS = Path(__file__).parents[2] / "configs"
WANTED = (  # of the search: prompts whose first picture with SEED is wrong
    "two cats on a green background",
    "two pizzas on a blue background",
    "three cherries on a white background",
)
SEED, TRIED, DETECTOR = 1, 16, "diffalign.emoji_world.detector:evidence"
ABOUT = (
    "A text-to-image model of 64 pixels, small enough for two processor cores, and three things "
    "that this library does with any: search for a better picture, train on a reward, and notice "
    "when a reward is being hacked. Everything below was drawn on this machine just now."
)
STRIP = (3, 8, 112)  # of the hacked run: prompts, epochs, px of a picture


def blue(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """How blue pictures (n, 3, H, W) are, (n,) in [-1, 1]: a reward to be hacked."""
    red, green, blue = images.unbind(1)
    return (blue - (red + green) / 2).mean((1, 2))


blue.differentiable = True  # type: ignore[attr-defined]


def searched(folder: Path) -> str:
    """The first picture of every prompt beside the best of TRIED, by the soft composition."""
    print(f"1 of 3: the best of {TRIED} pictures of each of {len(WANTED)} prompts", flush=True)
    start, how = time.perf_counter(), {"detector": DETECTOR, "soft": True}
    lines = [json.dumps({"prompt": text, **metadata(text)}) + "\n" for text in WANTED]
    write_atomic(folder / "search.jsonl", "".join(lines).encode())
    policy = policies.load(str(ASSETS / "emoji-sd"))
    sampling = sampling_for("best_of_n", policy.levels(8), 2.0)
    reward, seeds = reward_library.build({"composition": how}), [SEED] * len(WANTED)
    task = Task(policy, reward, load_prompts(folder / "search.jsonl"), sampling, seeds, 32)
    plain: list[Result] = []

    def keep(found: Sequence[Result]) -> None:
        plain.extend(() if plain else found)

    best = search(task, build("best_of_n", {"n": TRIED})(task), Budget(), "search", keep)
    columns = {"the first picture": plain, f"the best of {TRIED}": best}
    pictures = {k: [to_pil(r.image) for r in found] for k, found in columns.items()}
    notes = {k: [{"reward": r.reward} for r in found] for k, found in columns.items()}
    image = data_uri(comparison_grid(pictures, WANTED, notes, 192), 1200)
    before, after = (sum(right(p, WANTED)) for p in pictures.values())
    return section(
        "A search, without training",
        f'<div class="grids"><img alt="Every prompt before and after" src="{image}"></div>'
        "<p>Again: <code>python sample.py --best-of-n --best-of-n.n "
        f"{TRIED} --seeds {SEED} --steps 8 --guidance 2 --prompts {folder}/search.jsonl "
        f"--rewards.composition.soft true --rewards.composition.detector {DETECTOR}</code></p>",
        f"{TRIED} pictures of each prompt from other noises, of which the reward kept the best, in "
        f"{time.perf_counter() - start:.0f} s. A referee that no reward knows finds {before} of "
        f"{len(WANTED)} right before and {after} after. The prompts are ones whose first picture "
        "is wrong.",
    )


def right(pictures: Sequence[Image.Image], texts: Sequence[str]) -> list[bool]:
    """Whether the referee confirms everything that the prompt of a picture says."""
    images = torch.stack([to_tensor(picture) for picture in pictures])
    found = findings(images, list(texts), load("emoji-referee"))
    return [all(said.values()) for said in found]


def run(config: Path, folder: Path) -> Run:
    """Train as a config says, in a new folder."""
    trainer = Trainer(TrainConfig.from_file(config, ["--log.dir", str(folder)]), overwrite=True)
    trainer.train()
    return read([folder])[0]


def trained(run: Run) -> str:
    """Held-out pictures before and after, what the referee says of them, and the curves."""
    first, last = run.shots[0], run.shots[-1]
    before, after = (right(s.pictures, s.prompts) for s in (first, last))
    gains = [b - a for a, b in zip(before, after, strict=True)]
    error = statistics.stdev(gains) / len(gains) ** 0.5
    minutes = (run.total("seconds") or 0.0) / 60
    prompts, columns = columns_of([run])
    shown = viewer(prompts, columns, ["reward", "judge"], "beside")
    said = (
        f"{run.epochs} epochs of 32 pictures, {minutes:.1f} minutes. The reward reads numbers of "
        "objects from a verifier and sends its gradient back through all eight steps. Numbers and "
        f"objects of these {len(prompts)} prompts were never shown together, to the base model or "
        "in this run. A referee that no reward knows finds "
        f"{sum(before)} of the first pictures right and {sum(after)} of the last, "
        f"{statistics.fmean(gains):+.2f} ± {error:.2f} (a standard error over the prompts) of all."
    )
    return (
        section("A training run: counting", shown, said)
        + section("What was measured", tables.held_out(run))
        + section("", charted(film_and_curves([run]), graphs.legend([run])))
    )


def hacked(run: Run) -> str:
    """A strip over the epochs, and the guard's verdict where one should have stopped."""
    prompts, epochs, cell = STRIP
    strip = film.strip_of(spread(run.shots, epochs), prompts, cell, *run.flagged[:1])
    return section(
        "A hacked run",
        f'<p class="warn">{escape(guard(run))}</p><img class="strip" src="'
        f'{data_uri(strip, 1600)}" alt="The same prompts over the epochs, turning blue">'
        + charted(graphs.curves([run]), graphs.legend([run])),
        "The reward is how blue a picture is, and nothing else. It rises all the way, the pictures "
        "are lost, and a judge that was never trained on sees it. With eval.guard=stop the run "
        "would have ended there; the best weights by the judge are kept in any case.",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """`diffalign demo`; returns the exit status."""
    folder, start = Path(arguments_of.demo().parse_args(arguments).folder), time.perf_counter()
    check_folder(folder, "FOLDER")
    parts = [searched(folder)]
    for n, (name, shown) in enumerate({"counting": trained, "hacked": hacked}.items(), start=2):
        print(f"{n} of 3: configs/emoji_{name}.yaml", flush=True)
        done = run(CONFIGS / f"emoji_{name}.yaml", folder / name)
        print(f"The guard: {guard(done)}")
        parts.append(shown(done))
    minutes = (time.perf_counter() - start) / 60
    parts.insert(0, f"<header><h1>diffalign in {minutes:.0f} minutes</h1><p>{ABOUT}</p></header>")
    path = folder / "index.html"
    write_atomic(path, report.page("diffalign: demo", "".join(parts)))
    print(f"\n{minutes:.1f} minutes; the page is\n{path.resolve().as_uri()}")
    return 0
