"""Writes trained weights: in diffusers' format, and LoRAs of UNets in kohya's as well."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..config.files import disk_errors
from .lora_files import KOHYA
from .run_folder import WEIGHTS


def save_lora(
    pipe: Any, part: str, network: Any, layers: Mapping[str, Tensor], folder: Path
) -> Path:
    """Write a LoRA of a pipeline's denoiser `part`, from `lora.exported`, for
    `pipe.load_lora_weights(folder)`, and that of a UNet for other programs too; returns the path of
    the first file.

    Each file is written whole and then replaces the previous one.
    """
    with TemporaryDirectory(dir=folder) as temporary, disk_errors(folder):
        pipe.save_lora_weights(temporary, **{f"{part}_lora_layers": layers})
        files = {WEIGHTS: Path(temporary) / WEIGHTS}
        if part == "unet":
            from safetensors.torch import save_file

            files[KOHYA] = Path(temporary) / KOHYA
            rank = network.peft_config["default"].r
            save_file(kohya(layers), files[KOHYA], kohya_metadata(pipe, rank))
        for target, written in files.items():
            written.chmod(0o644)  # safetensors makes files that only the owner can read
            written.replace(folder / target)
    return folder / WEIGHTS


def save_network(network: Any, part: str, folder: Path) -> Path:
    """Write a whole denoiser for `from_pretrained(folder, subfolder=part)`; returns its folder."""
    target = folder / part
    with TemporaryDirectory(dir=folder) as temporary, disk_errors(folder):
        written = Path(temporary) / part
        network.save_pretrained(written)
        target.mkdir(exist_ok=True)
        for file in written.iterdir():
            file.chmod(0o644)
            file.replace(target / file.name)
    return target


def kohya(layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The LoRA of a UNet, from `lora.exported`, under the names of kohya's sd-scripts, which
    ComfyUI and the web interfaces read: lora_unet_<layer with _>.lora_down.weight (A, (rank, in)),
    .lora_up (B, (out, rank)) and .alpha, a number; float32.

    alpha equals the rank, a scale of 1, since `lora.exported` puts the scale into B.
    """
    found = {}
    for key, value in layers.items():
        layer, side, _ = key.rsplit(".", 2)
        layer = "lora_unet_" + layer.replace(".", "_")
        down = side == "lora_A"
        found[f"{layer}.{'lora_down' if down else 'lora_up'}.weight"] = value.contiguous()
        if down:
            found[f"{layer}.alpha"] = torch.tensor(float(len(value)))
    return found


def kohya_metadata(pipe: Any, rank: int) -> dict[str, str]:
    """Metadata that programs show for a file in kohya's format: the kind of base model, and the
    rank."""
    width = pipe.unet.config.cross_attention_dim
    base = {"768": "sd_v1", "1024": "sd_v2"}.get(str(width), "")
    if type(pipe).__name__ == "StableDiffusionXLPipeline":
        base = "sdxl_base_v1-0"
    said = {"ss_network_module": "networks.lora", "ss_base_model_version": base}
    said |= {"ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    return {"format": "pt"} | {k: v for k, v in said.items() if v}
