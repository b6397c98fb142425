"""Finds LoRA files, ours and other programs', compares their headers with a model, and loads them
into a pipeline.

Nothing here imports diffusers, which takes seconds: files that cannot be used are refused at once.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewards.files import read_tensors
from rewards.loading import damaged, header, reading

from .run_folder import DENOISERS, WEIGHTS, Model, resolve, trained_denoiser

KOHYA = "kohya_lora.safetensors"  # a second file of ours, for other programs
PEFT, PEFT_CONFIG = "adapter_model", "adapter_config.json"
NAMES = (WEIGHTS, f"{PEFT}.safetensors", "pytorch_lora_weights.bin", f"{PEFT}.bin")
Shape = tuple[int, ...]

SIDES = r"(lora_A|lora_B|lora_down|lora_up|(?:lora\d?|lora_linear_layer)\.(?:down|up))"
LAYER = re.compile(rf"(.+)[._]{SIDES}(?:\.default)?\.weight")
UNKNOWN = {"hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT", "dora_scale": "DoRA"}
ELSEWHERE = {  # names of blocks in other programs: the network they are part of
    r"(input|output)_blocks|middle_block": "UNet2DConditionModel",
    r"double_blocks|single_blocks": "FluxTransformer2DModel",
    r"joint_blocks": "SD3Transformer2DModel",
}


def find(lora: str, option: str) -> Path | None:
    """The file of a LoRA given by file, folder or run; None for a hub id. Raises ValueError."""
    path = Path(lora).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        local = lora.startswith((".", "/", "~", "runs/", "assets/"))
        if local or lora.endswith((".safetensors", ".bin", ".pt")):
            raise ValueError(f"{option} {lora!r} does not exist; give a run folder or a hub id")
        return None
    for name in NAMES:
        if (path / name).exists():
            return path / name
    others = sorted(path.glob("*.safetensors"))
    if len(others) == 1:
        return others[0]
    if others:
        names = ", ".join(file.name for file in others[:4])
        raise ValueError(f"{option} {lora!r} holds several files, {names}; give one of them")
    raise ValueError(f"{option} {lora!r} holds no .safetensors file; has the run been saved?")


def check(lora: str, option: str, model: str | None = None) -> None:
    """Raises ValueError for a path without trained weights, or with weights that do not fit
    `model`, as far as files on this machine tell: a hub id passes. Only headers are read."""
    base = resolve(model) if model is not None else None
    there = denoiser_shapes(base) if base is not None else None
    part = trained_denoiser(lora)
    if part is not None:
        own = denoiser_shapes(Model(lora))
        if None not in (own, there) and own != there:
            raise ValueError(
                f"{option} {lora!r} holds a whole {part} that is not of {model!r}; give the model "
                "that it was trained on"
            )
        return
    path = find(lora, option)
    if path is None:
        return
    if broken := damaged(path):
        raise ValueError(f"{option} {lora!r} is damaged: {broken}; copy it again")
    shapes = tensor_shapes(path)
    if is_peft(shapes):
        peft_settings(path, option)
    pipeline = ""
    if base is not None and there is not None:
        pipeline = json.loads((Path(base.base) / "model_index.json").read_bytes())["_class_name"]
    compare(shapes, there, pipeline, option, lora)


def compare(
    lora: Mapping[str, Shape],
    network: Mapping[str, Shape] | None,
    pipeline: str,
    option: str,
    name: str,
) -> None:
    """Raises ValueError for a LoRA of an unknown format, or one that does not fit the denoiser.

    lora, network: shapes of the tensors of LoRA and denoiser; None = the denoiser is not known.
    pipeline: class of the pipeline. option, name: what messages call the LoRA.
    """
    for mark, kind in UNKNOWN.items():
        if any(mark in key for key in lora):
            raise ValueError(
                f"{option} {name!r} is a {kind}, and only plain LoRAs are read; merge it into the "
                "model with the program that made it"
            )
    found = layers(lora)
    if not any("lora" in key for key in lora):
        first = next(iter(lora), "nothing")
        raise ValueError(
            f"{option} {name!r} holds no LoRA: its tensors are called as {first!r}; give a file "
            "with lora_A and lora_B (diffusers, peft) or lora_down and lora_up (kohya)"
        )
    if network is None:
        return
    weights = {k.removesuffix(".weight"): v for k, v in network.items() if k.endswith(".weight")}
    by_name = weights | {k.replace(".", "_"): v for k, v in weights.items()}
    own = {k: v for k, v in found.items() if not k.startswith(("text_encoder", "lora_te"))}
    modules = {k: stripped(k) for k in own}
    missing = [k for k, module in modules.items() if module not in by_name]
    foreign = [kind for mark, kind in ELSEWHERE.items() if any(re.search(mark, k) for k in own)]
    other = foreign and not _is(pipeline, foreign[0])
    if other or (missing and not foreign):
        what = "nothing" if len(missing) == len(own) else f"weights for {missing[0]!r}, and not all"
        raise ValueError(
            f"{option} {name!r} has {what} for a {pipeline}; give one that was trained on such a "
            "model"
        )
    for key, (a, b) in own.items():
        there = by_name.get(modules[key])
        if there and ((a and a[1] != there[1]) or (b and b[0] != there[0])):
            given = f"{a[1] if a else '?'} to {b[0] if b else '?'}"
            raise ValueError(
                f"{option} {name!r} is for a model of another width: its {modules[key]} goes from "
                f"{given} channels and this model's from {there[1]} to {there[0]}; give one that "
                "was trained on such a model"
            )


def _is(pipeline: str, network: str) -> bool:
    kinds = {"FluxPipeline": "Flux", "StableDiffusion3Pipeline": "SD3"}
    return network.startswith(kinds.get(pipeline, "UNet"))


def layers(shapes: Mapping[str, Shape]) -> dict[str, list[Shape | None]]:
    """Shapes of A and B for every layer that a LoRA file changes, under the file's own names."""
    found: dict[str, list[Shape | None]] = {}
    for key, shape in shapes.items():
        match = LAYER.fullmatch(key)
        if match and len(shape) >= 2:
            side = match[2].endswith(("B", "up"))
            found.setdefault(match[1], [None, None])[side] = shape
    return found


