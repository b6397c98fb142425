"""Pictures with plain diffusers: what anyone who loads the trained weights gets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from torch import Tensor

from rewards.device import default_device

from .. import policies
from ..config import Dtype
from ..config.decoding import ConfigError, decode, field_types, suggest
from ..config.files import check_file
from ..config.prompts import Prompt, collect, sides
from ..config.reading import read_sections
from ..drawing import grids
from ..dynamics import Levels
from ..policies import lora_files
from ..policies.run_folder import config_of, trained_denoiser
from . import drawn
from .drawn import Drawn

BATCH = 16  # pictures at a time


@dataclass
class Settings:
    """How a model draws. These are the defaults; a run's are the settings of its evaluation."""

    model: str = "assets/emoji-sd"
    merge_lora: str | None = None
    resolution: int | list[int] | None = None
    dtype: str = "float32"
    steps: int = 20
    guidance: float = 3.0


@dataclass(kw_only=True)
class Drawing(Settings):
    """What `sample.py` is asked to draw, and where to write it.

    prompts: texts or prompt files. seeds: a text for `parse_seeds`. lora: a folder or file that
    `pipe.load_lora_weights` reads, or a run folder with a whole denoiser; lora_scale multiplies ΔW.
    merge_lora is part of the model, and of the base model too. compare adds a row of the base model
    above each row. grid: the PNG of all pictures. out: a folder for the single pictures,
    prompts.jsonl and noise.safetensors (`drawn.write`).
    """

    prompts: Sequence[str]
    seeds: str
    lora: str | None = None
    lora_scale: float = 1.0
    compare: bool = False
    grid: str = "grid.png"
    out: str | None = None

    def check(self, **others: str | None) -> tuple[Levels, tuple[int, ...]]:
        """Calls `check_loras`, and `check_drawing`, whose result it returns. others: LoRAs of
        further options, by name."""
        found = check_drawing(self.model, self.steps, self.guidance, self.resolution, self.grid)
        check_loras(self.model, self.merge_lora, self.lora, self.lora_scale, **others)
        return found

    def how(self, kernel: str | None = None, eta: float = 0.0) -> dict[str, Any]:
        """The settings, as `Drawn.how` holds them."""
        names = ("model", "merge_lora", "lora", "lora_scale")
        names += ("steps", "guidance", "resolution", "dtype")
        own = {name: getattr(self, name) for name in names}
        return own | {"kernel": kernel, "eta": eta, "family": family_of(self.model)}


