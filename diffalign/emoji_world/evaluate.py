"""EmojiEval: GenEval's six categories (arXiv 2310.11513) in EmojiWorld, scored by two verifiers.

448 fixed prompts in the split `train`, 444 in `held_out`; the latter ask for combinations that no
denoiser was trained on (`scenes.held_out`). A picture succeeds when a verifier confirms everything
its prompt says; the score of a category is the share that succeeds, the overall score the mean of
the six. The first verifier may be what a run was trained on; the second, the referee, never is.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from .. import policies
from ..config import prompts
from ..sampling.rollout import Sampling, rollout
from . import SPLITS
from .claims import parse
from .scenes import ASSETS, STYLES, Scene, readable, sample_scene
from .tensors import pixels
from .verifier import DETECTORS, findings, load

VERIFIERS = tuple(DETECTORS)
CATEGORIES = (
    "single object", "two objects", "counting", "colours", "position", "colour attribution",
)  # fmt: skip
KINDS = {"counting": "count", "two objects": "pair", "colour attribution": "pair",
         "position": "relation"}  # of scenes; of the other categories: "single"  # fmt: skip


def load_prompts(split: str) -> list[str]:
    """The prompts of a split, category by category."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    path = ASSETS / "emoji-world" / "prompts" / f"eval_{split}.jsonl"
    return [p.text for p in prompts.load(path)]


@dataclass(frozen=True)
class Figure:
    """A measured value, its standard error, and the number of pictures behind it."""

    value: float
    error: float
    n: int

    def __str__(self) -> str:
        digits = max(1, math.ceil(-math.log10(self.error)))  # one of the error's at least
        return f"{self.value:.{digits}f} ± {self.error:.{digits}f}"


def share(hits: Sequence[Sequence[bool]]) -> Figure:
    """The share of hits, of which those of a prompt belong together.

    The standard error is that of the mean over P prompts, √(Σ (m_p - m)² / (P (P - 1))); where all
    prompts agree it is √(q (1 - q) / P) with q = (k + 1) / (P + 2) for k prompts that hit, not 0.
    Prompts have the same number of pictures.
    """
    means = torch.tensor([sum(h) / len(h) for h in hits], dtype=torch.double)
    prompts, value = len(means), means.mean().item()
    error = means.std().item() / prompts**0.5 if prompts > 1 else 0.0
    if error == 0:
        q = (prompts * value + 1) / (prompts + 2)
        error = (q * (1 - q) / prompts) ** 0.5
    return Figure(value, error, sum(len(h) for h in hits))


def scores(
    images: Tensor, texts: Sequence[str], verifier: str = "emoji-verifier"
) -> dict[str, Figure]:
    """Scores of pictures (n, 3, H, W) in [0, 1]: "overall", the six categories, and for each kind
    of claim, as "said: colour", the share of such claims that hold. A text may come several
    times. verifier: one of `VERIFIERS`."""
    success: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    said: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for text, found in zip(texts, findings(images, list(texts), load(verifier)), strict=True):
        success[parse(text).category][text].append(all(found.values()))
        for what, right in found.items():
            said[what][text].append(right)
    each = {c: share(list(success[c].values())) for c in CATEGORIES if success[c]}
    details = {f"said: {k}": share(list(v.values())) for k, v in said.items()}
    value = sum(f.value for f in each.values()) / len(each)
    error = sum(f.error**2 for f in each.values()) ** 0.5 / len(each)
    return {"overall": Figure(value, error, len(texts))} | each | details


def right(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[bool]:
    """Whether the referee confirms everything that the prompt of a picture says."""
    images = torch.stack([to_tensor(picture) for picture in pictures])
    return [all(said.values()) for said in findings(images, list(prompts), load("emoji-referee"))]


def real_scene(text: str, rng: random.Random) -> Scene:
    """A scene that a prompt describes; what the prompt leaves open is drawn at random."""
    claim = parse(text)
    while True:
        scene = sample_scene(rng, KINDS.get(claim.category, "single"), reserved=None)
        if claim.relation == scene.relation and claim.number in (None, len(scene.items)):
            break
    nouns = claim.nouns * claim.number if claim.number else claim.nouns
    ground, style = claim.background or scene.background, rng.choice(STYLES)
    hidden = any(c == ground or (not c and not readable(n, style, ground)) for n, c in nouns)
    if hidden and claim.background is None:
        return real_scene(text, rng)  # another background
    items = tuple(
        replace(item, name=name, color=color, style=style)
        for item, (name, color) in zip(scene.items, nouns, strict=True)
    )
    return replace(scene, items=items, background=ground)


def real_scenes(split: str = "held_out", rounds: int = 4) -> tuple[Tensor, list[str]]:
    """Perfect pictures, `rounds` for each prompt, and their prompts: what verifiers score them is
    their own accuracy."""
    rng = random.Random(10**6 + 5)
    texts = load_prompts(split) * rounds
    return pixels([real_scene(t, rng) for t in texts]).float() / 255, texts


@torch.no_grad()
def draw(
    policy: policies.Policy, texts: Sequence[str], steps: int, guidance: float, seed: int
) -> Tensor:
    """Pictures (n, 3, H, W) of `texts` by the deterministic sampler; prompt i has a seed of its
    own."""
    sampling = Sampling(policy.levels(steps), "ode", 0.0, guidance)
    images = []
    for start in range(0, len(texts), 32):
        chunk = texts[start : start + 32]
        seeds = [1000 * seed + start + i for i in range(len(chunk))]
        paths = rollout(policy, policy.encode(chunk), sampling, seeds, 32)
        images.append(policy.decode(paths.final).cpu())
    return torch.cat(images)
