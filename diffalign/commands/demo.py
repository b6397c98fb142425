"""`diffalign demo`, by `make demo`: a search, a training run and a hacked run, on one page."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from html import escape
from pathlib import Path

from torch import Tensor

import rewards as reward_library
from rewards.device import default_device

from .. import policies, report
from ..config.files import check_folder, write_atomic
from ..config.prompts import load as load_prompts
from ..drawing.grids import comparison_grid, to_pil
from ..emoji_world.detector import metadata
from ..emoji_world.evaluate import right
from ..emoji_world.scenes import ASSETS
from ..optimize_noise import build, sampling_for
from ..optimize_noise.base import Result, Task, search
from ..optimize_noise.options import Budget
from ..record.pictures import spread
from ..report import film, graphs, tables
from ..report.run import Run, read
from ..report.sections import charted, film_and_curves, guarded, section
from ..report.viewer import columns_of, data_uri, viewer
from . import arguments as arguments_of

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
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
    asked = str(folder / "search.jsonl")
    write_atomic(asked, "".join(lines).encode())
    policy = policies.load(str(ASSETS / "emoji-sd"))
    sampling = sampling_for("best_of_n", policy.levels(8), 2.0)
    reward, seeds = reward_library.build({"composition": how}), [SEED] * len(WANTED)
    task = Task(policy, reward, load_prompts(asked), sampling, seeds, 32)
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
        f"{TRIED} --seeds {SEED} --steps 8 --guidance 2 --prompts {escape(shlex.quote(asked))} "
        f"--rewards.composition.soft true --rewards.composition.detector {DETECTOR}</code></p>",
        f"{TRIED} pictures of each prompt from other noises, of which the reward kept the best, in "
        f"{time.perf_counter() - start:.0f} s. A referee that no reward knows finds {before} of "
        f"{len(WANTED)} right before and {after} after. The prompts were chosen because their "
        "first picture is wrong.",
    )


def train(config: Path, folder: Path) -> Run:
    """Train as a config says, in a new folder; on CPUs by two processes, which share their work
    better than two threads do. Raises ValueError where that fails."""
    command = ["train", str(config), "--log.dir", str(folder.resolve()), "--overwrite"]
    two, threads = default_device() == "cpu", max(1, (os.cpu_count() or 1) // 2)
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "--module"]
    extra = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(threads)} if two else {}
    module = [*(launch if two else []), "diffalign", *command]
    done = subprocess.run(
        [sys.executable, "-m", *module], cwd=ROOT, env=os.environ | extra, check=False
    )
    if done.returncode:
        raise ValueError(f"{config} was not trained; what went wrong is said above")
    return read([folder])[0]


def trained(run: Run) -> str:
    """Held-out pictures before and after, what the referee says of them, and the curves."""
    first, last = run.shots[0], run.shots[-1]
    before, after = (right(s.pictures, s.prompts) for s in (first, last))
    gains: dict[str, list[int]] = defaultdict(list)  # by number and object: prompts share them
    for text, a, b in zip(first.prompts, before, after, strict=True):
        gains[text.partition(" on ")[0]].append(b - a)
    means = [statistics.fmean(each) for each in gains.values()]
    error = statistics.stdev(means) / len(means) ** 0.5
    pictures = run.setting("data.groups", 0) * run.setting("data.group_size", 0)
    prompts, columns = columns_of([run])
    said = (
        f"{run.epochs} epochs of {pictures} pictures, {(run.total('seconds') or 0) / 60:.1f} "
        "minutes. The reward reads the objects in a picture by a verifier, and their look by a "
        "CLIP; its gradient goes back through all eight steps. No denoiser was shown the numbers "
        f"of objects that these {len(prompts)} prompts ask for. A referee, which no reward knows, "
        f"finds {sum(before)} of the first pictures right and {sum(after)} of the last: "
        f"{statistics.fmean(means):+.2f} ± {error:.2f} of all (a standard error over {len(means)} "
        "numbers of objects)."
    )
    shown = viewer(prompts, columns, ["reward", "judge"])
    return (
        section("A training run: counting", guarded(run) + shown, said)
        + section("What was measured", tables.held_out(run))
        + section("", charted(film_and_curves([run]), graphs.legend([run])))
    )


def hacked(run: Run) -> str:
    """A strip over the epochs, and the guard's verdict where one should have stopped."""
    prompts, epochs, cell = STRIP
    strip = film.strip_of(spread(run.shots, epochs), prompts, cell, *run.flagged[:1])
    said = "The reward is how blue a picture is, and nothing else."
    if run.flagged:
        said += (
            " It rises, the pictures are lost, and a judge that is no part of it sees that. The "
            "first flag is where one should have stopped; eval.guard=stop does."
        )
    return section(
        "A hacked run",
        f'{guarded(run)}<img class="strip" src="{data_uri(strip, 1600)}" alt="The same prompts '
        'over the epochs">' + charted(graphs.curves([run]), graphs.legend([run])),
        said,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """`diffalign demo`; returns the exit status."""
    folder, start = Path(arguments_of.demo().parse_args(arguments).folder), time.perf_counter()
    check_folder(folder, "FOLDER")
    parts = [searched(folder)]
    for n, (name, shown) in enumerate({"counting": trained, "hacked": hacked}.items(), start=2):
        print(f"{n} of 3: configs/emoji_{name}.yaml", flush=True)
        parts.append(shown(train(CONFIGS / f"emoji_{name}.yaml", folder / name)))
    minutes = (time.perf_counter() - start) / 60
    parts.insert(0, f"<header><h1>diffalign in {minutes:.0f} minutes</h1><p>{ABOUT}</p></header>")
    path = folder / "index.html"
    write_atomic(path, report.page("diffalign: demo", "".join(parts)))
    print(f"\n{minutes:.1f} minutes; the page is\n{path.resolve().as_uri()}")
    return 0
