"""LoRA as named adapters on a diffusers model (arXiv 2106.09685), through peft.

"default" trains; "old" and "ema" are copies on the same frozen weights; with all adapters off the
model is the reference.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .run_folder import WEIGHTS as WEIGHTS


def add(
    network: Any,
    rank: int,
    alpha: float | None,
    targets: Sequence[str] | str,
    seed: int,
    name: str = "default",
) -> None:
    """Add the adapter `name`: ΔW = (alpha / rank) B A with A Gaussian and B = 0, in float32.

    targets are suffixes of module names, or one regular expression for whole names. Raises
    ValueError where one matches no layer of the network, or is no regular expression.
    """
    from peft import LoraConfig  # takes seconds that a refusal need not wait for
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = (nn.Linear, nn.Conv2d, BaseTunerLayer)
    modules = [n for n, m in network.named_modules() if isinstance(m, layers)]
    for target in [targets] if isinstance(targets, str) else targets:
        if not any(_matches(target, n, isinstance(targets, str)) for n in modules):
            ends = sorted({n.rsplit(".", 1)[-1] for n in modules if not n[-1].isdigit()})
            raise ValueError(
                f"model.lora_targets names {target!r}, which matches no layer of "
                f"{type(network).__name__}; its layers end in {', '.join(ends)}"
            )
    config = LoraConfig(
        r=rank,
        # lora_alpha is declared int by peft and used as a plain factor
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]
        init_lora_weights="gaussian",
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    before = network.active_adapters() if getattr(network, "peft_config", None) else [name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with warnings.catch_warnings():  # a second adapter is intended
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            network.add_adapter(config, adapter_name=name)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    # add_adapter turns the new adapter on; a second one must stay off until it is asked for
    network.set_adapter(before)
    _KNOWN.pop(network, None)


def _matches(target: str, name: str, regex: bool) -> bool:
    if not regex:
        return name == target or name.endswith("." + target)
    try:
        return re.fullmatch(target, name) is not None
    except re.error as error:
        raise ValueError(
            f"model.lora_targets={target!r} is no regular expression: {error}; give one, or a list "
            "of how names end"
        ) from None


def state_dict(network: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The raw A and B of the adapter `name`, under peft's keys."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(network, adapter_name=name)
    return {k: v.detach().cpu().clone() for k, v in state.items()}


def load_state_dict(network: nn.Module, state: dict[str, Tensor], name: str = "default") -> None:
    from peft import set_peft_model_state_dict

    result = set_peft_model_state_dict(network, state, adapter_name=name)
    if result.unexpected_keys:
        raise ValueError(
            f"adapter {name!r} has no {result.unexpected_keys[:3]} ...; other targets?"
        )


def exported(network: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's A and B, from `state_dict`, with alpha / rank multiplied into B.

    Loaders that know nothing of alpha take it to be the rank; with the scale in B the product B A
    is right for all of them.
    """
    config = network.peft_config["default"]
    scale = config.lora_alpha / config.r
    return {k: v * scale if "lora_B" in k else v for k, v in state.items()}


@contextmanager
def disabled(network: Any) -> Iterator[None]:
    with _switched(network, "_disable_adapters", True):
        yield


@contextmanager
def merged(network: Any) -> Iterator[None]:
    """Run without gradient on W + ΔW of the active adapter, in place of W x + ΔW x: cheaper calls.
    Inside `disabled` there is nothing to merge.

    ΔW is rounded to the dtype of W, which is put back bit for bit. Needs memory for a second copy
    of the layers that have a LoRA.
    """
    layers = _layers(network)
    if all(m.disable_adapters for m in layers):
        yield
        return
    kept = []
    for module in layers:
        layer: Any = module.get_base_layer()
        kept.append((layer, layer.weight.data))
        with torch.no_grad():
            for name in module.active_adapters:
                change = module.get_delta_weight(name)  # type: ignore[operator]
                layer.weight.data = layer.weight.data + change.to(layer.weight.dtype)
    try:
        with torch.no_grad(), disabled(network):
            yield
    finally:
        for layer, weight in kept:
            layer.weight.data = weight


@contextmanager
def active(network: Any, name: str) -> Iterator[None]:
    """Run the adapter `name`, which keeps its `requires_grad`: copies are frozen."""
    with _switched(network, "_active_adapter", [name]):
        yield


@contextmanager
def _switched(network: nn.Module, attribute: str, value: Any) -> Iterator[None]:
    """Set what peft's own switches set in every layer. Those also visit each weight to turn its
    gradient on or off, which takes milliseconds, several times in a micro-batch."""
    layers = _layers(network)
    before = [getattr(layer, attribute) for layer in layers]
    for layer in layers:
        setattr(layer, attribute, value)
    try:
        yield
    finally:
        for layer, kept in zip(layers, before, strict=True):
            setattr(layer, attribute, kept)


_KNOWN: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


def _layers(network: nn.Module) -> list[Any]:
    """The layers with adapters, found once: a large model has thousands of modules."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if network not in _KNOWN:
        _KNOWN[network] = [m for m in network.modules() if isinstance(m, BaseTunerLayer)]
    return _KNOWN[network]


def set_scale(network: nn.Module, scale: float) -> None:
    """Weaken or strengthen the adapter: W + scale ΔW. The product B A is scaled, not each
    factor."""
    for layer in _layers(network):
        layer.set_scale("default", scale)
