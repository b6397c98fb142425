"""What a denoiser gets beside the noisy latents and their noise level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Cond:
    """Text conditioning of n samples: tensors (n, ...) by name, of prompt and negative prompt.

    `negative` is empty if guidance has no second branch. Of a family whose texts keep their own
    number of tokens there is a "length" (n,), long, and what lies behind it in (n, L, ...) is zero.
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


def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The embeddings (n_i, L_i, ...) of several, by name, one after the other; those of fewer
    tokens are padded with zeros to the longest. Those without tokens, (n_i,) and (n_i, D), are
    joined as they are."""
    found = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if values[0].ndim > 2:
            most = max(v.shape[1] for v in values)
            values = [pad(v, (0, 0) * (v.ndim - 2) + (0, most - v.shape[1])) for v in values]
        found[name] = torch.cat(values)
    return found
