"""The weights of a policy that train, a LoRA or the whole denoiser, and their copies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import lora


class TrainedWeights:
    """What a `Policy` knows of its own weights. Copies of a LoRA are adapters beside it; those of a
    wholly trained denoiser are further denoisers."""

    denoiser: ClassVar[str] = "transformer"  # its name in the pipeline: unet | transformer
    lora_targets: ClassVar[tuple[str, ...]]  # layers that get a LoRA where the config names none
    pipe: Any
    network: Any  # the denoiser
    device: torch.device
    read_base: Callable[[], Any]  # the denoiser before any training
    accelerated: Callable[[Any], None]  # makes the calls of a further denoiser as fast as its own
    _copies: dict[str, Any]  # of a wholly trained network: "base", "old", ...

    def add_lora(
        self,
        rank: int,
        alpha: float | None = None,
        targets: Sequence[str] | None = None,
        seed: int = 0,
        name: str = "default",
    ) -> None:
        """Add a LoRA to be trained, see `lora.add`; targets None = the family's `lora_targets`."""
        lora.add(self.network, rank, alpha, targets or self.lora_targets, seed, name)

    @property
    def is_lora(self) -> bool:
        return bool(getattr(self.network, "peft_config", None))

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The float32 weights that train, in a fixed order."""
        return [p for p in self.network.parameters() if p.requires_grad]

    def state_dict(self, name: str = "default") -> dict[str, Tensor]:
        """The trained weights, or their copy `name`, on the CPU: A and B of a LoRA, or the whole
        denoiser."""
        if self.is_lora:
            return lora.state_dict(self.network, name)
        network = self.network if name == "default" else self._copies[name]
        return {k: v.detach().cpu().clone() for k, v in network.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor], name: str = "default") -> None:
        if self.is_lora:
            lora.load_state_dict(self.network, state, name)
        else:
            network = self.network if name == "default" else self._copies[name]
            network.load_state_dict(state)

    def add_copy(self, name: str) -> None:
        """Keep a frozen copy of the trained weights, as they are now, for `adapter(name)`.

        The copy of a LoRA is small; that of a wholly trained network is as large as the network.
        """
        if self.is_lora:
            config = self.network.peft_config["default"]
            targets = sorted(config.target_modules)
            lora.add(self.network, config.r, config.lora_alpha, targets, 0, name)
            lora.load_state_dict(self.network, lora.state_dict(self.network), name)
        else:
            self._keep(name, copy.deepcopy(self.network))

    def _keep(self, name: str, network: Any) -> None:
        """Keep another denoiser beside the trained one, as fast as that is."""
        network.to(self.device, memory_format=torch.channels_last)
        self.accelerated(network)
        self._copies[name] = network.requires_grad_(False).eval()

    def weights(self, name: str = "default") -> list[nn.Parameter]:
        """The trained weights, or their copy `name`, in the order of `trainable_parameters`."""
        if self.is_lora:
            return [p for n, p in self.network.named_parameters() if f".{name}." in n]
        return list((self.network if name == "default" else self._copies[name]).parameters())

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Run the base model: the LoRA is off, or the base of a wholly trained network is read
        again.

        A base that was read is a second denoiser in memory until `forget("base")`.
        """
        if self.is_lora:
            with lora.disabled(self.network):
                yield
            return
        if "base" not in self._copies:
            self._keep("base", self.read_base())
        with self._instead(self._copies["base"]):
            yield

    def _read_base(self) -> Any:
        return type(self.network).from_pretrained(
            self.pipe.config._name_or_path, subfolder=self.denoiser
        )

    @contextmanager
    def adapter(self, name: str) -> Iterator[None]:
        """Run the copy `name`, e.g. "old" or "ema", in place of the trained weights."""
        if self.is_lora:
            with lora.active(self.network, name):
                yield
        else:
            with self._instead(self._copies[name]):
                yield

    def merged(self) -> AbstractContextManager[None]:
        """Draw pictures by the weights in use with a LoRA merged into the model (`lora.merged`).

        Where the model is in half precision nothing is merged: a change of less than half a unit
        in the last place of W, as every LoRA's is at first, would round to none.
        """
        whole = not self.is_lora or self.network.dtype != torch.float32
        return nullcontext() if whole else lora.merged(self.network)

    @contextmanager
    def _instead(self, network: Any) -> Iterator[None]:
        # swaps the module, not the weights in it, so that graphs made inside stay valid
        trained, self.network = self.network, network
        try:
            yield
        finally:
            self.network = trained

    def forget(self, name: str) -> None:
        """Free the copy `name` of a wholly trained network, if there is one."""
        self._copies.pop(name, None)

    def save(self, folder: Path, name: str = "default") -> Path:
        """Write the trained weights, or their copy `name`, for diffusers; returns the path of the
        file or folder.

        A LoRA becomes the file that `pipe.load_lora_weights(folder)` reads; for a UNet there is a
        second file in kohya's format (`export.kohya`) for other programs. A wholly trained denoiser
        becomes a folder for `from_pretrained(folder, subfolder=self.denoiser)`.
        """
        from . import export

        folder.mkdir(parents=True, exist_ok=True)
        if self.is_lora:
            return export.save_lora(self.pipe, self.denoiser, self.network, name, folder)
        network = self.network if name == "default" else self._copies[name]
        return export.save_network(network, self.denoiser, folder)
