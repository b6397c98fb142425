"""A run folder as a model: the pipeline that it was trained from, and the weights on top."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config.reading import read_yaml

WEIGHTS = "pytorch_lora_weights.safetensors"
DENOISERS = ("unet", "transformer")


@dataclass(frozen=True)
class Model:
    """What the name of a model stands for."""

    base: str  # a pipeline's folder or hub id
    denoiser: str | None = None  # the run whose whole denoiser takes the place of the base's
    loras: tuple[str, ...] = ()  # merged into the base, in this order
    resolution: Any = None  # of the run, in pixels


def trained_denoiser(run: str) -> str | None:
    """The name of the denoiser in the folder of a run that trained all its weights, else None."""
    return next((n for n in DENOISERS if (Path(run) / n / "config.json").exists()), None)


def config_of(run: str) -> Path | None:
    """The config.yaml of a run, given by its folder, its best/, or a file in either."""
    if not run or not Path(run).exists():
        return None
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    places = [folder, folder.parent] if folder.resolve().name == "best" else [folder]
    found = [place / "config.yaml" for place in places if (place / "config.yaml").exists()]
    return found[0] if found else None


def resolve(name: str, above: tuple[Path, ...] = ()) -> Model:
    """The model of a pipeline folder, a hub id, or a run folder (or its best/). A run is the model
    that its config.yaml names, which may be a run itself, with the weights that it trained.

    No weights are read, and the hub is not asked. above: the runs that led here. Raises ValueError
    for a local path that is neither a pipeline nor a run.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        local = path.is_absolute() or name.startswith((".", "assets/", "runs/"))
        if local or path.exists():
            raise ValueError(
                f"model.name={name!r} is not a folder; give a local pipeline, a run or a hub id"
            )
        return Model(name)
    if (path / "model_index.json").exists():
        return Model(str(path))
    file, whole = config_of(str(path)), trained_denoiser(str(path)) is not None
    if not whole and not (path / WEIGHTS).exists():
        reason = (
            "is a run that has saved no weights yet; wait for its first checkpoint"
            if file is not None
            else "has no model_index.json, so it is not a diffusers pipeline; give the folder that "
            "pipe.save_pretrained wrote, or a run folder"
        )
        raise ValueError(f"model.name={name!r} {reason}")
    if file is None:
        raise ValueError(
            f"model.name={name!r} holds trained weights, and no config.yaml says of which model; "
            "give that model here, and this folder as --lora (or model.merge_lora)"
        )
    if path.resolve() in above:
        raise ValueError(f"model.name={name!r} goes back to itself by its config.yaml; mend that")
    settings = read_yaml(file).get("model")
    if not isinstance(settings, Mapping) or not isinstance(settings.get("name"), str):
        raise ValueError(f"{file} names no model (model.name), so {name!r} cannot be one")
    try:
        below = resolve(settings["name"], (*above, path.resolve()))
    except ValueError as error:
        raise ValueError(f"{file} names the model of {name!r}: {error}") from error
    size: Any = settings.get("resolution") or below.resolution
    if whole:
        return Model(below.base, str(path), (), size)
    merged = [settings["merge_lora"]] if settings.get("merge_lora") else []
    return replace(below, loras=(*below.loras, *merged, str(path)), resolution=size)
