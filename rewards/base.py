"""The reward contract, its validation, and the wrapper for plain functions."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Reward(nn.Module):
    """A frozen scorer of images: ``forward`` maps (n, 3, H, W) to (n,), higher is better.

    Images are RGB float tensors in [0, 1]; values are float32. A reward with
    ``differentiable = True`` carries gradient from its values to the pixels. ``train()`` leaves
    rewards in eval mode: a dropout layer would make the score random.
    """

    name: str = "reward"
    differentiable: bool = False
    per_group: bool = False  # compares the images of a prompt, so one call must hold them all
    learns: bool = False  # `learn` changes its state, which `memory` returns
    # Completes "rewards.NAME is not differentiable: ..."; may use {name}.
    gradient_hint: str = (
        "if its values do carry gradient to the images, set `differentiable = True` on it; "
        "otherwise leave it out or choose an algorithm that needs no reward gradient"
    )

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Raise ValueError for options that cannot work; gets only those set. Loads nothing."""

    @classmethod
    def has_gradient(cls, **options: Any) -> bool | None:
        """Whether the reward is differentiable with these options; None if only loading it can
        tell."""
        return cls.differentiable

    @classmethod
    def check_prompts(cls, prompts: list[str], metadata: list[dict]) -> None:
        """Raise ValueError for a prompt that this reward cannot judge. Loads nothing."""

    def forward(
        self, images: Tensor, prompts: list[str], metadata: list[dict] | None = None
    ) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def learn(
        self, images: Tensor, prompts: list[str], metadata: list[dict] | None = None
    ) -> dict[str, float]:
        """Learn from an epoch's images, the same on all processes; returns metrics to log."""
        return {}

    def memory(self) -> dict[str, Any]:
        """The state that `learn` changes, as tensors and plain values, for a checkpoint."""
        return {}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Restore the state that `memory` returned."""

    def train(self, mode: bool = True):
        return super().train(False)

    def freeze(self):
        """Eval mode, no parameter gradients. Returns self."""
        return self.eval().requires_grad_(False)


class RewardError(RuntimeError):
    """A reward failed. Training must stop here: a silent 0 would be optimised.

    Attributes: ``reward`` is its name; ``index``, ``prompt`` and ``image`` (3, H, W, on the CPU)
    are those of the first offending sample. If the reward raised or returned a wrong shape, no
    sample stands out: ``index`` is None, ``prompt`` and ``image`` are the first of the batch.
    """

    def __init__(
        self,
        message: str,
        reward: str,
        prompt: str | None = None,
        image: Tensor | None = None,
        index: int | None = None,
    ):
        super().__init__(message)
        self.reward, self.prompt, self.image, self.index = reward, prompt, image, index


class FunctionReward(Reward):
    """Any ``f(images, prompts)`` or ``f(images, prompts, metadata)`` as a Reward.

    ``f`` may be a function, a callable object or an ``nn.Module`` (moved and frozen with this
    one); it returns (n,) values as a tensor, a numpy array or a list. ``differentiable`` and
    ``per_group`` are read from ``f``, False when absent. ``options`` are passed to every call as
    keywords.
    """

    def __init__(self, function: Callable, **options: Any):
        super().__init__()
        self.function = function
        self.options = options
        self.name = callable_name(function)
        self.differentiable = bool(getattr(function, "differentiable", False))
        self.per_group = bool(getattr(function, "per_group", False))
        self.takes_metadata = "metadata" in call_parameters(function)
        self.freeze()

    def forward(
        self, images: Tensor, prompts: list[str], metadata: list[dict] | None = None
    ) -> Tensor:
        extra = {"metadata": metadata} if self.takes_metadata else {}
        values = self.function(images, prompts, **extra, **self.options)
        if isinstance(values, (list, tuple)) and any(isinstance(v, Tensor) for v in values):
            return torch.stack([torch.as_tensor(v) for v in values])  # as_tensor would detach
        return torch.as_tensor(values)


def call_parameters(function: Callable) -> Mapping[str, inspect.Parameter]:
    """Parameters of a function, or of a module's ``forward``; empty for an opaque builtin."""
    target = function.forward if isinstance(function, nn.Module) else function
    try:
        return inspect.signature(target).parameters
    except ValueError:
        return {}


def callable_name(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)


def evaluate(
    reward: Reward,
    images: Tensor,
    prompts: list[str],
    metadata: list[dict] | None = None,
    name: str | None = None,
) -> Tensor:
    """One validated call: (n,) finite float32 values on the images' device.

    Runs outside autocast, and builds a graph only if ``reward.differentiable``. The reward gets
    copies of images, prompts and metadata, so writing into them changes nothing else. Raises
    RewardError if an image or a value is NaN or inf, or if the reward raises, returns another
    shape, or claims to be differentiable but drops the gradient. Raises ValueError if images,
    prompts and metadata do not match.
    """
    name = name or reward.name
    check_inputs(images, prompts, metadata)

    def fail(message: str, index: int | None = None) -> RewardError:
        where = f"prompt {prompts[index or 0]!r}"
        where = where if index is not None else f"a batch of {len(prompts)} starting with {where}"
        image = images[index or 0].detach().cpu()
        return RewardError(
            f"reward {name!r} {message} ({where})", name, prompts[index or 0], image, index
        )

    finite = images.detach().isfinite().flatten(1).all(1)
    if not finite.all():
        raise fail(
            "was given an image that contains NaN or inf: what drew it has overflown",
            int((~finite).nonzero()[0]),
        )
    needs_grad = torch.is_grad_enabled() and reward.differentiable
    try:
        with (
            torch.set_grad_enabled(needs_grad),
            torch.autocast(images.device.type, enabled=False),
        ):
            values = reward(*own_copies(images, prompts, metadata))
    except Exception as error:
        raise fail(f"raised {type(error).__name__}: {error}") from error
    if not isinstance(values, Tensor) or values.shape != (len(prompts),):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise fail(f"returned {got}; it must return a tensor of shape ({len(prompts)},)")
    if needs_grad and images.requires_grad and not values.requires_grad:
        raise fail(
            "declares differentiable = True, but its values do not depend on the images through "
            "autograd: remove no_grad, detach, item or numpy from it, or set it to False"
        )
    values = values.to(images.device, torch.float32)
    if not values.isfinite().all():
        index = int((~values.isfinite()).nonzero()[0])
        raise fail(f"returned {values[index].item()} at index {index}", index)
    return values


def own_copies(
    images: Tensor, prompts: list[str], metadata: list[dict] | None
) -> tuple[Tensor, list[str], list[dict] | None]:
    """Copies that a reward may write into. Gradient flows through the images."""
    return images.clone(), list(prompts), copy.deepcopy(metadata)


def check_inputs(images: Tensor, prompts: list[str], metadata: list[dict] | None = None) -> None:
    """Raise ValueError unless images are (n > 0, 3, H, W) floats, with a list of n prompts."""
    if isinstance(prompts, str):
        raise ValueError(f"prompts={prompts[:60]!r} is one text; give a list, one for each image")
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images are {tuple(images.shape)} {images.dtype}; expected (n, 3, H, W) floats in "
            "[0, 1], RGB"
        )
    for label, items in (("prompts", prompts), ("metadata", metadata)):
        if items is not None and len(items) != len(images):
            raise ValueError(f"{len(items)} {label} for {len(images)} images; give one per image")
    if len(images) == 0:
        raise ValueError("no images to score; the batch is empty")
