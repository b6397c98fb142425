"""Likeness to reference images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .aesthetic import image_tower
from .base import Reward
from .clip import Clip, _guess_backend, _unit
from .files import check_images, image_files, load_image
from .loading import PREPROCESSING, optional, pretrained
from .preprocess import IMAGENET_MEAN, IMAGENET_STD, clip_pixels

CLASS_TOKEN_FIRST = ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit")


class Similarity(Reward):
    """Cosine of image embeddings to those of references (subject or style); ignores the prompt.

        R(u) = mean_k or max_k <f(u), f(r_k)> / (|f(u)| |f(r_k)|), in [-1, 1]

    f is the class token of a DINO (``model`` a transformers folder or hub id: DINOv2, DINOv3, or
    DINO's ViT), or the image embedding of a CLIP (as in ``rewards.Clip``). DINO tells two objects
    of one kind apart, CLIP hardly; CLIP is the usual choice for style. For scale: pictures that
    DreamBooth generates of its subjects have a mean of 0.67 (Stable Diffusion) and 0.70 (Imagen)
    with DINO ViT-S/16.

    ``references`` is an image file, a folder of them, or a list of either; ``reference`` in a
    prompt's metadata replaces it for that prompt. ``reduce`` "mean" or "max" over the K images;
    transparent ones are put on white. Features of references are computed once, on first use, and
    kept (a few kB each). Resizing is antialiased bicubic whatever the model's processor says.
    Raises ValueError for bad options, missing files, and a prompt without a reference.
    Source: DINOv2 (arXiv 2304.07193); metrics DINO and CLIP-I of DreamBooth (arXiv 2208.12242).
    """

    name = "similarity"
    differentiable = True

    def __init__(
        self,
        model: str = "facebook/dinov2-base",
        references: str | Sequence[str] | None = None,
        reduce: str = "mean",
        dtype: str = "float32",
    ):
        self.check_options(model=model, references=references, reduce=reduce, dtype=dtype)
        super().__init__()
        from transformers import AutoConfig

        self.references, self.reduce = references, reduce
        self._cache: dict[str, Tensor] = {}
        open_clip = _guess_backend(str(model)) == "open_clip"
        kind = "clip"
        if not open_clip:
            kind = pretrained(AutoConfig.from_pretrained, f"model={model!r}", model).model_type
        if kind not in ("clip", *CLASS_TOKEN_FIRST):
            raise ValueError(
                f"model={model!r} is a {kind}; use a clip or one of {', '.join(CLASS_TOKEN_FIRST)}"
            )
        self.tower = image_tower(model, dtype) if kind == "clip" else Dino(model, dtype)
        self.freeze()

    @classmethod
    def check_options(cls, model="", references=None, reduce="mean", dtype="float32", **options):
        if reduce not in ("mean", "max"):
            raise ValueError(f"reduce={reduce!r} is not one of mean, max")
        Clip.check_options(model=model, dtype=dtype)
        if references is not None:
            check_images(references)

    @classmethod
    def check_prompts(cls, prompts, metadata):
        asked = {str(m["reference"]): m["reference"] for m in metadata if "reference" in m}
        for references in asked.values():
            check_images(references)

    def reference_features(self, references: str | Sequence[str]) -> Tensor:
        """Unit-length features of the reference images, (k, d), without gradient."""
        device, files = next(self.tower.parameters()).device, image_files(references)
        for file in files:
            if file not in self._cache:
                with torch.no_grad():
                    self._cache[file] = self.tower.image_features(load_image(file).to(device))[0]
        # As in Clip, the stack also copies features cached in inference mode.
        return torch.stack([self._cache[file].to(device) for file in files])

    def forward(self, images, prompts, metadata=None):
        values = []
        for i, feature in enumerate(self.tower.image_features(images)):
            references = (metadata[i] if metadata else {}).get("reference", self.references)
            if references is None:
                raise ValueError(
                    f"prompt {prompts[i]!r} has no reference image; set `references`, or "
                    "`reference` in the metadata of every prompt"
                )
            cosines = self.reference_features(references) @ feature
            values.append(cosines.mean() if self.reduce == "mean" else cosines.max())
        return torch.stack(values)


class Dino(nn.Module):
    """A DINO of transformers with its own preprocessing."""

    def __init__(self, name: str, dtype: str):
        super().__init__()
        from transformers import AutoImageProcessor, AutoModel

        self.model: Any = pretrained(
            AutoModel.from_pretrained, f"model={name!r}", name,
            unused=r"^pooler\.", dtype=getattr(torch, dtype),
        )  # fmt: skip
        self.pixels: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        self.pixels["size"] = self.model.config.image_size
        processor: Any = optional(
            AutoImageProcessor.from_pretrained, f"model={name!r}", name, PREPROCESSING
        )
        if processor is None:
            return
        shortest = processor.size.get("shortest_edge")
        size = processor.crop_size["height"] if processor.do_center_crop else shortest
        self.pixels = {
            "size": size or processor.size["height"],
            "mean": processor.image_mean,
            "std": processor.image_std,
            "crop": bool(shortest),
            "shortest": shortest,
        }

    def image_features(self, images: Tensor) -> Tensor:
        """Unit-length class tokens, (n, 3, H, W) -> (n, d), at least float32."""
        return _unit(self.tokens(images)[:, 0])

    def tokens(self, images: Tensor) -> Tensor:
        """The class token, registers if any, patches: (n, 3, H, W) -> (n, 1 + r + p, d)."""
        pixels = clip_pixels(images, **self.pixels).to(self.model.dtype)
        return self.model(pixel_values=pixels).last_hidden_state
