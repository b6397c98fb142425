"""Model families behind one contract; `load` picks the family from the pipeline's own class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline

from ..dynamics import Levels
from .base import Cond, Policy
from .unet import UNetPolicy

__all__ = ["FAMILIES", "Cond", "Policy", "UNetPolicy", "check", "family", "load", "peek"]

FAMILIES: dict[str, type[Policy]] = {"StableDiffusionPipeline": UNetPolicy}


def check(name: str) -> None:
    """Refuse a local path that is no pipeline folder; a hub id passes. No weights are read."""
    path = Path(name)
    looks_local = path.is_absolute() or name.startswith((".", "~", "assets/", "runs/"))
    if path.is_dir():
        if not (path / "model_index.json").exists():
            raise ValueError(
                f"model.name={name!r} has no model_index.json, so it is not a diffusers pipeline; "
                "give the folder that pipe.save_pretrained wrote"
            )
    elif looks_local or path.exists():
        raise ValueError(f"model.name={name!r} is not a folder; give a local pipeline or a hub id")


def family(name: str) -> type[Policy]:
    """The family of a pipeline, by the class its model_index.json names.

    Raises ValueError for a class of no known family, or when neither a folder nor a hub id fits.
    """
    check(name)
    try:
        config: Any = DiffusionPipeline.load_config(name)
        pipeline = config["_class_name"]
    except OSError as error:
        raise ValueError(
            f"model.name={name!r} is neither a local folder nor a hub id that can be read: {error}"
        ) from error
    if pipeline not in FAMILIES:
        raise ValueError(
            f"model.name={name!r} is a {pipeline}; supported: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[pipeline]


def peek(name: str, steps: int) -> tuple[Levels, tuple[int, ...]]:
    """(K + 1,) levels and latent shape of a pipeline, without reading any weights."""
    return family(name).peek(name, steps)


def load(name: str, device: torch.device | str = "cpu", dtype: str = "float32") -> Policy:
    """The policy of a local pipeline folder or a hub id such as "org/model".

    dtype is that of the frozen network: float32 or bfloat16. Raises as `family` does.
    """
    kind = family(name)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipe = DiffusionPipeline.from_pretrained(name)
    return kind(pipe, device, getattr(torch, dtype))
