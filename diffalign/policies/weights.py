"""The weights of a policy that train, a LoRA or the whole denoiser, and their copies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import lora
from .sharding import Rows, Shard, Team, all_of, empty, put, reshard, taken, whole

LAYOUT = torch.channels_last  # convolutions are faster in this order of memory


class TrainedWeights:
    """What a `Policy` knows of its own weights. Copies of a LoRA are adapters beside it; those of a
    wholly trained denoiser are further denoisers, divided among processes as it is."""

    denoiser: ClassVar[str] = "transformer"  # its name in the pipeline: unet | transformer
    lora_targets: ClassVar[
        tuple[str, ...] | str
    ]  # of a LoRA where the config names none, see `lora.add`
    pipe: Any
    network: Any  # the denoiser
    device: torch.device
    read_base: Callable[[], Any]  # the denoiser before any training
    sharding: Team | None  # the processes among which the denoiser is divided, if it is
    accelerated: Callable[[Any], None]  # makes the calls of a further denoiser as fast as its own
    _copies: dict[str, Any]  # of a wholly trained network: "base", "old", ...

    def add_lora(
        self,
        rank: int,
        alpha: float | None = None,
        targets: Sequence[str] | str | None = None,
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
        return [p for p in self._network("default").parameters() if p.requires_grad]

    def state_dict(self, name: str = "default") -> dict[str, Tensor | Shard]:
        """The trained weights, or their copy `name`, on the CPU: A and B of a LoRA, or the whole
        denoiser, of which there is what this process holds."""
        if self.is_lora:
            return {**lora.state_dict(self.network, name)}
        return {k: taken(v) for k, v in self._network(name).state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Rows], name: str = "default") -> None:
        """Take up whole tensors by name. Raises KeyError, RuntimeError or ValueError for weights
        that do not fit."""
        if self.is_lora:
            lora.load_state_dict(self.network, {k: whole(v) for k, v in state.items()}, name)
        elif self.sharding is None:
            self._network(name).load_state_dict({k: whole(v) for k, v in state.items()})
        else:
            for key, value in self._network(name).state_dict().items():
                put(value, state[key])

    def _network(self, name: str) -> Any:
        """The denoiser, or its copy `name`, to look at its weights or write to them."""
        network = self.network if name == "default" else self._copies[name]
        if self.sharding is not None:  # else some weights may be those that a call has gathered
            reshard(network)
        return network

    def add_copy(self, name: str) -> None:
        """Keep a frozen copy of the trained weights, as they are now, for `adapter(name)`.

        The copy of a LoRA is small; that of a wholly trained network is as large as the network.
        """
        if self.is_lora:
            config = self.network.peft_config["default"]
            targets = config.target_modules  # a set, or a regular expression
            targets = targets if isinstance(targets, str) else sorted(targets)
            lora.add(self.network, config.r, config.lora_alpha, targets, 0, name)
            lora.load_state_dict(self.network, lora.state_dict(self.network), name)
        elif self.sharding is not None:
            self._keep(name, self.sharding.twin(self.network))
        else:
            self._keep(name, copy.deepcopy(self.network).to(self.device, memory_format=LAYOUT))

    def _keep(self, name: str, network: Any) -> None:
        """Keep another denoiser beside the trained one, as fast as that is."""
        self.accelerated(network)
        self._copies[name] = network.requires_grad_(False).eval()

    def weights(self, name: str = "default") -> list[nn.Parameter]:
        """The trained weights, or their copy `name`, in the order of `trainable_parameters`."""
        if self.is_lora:
            return [p for n, p in self.network.named_parameters() if f".{name}." in n]
        return list(self._network(name).parameters())

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
            if self.sharding is None:
                base = self.read_base().to(self.device, memory_format=LAYOUT)
            else:
                base = self.sharding.divide(self.sharding.read(self.read_base, self.network))
            self._keep("base", base)
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

    def save(
        self,
        folder: Path,
        name: str = "default",
        state: Mapping[str, Rows] | None = None,
        main: bool = True,
    ) -> Path | None:
        """Write the trained weights, or their copy `name`, for diffusers; returns the path of the
        file or folder.

        A LoRA becomes the file that `pipe.load_lora_weights(folder)` reads; for a UNet there is a
        second file in kohya's format (`export.kohya`) for other programs. A wholly trained denoiser
        becomes a folder for `from_pretrained(folder, subfolder=self.denoiser)`.

        state: whole weights to write in their place. main: whether this process writes. Without a
        `state` all processes must call this for a divided denoiser, and elsewhere only the one that
        writes.
        """
        from . import export

        if state is None and self.sharding is not None:
            state = {
                k: all_of(v).detach().cpu() for k, v in self._network(name).state_dict().items()
            }
        if not main:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        if self.is_lora:
            state = lora.state_dict(self.network, name) if state is None else state
            layers = lora.exported(self.network, {k: whole(v) for k, v in state.items()})
            return export.save_lora(self.pipe, self.denoiser, self.network, layers, folder)
        network = self._network(name)
        if state is not None:
            network = empty(network)
            network.load_state_dict({k: whole(v) for k, v in state.items()}, assign=True)
        return export.save_network(network, self.denoiser, folder)
