"""ImageReward: human preference by BLIP, on transformers' BLIP modules."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .base import Reward
from .files import check_file, fetch, read_tensors
from .loading import LoadingError, pretrained
from .preprocess import clip_pixels

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # ImageReward's, of the MLP's output
VISION, TEXT = "blip.visual_encoder.", "blip.text_encoder."
UNUSED = r"blip\.(vision_proj|text_proj)\..*|.*\.position_ids"  # used by BLIP's contrastive loss
HUB_NAME = r"(\w[\w.-]*/)?\w[\w.-]*"
RENAMES = (  # transformers' names to ImageReward's, applied in this order
    ("vision.embeddings.class_embedding", "vision.cls_token"),
    ("vision.embeddings.position_embedding", "vision.pos_embed"),
    ("vision.embeddings.patch_embedding", "vision.patch_embed.proj"),
    ("vision.encoder.layers", "vision.blocks"),
    ("vision.post_layernorm", "vision.norm"),
    ("self_attn.projection", "attn.proj"),
    ("self_attn", "attn"),
    ("layer_norm", "norm"),
    ("vision.", VISION),
    ("text.", TEXT),
    ("head.", "mlp.layers."),
)


class ImageReward(Reward):
    """How much annotators would prefer the image among others of the same prompt.

        R(u, c) = (MLP(BERT(c; ViT(u))_[CLS]) - 0.16717) / 1.03334

    BERT reads [CLS] c [SEP] and, by cross-attention in every layer, the ViT's patches; the MLP has
    no activations. Standardised but unbounded, typically in [-2.3, 2].

    ``checkpoint`` is a local .pt or .safetensors file, or ``ORG/REPO:NAME`` on the hub. Its tensor
    shapes give the network's sizes, but not the ViT's ``vision_heads`` (default: width / 64) nor
    BERT's num_attention_heads (default: width / 64), layer_norm_eps and hidden_act. The defaults
    suit ImageReward.pt; a ``config`` such as med_config.json overrides those three of BERT, and
    its other entries are ignored. ``tokenizer`` is a folder or hub id. Prompts are cut to
    ``max_length`` tokens, 35 as in training. Text features are not cached, because BERT's states
    depend on the image.

    ``dtype`` is that of the two towers; resizing, normalisation and the MLP are float32 (float64
    with dtype float64), and so is the (n,) result. Raises ValueError for an option that cannot
    work, and for a checkpoint that is not ImageReward's, naming the first key that differs.
    Source: Xu et al. 2023 (arXiv 2304.05977).
    """

    name = "imagereward"
    differentiable = True

    def __init__(
        self,
        checkpoint: str = "THUDM/ImageReward:ImageReward.pt",
        config: str | None = None,
        vision_heads: int | None = None,
        tokenizer: str = "bert-base-uncased",
        max_length: int = 35,
        dtype: str = "float32",
    ):
        self.check_options(checkpoint, config, vision_heads, tokenizer, max_length, dtype)
        super().__init__()
        from transformers import AutoTokenizer

        option = f"tokenizer={tokenizer!r}"
        self.tokenizer: Any = pretrained(AutoTokenizer.from_pretrained, option, tokenizer)
        self.max_length = max_length
        self.network = load(checkpoint, config, vision_heads)
        text = self.network.text.config
        if text.vocab_size - len(self.tokenizer) not in (0, 2):  # BLIP added [DEC] and [ENC]
            raise ValueError(
                f"tokenizer={tokenizer!r} has {len(self.tokenizer)} tokens, {checkpoint} embeds "
                f"{text.vocab_size}; ImageReward's own is bert-base-uncased"
            )
        if max_length > text.max_position_embeddings:
            raise ValueError(
                f"max_length={max_length} exceeds the {text.max_position_embeddings} positions of "
                f"{checkpoint}; ImageReward was trained with 35"
            )
        self.network.vision.to(getattr(torch, dtype))
        self.network.text.to(getattr(torch, dtype))
        self.network.head.to(torch.promote_types(getattr(torch, dtype), torch.float32))
        self.freeze()

    @classmethod
    def check_options(
        cls,
        checkpoint="THUDM/ImageReward:ImageReward.pt",
        config=None,
        vision_heads=None,
        tokenizer="bert-base-uncased",
        max_length=35,
        dtype="float32",
        **options,
    ):
        checkpoint, tokenizer = str(checkpoint), str(tokenizer)
        where = f"does not exist under {Path.cwd()}; give"
        check_file("checkpoint", checkpoint)
        if config is not None and not Path(str(config)).is_file():
            raise ValueError(f"config={config!r} {where} a med_config.json, or leave it out")
        if not Path(tokenizer).is_dir() and not re.fullmatch(HUB_NAME, tokenizer):
            raise ValueError(
                f"tokenizer={tokenizer!r} {where} a folder, or a hub id such as bert-base-uncased"
            )
        if vision_heads is not None and (type(vision_heads) is not int or vision_heads < 1):
            raise ValueError(f"vision_heads={vision_heads!r} is not a positive integer")
        if type(max_length) is not int or max_length < 3:
            raise ValueError(f"max_length={max_length!r} is not an integer of at least 3")
        allowed = ("float32", "bfloat16", "float16", "float64")
        if dtype not in allowed:
            raise ValueError(f"dtype={dtype!r} is not one of {', '.join(allowed)}")

    def forward(self, images, prompts, metadata=None):
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        ).to(images.device)
        pixels = clip_pixels(images, self.network.vision.config.image_size)
        return self.network(pixels, tokens.input_ids, tokens.attention_mask)


class Network(nn.Module):
    """ImageReward without its preprocessing; dropout and drop path are left out."""

    def __init__(self, vision_config: Any, text_config: Any):
        super().__init__()
        from transformers import BlipTextModel, BlipVisionModel

        self.vision: Any = BlipVisionModel(vision_config)
        self.text: Any = BlipTextModel(text_config, add_pooling_layer=False)
        self.head = nn.Sequential(
            nn.Linear(text_config.hidden_size, 1024),
            nn.Identity(),  # in place of training's dropout, which counts in the names
            nn.Linear(1024, 128),
            nn.Identity(),
            nn.Linear(128, 64),
            nn.Identity(),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Normalised pixels (n, 3, s, s), token ids and their mask (n, l) -> (n,)."""
        patches = self.vision(pixels).last_hidden_state
        states = self.text(
            ids, attention_mask=mask, encoder_hidden_states=patches, is_decoder=False
        ).last_hidden_state
        values = self.head(states[:, 0].to(self.head[0].weight.dtype))
        return (values.squeeze(-1) - MEAN) / STD


