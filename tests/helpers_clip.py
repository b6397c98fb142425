"""Tiny CLIP models with random weights and real tokenizers, in the two libraries' formats."""

from __future__ import annotations

import json
from pathlib import Path

import torch


def tiny_clip(folder: Path | str, size: int = 32, seed: int = 0, merges: int = 500) -> str:
    """Save a transformers CLIPModel and its CLIPTokenizer in ``folder``; returns the folder."""
    import open_clip.tokenizer
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    # OpenAI's byte-pair merges ship with open_clip; the first ones are a complete tokenizer.
    pairs = list(open_clip.tokenizer.SimpleTokenizer().bpe_ranks)[:merges]
    letters = list(open_clip.tokenizer.bytes_to_unicode().values())
    words = [*letters, *(c + "</w>" for c in letters), *("".join(pair) for pair in pairs)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    # vocab_file= and merges_file= are silently ignored by transformers 5.
    tokenizer = CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=pairs)
    assert len(tokenizer) == len(words) == 514 + merges
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 2, "projection_dim": 24}
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 20,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,  # the default 2 is a legacy pooling
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**tower, "image_size": size, "patch_size": size // 4},
        projection_dim=24,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = CLIPModel(config)
        _spread(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny_open_clip(folder: Path | str, size: int = 32, seed: int = 0) -> str:
    """Save an open_clip folder: open_clip_config.json and weights; returns the folder."""
    import open_clip
    from safetensors.torch import save_file

    config = {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": size,
            "layers": 2,
            "width": 32,
            "head_width": 16,
            "patch_size": size // 4,
        },
        "text_cfg": {
            "context_length": 20,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 2,
        },
    }
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**config)
        _spread(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    (folder / "open_clip_config.json").write_text(text)
    return str(folder)


def _spread(model: torch.nn.Module) -> None:
    """Wider weights than the default, so that images and prompts get distinct scores."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
