"""Tiny randomly initialised pipelines of the real diffusers classes, built once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import BUILDERS

from diffalign import policies
from diffalign.policies import Policy

SIDE = 8  # pixels; some pipelines know no resolution small enough for a test


def side_of(folder: str) -> int:
    return 32 if folder.endswith("qwen21") else SIDE  # the size of one of its tokens


def load(folder: str, resolution: int | None = None, **options) -> Policy:
    return policies.load(folder, resolution=resolution or side_of(str(folder)), **options)


@pytest.fixture(autouse=True)
def _same_every_time():
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Pipelines(dict):
    """{kind: folder}, each built when first asked for."""

    def __init__(self, root: Path):
        super().__init__()
        self.root = root

    def __missing__(self, kind: str) -> str:
        BUILDERS[kind](self.root / kind)
        self[kind] = str(self.root / kind)
        return self[kind]


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory) -> Pipelines:
    return Pipelines(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(params=sorted(BUILDERS))
def folder(request, pipelines) -> str:
    """A pipeline of each kind in turn."""
    return pipelines[request.param]


@pytest.fixture
def policy(folder) -> Policy:
    """Its policy, with a LoRA at its initialisation."""
    policy = load(folder)
    policy.add_lora(2)
    return policy


def perturb(policy: Policy, scale: float = 0.2) -> None:
    """Move what is trained off its initialisation, as training would."""
    generator = torch.Generator().manual_seed(1)
    for p in policy.trainable_parameters():
        p.data += scale * torch.randn(p.shape, generator=generator)


def peak_saved(work: Callable[[], object]) -> int:
    """The most tensors that `work` had saved for a backward pass at a time."""

    class Kept:
        alive = peak = 0

        def __init__(self, tensor):
            self.tensor = tensor
            Kept.alive += 1
            Kept.peak = max(Kept.peak, Kept.alive)

        def __del__(self):
            Kept.alive -= 1

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        work()
    return Kept.peak
