"""What makes the calls of a denoiser cheap must not change what they say."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from conftest import load, perturb
from torch import nn
from torch._dynamo.testing import CompileCounter

from diffalign.config import ModelConfig, TrainConfig
from diffalign.config.decoding import ConfigError
from diffalign.policies import acceleration, prepared
from diffalign.training.checks import check_packages

KINDS = ("sd-v", "sdxl", "sd3", "flux-dev")


def says(policy, rows=3, guidance=3.0):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, *policy.latent_shape, generator=generator)
    return policy.predict(x, policy.levels(4)[1], policy.encode(["a"] * rows), guidance).native


def trained(folder, **options):
    policy = load(folder, **options)
    policy.add_lora(2)
    perturb(policy)
    return policy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["math", "flash"])
def test_every_attention_layer_is_answered(pipelines, monkeypatch, kind, name):
    """Also those whose processor calls torch, and not diffusers' table of back ends."""
    asked = []
    make = acceleration.kernel

    def counted(*how):
        found = make(*how)

        def attention(*args, **options):
            asked.append(1)
            return found(*args, **options)

        return found and attention

    monkeypatch.setattr(acceleration, "kernel", counted)
    plain, other = trained(pipelines[kind]), trained(pipelines[kind], attention=name)
    layers = [m for m in other.network.modules() if hasattr(m, "processor")]
    torch.testing.assert_close(says(other), says(plain), atol=1e-5, rtol=1e-5)
    assert len(asked) == len(layers) > 0


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_attention_spelled_out(mask):
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 7, 7))
    given = None if mask is None else torch.rand(2, 1, 5, 7) > 0.3
    given = given if mask != "float" else torch.where(given, 0.0, -1.0)
    for scale in (None, 0.2):
        ours = acceleration.spelled_out(q, k, v, given, scale=scale)
        torch.testing.assert_close(
            ours, F.scaled_dot_product_attention(q, k, v, given, scale=scale)
        )
    k, v = k[:, :, :5], v[:, :, :5]
    torch.testing.assert_close(
        acceleration.spelled_out(q, k, v, is_causal=True),
        F.scaled_dot_product_attention(q, k, v, is_causal=True),
    )


def test_diffusers_back_ends_get_their_own_layout():
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 7, 7))
    for name in ("native", "_native_math"):
        torch.testing.assert_close(
            acceleration._backend(name)(q, k, v), F.scaled_dot_product_attention(q, k, v)
        )


def test_auto_is_torch_but_in_half_precision_on_cpus(monkeypatch):
    half, full = torch.bfloat16, torch.float32
    assert acceleration.kernel("auto", "cpu", full) is None
    assert acceleration.kernel("auto", "cuda", half) is None
    auto = acceleration.kernel("auto", "cpu", half)
    asked = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: asked.append(1))
    few, many = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 2000, 2)
    auto(few, few, few)
    assert not asked  # spelled out
    auto(many, many, many)
    assert asked  # scores that would fill the memory


def test_refused(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "xformers" else find(n))
    config = TrainConfig.from_dict(
        {"model": {"attention": "xformers"}, "algorithm": {"type": "ddpo"}}
    )
    with pytest.raises(ConfigError, match="xformers needs the package; pip install xformers"):
        check_packages(config)
    for name in acceleration.NEEDS_CUDA:
        with pytest.raises(ConfigError, match=f"{name} runs on CUDA devices alone.*on cpu"):
            acceleration.kernel(name, "cpu", torch.float32)
    monkeypatch.setenv("PATH", str(tmp_path))
    config = TrainConfig.from_dict({"model": {"compile": True}})
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler, and there is no g\+\+"):
        check_packages(config)


@pytest.fixture
def compiled(monkeypatch):
    """The graphs that were compiled, by a compiler that runs them as they are."""
    torch._dynamo.reset()
    counter, compile = CompileCounter(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda m: compile(m, backend=counter))
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["sd-v", "sd3", "flux-dev"])
def test_no_compilation_for_each_batch_size(pipelines, compiled, kind, dtype, gradient):
    policy = trained(pipelines[kind], compile=True, dtype=dtype)
    plain = trained(pipelines[kind], dtype=dtype)
    with torch.set_grad_enabled(gradient):
        for rows in (2, 3):
            says(policy, rows)
        first = compiled.frame_count
        assert first > 0
        for rows in (5, 4, 7, 2, 6):
            torch.testing.assert_close(says(policy, rows), says(plain, rows), atol=1e-5, rtol=1e-5)
        assert compiled.frame_count == first


def test_copies_of_a_whole_network_are_as_fast(pipelines, compiled):
    policy = load(pipelines["sd-v"], train_all=True, compile=True, attention="math")
    policy.add_copy("old")
    for inside in (policy.adapter("old"), policy.reference()):
        before = compiled.frame_count
        with inside:
            says(policy)
            network = policy.network
        assert compiled.frame_count > before
        assert network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        assert all(
            hasattr(m.processor, "answered_by")
            for m in network.modules()
            if hasattr(m, "processor")
        )


@pytest.mark.parametrize("kind", KINDS)
def test_merged_lora(pipelines, kind):
    policy = trained(pipelines[kind])
    before = {k: v.clone() for k, v in policy.network.state_dict().items()}
    apart = says(policy)
    with policy.merged():
        together = says(policy)
    torch.testing.assert_close(together, apart.detach(), atol=1e-4, rtol=1e-4)
    assert not together.requires_grad
    assert torch.equal(says(policy), apart)
    with policy.reference():
        base = says(policy)
        assert not torch.allclose(base, apart)
        with policy.merged():  # as where a run that goes on evaluates its base again
            assert torch.equal(says(policy), base)
        assert torch.equal(says(policy), base)
    assert all(torch.equal(v, before[k]) for k, v in policy.network.state_dict().items())


def test_merged_is_the_copy_in_use(pipelines):
    policy = trained(pipelines["sd3"])
    policy.add_copy("old")
    perturb(policy)
    with policy.adapter("old"):
        old = says(policy).detach()
        with policy.merged():
            torch.testing.assert_close(says(policy), old, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(says(policy), old, atol=1e-2)


def test_nothing_is_merged_in_half_precision(pipelines):
    """A small change of a bfloat16 weight rounds to none: the LoRA would be gone."""
    policy = load(pipelines["sd3"], dtype="bfloat16")
    policy.add_lora(2)
    perturb(policy, 1e-3)
    apart = says(policy).detach()
    with policy.merged():
        assert torch.equal(says(policy), apart)
    whole = load(pipelines["sd3"], train_all=True)
    assert isinstance(whole.merged(), nullcontext)


def test_config_reaches_the_policy(pipelines):
    config = ModelConfig(pipelines["sd3"], resolution=8, vae_dtype="bfloat16", attention="math")
    policy = prepared(config, 0)
    assert policy.vae.dtype == torch.bfloat16
    blocks = [m for m in policy.network.modules() if hasattr(m, "processor")]
    assert all(hasattr(m.processor, "answered_by") for m in blocks)
    pictures = policy.decode(torch.randn(2, *policy.latent_shape))
    assert pictures.dtype == torch.float32
