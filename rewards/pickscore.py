"""PickScore."""

from __future__ import annotations

from pathlib import Path

from .clip import Clip

MODEL = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScore(Clip):
    """Which picture of a prompt people would pick: a CLIP fine-tuned on half a million choices.

        R(u, c) = exp(logit_scale) <f(u), g(c)> / (|f(u)| |g(c)|)

    It is ``rewards.Clip`` with scale "logit" and other defaults. Values are about 19 to 24; 1 point
    means odds of e : 1 between two pictures of a prompt. Comparisons across prompts mean little.
    ``model`` is a transformers CLIP. ``processor`` (tokenizer and pixel statistics) defaults to the
    model's own if ``model`` is a folder with a tokenizer, else to LAION's CLIP ViT-H-14, from which
    PickScore_v1 was fine-tuned. (PickScore_v1 comes without a tokenizer.)
    Source: Kirstain et al. 2023 (arXiv 2305.01569).
    """

    name = "pickscore"

    def __init__(self, model: str = MODEL, processor: str | None = None, dtype: str = "float32"):
        if not (processor or any(Path(model).glob("*token*.json"))):
            processor = PROCESSOR
        super().__init__(model, "transformers", "logit", dtype, processor)
