"""What every shipped model of EmojiWorld measures: one set of probes for docs and tests.

    python -m diffalign.emoji_world.workshop.figures              # measure all, write figures.json
    python -m diffalign.emoji_world.workshop.figures emoji-judge  # one model's again
    python -m diffalign.emoji_world.workshop.figures --table      # figures.json as docs have it

`assets/emoji-world/figures.json` holds for every model the digest of its weights and its figures:
value, standard error, number of pictures. Tests measure again with fewer pictures, and refuse
weights that are not those measured: new weights cannot be shipped under the figures of old ones.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

import rewards

from ... import policies
from ...config.files import write_atomic
from .. import evaluate
from ..claims import parse
from ..evaluate import Figure, share
from ..scenes import ASSETS, KINDS, sample_scene
from ..tensors import pixels
from . import train_vae
from .train_aesthetic import examples, rank_correlation
from .train_clip import MIX, probes
from .train_preference import pairs

FILE = ASSETS / "emoji-world" / "figures.json"


def singles(hits: Sequence[bool]) -> Figure:
    """The share of hits in pictures that are independent."""
    return share([[hit] for hit in hits])


def mean(values: Tensor) -> Figure:
    """The mean of independent values (n,)."""
    return Figure(values.mean().item(), values.std().item() / len(values) ** 0.5, len(values))


def digest(model: str) -> str:
    """Of all weights of the model: those in its folder, then those in folders it links to."""
    total = hashlib.sha256()
    for path in sorted((ASSETS / model).rglob("*.safetensors")):
        total.update(path.read_bytes())
    for part in sorted(p for p in (ASSETS / model).iterdir() if p.is_symlink()):
        for path in sorted(part.resolve().rglob("*.safetensors")):
            total.update(path.read_bytes())
    return total.hexdigest()


def clip(model: str, few: bool) -> dict[str, Figure]:
    tower = rewards.Clip(str(ASSETS / model))
    hits = probes(tower.image_features, tower.text_features, 140 if few else 1400)
    return {kind: singles(found) for kind, found in hits.items()}


@torch.no_grad()
def preference(few: bool) -> dict[str, Figure]:
    """Share of pairs of pictures, of reserved combinations, in which the preferred one wins."""
    judge, draw = rewards.PickScore(str(ASSETS / "emoji-pickscore")), random.Random(10**6 + 7)
    torch.manual_seed(0)
    hits: dict[str, list[bool]] = {}
    n = 200 if few else 600
    for clean in (False, True):
        scenes = [sample_scene(draw, draw.choice(MIX), reserved=True) for _ in range(n)]
        prompts, good, bad, kinds = pairs(scenes, draw, clean)
        wins = (judge(good, prompts) > judge(bad, prompts)).tolist()
        for kind, win in zip(kinds, wins, strict=True):
            hits.setdefault(kind, []).append(win)
    return {k: singles(v) for k, v in sorted(hits.items())}


@torch.no_grad()
def aesthetic(few: bool) -> dict[str, Figure]:
    """Spearman's rank correlation with the known beauty of pictures, of reserved combinations."""
    n = 500 if few else 2000
    reward = rewards.Aesthetic(str(ASSETS / "emoji-clip"), str(ASSETS / "emoji-aesthetic"))
    embeddings, beauty = examples(reward.clip.image_features, 10**6 + 11, n, reserved=True)
    rho = rank_correlation(reward.head(embeddings)[:, 0], beauty)
    return {"Spearman": Figure(rho, (1 - rho**2) / (n - 1) ** 0.5, n)}


def categories(images: Tensor, texts: Sequence[str], verifier: str) -> dict[str, Figure]:
    """EmojiEval's overall score and its six categories."""
    found = evaluate.scores(images, texts, verifier)
    return {k: found[k] for k in ("overall", *evaluate.CATEGORIES)}


