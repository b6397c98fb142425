"""Pictures with plain diffusers: what anyone who loads the trained weights gets."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from . import grids, policies
from .prompts import collect


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


def trained_denoiser(run: str) -> str | None:
    """The name of the denoiser in a run folder that trained all its weights."""
    names = ("unet", "transformer")
    return next((n for n in names if (Path(run) / n / "config.json").exists()), None)


def check_drawing(model: str, steps: int, out: str, option: str = "--grid") -> None:
    """Refuse, before a model is loaded, what cannot be drawn or written."""
    policies.check(model)
    if steps < 1:
        raise ValueError(f"--steps {steps} draws nothing; use 1 or more")
    if not out.lower().endswith(".png"):
        raise ValueError(f"{option} {out!r} does not end in .png, and that is what is written")


def check_lora(lora: str, option: str) -> None:
    """Refuse what is no trained weights: a local path without any; a hub id passes."""
    local = lora.startswith((".", "/", "runs/")) or lora.endswith(".safetensors")
    if local and not Path(lora).exists():
        raise ValueError(f"{option} {lora!r} does not exist; give a run folder or a hub id")
    empty = Path(lora).is_dir() and not list(Path(lora).glob("*.safetensors"))
    if empty and trained_denoiser(lora) is None:
        raise ValueError(f"{option} {lora!r} holds no .safetensors file; has the run been saved?")


class Sampler:
    """A diffusers pipeline, and on it any mixture of LoRAs."""

    def __init__(self, model: str, merge_lora: str | None = None, dtype: str = "float32"):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        options = {"torch_dtype": getattr(torch, dtype)}
        self.pipe = policies.pipeline(model, merge_lora, **options).to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.adapters: dict[str, str] = {}  # LoRAs loaded: their names in the pipeline
        self.base: tuple[str, Any] | None = None  # the base denoiser, while another is in its place

    def use(self, weights: Mapping[str, float]) -> None:
        """W + Σ factor ΔW over {LoRA: factor}; none is the base model. A LoRA is what
        `pipe.load_lora_weights` reads; a run folder with a whole denoiser stands alone, with 1."""
        weights = {path: factor for path, factor in weights.items() if factor != 0}
        if self.base is not None:
            setattr(self.pipe, *self.base)
            self.base = None
        denoiser = next(filter(None, map(trained_denoiser, weights)), None)
        if denoiser is not None:
            if list(weights.values()) != [1]:
                raise ValueError(
                    f"{weights}: a whole denoiser cannot be scaled or mixed as LoRAs can; give one "
                    "alone, with the factor 1"
                )
            network = getattr(self.pipe, denoiser)
            trained = type(network).from_pretrained(*weights, subfolder=denoiser)
            self.base = denoiser, network
            setattr(self.pipe, denoiser, trained.to(self.device, network.dtype))
        elif weights:
            for path in weights:
                if path not in self.adapters:
                    self.adapters[path] = f"lora{len(self.adapters)}"
                    with warnings.catch_warnings():  # that there is an adapter already is meant so
                        warnings.filterwarnings("ignore", "Already found a `peft_config`")
                        self.pipe.load_lora_weights(path, adapter_name=self.adapters[path])
            self.pipe.enable_lora()
            self.pipe.set_adapters([self.adapters[p] for p in weights], list(weights.values()))
        elif self.adapters:
            self.pipe.disable_lora()

    def draw(
        self,
        texts: Sequence[str],
        seeds: Sequence[int],
        steps: int,
        guidance: float,
        resolution: int | None = None,
    ) -> list[Image.Image]:
        """A picture for each of the texts, from the noise of its seed, in one batch."""
        return self.pipe(
            list(texts),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(s) for s in seeds],
            height=resolution,
            width=resolution,
            **policies.text_options(self.pipe),
        ).images


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
    dtype: str = "float32",
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
    texts = [p.text for p in collect(prompts, "--prompts")]
    check_drawing(model, steps, grid)
    if lora is not None:
        check_lora(lora, "--lora")
        denoiser = trained_denoiser(lora)
        if denoiser is not None and lora_scale != 1:
            raise ValueError(
                f"--lora-scale {lora_scale:g} is for a LoRA, and {lora!r} holds a whole "
                f"{denoiser}; leave it out"
            )
    if compare and lora is None:
        raise ValueError("--compare sets the LoRA beside the base model; give --lora as well")

    sampler = Sampler(model, merge_lora, dtype)

    def rows(weights: Mapping[str, float]) -> list[list[Image.Image]]:
        sampler.use(weights)
        how = numbers, steps, guidance, resolution
        return [sampler.draw([text] * len(numbers), *how) for text in texts]

    shown = list(zip(texts, rows({}), strict=True)) if compare or lora is None else []
    if lora is not None:
        names = [f"{text} [{Path(lora).name}]" for text in texts]
        tuned = list(zip(names, rows({lora: lora_scale}), strict=True))
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