def settings(runs: Sequence[str | None], given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of `Settings` by name: those given, else those of the evaluation of the first run
    among `runs`, else the defaults. Prints what it took from the run.

    A run is given by its folder, its best/, or a file in either; other LoRAs and hub ids are passed
    over. Raises ConfigError for a config.yaml that cannot be read.
    """
    given = {k: v for k, v in given.items() if v is not None and k in field_types(Settings)}
    path = next(filter(None, map(config_of, filter(None, runs))), None)
    taken = _evaluated(path) if path is not None else {}
    # a run as the model brings its own merge_lora
    brought = ("merge_lora",) if config_of(given.get("model", "")) else ()
    taken = {k: v for k, v in taken.items() if k not in (*given, *brought)}
    found = decode(Settings, {**taken, **given}, source=f" in {path}" if path else "")
    if found.dtype not in get_args(Dtype):
        tip = suggest(found.dtype, get_args(Dtype))
        raise ConfigError(f"dtype={found.dtype!r} in {path} is not known{tip}")
    if taken:
        told = [f"{k.replace('_', ' ')} {v}" for k, v in taken.items() if v is not None]
        print(f"as in {path}: {', '.join(told)}")
    return vars(found)


def _evaluated(path: Path) -> dict[str, Any]:
    tree, found = read_sections(path), {}
    names = {"name": "model", "merge_lora": "merge_lora", "resolution": "resolution"}
    drawn = {"steps": "steps", "guidance": "guidance"}
    # in this order: settings of eval replace those of the sampler
    sections = {"model": {**names, "dtype": "dtype"}, "sampler": drawn}
    sections["eval"] = {**drawn, "resolution": "resolution"}
    for section, keys in sections.items():
        said = {name: tree.get(section, {}).get(key) for key, name in keys.items()}
        found |= {name: value for name, value in said.items() if value is not None}
    return found


MOST_SEEDS = 10_000


def parse_seeds(text: str) -> list[int]:
    """The numbers of a list with ranges, each once: 0-3,7 is [0, 1, 2, 3, 7]. Raises ValueError."""
    seeds: dict[int, None] = {}
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            low, high = int(first), int(last if dash else first)
            if low > high or high >= 2**63:
                raise ValueError
            if high - low >= MOST_SEEDS or len(seeds) > MOST_SEEDS:
                raise ConfigError(
                    f"--seeds {text!r} are more than {MOST_SEEDS} a prompt; ask for fewer"
                )
            seeds |= dict.fromkeys(range(low, high + 1))
    except ConfigError:
        raise
    except ValueError:
        raise ConfigError(f"--seeds {text!r} is not understood; write 0-7, 3 or 1,5,9") from None
    return list(seeds)


def check_drawing(
    model: str,
    steps: int,
    guidance: float,
    resolution: policies.Size | None,
    grid: str | None = None,
    option: str = "--grid",
) -> tuple[Levels, tuple[int, ...]]:
    """The levels of the sampler and the shape of a latent. Refuses, before a model is loaded,
    settings that cannot be drawn and a grid that cannot be written."""
    policies.check(model)
    if steps < 1:
        raise ValueError(f"--steps {steps} draws nothing; use 1 or more")
    if not 0 <= guidance < math.inf:
        raise ValueError(f"--guidance {guidance:g} is no guidance scale; use 0 or more")
    if resolution is not None:
        sides(resolution, "--resolution ")
    if grid is not None and not grid.lower().endswith(".png"):
        raise ValueError(f"{option} {grid!r} does not end in .png, and that is what is written")
    if grid is not None:
        check_file(grid, option)
    if guidance > 1 and policies.guided_by(model) is None:
        print(f"{model} takes no guidance scale: {guidance:g} is that of none")
    return policies.peek(model, steps, resolution)


def check_plain(model: str, resolution: policies.Size | None) -> None:
    """Refuse a size that diffusers' own pipeline does not draw, though the network could."""
    asked = sides(resolution, "--resolution ") if resolution is not None else ()
    if any(side % 8 for side in asked) and family_of(model) == "UNet":
        pair = [max(8, round(side / 8) * 8) for side in asked]
        near = pair[0] if isinstance(resolution, int) else pair
        raise ValueError(
            f"--resolution {resolution} is no multiple of 8, and diffusers' pipelines of a UNet "
            f"draw nothing else; the nearest is {near}"
        )


def family_of(model: str) -> str:
    """UNet, SD3 or Flux: the family of a model. Noise is for one family and one shape."""
    return policies.family(model).__name__.removesuffix("Policy")


def check_scale(scale: float, option: str = "--lora-scale") -> None:
    if not math.isfinite(scale):
        raise ValueError(f"{option} {scale} is no factor; use a number such as 0.5")


def check_loras(
    model: str,
    merge_lora: str | None = None,
    lora: str | None = None,
    scale: float = 1.0,
    **others: str | None,
) -> None:
    """Refuse, before the model is loaded, trained weights that cannot be read or do not fit it, as
    far as their headers tell. others: the weights of further options, by name."""
    given = {"merge_lora": merge_lora, "lora": lora, **others}
    for name, path in given.items():
        if path is not None:
            policies.check_lora(path, f"--{name.replace('_', '-')}", model)
    check_scale(scale)
    denoiser = trained_denoiser(lora) if lora is not None else None
    if denoiser is not None and scale != 1:
        raise ValueError(
            f"--lora-scale {scale:g} is for a LoRA, and {lora!r} holds a whole {denoiser}; leave "
            "it out"
        )


class Sampler:
    """A diffusers pipeline with any mixture of LoRAs on it."""

    def __init__(self, model: str, merge_lora: str | None = None, dtype: str = "float32"):
        self.device = default_device()
        self.model, self.dtype = model, getattr(torch, dtype)
        self.pipe = policies.pipeline(model, merge_lora, torch_dtype=self.dtype).to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.adapters: dict[str, str] = {}  # {loaded LoRA: its name in the pipeline}
        self.base: tuple[str, Any] | None = None  # the base denoiser, while another is in its place

    def use(self, weights: Mapping[str, float]) -> None:
        """Set the weights to W + Σ factor ΔW over {LoRA: factor}; empty = the base model. A LoRA is
        a path that `pipe.load_lora_weights` reads. A run folder with a whole denoiser must be given
        alone, with the factor 1."""
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
            from ..policies import loading

            trained = loading.trained(next(iter(weights)), network)
            self.base = denoiser, network
            setattr(self.pipe, denoiser, trained.to(self.device))
        elif weights:
            for path in weights:
                if path not in self.adapters:
                    self.adapters[path] = f"lora{len(self.adapters)}"
                    lora_files.load(self.pipe, path, self.adapters[path])
            self.pipe.enable_lora()
            self.pipe.set_adapters([self.adapters[p] for p in weights], list(weights.values()))
        elif self.adapters:
            self.pipe.disable_lora()

    def noise(self, seeds: Sequence[int], resolution: policies.Size | None = None) -> Tensor:
        """The noise (n, *latent) from which the pipeline starts for these seeds, float32."""
        return self._noise(_generators(seeds), resolution).float()

    def _noise(
        self, generators: Sequence[torch.Generator], resolution: policies.Size | None
    ) -> Tensor:
        _, shape = policies.peek(self.model, 2, resolution)
        draws = [torch.randn(shape, generator=g, dtype=self.dtype) for g in generators]
        return torch.stack(draws)

    def draw(
        self,
        texts: Sequence[str],
        seeds: Sequence[int],
        steps: int,
        guidance: float,
        resolution: policies.Size | None = None,
        noise: Tensor | None = None,
    ) -> list[Image.Image]:
        """One picture per text, in one batch, from the noise of its seed, as `pipe(generator=...)`
        draws it, or from `noise` (n, *latent)."""
        generators = _generators(seeds)
        # drawn even if noise is given: a stochastic scheduler goes on with these generators
        x = self._noise(generators, resolution)
        if noise is not None:
            x = noise.to(x)
        family = policies.family(self.model)
        factor = family.pixels_per_latent(self.pipe.vae.config)
        height, width = (side * factor for side in x.shape[2:])
        return self.pipe(
            prompt=list(texts),  # FLUX.2's first argument is another
            num_inference_steps=steps,
            generator=generators,
            latents=family.as_pipeline(x),
            height=height,
            width=width,
            **family.guided(guidance, len(texts)),
            **policies.text_options(self.pipe),
        ).images


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def pictures(
    sampler: Sampler,
    prompt: Prompt,
    seeds: Sequence[int],
    how: Mapping[str, Any],
    noise: Tensor | None = None,
    text: str | None = None,
) -> list[Drawn]:
    """Pictures of a prompt, one per seed, BATCH at a time. noise: (n, *latent), replaces the seeds'
    own."""
    if noise is None:
        noise = sampler.noise(seeds, how["resolution"])
    found = []
    for start in range(0, len(seeds), BATCH):
        own, x = seeds[start : start + BATCH], noise[start : start + BATCH]
        texts = [text or prompt.text] * len(own)
        images = sampler.draw(texts, own, how["steps"], how["guidance"], how["resolution"], x)
        each = zip(images, own, x, strict=True)
        found += [Drawn(image, prompt, s, z[None], how, text) for image, s, z in each]
    return found


def draw(wanted: Drawing) -> Path:
    """Write a grid with a row per prompt and a column per seed; returns its path.

    Raises ValueError for bad input before the pipeline is loaded.
    """
    numbers, texts = parse_seeds(wanted.seeds), collect(wanted.prompts, "--prompts")
    model, lora, out = wanted.model, wanted.lora, wanted.out
    wanted.check()
    check_plain(model, wanted.resolution)
    if wanted.compare and lora is None:
        raise ValueError("--compare sets the LoRA beside the base model; give --lora as well")
    variants = [None, lora] if wanted.compare else [lora]
    names = [
        f"{row:03d}_seed{seed}.png" for row in range(len(texts) * len(variants)) for seed in numbers
    ]
    if out is not None:
        drawn.check_out(out, wanted.grid, names)

    sampler = Sampler(model, wanted.merge_lora, wanted.dtype)
    columns = []
    for variant in variants:
        sampler.use({} if variant is None else {variant: wanted.lora_scale})
        how = wanted.how() | {"lora": variant}
        columns.append([pictures(sampler, prompt, numbers, how) for prompt in texts])
    rows = [row for several in zip(*columns, strict=True) for row in several]
    about = {"prompts": [p.text for p in texts], "seeds": numbers}
    grids.save_png(drawn.grid_of(rows), wanted.grid, wanted.how() | about)
    if out is not None:
        flat = [one for row in rows for one in row]
        drawn.write(out, dict(zip(names, flat, strict=True)))
    return Path(wanted.grid)
