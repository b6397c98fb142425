"""What runs on a GPU is tried without one: forward passes on torch's fake CUDA tensors.

A fake tensor has a shape, a dtype and a device, and no values. So the hot paths fail here where
they mix devices, look at a value (`.item()`, `bool(tensor)`, a mask as an index), or copy between
CPU and GPU, which waits for everything that was queued. Backward passes need a device.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import test_imagereward
import test_rewards_vision
import torch
from conftest import load
from helpers_algorithms import KINDS
from helpers_clip import tiny_clip, tiny_open_clip
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffalign.algorithms import ALGORITHMS, Matches, Needs, Transitions
from diffalign.dynamics import KERNELS, Levels, Prediction, dpm_solver_2m, noised
from diffalign.policies import Cond
from diffalign.sampling.adjoint import renoise_last, reward_input
from diffalign.sampling.rollout import Sampling
from rewards import Adversarial, Clip, ImageReward, Jpeg

kit, images, folder = test_rewards_vision.kit, test_rewards_vision.images, test_imagereward.folder

FAKE = FakeTensorMode()
PROMPTS = ["a red cat", "a dog"]
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class OneDevice(TorchDispatchMode):
    """Refuses what a GPU would have to wait for: copies from or to the CPU, index tensors there.

    A number on the CPU, of no dimension, may be an operand: it is passed along by its value.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors if t.ndim or func in COPIES}
        assert len(devices) < 2, f"{func} works across {' and '.join(sorted(devices))}"
        return out


@contextmanager
def gpu():
    """Only fake tensors, and none that crosses between devices."""
    with FAKE, OneDevice():
        yield


def fake(tensor):
    real = tensor.detach()
    with FAKE:
        return FAKE.from_tensor(real).to("cuda")


