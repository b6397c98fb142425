"""What makes the calls of a denoiser cheap, for every family alike: the kernel that computes its
attention, and compilation.

Some of diffusers' attention processors ask its table of back ends and others call torch directly
(those of UNets and of SD3 do), so that its own `set_attention_backend` does nothing for half of our
families. Here the call of torch's function is answered instead, whichever processor makes it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..config.decoding import ConfigError

Attention = Callable[..., Tensor]  # the signature of F.scaled_dot_product_attention

NEEDS_CUDA = {
    "efficient": "_native_efficient",
    "cudnn": "_native_cudnn",
    "xformers": "xformers",
}  # by the name that diffusers has for it
LARGEST = 1024**2  # scores of a head that `auto` spells out; above, they would fill the memory


def check(attention: str, compile: bool) -> None:
    """Raises ConfigError for what is not installed."""
    if attention == "xformers" and importlib.util.find_spec("xformers") is None:
        raise ConfigError(
            "model.attention=xformers needs the package; pip install xformers, or use auto, which "
            "takes torch's own fused attention"
        )
    compiler = os.environ.get("CXX", "g++")
    if compile and not any(shutil.which(name) for name in (compiler, "clang++", "cl")):
        raise ConfigError(
            f"model.compile=true needs a C++ compiler, and there is no {compiler}; install g++, or "
            "set it to false"
        )


def accelerate(
    attention: str, compile: bool, blocks: Sequence[str], network: Any, device: str, dtype: Any
) -> None:
    """Have the attention layers of `network` use a kernel, and torch compile it at its first calls.

    attention: a name of `kernel`. compile: either the blocks of the named classes, of which a
    transformer has many alike, or, where none is named, the whole of a network. A second batch size
    compiles once more, for all sizes from then on; so do the first call with gradient and the first
    of each copy of the weights. Raises ConfigError for a kernel that `device` does not have.
    """
    answer = kernel(attention, device, dtype)
    if answer is not None:
        _answer(network, answer)
    if compile:
        # blocks of a kind share their versions: by gradient, copy of the weights, batch size
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        parts = [m for m in network.modules() if type(m).__name__ in blocks]
        for part in parts or [network]:
            part.compile()


def kernel(name: str, device: str, dtype: torch.dtype) -> Attention | None:
    """The function that computes attention, None for torch's own.

    sdpa: torch's choice. math: the matrix products spelled out. flash | efficient | cudnn: torch's
    kernel of that name. xformers: that package's. auto: sdpa; but on CPUs in half precision, where
    the backward pass of torch's fused attention takes several times as long, math for up to
    1024 × 1024 tokens. A choice depends on shapes alone, so that a rollout and the loss that scores
    it again are computed alike. Raises ConfigError for a kernel that `device` does not have.
    """
    if name in NEEDS_CUDA and device != "cuda":
        raise ConfigError(
            f"model.attention={name} runs on CUDA devices alone, and this run is on {device}; "
            "use auto"
        )
    if name == "auto" and device == "cpu" and dtype != torch.float32:
        return _small_spelled_out
    if name in ("auto", "sdpa"):
        return None
    return spelled_out if name == "math" else _backend(NEEDS_CUDA.get(name, f"_native_{name}"))


def _answer(network: nn.Module, attention: Attention) -> None:
    """Have `attention` answer the calls of torch's function in all attention layers."""
    mode, routed = _Answered(attention), {}
    for module in network.modules():
        processor = getattr(module, "processor", None)
        kind = type(processor)
        if processor is not None and not hasattr(kind, "answered_by"):  # of a copy they are
            # a class with the same name, as diffusers and torch.compile look at that
            routed.setdefault(kind, _routed(kind, mode))
            processor.__class__ = routed[kind]


def spelled_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale q kᵀ + mask) v of (n, heads, tokens, width), as two matrix products.

    The default scale is width ** -0.5. A call with dropout, a causal mask or grouped heads goes to
    torch; the denoisers make none.
    """
    if dropout_p or is_causal or enable_gqa:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-1, -2)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1).to(value.dtype) @ value


def _small_spelled_out(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    small = query.shape[-2] * key.shape[-2] <= LARGEST
    attention = spelled_out if small else F.scaled_dot_product_attention
    return attention(query, key, value, **options)


def _backend(name: str) -> Attention:
    """One of diffusers' back ends, which take (n, tokens, heads, width)."""
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    backend = AttentionBackendName(name)

    def attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return dispatch_attention_fn(q, k, v, *rest, backend=backend, **options).transpose(1, 2)

    return attention


class _Answered(TorchFunctionMode):
    """While it is on, `attention` answers calls of torch's function."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.attention = attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = func is F.scaled_dot_product_attention
        return (self.attention if asked else func)(*args, **(kwargs or {}))


def _routed(kind: Any, mode: _Answered) -> Any:
    """The class of an attention processor, whose calls are answered by `mode`."""

    @functools.wraps(kind.__call__)  # diffusers passes what the signature names
    def call(self: Any, *args: Any, **options: Any) -> Any:
        with mode:
            return kind.__call__(self, *args, **options)

    return type(kind.__name__, (kind,), {"__call__": call, "answered_by": mode})
