"""Reads pipelines and their weights from folders, the hub or run folders."""

from __future__ import annotations

import os
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderTiny, DiffusionPipeline
from torch import nn

from rewards.loading import LoadingError, pretrained, reading

from . import lora_files
from .configs import read_config
from .run_folder import DENOISERS, resolve, trained_denoiser

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

XL = "StableDiffusionXLPipeline"


@cache
def note(text: str) -> None:
    """Print a text to stderr once, on the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def pipeline(name: str, merge_lora: str | None = None, **options: Any) -> Any:
    """See `policies.pipeline`."""
    model = resolve(name)
    index = read_config(model.base, "model_index.json")
    parts = _missing(name)
    if model.denoiser is not None:
        denoiser = next(k for k in DENOISERS if k in index)
        parts[denoiser] = _whole(model.denoiser, denoiser, index, options)
    pipe = _read(name, model.base, {**parts, **options})
    for part in (*model.loras, *([] if merge_lora is None else [merge_lora])):
        merge(pipe, part)
    return pipe


def _missing(name: str) -> dict[str, Any]:
    """The options of `from_pretrained` for what a pipeline is to do without."""
    index = read_config(resolve(name).base, "model_index.json")
    # diffusers wants None for every part that was saved as missing, such as the T5 of an SD3
    parts: dict[str, Any] = {key: None for key, value in index.items() if value == [None, None]}
    if index["_class_name"] == "StableDiffusionPipeline":
        parts |= {"safety_checker": None, "requires_safety_checker": False}
        if index.get("safety_checker", [None, None])[1]:
            note(f"{name}: drawn without its safety checker, as in training")
    if index["_class_name"] == XL:
        parts |= {"add_watermarker": False}
        if index.get("add_watermarker"):
            note(f"{name}: drawn without its watermark, as in training")
    return parts


def denoiser(name: str, merge_lora: str | None, part: str) -> Any:
    """Only the denoiser of a model, in float32; `part` is its name in the pipeline."""
    model = resolve(name)
    index = read_config(model.base, "model_index.json")
    options = {"torch_dtype": torch.float32}
    kept = (part, "scheduler", "processor")  # Qwen-Image-2.1 asks its processor at once
    parts = {k: None for k, v in index.items() if isinstance(v, list) and k not in kept}
    if model.denoiser is not None:
        parts[part] = _whole(model.denoiser, part, index, options)
    pipe = _read(name, model.base, {**parts, **options})
    for lora in (*model.loras, *([] if merge_lora is None else [merge_lora])):
        merge(pipe, lora)
    return getattr(pipe, part)


def _read(name: str, base: str, options: dict[str, Any], whole: bool = True) -> Any:
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    option = f"model.name={name!r}"
    # without a config.json transformers takes the defaults of the class
    for folder in sorted(Path(base).glob("text_encoder*/")):
        if not (folder / "config.json").exists():
            raise LoadingError(
                f"{option} has no {folder / 'config.json'}; give a complete pipeline"
            )
    with warnings.catch_warnings():
        # torch_dtype will be renamed to dtype, which our oldest diffusers does not know
        warnings.simplefilter("ignore", FutureWarning)
        pipe: Any = pretrained(DiffusionPipeline.from_pretrained, option, base, **options)
    for key, value in pipe.components.items():
        # without its files transformers makes up an empty tokenizer
        if isinstance(value, transformers.PreTrainedTokenizerBase) and (
            len(value) <= len(value.all_special_tokens)
        ):
            raise LoadingError(f"{option} has no files of its {key}; give a complete pipeline")
        if whole and isinstance(value, nn.Module) and any(p.is_meta for p in value.parameters()):
            raise LoadingError(f"{option} has no weights for its {key}; give a complete pipeline")
    return pipe


def _whole(run: str, part: str, index: Any, options: dict[str, Any]) -> Any:
    """The denoiser of a run that trained all its weights; its class is the one that the base
    names."""
    kind = getattr(diffusers, index[part][1])
    dtypes = options.get("torch_dtype", torch.float32)
    dtype = dtypes.get(part, dtypes["default"]) if isinstance(dtypes, dict) else dtypes
    option = f"the run {run!r}"
    return pretrained(kind.from_pretrained, option, run, subfolder=part, torch_dtype=dtype)


def without_weights(name: str, merge_lora: str | None = None, **options: Any) -> Any:
    """As `pipeline`, but the weights of all modules are on the meta device, to be received from a
    process that reads them, with whatever is merged into them."""
    from accelerate import init_empty_weights

    base, dtypes = resolve(name).base, options["torch_dtype"]
    with init_empty_weights(include_buffers=False):
        modules = _modules(base, read_config(base, "model_index.json"))
    for key, module in modules.items():
        module.to(dtypes.get(key, dtypes["default"]))
    return _read(name, base, {**_missing(base), **modules, **options}, whole=False)


def _modules(base: str, index: Any) -> dict[str, Any]:
    """Denoiser, VAE and text encoders of a pipeline, by their configs."""
    parts = {}
    for key, value in index.items():
        kind = value[1] if isinstance(value, list) else None
        text = "text_encoder" in key
        if kind is None or not (text or key in ("unet", "transformer", "vae")):
            continue
        made = getattr(transformers if text else diffusers, kind)
        config = read_config(base, f"{key}/config.json")
        parts[key] = made(made.config_class.from_dict(config)) if text else made.from_config(config)
    return parts


def skeleton(name: str) -> Any:
    """The pipeline of a model by its configs, on the meta device and without tokenizers."""
    base = resolve(name).base
    index = read_config(base, "model_index.json")
    parts: dict[str, Any] = {k: None for k, v in index.items() if isinstance(v, list)}
    with torch.device("meta"):
        parts |= _modules(base, index)
    for key, value in index.items():
        kind = value[1] if isinstance(value, list) else None
        if kind is None:
            continue
        if key == "scheduler":
            config = read_config(base, "scheduler/scheduler_config.json")
            parts[key] = getattr(diffusers, kind).from_config(config)
        if key == "processor":
            parts[key] = transformers.AutoProcessor.from_pretrained(base, subfolder=key)
    options = {
        "StableDiffusionPipeline": {"requires_safety_checker": False},
        XL: {"add_watermarker": False},
    }
    kind = index["_class_name"]
    return getattr(diffusers, kind)(**parts, **options.get(kind, {}))


def fake_weights(module: nn.Module, fake: FakeTensorMode, device: torch.device | str) -> None:
    """Give a module of the meta device weights and buffers of `fake` on another."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, value in held.items():
                if value is not None:
                    with fake:
                        made = torch.empty_like(value, device=device)
                    weight = isinstance(value, nn.Parameter)
                    held[name] = nn.Parameter(made, value.requires_grad) if weight else made  # type: ignore[index]


