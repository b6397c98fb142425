"""Human Preference Score v2."""

from __future__ import annotations

from .clip import Clip
from .files import check_file, fetch
from .preprocess import pad_square

CHECKPOINTS = {
    "v2.0": "xswu/HPSv2:HPS_v2_compressed.pt",
    "v2.1": "xswu/HPSv2:HPS_v2.1_compressed.pt",
}


class HPS(Clip):
    """Human Preference Score v2: cosine of a CLIP ViT-H-14 fine-tuned on human rankings.

        R(u, c) = <f(u), g(c)> / (|f(u)| |g(c)|), no scale

    Values are about 0.20 to 0.30 with ``version`` "v2.0", 0.24 to 0.35 with "v2.1" (0.41 after
    training on it). ``checkpoint`` replaces the version's weights: a file or a hub file
    ORG/REPO:NAME, for the open_clip architecture ``arch``. ``transform`` "pad" is the official
    preprocessing: it resizes the longest side to 224 and pads the other with black. "crop" resizes
    the shortest side and crops the center, as many trainers do. Both agree for square images.
    Source: Wu et al. 2023 (arXiv 2306.09341), https://github.com/tgxs002/HPSv2.
    """

    name = "hps"

    def __init__(
        self,
        version: str = "v2.1",
        checkpoint: str | None = None,
        arch: str = "ViT-H-14",
        transform: str = "pad",
        dtype: str = "float32",
    ):
        self.check_options(version, checkpoint, transform, dtype=dtype)
        weights = fetch(checkpoint or CHECKPOINTS[version])
        super().__init__(f"{arch}::{weights}", dtype=dtype)
        self.pad = transform == "pad"

    @classmethod
    def check_options(cls, version="v2.1", checkpoint=None, transform="pad", **options):
        for option, value, allowed in (
            ("version", version, tuple(CHECKPOINTS)),
            ("transform", transform, ("pad", "crop")),
        ):
            if value not in allowed:
                raise ValueError(f"{option}={value!r} is not one of {', '.join(allowed)}")
        if checkpoint is not None:
            check_file("checkpoint", checkpoint)
        super().check_options(**options)

    def image_features(self, images):
        # After padding to the tower's size, the preprocessing that follows only normalizes.
        return super().image_features(pad_square(images, self.tower.size) if self.pad else images)
