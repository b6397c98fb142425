"""Tiny Qwen2-VL models with random weights, a tokenizer of bytes and the real image processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from families_qwen import IDS, SPECIAL, qwen_tokenizer
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

CHAT_TEMPLATE = (  # Qwen2-VL's, without videos and numbered pictures
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 256,
    "eos_token_id": 258,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
}
VISION = {
    "qwen2_vl": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2},
    "qwen2_5_vl": {
        "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2,
        "intermediate_size": 64, "fullatt_block_indexes": [1],
    },
}  # fmt: skip


def tiny_qwen(folder: Path | str, kind: str = "qwen2_vl", words: tuple[str, ...] = ()) -> Any:
    """Save the model, with tokens for the `words`, and its processor in `folder`; returns it."""
    tokenizer = qwen_tokenizer(4096)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.add_tokens(list(words))
    text = {**TEXT, "vocab_size": 256 + len(SPECIAL) + len(words) + 3}  # Qwen's has spare rows
    config, cls = {
        "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
        "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    }[kind]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model: Any = cls(config(text_config=text, vision_config=VISION[kind], **IDS)).eval()
        for parameter in model.parameters():  # the default, 0.02, hides mistakes
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return model
