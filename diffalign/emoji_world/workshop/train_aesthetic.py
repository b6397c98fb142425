"""Train an aesthetic head on emoji-clip, in the exact layout of LAION's.

    python -m diffalign.emoji_world.workshop.train_aesthetic OUT --clip CLIP

The head is LAION's improved-aesthetic-predictor MLP on the normalised image embedding of a CLIP:
Linear(d, 1024), Dropout(0.2), Linear(1024, 128), Dropout(0.2), Linear(128, 64), Dropout(0.1),
Linear(64, 16), Linear(16, 1), with no activation between them. What it learns is made up, and
therefore known: `beauty` of a picture is 2 + 4 vividness + 4 (1 - degradation), from 2 to 10.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel

from ..scenes import sample_scene
from ..tensors import pixels
from .train_clip import MIX, normalize
from .train_preference import DEGRADATIONS, degrade
from .training import fit


class Head(nn.Module):
    """(n, d) unit embeddings -> (n,) scores; the state dict is keyed "layers.0.weight" ... ."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2),
            nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, embedding: Tensor) -> Tensor:
        return self.layers(embedding).squeeze(-1)


def vividness(images: Tensor) -> Tensor:
    """Mean of max - min over the colour channels, (n,) in [0, 1], of (n, 3, H, W)."""
    return (images.amax(1) - images.amin(1)).mean((1, 2))


@torch.no_grad()
def examples(
    encode: Callable[[Tensor], Tensor], seed: int, n: int, reserved: bool
) -> tuple[Tensor, Tensor]:
    """(unit embeddings (n, d), beauty (n,)) of scenes of which two in three are degraded. `encode`
    maps pictures (m, 3, 64, 64) in [0, 1] to unit embeddings (m, d)."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    scenes = [sample_scene(rng, rng.choice(MIX), reserved) for _ in range(n)]
    embeddings, beauty = [], []
    for start in range(0, n, 100):
        clean = pixels(scenes[start : start + 100]).float() / 255
        strength = torch.rand(len(clean)) * (torch.rand(len(clean)) < 2 / 3)
        kinds = [rng.choice(DEGRADATIONS) for _ in clean]
        shown = torch.where(strength.view(-1, 1, 1, 1) > 0, degrade(clean, strength, kinds), clean)
        embeddings.append(encode(shown))
        beauty.append(2 + 4 * vividness(clean) + 4 * (1 - strength))
    return torch.cat(embeddings), torch.cat(beauty)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rho of two (n,) tensors without ties."""
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).float()
    return torch.corrcoef(ranks)[0, 1].item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--clip", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    model: Any = CLIPModel.from_pretrained(args.clip).eval()

    def encode(pictures: Tensor) -> Tensor:
        return F.normalize(model.get_image_features(normalize(pictures)).pooler_output, dim=-1)

    inputs, truth = examples(encode, 11, 16000, reserved=False)
    held_inputs, held_truth = examples(encode, 10**6 + 11, 2000, reserved=True)
    torch.manual_seed(11)
    head = Head(inputs.shape[1])

    def loss(step: int) -> Tensor:
        pick = torch.randint(len(inputs), (256,))
        return F.mse_loss(head(inputs[pick]).float(), truth[pick])

    @torch.no_grad()
    def report(step: int) -> dict:
        head.eval()
        out = head(held_inputs)
        head.train()
        return {
            "spearman": round(rank_correlation(out, held_truth), 3),
            "rmse": round(F.mse_loss(out, held_truth).sqrt().item(), 3),
        }

    figures = fit(
        {"head": head}, loss, args.steps, 1e-3, args.out / "training.pt", report=report,
        report_every=args.steps,
    )  # fmt: skip
    print({"figures": figures, "std of the truth": round(held_truth.std().item(), 3)})
    state = {k: v.half().contiguous() for k, v in head.state_dict().items()}
    save_file(state, args.out / "model.safetensors")


if __name__ == "__main__":
    main()
