"""What a denoiser gets beside the noisy latents and their noise level."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Cond:
    """Text conditioning of n samples: tensors (n, ...) by name, of prompt and negative prompt.

    `negative` is empty if guidance has no second branch.
    """

    positive: dict[str, Tensor]
    negative: dict[str, Tensor]

    def __getitem__(self, index: Tensor | slice) -> Cond:
        """The rows `index` (a LongTensor or a slice)."""
        return Cond(
            {k: v[index] for k, v in self.positive.items()},
            {k: v[index] for k, v in self.negative.items()},
        )

    def __len__(self) -> int:
        return len(next(iter(self.positive.values())))
