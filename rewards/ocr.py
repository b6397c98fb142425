"""Text rendering: how much of the quoted text of the prompt can be read in the image."""

from __future__ import annotations

import importlib.metadata
import re
from typing import Any

import torch
from torch import Tensor

from .base import Reward
from .preprocess import quantize_pixels, resize

QUOTED = re.compile('["“”]([^"“”]*)["“”]')
SIDE = 512  # pixels: the longest side of the image that the text detector gets


class OCR(Reward):
    """Share of the prompt's quoted text t found in r, the text read in the image, in [0, 1].

        R = 1 if t is a substring of r, else 1 - min(lev(t, r), |t|) / |t|

    lev is the Levenshtein distance. t is the text between the first two double quotes, straight or
    curly; r is the recognised lines joined from top to bottom. Both are lower-cased and lose their
    spaces. The engine is RapidOCR on onnxruntime, with the models in its package: nothing is
    downloaded, and it runs on the CPU. Upside-down text is not rotated. Lines are detected with
    the longest side of the image at 512 pixels (at full size the detector misses large letters)
    and read at full size. Lines below ``min_confidence``, in [0, 1], are left out.

    Not differentiable. Raises ValueError for a prompt without quoted text, ImportError without
    rapidocr and onnxruntime, and the engine's own exceptions. Source: Flow-GRPO (arXiv
    2505.05470), but with the color channels in the order that the engine expects.
    """

    name = "ocr"
    gradient_hint = "text is read by an engine outside autograd; choose an algorithm without it"

    def __init__(self, min_confidence: float = 0.5):
        self.check_options(min_confidence=min_confidence)
        super().__init__()
        try:
            import onnxruntime  # noqa: F401  # if absent, the engine fails only at the first image
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ImportError(
                f"{error}. The ocr reward needs: pip install 'rapidocr>=3.5' onnxruntime"
            ) from error
        self.engine: Any = RapidOCR(
            params={
                "Global.use_cls": False,
                "Global.text_score": min_confidence,
                "Global.log_level": "error",  # an image without text is no warning
                "Det.limit_type": "max",
                "Det.limit_side_len": SIDE,
                **{f"{k}.model_path": _bundled(k.lower()) for k in ("Det", "Cls", "Rec")},
                "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
            }
        )

    @classmethod
    def check_options(cls, min_confidence=0.5, **options):
        if isinstance(min_confidence, bool) or not isinstance(min_confidence, (int, float)):
            raise ValueError(f"min_confidence={min_confidence!r} is not a number")
        if not 0 <= min_confidence <= 1:
            raise ValueError(f"min_confidence={min_confidence!r} is not in [0, 1]")

    @classmethod
    def check_prompts(cls, prompts, metadata=None):
        for prompt in prompts:
            quoted_text(prompt)

    def read(self, images: Tensor) -> list[str]:
        """The text in (n, 3, H, W) images, after rounding to 8 bits and enlarging small ones."""
        images = quantize_pixels(images.detach().float())
        height, width = images.shape[-2:]
        scale = max(1, SIDE / max(height, width))
        images = resize(images, round(height * scale), round(width * scale), quantize=True)
        pixels = (images * 255).round().to(torch.uint8)
        arrays = pixels.flip(1).permute(0, 2, 3, 1).contiguous().cpu().numpy()  # BGR, height first
        return ["".join(self.engine(array).txts or ()) for array in arrays]

    def forward(self, images, prompts, metadata=None):
        targets = [quoted_text(prompt) for prompt in prompts]
        scores = [edit_score(t, r) for t, r in zip(targets, self.read(images), strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)


def _bundled(kind: str) -> str:
    """Path of a model in the package; without it RapidOCR downloads files it does not recognize."""
    files = importlib.metadata.files("rapidocr") or []
    found = [f for f in files if f.suffix == ".onnx" and f"_{kind}_" in f.name]
    if not found:
        version = importlib.metadata.version("rapidocr")
        raise ImportError(
            f"rapidocr {version} ships no *_{kind}_*.onnx model; pip install 'rapidocr>=3.5'"
        )
    return str(found[0].locate())


def quoted_text(prompt: str) -> str:
    """The text between the first two double quotes, straight or curly.

    Raises ValueError if there is no such text, or only spaces.
    """
    found = QUOTED.search(prompt)
    if found is None or not found[1].strip():
        raise ValueError(
            f"prompt {prompt!r} has no text in double quotes for the ocr reward to look for; write "
            'the wanted text like a sign that says "OPEN", or remove the prompt'
        )
    return found[1]


def edit_score(target: str, text: str) -> float:
    """R of ``OCR`` for the wanted and the read text, in [0, 1]."""
    target, text = ("".join(s.lower().split()) for s in (target, text))
    return 1.0 if target in text else 1 - min(levenshtein(target, text), len(target)) / len(target)


def levenshtein(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions of a character that turn ``a`` into ``b``."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]
