"""Write a transformers CLIPModel as an open_clip folder: the same numbers, the other library.

    python -m diffalign.emoji_world.workshop.open_clip_format CLIP OUT

`open_clip.create_model_and_transforms("local-dir:OUT")` loads it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from .train_clip import MEAN, STD

BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def blocks(state: dict[str, Tensor], tower: str, prefix: str, layers: int) -> dict[str, Tensor]:
    """A tower's transformer blocks under open_clip's names; q, k and v become one matrix."""
    out = {}
    for i in range(layers):
        old, new = f"{tower}.encoder.layers.{i}", f"{prefix}transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            for ours, theirs in BLOCK.items():
                out[f"{new}.{theirs}.{kind}"] = state[f"{old}.{ours}.{kind}"]
            parts = [state[f"{old}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
            out[f"{new}.attn.in_proj_{kind}"] = torch.cat(parts)
    return out


def convert(model: CLIPModel) -> tuple[dict, dict[str, Tensor]]:
    """(open_clip_config, state dict) of a CLIPModel with quick GELU."""
    text: Any = model.config.text_config
    vision: Any = model.config.vision_config
    assert text.hidden_act == vision.hidden_act == "quick_gelu"
    # open_clip reads the text feature at the highest token id
    assert text.eos_token_id == text.vocab_size - 1
    config = {
        "model_cfg": {
            "embed_dim": model.config.projection_dim,
            "quick_gelu": True,
            "vision_cfg": {
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "layers": vision.num_hidden_layers,
                "width": vision.hidden_size,
                "head_width": vision.hidden_size // vision.num_attention_heads,
            },
            "text_cfg": {
                "context_length": text.max_position_embeddings,
                "vocab_size": text.vocab_size,
                "width": text.hidden_size,
                "heads": text.num_attention_heads,
                "layers": text.num_hidden_layers,
                # the folder's own; open_clip asks for a name to use transformers' tokenizers at all
                "hf_tokenizer_name": ".",
                "tokenizer_kwargs": {"clean": "whitespace"},
            },
        },
        "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic"},
    }
    s = model.state_dict()
    state = {
        "logit_scale": s["logit_scale"],
        "text_projection": s["text_projection.weight"].T,
        "token_embedding.weight": s["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": s["text_model.embeddings.position_embedding.weight"],
        "visual.class_embedding": s["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": s["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": s["vision_model.embeddings.patch_embedding.weight"],
        "visual.proj": s["visual_projection.weight"].T,
    }
    for kind in ("weight", "bias"):
        state[f"ln_final.{kind}"] = s[f"text_model.final_layer_norm.{kind}"]
        state[f"visual.ln_pre.{kind}"] = s[f"vision_model.pre_layrnorm.{kind}"]
        state[f"visual.ln_post.{kind}"] = s[f"vision_model.post_layernorm.{kind}"]
    state |= blocks(s, "text_model", "", text.num_hidden_layers)
    state |= blocks(s, "vision_model", "visual.", vision.num_hidden_layers)
    return config, {k: v.contiguous() for k, v in state.items()}


def main(clip: Path, out: Path) -> None:
    config, state = convert(CLIPModel.from_pretrained(clip))
    out.mkdir(parents=True, exist_ok=True)
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    weights = out / "open_clip_model.safetensors"
    save_file({k: v.half() for k, v in state.items()}, weights)
    weights.chmod(0o644)  # safetensors writes for the owner alone
    CLIPTokenizer.from_pretrained(clip).save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clip", type=Path)
    parser.add_argument("out", type=Path)
    main(**vars(parser.parse_args()))