def load(checkpoint: str, config: str | None = None, vision_heads: int | None = None) -> Network:
    """The network with the checkpoint's weights, in their dtype; names and shapes must match."""
    state = _read(checkpoint)
    shapes = {k: tuple(v.shape) for k, v in state.items() if not re.fullmatch(UNUSED, k)}
    try:
        network = build(shapes, config, vision_heads)
    except KeyError as error:
        raise _refusal(checkpoint, f"{error} is missing") from None
    empty = network.state_dict()
    expected = {imagereward_name(name): tuple(v.shape) for name, v in empty.items()}
    for key in sorted(expected.keys() | shapes.keys()):
        if expected.get(key) != shapes.get(key):
            raise _refusal(
                checkpoint,
                f"{key!r} is {shapes.get(key, 'missing')} and should be "
                f"{expected.get(key, 'absent')} in a network of its other shapes",
            )
    network.load_state_dict({name: state[imagereward_name(name)] for name in empty}, assign=True)
    positions = torch.arange(network.text.config.max_position_embeddings)
    network.text.embeddings.position_ids = positions[None]  # not in the state, so still on meta
    return network


def build(
    shapes: Mapping[str, tuple[int, ...]],
    config: str | None = None,
    vision_heads: int | None = None,
) -> Network:
    """The network of a checkpoint with these shapes, on the meta device. KeyError if incomplete."""
    from transformers import BlipTextConfig, BlipVisionConfig

    width, _, _, patch = shapes[VISION + "patch_embed.proj.weight"]
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=shapes[VISION + "blocks.0.mlp.fc1.weight"][0],
        num_hidden_layers=_depth(shapes, VISION + "blocks."),
        num_attention_heads=_heads(width, vision_heads, "vision_heads"),
        image_size=patch * math.isqrt(shapes[VISION + "pos_embed"][1] - 1),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    given = json.loads(Path(config).read_text()) if config else {}
    vocabulary, hidden = shapes[TEXT + "embeddings.word_embeddings.weight"]
    heads = _heads(hidden, given.get("num_attention_heads"), "num_attention_heads in config")
    text = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        encoder_hidden_size=width,
        intermediate_size=shapes[TEXT + "encoder.layer.0.intermediate.dense.weight"][0],
        num_hidden_layers=_depth(shapes, TEXT + "encoder.layer."),
        num_attention_heads=heads,
        max_position_embeddings=shapes[TEXT + "embeddings.position_embeddings.weight"][0],
        layer_norm_eps=given.get("layer_norm_eps", 1e-12),
        hidden_act=given.get("hidden_act", "gelu"),
        is_decoder=True,  # only makes the cross-attention layers; attention stays bidirectional
    )
    with torch.device("meta"):
        return Network(vision, text)


def imagereward_name(name: str) -> str:
    """ImageReward's name of a weight of ``Network``."""
    for ours, theirs in RENAMES:
        name = name.replace(ours, theirs)
    return name


def _read(checkpoint: str) -> dict[str, Tensor]:
    path = fetch(checkpoint)
    try:
        state = read_tensors(path, "it")
    except LoadingError as error:
        raise _refusal(checkpoint, f"no tensors can be read ({error})") from error
    state = state if isinstance(state, dict) else {}
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _refusal(checkpoint: str, reason: str) -> ValueError:
    return ValueError(
        f"{checkpoint} is not a complete ImageReward checkpoint: {reason}. Give ImageReward.pt of "
        "huggingface.co/THUDM/ImageReward, or its state dict as .safetensors"
    )


def _depth(shapes: Mapping[str, Any], prefix: str) -> int:
    return 1 + max(int(k[len(prefix) :].split(".")[0]) for k in shapes if k.startswith(prefix))


def _heads(width: int, given: int | None, option: str) -> int:
    heads = given or (0 if width % 64 else width // 64)
    if not heads or width % heads:
        split = f"{given} heads" if given else "heads of 64"
        raise ValueError(f"a width of {width} does not divide into {split}; set {option}")
    return heads