def verifier(name: str, few: bool) -> dict[str, Figure]:
    """EmojiEval of perfect pictures."""
    return categories(*evaluate.real_scenes(rounds=1 if few else 4), name)


def pipeline(name: str, few: bool, split: str = "held_out") -> dict[str, Figure]:
    """EmojiEval of the first seed: 20 steps and guidance 3, or what is in LORAS."""
    texts = evaluate.load_prompts(split)
    if few:  # a quarter of every category
        kinds = {c: [t for t in texts if parse(t).category == c] for c in evaluate.CATEGORIES}
        texts = [t for c in kinds.values() for t in c[::4]]
    if name in LORAS:
        policy = policies.load(str(ASSETS / "emoji-sd"), merge_lora=str(ASSETS / name))
        images = evaluate.draw(policy, texts, *LORAS[name], seed=0)
    else:
        images = evaluate.draw(policies.load(str(ASSETS / name)), texts, 20, 3.0, seed=0)
    return {
        f"{name}{note}": figure
        for note, one in zip(("", ", referee"), evaluate.VERIFIERS, strict=True)
        for name, figure in categories(images, texts, one).items()
    }


def vae(few: bool) -> dict[str, Figure]:
    """10 log10(255² / MSE) of pictures through encoder and decoder, in dB."""
    model = AutoencoderKL.from_pretrained(ASSETS / "emoji-sd" / "vae")
    n = 64 if few else 300

    rng = random.Random(10**6 + 1)
    images = {kind: pixels([sample_scene(rng, kind) for _ in range(n)]) for kind in KINDS}
    return {f"{kind}, dB": mean(train_vae.psnr(model, images[kind])) for kind in KINDS}


LORAS = {"emoji-turbo": (1, 1.0), "emoji-composition": (8, 1.0)}  # steps and guidance
PIPELINES = ("emoji-sd", "emoji-sd3", "emoji-flux", *LORAS)
PROBES: dict[str, Callable[[bool], dict[str, Figure]]] = {
    "emoji-sd/vae": vae,
    **{name: partial(pipeline, name) for name in PIPELINES},
    "emoji-clip": partial(clip, "emoji-clip"),
    "emoji-judge": partial(clip, "emoji-judge"),
    "emoji-pickscore": preference,
    "emoji-aesthetic": aesthetic,
    **{name: partial(verifier, name) for name in evaluate.VERIFIERS},
}
"""Figures of every model; with True, of fewer pictures, for the tests."""


def documented() -> dict[str, dict[str, Any]]:
    """{model: {"sha256": digest, "figures": {name: Figure}}} of figures.json."""
    tree = json.loads(FILE.read_text("utf-8")) if FILE.exists() else {}
    return {
        model: entry | {"figures": {k: Figure(**v) for k, v in entry["figures"].items()}}
        for model, entry in tree.items()
    }


def table() -> str:
    """The figures as Markdown, a row a model."""
    lines = ["| model | measured, ± standard error |", "|---|---|"]
    for model, entry in documented().items():
        cells = ", ".join(f"{name} {figure}" for name, figure in entry["figures"].items())
        lines.append(f"| `{model}` | {cells} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(PROBES)}; none = all")
    parser.add_argument("--table", action="store_true", help="print what is written, no more")
    args = parser.parse_args(arguments)
    for model in [] if args.table else args.models or PROBES:
        tree = documented()
        figures = PROBES[model](False)
        tree[model] = {"sha256": digest(model), "figures": figures}
        ordered = {name: tree[name] for name in PROBES if name in tree}
        for entry in ordered.values():
            entry["figures"] = {
                k: {"value": round(f.value, 4), "error": round(f.error, 4), "n": f.n}
                for k, f in entry["figures"].items()
            }
        write_atomic(FILE, (json.dumps(ordered, indent=1) + "\n").encode())
        print(model, {k: str(f) for k, f in figures.items()}, flush=True)
    print(table())


if __name__ == "__main__":
    main()
