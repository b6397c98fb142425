"""LAION's aesthetic score."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from .base import Reward
from .clip import Clip
from .files import check_file, fetch, read_tensors

# Prefixes of the linear layers in a state dict. The numbers skip dropouts and activations.
AFFINE, RELU = (
    [f"layers.{i}." for i in numbers] for numbers in ((0, 2, 4, 6, 7), (0, 3, 6, 9, 11))
)


class Aesthetic(Reward):
    """How beautiful a picture is to LAION's improved aesthetic predictor; ignores the prompt.

        A(u) = w·f(u) / |f(u)| + b          R = A, or -|A - target| when ``target`` is given

    f is the projected image embedding of ``model``, a CLIP as in ``rewards.Clip`` whose text tower
    is thrown away; the official heads take OpenAI's ViT-L/14 (768-d). ``head`` is a .pth or
    .safetensors file, a folder with model.safetensors, or a hub file ORG/REPO:NAME, in one of the
    layouts of ``load_head``. Real images score about 4 to 7; people rated from 1 to 10, but the map
    is affine, so nothing keeps A below 10 (for sac+logos+ava1 |w| = 18.0 and b = 5.24).

    ``dtype`` is that of the tower; the head is float32 (float64 with dtype float64), and so is the
    (n,) result. Raises ValueError for bad options, for a head in another layout, or if its width
    is not that of the model's features.
    Source: https://github.com/christophschuhmann/improved-aesthetic-predictor; used as a reward by
    DDPO (arXiv 2305.13301) and AlignProp (arXiv 2310.03739), which takes -|A - 10|.
    """

    name = "aesthetic"
    differentiable = True

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        head: str = "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth",
        target: float | None = None,
        dtype: str = "float32",
    ):
        self.check_options(model=model, head=head, target=target, dtype=dtype)
        super().__init__()
        self.target = target
        self.head = load_head(fetch(head, "head"))
        self.width = next(self.head.parameters()).shape[1]
        self.head.to(torch.promote_types(getattr(torch, dtype), torch.float32))
        self.clip = image_tower(model, dtype)
        self.freeze()

    @classmethod
    def check_options(cls, model="", head=None, target=None, dtype="float32", **options):
        number = isinstance(target, (int, float)) and not isinstance(target, bool)
        if target is not None and not (number and math.isfinite(target)):
            raise ValueError(f"target={target!r} is not a finite number; give one such as 7.0")
        Clip.check_options(model=model, dtype=dtype)
        if head is not None:
            check_file("head", head)

    def forward(self, images, prompts, metadata=None):
        features = self.clip.image_features(images)
        if features.shape[1] != self.width:
            raise ValueError(
                f"the head takes {self.width} features and the model gives {features.shape[1]}; "
                "use the CLIP that the head was trained on (LAION's: openai/clip-vit-large-patch14)"
            )
        score = self.head(features).squeeze(-1)
        return score if self.target is None else -(score - self.target).abs()


def load_head(path: str | Path) -> nn.Module:
    """The head in ``path`` as a float32 module, (n, d) unit features -> (n, 1).

    layers.{0,2,4,6,7}   LAION's MLP. It has no activation, so it is exactly affine: folded (in
                         float64) into one linear layer
    layers.{0,3,6,9,11}  its variant with ReLUs in between, kept as it is
    weight, bias         one linear layer, also as linear.weight, linear.bias

    Raises ValueError for any other set of keys.
    """
    path = Path(path)
    path = path / "model.safetensors" if path.is_dir() else path
    state = read_tensors(str(path), f"head={str(path)!r}")
    state = state if isinstance(state, dict) else {}
    for layers in (AFFINE, RELU, ["linear."], [""]):
        if set(state) == {layer + part for layer in layers for part in ("weight", "bias")}:
            break
    else:
        raise ValueError(
            f"{path} is no aesthetic head: its keys are {', '.join(sorted(state)[:12])}; expected "
            "weight and bias of layers.{0,2,4,6,7} (LAION's), of layers.{0,3,6,9,11} (with ReLU), "
            "or of one linear layer"
        )
    pairs = [(state[p + "weight"].double(), state[p + "bias"].double()) for p in layers]
    if layers is RELU:
        return nn.Sequential(*[m for pair in pairs for m in (_linear(*pair), nn.ReLU())][:-1])
    weight, bias = pairs.pop()
    for inner_weight, inner_bias in reversed(pairs):
        weight, bias = weight @ inner_weight, weight @ inner_bias + bias
    return _linear(weight, bias)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def image_tower(model: str, dtype: str) -> Clip:
    """A Clip without its text tower; only ``image_features`` works."""
    clip = Clip(model, dtype=dtype)
    for name, _ in list(clip.tower.model.named_children()):
        if not name.startswith("vis"):  # visual; in transformers vision_model, visual_projection
            setattr(clip.tower.model, name, None)
    return clip
