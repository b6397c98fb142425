"""GPU memory that a process holds for weights and their training, from architectures alone.

    python benchmarks/scale.py            # writes benchmarks/results/scale.md

What one micro-batch takes comes on top: `diffalign train CONFIG --dry-run` says it for a model that
is on the disk. Nothing is read, and no GPU is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from architectures import MODELS, modules
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from peft.tuners.lora import LoraConfig

from diffalign.training.memory import largest, size

GIB, RANK = 2**30, 32
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
GPUS = (1, 8, 16, 64)
OUT = Path(__file__).parent / "results" / "scale.md"


def models() -> dict[str, tuple[Any, Any]]:
    """Denoiser and VAE of each, without memory."""
    found = {name: modules(model) for name, model in MODELS.items()}
    with torch.device("meta"):  # the defaults of both classes are those of Qwen-Image
        return found | {"qwen-image": (QwenImageTransformer2DModel(), AutoencoderKLQwenImage())}


def rows() -> list[tuple[str, float, float, list[float]]]:
    """Per model: billions of weights, GiB of a replica with a LoRA, and GiB of a process that
    trains all weights, by the number of GPUs."""
    found = []
    for name, (network, vae) in models().items():
        weights = size(network.parameters())  # in float32
        block, vae_bytes = largest(network), size(vae.parameters())
        full = [
            4 * weights / n + (2 * block if n > 1 else 0) + vae_bytes for n in GPUS
        ]  # weights, gradients, two moments
        network.add_adapter(LoraConfig(r=RANK, target_modules=TARGETS))
        lora = size(p for p in network.parameters() if p.requires_grad)
        replica = weights / 2 + 4 * lora + vae_bytes  # bfloat16, and the LoRA in float32
        found.append((name, weights / 4e9, replica / GIB, [n / GIB for n in full]))
    return found


def main() -> None:
    head = "| model | weights, 10⁹ | LoRA of rank 32, a replica |"
    lines = [
        head + "".join(f" all weights, {n} GPU{'s' * (n > 1)} |" for n in GPUS),
        "|---" * (3 + len(GPUS)) + "|",
    ]
    for name, billions, replica, full in rows():
        cells = "".join(f" {gib:.1f} |" for gib in full)
        lines.append(f"| {name} | {billions:.2f} | {replica:.1f} |{cells}")
    OUT.write_text("\n".join(lines) + "\n")
    print(OUT.read_text())


if __name__ == "__main__":
    main()
