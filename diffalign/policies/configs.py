"""Configs of a pipeline, and what follows from them without any weights."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rewards.loading import reading

from ..config.prompts import sides

Size = int | Sequence[int]
"""Of a picture in pixels: the side of a square, or height and width."""


def read_config(name: str, file: str, option: str = "model.name") -> dict[str, Any]:
    """A JSON file of a local folder or hub id; no other file is read. Raises ValueError."""
    with reading(f"{option}={name!r}", name):
        path = Path(name).expanduser() / file
        if not Path(name).expanduser().is_dir():
            from huggingface_hub import hf_hub_download

            folder, _, last = file.rpartition("/")
            path = Path(hf_hub_download(name, last, subfolder=folder or None))
        config = json.loads(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError(f"{file} holds no settings")
        return config


def latent_sides(resolution: Size, factor: int, patch: int = 1) -> tuple[int, int]:
    """Height and width of the latents of a picture of this size.

    factor: pixels per latent. patch: latents per token of a transformer. Raises ValueError if a
    side is no multiple of factor * patch.
    """
    step, found = factor * patch, sides(resolution)
    if any(side % step for side in found):
        near = [max(step, round(side / step) * step) for side in found]
        valid = near[0] if isinstance(resolution, int) else near
        raise ValueError(
            f"model.resolution={resolution} is not a multiple of {step}, the pixels of a "
            f"{'latent' if patch == 1 else 'token'} of this model; the nearest is {valid}"
        )
    return found[0] // factor, found[1] // factor


def pixels_per_latent(vae: Mapping[str, Any]) -> int:
    """The factor between the sides of picture and latents, from the config of a VAE."""
    return 2 ** (len(vae["block_out_channels"]) - 1)


def text_options(pipe: Any) -> dict[str, int]:
    """Arguments that make `pipe(...)` encode prompts as a policy does: its number of tokens, beside
    those of CLIPs.

    That is the pipeline's default, or the maximum of its last tokenizer if that is smaller.
    """
    default = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
    if default is None:
        return {}
    name = max(k for k in pipe.components if k.startswith("tokenizer"))
    tokenizer = getattr(pipe, name)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of FLUX.2-dev's processor
    most = default.default if tokenizer is None else tokenizer.model_max_length
    return {"max_sequence_length": min(default.default, most)}
