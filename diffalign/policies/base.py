"""The contract between a diffusers pipeline and everything above it.

A family file (`unet.py`, ...) says how its network is called and what its output means; the rest is
here: classifier-free guidance, prompt cache, decoding and LoRA adapters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..dynamics import Levels, Prediction
from . import lora


@dataclass(frozen=True)
class Cond:
    """Text conditioning of n samples: tensors (n, ...) by name, of prompt and negative prompt."""

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


class Policy(ABC):
    """A text-to-image pipeline as a policy: what algorithms may ask of a model.

    Latents are float32 (n, *latent_shape); pictures are (n, 3, H, W) in [0, 1].
    The frozen weights run in `dtype` under autocast; LoRA weights stay float32.
    """

    network: Any  # the denoiser, with the adapters on it
    vae: Any
    pipe: Any
    latent_shape: tuple[int, ...]
    parametrise: Callable[[Tensor, Tensor, Levels], Prediction]  # (x, network output, level)

    def __init__(self, pipe: Any, device: torch.device | str, dtype: torch.dtype):
        self.pipe = pipe
        self.device = torch.device(device)
        self.dtype = dtype
        self.decode_batch = 16
        self.calls = 0  # samples through the denoiser so far, both branches of CFG counted
        self._prompts: dict[str, dict[str, Tensor]] = {}

    @classmethod
    @abstractmethod
    def peek(cls, name: str, steps: int) -> tuple[Levels, tuple[int, ...]]:
        """Levels of a sampling run and shape of a latent, from the pipeline's configs alone."""

    @abstractmethod
    def levels(self, steps: int) -> Levels:
        """The (steps + 1,) levels of a sampling run, from noise to data."""

    @abstractmethod
    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        """Text embeddings (n, ...) by name, as `call` wants them."""

    @abstractmethod
    def call(self, x: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
        """Raw network output for `x` (n, *latent), `t` (n,) and embeddings (n, ...)."""

    def encode(self, prompts: Sequence[str], negative: str = "") -> Cond:
        """Conditioning of `prompts`; every distinct text goes through the encoders once per run."""
        missing = [p for p in dict.fromkeys([*prompts, negative]) if p not in self._prompts]
        for start in range(0, len(missing), 64):
            chunk = missing[start : start + 64]
            with torch.no_grad():
                embedded = self.embed(chunk)
            for i, prompt in enumerate(chunk):
                self._prompts[prompt] = {k: v[i].cpu() for k, v in embedded.items()}

        def rows(texts: Sequence[str]) -> dict[str, Tensor]:
            names = self._prompts[negative]
            return {
                k: torch.stack([self._prompts[p][k] for p in texts]).to(self.device) for k in names
            }

        return Cond(rows(prompts), rows([negative] * len(prompts)))

    def predict(self, x: Tensor, level: Levels, cond: Cond, guidance: float = 1.0) -> Prediction:
        """The network's view of `x` (n, *latent) at `level` (one level, or one a sample).

        guidance w != 1 is classifier-free guidance `u + w (c - u)` (arXiv 2207.12598) on the raw
        output, both branches in one call. float32; carries gradient where grad is enabled.
        """
        t = level.t.to(self.device).expand(len(x)) if level.t.ndim == 0 else level.t.to(self.device)
        guided = guidance != 1.0
        text = cond.positive
        if guided:
            x_in, t = torch.cat([x, x]), torch.cat([t, t])
            text = {k: torch.cat([cond.negative[k], v]) for k, v in text.items()}
        else:
            x_in = x
        self.calls += len(x_in)
        with self.autocast():
            output = self.call(x_in, t, text).float()
        if guided:
            unconditional, conditional = output.chunk(2)
            output = unconditional + guidance * (conditional - unconditional)
        return self.parametrise(x, output, level)

    def autocast(self):
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def decode(self, x0: Tensor, differentiable: bool = False) -> Tensor:
        """Pictures (n, 3, H, W) in [0, 1] of clean latents (n, *latent).

        Slices of `decode_batch` bound the memory; with `differentiable` the graph to `x0` is kept.
        """
        with torch.set_grad_enabled(differentiable):
            return torch.cat([self._decode(chunk) for chunk in x0.split(self.decode_batch)])

    def _decode(self, x0: Tensor) -> Tensor:
        config = self.vae.config
        x0 = x0 / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        image = self.vae.decode(x0.to(self.vae.dtype)).sample.float()
        return (image / 2 + 0.5).clamp(0, 1)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The float32 weights of the adapter in use, in a fixed order."""
        return [p for p in self.network.parameters() if p.requires_grad]

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The frozen base model: every adapter off."""
        with lora.disabled(self.network):
            yield

    @contextmanager
    def adapter(self, name: str) -> Iterator[None]:
        """The adapter `name` in place of "default", e.g. "old" or "ema"."""
        with lora.active(self.network, name):
            yield

    @abstractmethod
    def save_lora(self, folder: Path) -> Path:
        """Write the weights file that `pipe.load_lora_weights(folder)` reads; returns its path."""