def tiny_vae(name: str) -> Any:
    """The AutoencoderTiny of a local folder or hub id."""
    return pretrained(AutoencoderTiny.from_pretrained, f"model.tiny_vae={name!r}", name)


def trained(run: str, network: Any) -> Any:
    """The denoiser of a run that trained all its weights; its class is that of `network`."""
    part = trained_denoiser(run)
    if part is None:
        raise ValueError(f"{run!r} holds no denoiser; give a run folder with one")
    found = pretrained(
        type(network).from_pretrained, f"the run {run!r}", run, subfolder=part,
        torch_dtype=network.dtype,
    )  # fmt: skip
    ours, theirs = (
        {k: tuple(v.shape) for k, v in one.state_dict().items()} for one in (found, network)
    )
    if ours != theirs:
        raise ValueError(
            f"the run {run!r} trained a {type(network).__name__} of another size than this "
            "model's; give the model that it was trained on"
        )
    return found


def merge(pipe: Any, lora: str, scale: float = 1.0) -> None:
    """See `policies.merge`."""
    part = trained_denoiser(lora)
    if part is not None:
        if scale != 1:
            raise ValueError(
                f"{lora!r} holds a whole {part}, which cannot be scaled as a LoRA can; use 1"
            )
        network = getattr(pipe, part, None)
        if network is None:
            raise ValueError(
                f"the run {lora!r} trained a {part}, and a {type(pipe).__name__} has none; give "
                "the model that it was trained on"
            )
        network.load_state_dict(trained(lora, network).state_dict())
        return
    lora_files.load(pipe, lora)
    with reading(f"the LoRA {lora!r}", str(Path(lora))):
        pipe.fuse_lora(lora_scale=scale)
        pipe.unload_lora_weights()