def stripped(layer: str) -> str:
    """The name in the denoiser of a LoRA file's layer, with dots or with underscores (kohya)."""
    name = re.sub(r"^(base_model\.model\.)?(unet\.|transformer\.|diffusion_model\.)?", "", layer)
    name = re.sub(r"^lora_(unet|transformer)_", "", name)
    return name.replace(".processor.", ".")


def tensor_shapes(path: Path) -> dict[str, Shape]:
    if path.suffix == ".safetensors":
        return {k: tuple(v["shape"]) for k, v in header(path).items() if k != "__metadata__"}
    state = read_tensors(str(path), f"the LoRA {str(path)!r}")
    return {k: tuple(v.shape) for k, v in state.items()} if isinstance(state, dict) else {}


def denoiser_shapes(model: Model) -> dict[str, Shape] | None:
    """Shapes of a model's denoiser weights from the headers of its files; None if they are not on
    this machine as safetensors."""
    for folder in filter(None, (model.denoiser, model.base)):
        parts = (file for name in DENOISERS for file in Path(folder, name).glob("*.safetensors"))
        files = sorted(parts)
        if files:
            try:
                return {k: v for file in files for k, v in tensor_shapes(file).items()}
            except ValueError:
                return None  # damaged, which is reported when the weights are read
    return None


def load(pipe: Any, lora: str, name: str | None = None, option: str = "the LoRA") -> None:
    """Load a LoRA into a pipeline as the adapter `name`: a file that `pipe.load_lora_weights`
    reads, or one that peft's save_pretrained wrote. Raises ValueError for a LoRA with nothing for
    the pipeline."""
    said = f"{option} {lora!r}"
    path = find(lora, option) or _downloaded(lora, said)
    before = {k: list(v) for k, v in pipe.get_list_adapters().items()}
    with warnings.catch_warnings():  # a second adapter is intended
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        if path is None:  # a hub id, whose file only diffusers' own search finds
            with reading(said, lora):
                pipe.load_lora_weights(lora, adapter_name=name)
        else:
            _check_loaded(path, pipe, option, lora)
            state = _state(path, pipe, option)
            with reading(said, str(path)):
                if state is None:
                    pipe.load_lora_weights(
                        str(path.parent), weight_name=path.name, adapter_name=name
                    )
                else:
                    pipe.load_lora_weights(state, adapter_name=name)
    if pipe.get_list_adapters() == before:
        raise ValueError(
            f"{said} has nothing for a {type(pipe).__name__}; give one that was trained on such a "
            "model"
        )


