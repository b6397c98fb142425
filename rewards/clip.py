"""CLIP score with transformers or open_clip weights."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Reward
from .loading import PREPROCESSING, LoadingError, optional, pretrained, reading
from .preprocess import CLIP_MEAN, CLIP_STD, clip_pixels

CACHED_PROMPTS = 4096


class Clip(Reward):
    """Cosine of CLIP's image and text embeddings, CLIPScore without its clipping at 0.

        R(u, c) = s <f(u), g(c)> / (|f(u)| |g(c)|)

    ``model`` is a transformers CLIP folder or hub id, or for open_clip ``hf-hub:ORG/NAME``,
    ``local-dir:PATH``, a folder with open_clip_config.json, or ``ARCH::CHECKPOINT`` where
    CHECKPOINT is a file or an open_clip tag (``ViT-H-14::weights.pt``; OpenAI's weights need an
    architecture ending in ``-quickgelu``). ``backend`` "auto" infers the library from ``model``; a
    folder that both libraries can load goes to transformers. ``processor`` is the folder or hub id
    of a transformers model's tokenizer and pixel statistics, by default ``model`` itself.

    ``scale`` s: "cosine" 1, range [-1, 1]; "100"; "logit" the model's exp(logit_scale), about 100.
    ``dtype`` is that of the two towers; resizing, normalisation and cosine are float32 (float64
    with dtype float64), and so is the (n,) result. Gradient goes to the images only; text features
    are cached per prompt. Raises ValueError for an unknown option or a path that does not exist.
    Source: Radford et al. 2021 (arXiv 2103.00020), Hessel et al. 2021 (arXiv 2104.08718).
    """

    name = "clip"
    differentiable = True

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        backend: str = "auto",
        scale: str = "cosine",
        dtype: str = "float32",
        processor: str | None = None,
    ):
        self.check_options(
            model=model, backend=backend, scale=scale, dtype=dtype, processor=processor
        )
        super().__init__()
        if _guess_backend(str(model), backend) == "open_clip":
            self.tower: Any = _OpenClip(str(model), getattr(torch, dtype))
        else:
            self.tower = _Transformers(str(model), getattr(torch, dtype), str(processor or model))
        self.scale = str(scale)
        self._text_cache: OrderedDict[str, Tensor] = OrderedDict()
        self.freeze()

    @classmethod
    def check_options(
        cls, model="", backend="auto", scale="cosine", dtype="float32", processor=None, **options
    ):
        for option, value, allowed in (
            ("backend", backend, ("auto", "transformers", "open_clip")),
            ("scale", str(scale), ("cosine", "100", "logit")),
            ("dtype", dtype, ("float32", "bfloat16", "float16", "float64")),
        ):
            if value not in allowed:
                raise ValueError(f"{option}={value!r} is not one of {', '.join(allowed)}")
        if processor and _guess_backend(str(model), backend) == "open_clip":
            raise ValueError(
                f"processor={processor!r} is for transformers models; {model!r} is open_clip's, "
                "which brings its own tokenizer: leave processor out"
            )
        for option, value in (("model", str(model)), ("processor", str(processor or ""))):
            path = value.removeprefix("local-dir:").rpartition("::")[2]
            local = value.startswith("local-dir:") or path.startswith((".", "/", "~", "assets/"))
            local = local or path.count(os.sep) > 1
            local = local or path.endswith((".pt", ".bin", ".safetensors"))
            if local and not value.startswith("hf-hub:") and not Path(path).exists():
                raise ValueError(
                    f"{option}={value!r}: {path} does not exist under {Path.cwd()}; give an "
                    "existing path or a hub id such as openai/clip-vit-base-patch32"
                )

    def image_features(self, images: Tensor) -> Tensor:
        """Unit-length projected features, (n, 3, H, W) -> (n, d), at least float32."""
        tower = self.tower
        pixels = clip_pixels(images, tower.size, tower.mean, tower.std, crop=tower.crop)
        return _unit(tower.image(pixels.to(next(tower.parameters()).dtype)))

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> Tensor:
        """Unit-length projected features, (n, d), at least float32, without gradient."""
        cache, device = self._text_cache, next(self.tower.parameters()).device
        new = [p for p in dict.fromkeys(prompts) if p not in cache]
        if new:
            features = _unit(self.tower.text(self.tower.tokenize(new).to(device)))
            cache.update(zip(new, features, strict=True))
        # The stack also copies features cached in inference mode, which autograd could not save.
        result = torch.stack([cache[p].to(device) for p in prompts])
        while len(cache) > CACHED_PROMPTS:
            cache.popitem(last=False)
        return result

    def forward(self, images, prompts, metadata=None):
        cosine = (self.image_features(images) * self.text_features(prompts)).sum(-1)
        if self.scale == "logit":
            return cosine * self.tower.logit_scale
        return cosine * (100 if self.scale == "100" else 1)


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def _guess_backend(model: str, backend: str = "auto") -> str:
    if backend != "auto":
        return backend
    folder = Path(model)
    if "::" in model or model.startswith(("hf-hub:", "local-dir:")):
        return "open_clip"
    only_open_clip = (folder / "open_clip_config.json").exists()
    return (
        "open_clip" if only_open_clip and not (folder / "config.json").exists() else "transformers"
    )


class _Transformers(nn.Module):
    def __init__(self, name: str, dtype: torch.dtype, processor: str):
        super().__init__()
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        self.model: Any = pretrained(
            CLIPModel.from_pretrained, f"model={name!r}", name, dtype=torch.float32
        )
        self.logit_scale = self.model.logit_scale.exp().item()  # before bfloat16 rounds it by 1 %
        self.model.to(dtype)
        option = f"{'model' if processor == name else 'processor'}={processor!r}"
        self.tokenizer: Any = pretrained(AutoTokenizer.from_pretrained, option, processor)
        if len(self.tokenizer) < 256:  # transformers 5 invents an empty one; CLIP's holds all bytes
            raise ValueError(
                f"{processor} has no tokenizer; set `processor` to the folder or hub id of one, "
                "such as openai/clip-vit-base-patch32"
            )
        text = self.model.config.text_config
        self.context = text.max_position_embeddings
        # CLIP reads its text feature at the end token; 2 is the legacy value that means "argmax".
        if text.eos_token_id not in (2, self.tokenizer.eos_token_id):
            raise ValueError(
                f"{name}: the model's eos_token_id {text.eos_token_id} is not the tokenizer's "
                f"{self.tokenizer.eos_token_id} (vocabulary {len(self.tokenizer)}); the folder "
                "pairs a model with another model's tokenizer"
            )
        self.size = self.model.config.vision_config.image_size
        self.mean, self.std, self.crop = CLIP_MEAN, CLIP_STD, True
        pixels: Any = optional(CLIPImageProcessor.from_pretrained, option, processor, PREPROCESSING)
        if pixels is not None:
            self.mean, self.std = pixels.image_mean, pixels.image_std
            self.crop = pixels.do_center_crop

    def tokenize(self, prompts: list[str]) -> Tensor:
        return self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.context,
            return_tensors="pt",
        ).input_ids

    def image(self, pixels: Tensor) -> Tensor:
        return _pooled(self.model.get_image_features(pixel_values=pixels))

    def text(self, tokens: Tensor) -> Tensor:
        # No attention mask: attention is causal and the feature is read at the first end token.
        return _pooled(self.model.get_text_features(input_ids=tokens))


def _pooled(output: Any) -> Tensor:
    # transformers 4 returns the projected tensor, 5 an output object that holds it.
    return output if isinstance(output, Tensor) else output.pooler_output


class _OpenClip(nn.Module):
    def __init__(self, name: str, dtype: torch.dtype):
        super().__init__()
        try:
            import open_clip
        except ImportError as error:
            raise LoadingError(
                f"model={name!r} is open_clip's ({error}); pip install open_clip_torch"
            ) from error
        given = name
        if "::" not in name and not name.startswith(("hf-hub:", "local-dir:")):
            name = ("local-dir:" if Path(name).is_dir() else "hf-hub:") + name
        name, _, checkpoint = name.partition("::")
        source = checkpoint or name.removeprefix("local-dir:").removeprefix("hf-hub:")
        with reading(f"model={given!r}", source):
            # require_pretrained: open_clip would otherwise warn and keep random weights.
            self.model: Any = open_clip.create_model(
                name, checkpoint or None, require_pretrained=True, weights_only=True
            )
            self.tokenize: Any = open_clip.get_tokenizer(name)
        self.logit_scale = self.model.logit_scale.exp().item()
        self.model.to(dtype)
        config: Any = open_clip.get_model_preprocess_cfg(self.model)
        height, width = (config["size"],) * 2 if isinstance(config["size"], int) else config["size"]
        mode = config.get("resize_mode", "shortest")
        if height != width or mode not in ("shortest", "squash"):
            raise ValueError(
                f"{name}: size {height}x{width}, resize_mode {mode!r} is not supported; only "
                "square inputs with resize_mode 'shortest' or 'squash' are"
            )
        self.size, self.mean, self.std = height, config["mean"], config["std"]
        self.crop = mode == "shortest"

    def image(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    def text(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens)