def move(module):
    """The weights and buffers of a module, to the fake GPU."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(fake(value), value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = fake(value)
    return module


def on_gpu(policy):
    """A policy, and the conditioning of PROMPTS."""
    cond = policy.encode(PROMPTS)
    for part in (policy.network, policy.vae):
        move(part)
    policy.device = torch.device("cuda")
    sides = ({k: fake(v) for k, v in side.items()} for side in (cond.positive, cond.negative))
    return policy, Cond(*sides)


def sampling_on_gpu(levels, kernel="ddim", eta=0.7, guidance=3.0):
    """What it looks up once a run is looked up; that may wait."""
    there = Sampling(on_gpu_levels(levels), kernel, eta, guidance)
    here = Sampling(levels, kernel, eta, guidance)
    there.__dict__.update(stds=fake(here.stds), drawn=fake(here.drawn), stochastic=here.stochastic)
    return there


def on_gpu_levels(levels):
    return Levels(*(fake(v) for v in (levels.t, levels.alpha, levels.sigma)))


def latents(policy):
    return torch.randn(len(PROMPTS), *policy.latent_shape, device="cuda")


@pytest.mark.parametrize(
    "stalls",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x[[True, False]],
        lambda x: x[torch.tensor([0])],
        lambda x: x.cpu(),
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: torch.tensor(1.0, device=x.device),
        lambda x: x + torch.ones(2),
    ],
)
def test_what_waits_is_seen(stalls):
    with gpu():
        x = torch.ones(2, device="cuda")
        assert (x * 2 + torch.tensor(1.0)).device.type == "cuda"
        with pytest.raises((AssertionError, DataDependentOutputException, RuntimeError)):
            stalls(x)


def test_policies(folder_of_policy):
    policy = load(folder_of_policy)
    policy.add_lora(2)
    levels = on_gpu_levels(policy.levels(3))
    policy, cond = on_gpu(policy)
    with gpu():
        x, index = latents(policy), torch.ones(2, dtype=torch.long, device="cuda")
        for guidance in (1.0, 3.0):
            for level in (levels[0], levels[index]):
                seen = policy.predict(x, level, cond, guidance)
                assert seen.x0.device.type == seen.eps.device.type == "cuda"
                assert seen.native.requires_grad
        with torch.no_grad(), policy.reference():
            assert not policy.predict(x, levels[0], cond).native.requires_grad
        for differentiable in (False, True):
            pictures = policy.decode(x.requires_grad_(), differentiable)
            assert (pictures.device.type, pictures.requires_grad) == ("cuda", differentiable)


# the networks of diffusers themselves wait: for lengths of texts, or tables kept on the CPU
WAIT = {"qwen", "qwen21", "z-image"}


@pytest.fixture(params=sorted(set(KINDS) - WAIT))
def folder_of_policy(request, pipelines):
    return pipelines[request.param]


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels(kernel):
    sigma = torch.linspace(1, 0, 5)
    levels = on_gpu_levels(Levels(1000 * sigma, 1 - sigma, sigma))
    with gpu():
        x, u = torch.randn(2, 2, 4, 8, 8, device="cuda")
        for index in (1, torch.ones(2, dtype=torch.long, device="cuda")):
            seen = Prediction.from_flow(x, u, levels[index])
            step = KERNELS[kernel](x, seen, levels[index], levels[index + 1], 0.7)
            drawn = step.sample(torch.randn_like(x))
            assert step.log_prob(drawn).shape == step.kl(step).shape == (2,)
        assert dpm_solver_2m(seen, x, seen.x0, levels, 1).device.type == "cuda"


GRADIENT = [name for name, kind in ALGORITHMS.items() if kind.needs is Needs.GRADIENT]
OPTIONS = [
    *[(name, {"kl_weight": 0.1}) for name in ALGORITHMS if name not in GRADIENT],
    ("ddpo", {"estimator": "sf"}),
    ("dpok", {"value_weight": 1.0, "kl": "g_sqrt_dt"}),
    ("flow_grpo", {"log_prob": "cps", "step_weight": "noise"}),
    ("flow_grpo", {"trust": "kl"}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_losses(pipelines, name, options):
    kind = "sd3" if "grpo" in name or name == "awm" else "sd-v"
    policy, method = load(pipelines[kind]), ALGORITHMS[name](**options)
    policy.add_lora(2)
    method.setup(policy)
    for copy in method.copies():
        policy.add_copy(copy)
    how = sampling_on_gpu(policy.levels(4), "flow_sde" if kind == "sd3" else "ddim")
    policy, cond = on_gpu(policy)
    if getattr(method, "value", None) is not None:
        move(method.value)
    with gpu():
        step, x = torch.ones(2, dtype=torch.long, device="cuda"), latents(policy)
        common = {"sampling": how, "cond": cond, "level": how.levels[step]}
        common |= {name: torch.randn(2, device="cuda") for name in ("advantage", "reward")}
        noise, rows = torch.randn_like(x), Matches
        if method.needs is Needs.FINAL:
            common |= {"x": noised(x, noise, common["level"]), "x0": x, "noise": noise}
        else:
            rows, old = Transitions, torch.randn(2, device="cuda")
            common |= {"x": x, "step": step, "x_next": noise, "log_prob_old": old, "mean_old": x}
        for on_policy in (True, False):
            loss, figures = method.loss(policy, rows(**common, on_policy=on_policy))
            assert (loss.shape, loss.device.type, loss.requires_grad) == ((), "cuda", True)
            assert {v.device.type for v in figures.values()} == {"cuda"}
            assert not any(v.requires_grad for v in figures.values())


@pytest.mark.parametrize("name", GRADIENT)
def test_surrogates(pipelines, name):
    policy, method = load(pipelines["sd3"]), ALGORITHMS[name]()
    plan = method.surrogate(4, torch.Generator())
    how = sampling_on_gpu(policy.levels(4), "ode")
    policy, cond = on_gpu(policy)
    with gpu():
        states = torch.randn(2, 5, *policy.latent_shape, device="cuda")
        x0 = reward_input(policy, cond, how, states, plan)
        again = renoise_last(policy, cond, how, states, torch.randn_like(x0))
        assert x0.device.type == again.device.type == "cuda"
        losses = method.reward_loss(torch.randn(2, device="cuda"))
        assert (losses.shape, losses.device.type) == ((2,), "cuda")


WAITS = {
    "imagereward": "BERT reads the image, so that tokens go to the device with every call",
    "jpeg": "quantization tables and DCT are made on the CPU, 1 kB a call",
}
"""Rewards that copy to the device, and why."""


def tower(make):
    return lambda root, kit, folder: make(kit)


MAKERS = {
    **{name: tower(make) for name, make in test_rewards_vision.MAKERS.items()},
    "similarity to clip": tower(test_rewards_vision.MAKERS["clip"]),
    "clip": lambda root, kit, folder: Clip(tiny_clip(root), scale="logit"),
    "open_clip": lambda root, kit, folder: Clip(tiny_open_clip(root)),
    "imagereward": lambda root, kit, folder: ImageReward(**test_imagereward.options(folder)),
    "jpeg": lambda root, kit, folder: Jpeg(surrogate=True),
    "adversarial": lambda root, kit, folder: Adversarial(kit["references"], kit["dino"]),
}


@pytest.mark.parametrize("name", MAKERS)
def test_rewards(name, tmp_path, kit, folder):
    reward = move(MAKERS[name](tmp_path, kit, folder))
    with FAKE:
        pictures = torch.rand(2, 3, 40, 48, device="cuda", requires_grad=True)
        reward(pictures, PROMPTS)  # what is computed once a prompt or a run
        with torch.no_grad() if name in WAITS else OneDevice():
            values = reward(pictures, PROMPTS)
        assert (values.shape, values.device.type) == ((2,), "cuda")
