"""A model that several processes have, each the whole of it or, by FSDP2 (arXiv 2304.11277), some
rows of every weight, while the rest of a block is gathered as it runs."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator


class Rows(Protocol):
    """A tensor, or one that is saved in several files, of which some rows are read."""

    @property
    def shape(self) -> Any: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


@dataclass(frozen=True)
class Shard:
    """The rows of a tensor of `shape` that this process holds, on the CPU."""

    rows: Tensor
    shape: tuple[int, ...]


def is_sharded(value: Any) -> bool:
    """Whether a tensor, or a network by its first weight, is divided among processes."""
    if isinstance(value, nn.Module):
        value = next(value.parameters(), None)
    module = sys.modules.get("torch.distributed.tensor")  # slow to import, and else there are none
    return module is not None and isinstance(value, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The rows of a tensor that are here; all where it is not divided."""
    return cast(Any, tensor).to_local() if is_sharded(tensor) else tensor


def taken(tensor: Tensor) -> Tensor | Shard:
    """What is here of a tensor, as a copy on the CPU that training does not change."""
    rows = local(tensor).detach().to("cpu", copy=True)
    return Shard(rows, tuple(tensor.shape)) if is_sharded(tensor) else rows


def whole(source: Tensor | Rows) -> Tensor:
    """All rows."""
    return source if isinstance(source, Tensor) else source[slice(None)]


def all_of(tensor: Tensor) -> Tensor:
    """All rows of a tensor that may be divided; then all processes must call this."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def put(target: Tensor, source: Tensor | Rows) -> None:
    """Copy a whole tensor into one that may be divided. Raises ValueError for another shape."""
    if tuple(source.shape) != tuple(target.shape):
        raise ValueError(f"{tuple(source.shape)} is saved where {tuple(target.shape)} is needed")
    rows = source[_span(target)] if is_sharded(target) else whole(source)
    local(target).copy_(rows)


def alike(tensor: Tensor, source: Tensor | Rows) -> Tensor:
    """A whole tensor, divided as `tensor` is if it is as large."""
    if not is_sharded(tensor) or tuple(source.shape) != tuple(tensor.shape):
        return whole(source)
    like, rows = cast(Any, tensor), source[_span(tensor)]
    return type(like).from_local(
        rows.to(like.to_local().device), like.device_mesh, like.placements, run_check=False,
        shape=like.shape, stride=like.stride(),
    )  # fmt: skip


def _span(tensor: Any) -> slice:
    """The rows that this process holds: FSDP2 gives each as many, the last ones fewer or none."""
    mesh = tensor.device_mesh
    most = -(-tensor.shape[0] // mesh.size())
    start = min(mesh.get_local_rank() * most, tensor.shape[0])
    return slice(start, min(start + most, tensor.shape[0]))


def reshard(network: Any) -> None:
    """Let go of the rows that a divided network has gathered from others."""
    from torch.distributed.fsdp import FSDPModule

    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class Team:
    """The processes of a run, as far as they share a model. divides: whether the denoiser that
    trains is divided among them, as the FSDP2 plugin of `accelerator` says.

    peers: the ranks on this machine; reads: whether this process reads files for them.
    """

    def __init__(self, accelerator: Accelerator, divides: bool = False):
        self.accelerator, self.divides = accelerator, divides
        if divides:  # weights are handed out here
            cast(Any, accelerator.state).fsdp_plugin.cpu_ram_efficient_loading = False
        world, rank = accelerator.num_processes, accelerator.process_index
        most = int(os.environ.get("LOCAL_WORLD_SIZE") or world) if world > 1 else 1
        first = rank - accelerator.local_process_index
        self.peers = range(first, min(first + most, world))
        self.reads = rank == first
        self.group: Any = None  # of the peers, where they are not all
        if 1 < most < world:
            self.group, _ = torch.distributed.new_subgroups(most)

    def spread(self, module: nn.Module, device: torch.device | str) -> None:
        """Move a module to `device`. Its weights and buffers are those of the process that reads;
        elsewhere the weights may be on the meta device."""
        if len(self.peers) == 1:
            module.to(device)
            return
        places = [
            (held, name)
            for part in module.modules()
            for held in (part._parameters, part._buffers)
            for name, value in held.items()
            if value is not None
        ]
        # a reader may keep some in another dtype than was asked for
        dtypes: list[Any] = [[cast(Tensor, held[name]).dtype for held, name in places]]
        torch.distributed.broadcast_object_list(dtypes, self.peers.start, group=self.group)
        for (held, name), dtype in zip(places, dtypes[0], strict=True):
            value = cast(Tensor, held[name])
            if value.is_meta:
                moved = torch.empty_like(value, device=device, dtype=dtype)
            else:
                moved = value.detach().to(device, dtype)
            torch.distributed.broadcast(moved, self.peers.start, group=self.group)
            weight = isinstance(value, nn.Parameter)
            held[name] = nn.Parameter(moved, value.requires_grad) if weight else moved  # type: ignore[index]

    @property
    def rank(self) -> int:
        """Of this process among those on its machine."""
        return self.accelerator.process_index - self.peers.start

    def folder(self) -> Path:
        """A new folder for temporary files that the processes on this machine share."""
        name: list[Any] = [tempfile.mkdtemp(prefix="diffalign-") if self.reads else None]
        torch.distributed.broadcast_object_list(name, self.peers.start, group=self.group)
        return Path(name[0])

    def wait(self) -> None:
        """Until all processes on this machine are here."""
        torch.distributed.barrier(self.group)

    def read(self, reader: Callable[[], Any], like: Any) -> Any:
        """What `reader` reads on the main process; elsewhere a network like `like` without
        weights."""
        return reader() if self.accelerator.is_main_process else empty(like)

    @torch.no_grad()
    def divide(self, network: Any) -> Any:
        """Divide a network, in place. Its weights and buffers are those of the main process;
        elsewhere the weights may be on the meta device."""
        network.to(memory_format=torch.contiguous_format)  # FSDP2 cannot divide another
        given = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        device = self.accelerator.device
        self._divided(network.to("meta")).to_empty(device=device)
        # accelerate would do this too, but for networks with buffers in their state
        for name, held in [*network.named_parameters(), *network.named_buffers()]:
            value = given[name].detach()
            if not self.accelerator.is_main_process:
                value = torch.empty(held.shape, dtype=held.dtype, device=device)
            value = value.to(device)
            torch.distributed.broadcast(value, 0)
            put(held, value)
        return network

    @torch.no_grad()
    def twin(self, network: Any) -> Any:
        """A network like a divided one, with the same weights, divided in the same way."""
        made = self._divided(empty(network).to("meta"))
        made.to_empty(device=local(next(network.parameters())).device)
        reshard(network)
        theirs = [*network.parameters(), *network.buffers()]
        for own, other in zip([*made.parameters(), *made.buffers()], theirs, strict=True):
            local(own).copy_(local(other))
        return made

    def _divided(self, network: Any) -> Any:
        from accelerate.utils import fsdp2_prepare_model

        return fsdp2_prepare_model(self.accelerator, network)


def empty(network: Any) -> Any:
    """A network of the same class and config whose weights are on the meta device."""
    from accelerate import init_empty_weights

    # FSDP2 makes a class of its own in front of the network's
    kind = next(c for c in type(network).__mro__ if not c.__module__.startswith("torch."))
    with init_empty_weights(include_buffers=False):
        made = kind.from_config(network.config)
    if network.is_gradient_checkpointing:
        made.enable_gradient_checkpointing()
    return made
