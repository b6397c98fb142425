"""Pictures with plain diffusers: what anyone who loads the trained weights gets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from . import grids, policies
from . import prompts as prompt_files


def parse_seeds(text: str) -> list[int]:
    """The numbers of a list with ranges: 0-3,7 is [0, 1, 2, 3, 7]. Raises ValueError."""
    try:
        seeds = []
        for part in text.split(","):
            first, _, last = part.partition("-")
            seeds += range(int(first), int(last or first) + 1)
        if not seeds:
            raise ValueError
    except ValueError:
        raise ValueError(f"--seeds {text!r} is not understood; write 0-7, 3 or 1,5,9") from None
    return seeds


def _trained_denoiser(run: str | None) -> str | None:
    """The name of the denoiser in a run folder that trained all its weights."""
    names = ("unet", "transformer") if run is not None else ()
    return next((n for n in names if (Path(run or "") / n / "config.json").exists()), None)


def draw(
    model: str,
    prompts: Sequence[str],
    seeds: str,
    lora: str | None = None,
    lora_scale: float = 1.0,
    compare: bool = False,
    steps: int = 20,
    guidance: float = 3.0,
    resolution: int | None = None,
    merge_lora: str | None = None,
    grid: str = "grid.png",
    out: str | None = None,
) -> Path:
    """Write a grid with a row per prompt and a column per seed; returns its path.

    lora: a folder or file that `pipe.load_lora_weights` reads, or a run folder with a whole
    denoiser; lora_scale multiplies ΔW. merge_lora is part of the model, of the base too. compare
    adds a row of the base model above each. Raises ValueError for bad input before the pipeline is
    loaded.
    """
    numbers = parse_seeds(seeds)
    if len(prompts) == 1 and prompts[0].endswith((".txt", ".jsonl")):
        texts = [p.text for p in prompt_files.load(prompts[0])]
    else:
        texts = list(prompts)
    denoiser = _trained_denoiser(lora)
    policies.check(model)
    if not grid.lower().endswith(".png"):
        raise ValueError(f"--grid {grid!r} does not end in .png, and that is what is written")
    local = lora is not None and (
        lora.startswith((".", "/", "runs/")) or lora.endswith(".safetensors")
    )
    if lora is not None and local and not Path(lora).exists():
        raise ValueError(f"--lora {lora!r} does not exist; give a run folder or a hub id")
    if denoiser is not None and lora_scale != 1:
        raise ValueError(
            f"--lora-scale {lora_scale:g} is for a LoRA, and {lora!r} holds a whole {denoiser}; "
            "leave it out"
        )
    empty = lora is not None and Path(lora).is_dir() and not list(Path(lora).glob("*.safetensors"))
    if empty and denoiser is None:
        raise ValueError(f"--lora {lora!r} holds no .safetensors file; has the run been saved yet?")
    if compare and lora is None:
        raise ValueError("--compare sets the LoRA beside the base model; give --lora as well")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = policies.pipeline(model, merge_lora).to(device)
    pipe.set_progress_bar_config(disable=True)

    def pictures() -> list[list[Image.Image]]:
        rows = []
        for text in texts:
            generators = [torch.Generator().manual_seed(s) for s in numbers]
            row = pipe(
                [text] * len(numbers),
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=generators,
                height=resolution,
                width=resolution,
                **policies.text_options(pipe),
            )
            rows.append(row.images)
        return rows

    shown = list(zip(texts, pictures(), strict=True)) if compare or lora is None else []
    if lora is not None:
        if denoiser is not None:
            network = getattr(pipe, denoiser)
            trained = type(network).from_pretrained(lora, subfolder=denoiser)
            setattr(pipe, denoiser, trained.to(device, network.dtype))
        else:
            pipe.load_lora_weights(lora, adapter_name="default")
            pipe.set_adapters("default", lora_scale)
        names = [f"{text} [{Path(lora).name}]" for text in texts]
        tuned = list(zip(names, pictures(), strict=True))
        shown = (
            [row for pair in zip(shown, tuned, strict=True) for row in pair] if compare else tuned
        )
    columns = {f"seed {s}": [row[i] for _, row in shown] for i, s in enumerate(numbers)}
    settings = {"model": model, "lora": lora, "lora_scale": lora_scale, "steps": steps}
    settings |= {"guidance": guidance, "prompts": texts, "seeds": numbers}
    options = {"resolution": resolution, "merge_lora": merge_lora}
    settings |= {name: value for name, value in options.items() if value is not None}
    grids.save_png(grids.comparison_grid(columns, [t for t, _ in shown]), grid, settings)
    if out is not None:
        for r, (_, row) in enumerate(shown):
            for seed, image in zip(numbers, row, strict=True):
                grids.save_png(image, Path(out) / f"{r:03d}_seed{seed}.png", settings)
    return Path(grid)
