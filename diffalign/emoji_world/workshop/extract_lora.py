"""The change that a run made to all weights of emoji-sd, as a LoRA of low rank.

    python -m diffalign.emoji_world.workshop.extract_lora runs/emoji_composition_seed0 \\
        assets/emoji-composition --rank 16

For every linear layer and convolution the best approximation B A of the change, (out, in x kernel),
in the least squares sense: its largest singular values. What biases and norms learned is left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...policies.run_folder import WEIGHTS
from ..scenes import ASSETS

UNET = Path("unet") / "diffusion_pytorch_model.safetensors"


def low_rank(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A, B) with B A nearest to `change`, (out, in) or (out, in, height, width): A is (rank, in,
    ...), B (out, rank), or (out, rank, 1, 1) for convolutions; less where no more is needed."""
    u, s, v = torch.linalg.svd(change.flatten(1), full_matrices=False)
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    a, b = root[:, None] * v[:rank], u[:, :rank] * root
    return a.view(rank, *change.shape[1:]), b.view(*b.shape, *[1] * (change.dim() - 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="of model.lora_rank 0, from emoji-sd")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    before, after = load_file(ASSETS / "emoji-sd" / UNET), load_file(args.run / UNET)
    lora, whole, lost = {}, 0.0, 0.0
    for name, weight in before.items():
        change = after[name].float() - weight.float()
        whole += change.square().sum().item()
        if change.dim() < 2 or not name.endswith(".weight"):
            lost += change.square().sum().item()
            continue
        a, b = low_rank(change, args.rank)
        lost += (change.flatten(1) - b.flatten(1) @ a.flatten(1)).square().sum().item()
        layer = f"unet.{name.removesuffix('.weight')}"
        lora |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / WEIGHTS
    save_file({k: v.half().contiguous() for k, v in lora.items()}, path, {"format": "pt"})
    path.chmod(0o644)  # safetensors writes for the owner alone
    print(
        f"{path}: {1 - lost / whole:.0%} of the squared change, {path.stat().st_size / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