def _check_loaded(path: Path, pipe: Any, option: str, lora: str) -> None:
    """Refuse a LoRA that fits a pipeline's denoiser only in part. If no layer fits, diffusers
    decides, as it knows the layer names of more programs."""
    with reading(f"{option} {lora!r}", str(path)):
        shapes = tensor_shapes(path)
    network = next(filter(None, (getattr(pipe, name, None) for name in DENOISERS)))
    there = {k.replace(".base_layer", ""): tuple(v.shape) for k, v in network.named_parameters()}
    names = {k.removesuffix(".weight") for k in there}
    names |= {name.replace(".", "_") for name in names}
    fits = any(stripped(layer) in names for layer in layers(shapes))
    compare(shapes, there if fits else None, type(pipe).__name__, option, lora)


def _downloaded(lora: str, said: str) -> Path | None:
    """The LoRA file of a hub id; None if it has none of the usual names."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    absent: Exception | None = None
    with reading(said, lora):
        for name in NAMES:
            try:
                path = Path(hf_hub_download(lora, name))
                if path.stem == PEFT:
                    hf_hub_download(lora, PEFT_CONFIG)
                return path
            except EntryNotFoundError as error:
                absent = error
        if isinstance(absent, LocalEntryNotFoundError):  # offline, so there may be one after all
            raise absent
    return None


def is_peft(shapes: Mapping[str, Shape]) -> bool:
    return any(key.startswith("base_model.model.") for key in shapes)


def peft_settings(path: Path, option: str) -> dict[str, Any]:
    """The settings of the adapter_config.json beside peft's weights. Raises ValueError unless they
    are those of a plain LoRA."""
    file = path.parent / PEFT_CONFIG
    if not file.exists():
        raise ValueError(
            f"{option} {str(path)!r} is peft's, and no {PEFT_CONFIG} beside it says its lora_alpha;"
            " copy that too"
        )
    with reading(f"{option} {str(file)!r}", str(file)):
        settings = json.loads(file.read_bytes())
        if not isinstance(settings, dict):
            raise ValueError("it holds no settings")
    kind = settings.get("peft_type")
    odd = [k for k in ("use_dora", "modules_to_save", "lora_bias") if settings.get(k)]
    odd += ["bias"] if settings.get("bias", "none") != "none" else []
    if kind != "LORA" or odd:
        what = f"is a {kind}" if kind != "LORA" else f"has {odd[0]}={settings[odd[0]]!r}"
        raise ValueError(
            f"{option} {str(path.parent)!r} {what} by its {PEFT_CONFIG}, and only plain LoRAs are "
            "read; merge it into the model with peft's merge_and_unload"
        )
    try:
        peft_scale(settings, "", 1)
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise ValueError(
            f"{option} {str(file)!r} has a lora_alpha or alpha_pattern that is not understood "
            f"({error}); copy it again"
        ) from None
    return settings


def _state(path: Path, pipe: Any, option: str) -> dict[str, Any] | None:
    """The tensors of a LoRA under diffusers' names, with alpha multiplied in; None if diffusers can
    read the file itself."""
    shapes = tensor_shapes(path)
    alphas = any(k.endswith(".alpha") for k in shapes)
    kohya = any(k.startswith("lora_") for k in shapes)
    if not is_peft(shapes) and (kohya or not alphas):
        return None
    settings = peft_settings(path, option) if is_peft(shapes) else {}
    state = read_tensors(str(path), f"{option} {str(path)!r}")
    ranks = {layer: a[0] for layer, (a, _) in layers(shapes).items() if a}
    part = next(name for name in DENOISERS if getattr(pipe, name, None) is not None)
    found = {}
    for key, value in state.items():
        match = LAYER.fullmatch(key)
        if match is None:
            continue
        layer, up, module = match[1], match[2].endswith(("B", "up")), stripped(match[1])
        place = layer if layer.startswith("text_encoder") else f"{part}.{module}"
        factor = 1.0
        if up and layer in ranks:
            alpha = state.get(f"{layer}.alpha")
            factor = (
                peft_scale(settings, module, ranks[layer])
                if alpha is None
                else float(alpha) / ranks[layer]
            )
        found[f"{place}.lora_{'B' if up else 'A'}.weight"] = value.float() * factor
    return found


def peft_scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """The factor by which peft multiplies a layer's B A: alpha / rank, or alpha / sqrt(rank) with
    use_rslora. An alpha_pattern that matches the end of the layer's name sets its alpha. 1 without
    settings."""
    patterns = settings.get("alpha_pattern") or {}
    found = [float(v) for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", module)]
    alpha = found[0] if found else float(settings.get("lora_alpha", rank))
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
