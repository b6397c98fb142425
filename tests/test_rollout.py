"""Trajectories and the adjoint sweep: ratio one, seeds, exact gradients."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from conftest import peak_saved, perturb
from diffusers import DDIMScheduler
from torch import nn

from diffalign.dynamics import Levels, Prediction
from diffalign.policies import Cond
from diffalign.sampling.adjoint import Surrogate, adjoint_sweep
from diffalign.sampling.rollout import Noise, Sampling, rollout

PROMPTS = ["a red dog", "a cat on a blue background", "a rocket", "a tree"]


def sampling(policy, steps=5, kernel="ddim", eta=1.0, guidance=3.0):
    return Sampling(policy.levels(steps), kernel, eta, guidance)


def suffix(how, first):
    return Surrogate(tuple(range(first, how.steps)))


@pytest.mark.parametrize("merged", [False, True])
def test_stored_log_prob_is_that_of_training(policy, merged):
    """The importance ratio is 1 before any update, on the stored log-probability too; of a merged
    LoRA but for rounding."""
    perturb(policy)
    if not merged:
        policy.merged = nullcontext
    how, cond = sampling(policy), policy.encode(PROMPTS)
    paths = rollout(policy, cond, how, [1, 2, 3, 4], batch=4)
    for i in [i for i, chance in enumerate(how.stochastic) if chance]:
        again = how.transition(policy, paths.states[:, i], i, cond).log_prob(paths.states[:, i + 1])
        assert (again - paths.log_prob[:, i]).abs().max() <= (2e-6 if merged else 0)
    # folded with other steps into other micro-batches
    rows, steps = torch.tensor([3, 0, 2]), torch.tensor([0, 2, 1])
    mixed = how.transition(policy, paths.states[rows, steps], steps, cond[rows])
    ratio = (mixed.log_prob(paths.states[rows, steps + 1]) - paths.log_prob[rows, steps]).exp()
    assert (ratio - 1).abs().max() < 1e-6


def test_log_prob_is_that_of_a_normal(policy):
    how, cond = sampling(policy), policy.encode(PROMPTS)
    paths = rollout(policy, cond, how, [1, 2, 3, 4], batch=4)
    gaussian = how.transition(policy, paths.states[:, 1], 1, cond)
    normal = torch.distributions.Normal(gaussian.mean, gaussian.std.expand_as(gaussian.mean))
    expected = normal.log_prob(paths.states[:, 2]).flatten(1).mean(1)
    torch.testing.assert_close(paths.log_prob[:, 1], expected, atol=1e-5, rtol=1e-5)


def test_noise_depends_on_the_seed_alone(policy):
    how, cond = sampling(policy), policy.encode(PROMPTS)
    whole = rollout(policy, cond, how, [1, 2, 3, 4], batch=4).final
    torch.testing.assert_close(
        rollout(policy, cond, how, [1, 2, 3, 4], batch=3).final, whole, atol=1e-5, rtol=1e-4
    )
    turned = rollout(policy, cond[torch.tensor([3, 2, 1, 0])], how, [4, 3, 2, 1], batch=4).final
    torch.testing.assert_close(turned.flip(0), whole, atol=1e-5, rtol=1e-4)
    other = rollout(policy, cond, how, [5, 6, 7, 8], batch=4).final
    assert not torch.allclose(other, whole, atol=1e-2)
    draws = Noise([1, 2], (3,), "cpu")
    assert not torch.equal(draws.draw(), draws.draw())


class ToyPolicy:
    """A float64 denoiser with the two calls that sampling needs."""

    def __init__(self, parametrize):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        self.parametrize = parametrize
        self.latent_shape, self.device = (4,), "cpu"
        self.graphs = 0

    def predict(self, x, level, cond, guidance=1.0):
        self.graphs += torch.is_grad_enabled()
        text = cond.positive["prompt"]
        t = level.sigma.expand(len(x))[:, None]
        outputs = [self.net(torch.cat([x + c, t], 1)) for c in (0 * text, text)]
        out = outputs[0] + guidance * (outputs[1] - outputs[0])
        return self.parametrize(x, out, level)


def toy(path):
    u = torch.linspace(0.95, 0.0, 7, dtype=torch.float64)
    if path == "flow":
        return ToyPolicy(Prediction.from_flow), Levels(u, 1 - u, u)
    kind = Prediction.from_epsilon if path == "epsilon" else Prediction.from_v
    return ToyPolicy(kind), Levels(u, (1 - u**2).sqrt(), u)


def chain_loss(policy, how, cond, noises, first):
    """-reward through the chain by plain autograd, the prefix cut off."""
    x = noises[0]
    states = [x]
    for i in range(how.steps):
        with torch.set_grad_enabled(i >= first and torch.is_grad_enabled()):
            x = how.transition(policy, x, i, cond).sample(noises[i + 1])
        states.append(x)
    return (x.square().sum(1) - x[:, 0]).mean(), torch.stack(states, 1)


@pytest.mark.parametrize("path", ["epsilon", "v", "flow"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("last", [1, 3, 6])
def test_adjoint_sweep_equals_autograd_through_the_chain(path, eta, last):
    policy, levels = toy(path)
    how = Sampling(levels, "ddim", eta, 2.5)
    cond = Cond({"prompt": torch.randn(3, 4).double()}, {})
    noises = torch.randn(7, 3, 4).double()
    first = how.steps - last
    parameters = list(policy.net.parameters())

    loss, states = chain_loss(policy, how, cond, noises, first)
    expected = torch.autograd.grad(loss, parameters)

    final = states[:, -1].detach().requires_grad_()
    (grad,) = torch.autograd.grad((final.square().sum(1) - final[:, 0]).mean(), final)
    policy.graphs = 0
    adjoint_sweep(policy, cond, how, states.detach(), grad, suffix(how, first))  # type: ignore[arg-type]
    assert policy.graphs == last
    for p, e in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, e, atol=1e-13, rtol=1e-12)


def test_full_chain_gradient_equals_finite_differences():
    policy, levels = toy("flow")
    how = Sampling(levels, "ode", 0.0, 1.5)
    cond = Cond({"prompt": torch.randn(3, 4).double()}, {})
    noises = torch.randn(7, 3, 4).double()
    with torch.no_grad():
        _, states = chain_loss(policy, how, cond, noises, 0)
    final = states[:, -1].detach().requires_grad_()
    (grad,) = torch.autograd.grad((final.square().sum(1) - final[:, 0]).mean(), final)
    adjoint_sweep(policy, cond, how, states, grad, suffix(how, 0))  # type: ignore[arg-type]
    weight = policy.net[0].weight
    assert isinstance(weight, nn.Parameter)
    direction = torch.randn_like(weight)
    slope, h = (weight.grad * direction).sum(), 1e-5  # type: ignore[operator]
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            weight += sign * h * direction
            values.append(chain_loss(policy, how, cond, noises, 0)[0])
            weight -= sign * h * direction
    torch.testing.assert_close(slope, (values[0] - values[1]) / (2 * h), atol=1e-8, rtol=1e-6)


def test_gradient_reaches_the_lora_through_the_last_steps_only(policy):
    """On the real UNet in float32, against autograd with the prefix under no_grad."""
    perturb(policy)
    how, cond = sampling(policy, 4, eta=0.0), policy.encode(PROMPTS)
    paths = rollout(policy, cond, how, [1, 2, 3, 4], batch=4)
    parameters = policy.trainable_parameters()

    def swept(first):
        for p in parameters:
            p.grad = None
        final = paths.final.detach().requires_grad_()
        (grad,) = torch.autograd.grad(policy.decode(final, True).mean(), final)
        adjoint_sweep(policy, cond, how, paths.states, grad, suffix(how, first))
        return torch.cat(
            [torch.zeros(0) if p.grad is None else p.grad.flatten() for p in parameters]
        )

    x = paths.states[:, 2]
    for i in (2, 3):
        x = how.transition(policy, x, i, cond).mean
    expected = torch.autograd.grad(policy.decode(x, True).mean(), parameters, allow_unused=True)
    expected = torch.cat([torch.zeros(0) if e is None else e.flatten() for e in expected])
    torch.testing.assert_close(swept(2), expected, atol=1e-7, rtol=1e-3)
    assert (swept(0) - expected).norm() > 1e-2 * expected.norm()


def test_deterministic_steps_have_no_std(policy):
    how = sampling(policy, 5, "ode", 0.0)
    assert how.stds.tolist() == [0.0] * 5
    zero = rollout(policy, policy.encode(PROMPTS), how, [1, 2, 3, 4], 4)
    tiny = rollout(
        policy, policy.encode(PROMPTS), replace(how, kernel="ddim", eta=0.0), [1, 2, 3, 4], 4
    )
    torch.testing.assert_close(zero.final, tiny.final)


def test_stored_states_are_what_the_network_saw(policy, monkeypatch):
    seen = []
    predict = policy.predict

    def spy(x, *rest):
        seen.append(x.clone())
        return predict(x, *rest)

    monkeypatch.setattr(policy, "predict", spy)
    paths = rollout(policy, policy.encode(PROMPTS), sampling(policy), [1, 2, 3, 4], batch=4)
    assert torch.equal(torch.stack(seen, 1), paths.states[:, :-1])


def test_a_stochastic_step_is_that_of_the_diffusers_scheduler(policy):
    if policy.denoiser != "unet":
        pytest.skip("DDIM in diffusers is for VP levels")
    how, cond = sampling(policy, 5, eta=0.7), policy.encode(PROMPTS)
    paths = rollout(policy, cond, how, [1, 2, 3, 4], batch=4)
    noise = Noise([1, 2, 3, 4], policy.latent_shape, "cpu")
    draws = [noise.draw() for _ in range(3)]  # the first latents, steps 0 and 1
    x, x_next = paths.states[:, 1], paths.states[:, 2]
    with torch.no_grad():
        native = policy.predict(x, how.levels[1], cond, how.guidance).native
    scheduler: Any = DDIMScheduler.from_config(policy.pipe.scheduler.config)
    scheduler.set_timesteps(5)
    t = scheduler.timesteps[1]
    step = scheduler.step(native, t, x, eta=0.7, variance_noise=draws[-1])
    torch.testing.assert_close(x_next, step.prev_sample, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("path", "kernel", "eta"),
    [
        ("flow", "flow_sde", 0.7),
        ("flow", "dance_sde", 0.3),
        ("flow", "cps", 0.5),
        ("v", "cps", 0.5),
    ],
)
def test_adjoint_sweep_with_every_kernel(path, kernel, eta):
    policy, levels = toy(path)
    how = Sampling(levels, kernel, eta, 2.5)
    cond = Cond({"prompt": torch.randn(3, 4).double()}, {})
    noises = torch.randn(7, 3, 4).double()
    parameters = list(policy.net.parameters())
    loss, states = chain_loss(policy, how, cond, noises, 0)
    expected = torch.autograd.grad(loss, parameters)
    final = states[:, -1].detach().requires_grad_()
    (grad,) = torch.autograd.grad((final.square().sum(1) - final[:, 0]).mean(), final)
    adjoint_sweep(policy, cond, how, states.detach(), grad, suffix(how, 0))  # type: ignore[arg-type]
    for p, e in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, e, atol=1e-13, rtol=1e-11)


def test_sweep_holds_the_graph_of_one_step_at_a_time():
    """The most tensors kept for a backward pass do not grow with the number of steps."""

    policy, levels = toy("v")
    how = Sampling(levels, "ode", 0.0, 2.5)
    cond = Cond({"prompt": torch.randn(3, 4).double()}, {})
    states, grad = torch.randn(3, 7, 4).double(), torch.ones(3, 4).double()
    peaks = []
    # the earliest step of a sweep needs no gradient of its x, so neither case is a single step
    for first in (4, 0):
        peaks.append(
            peak_saved(partial(adjoint_sweep, policy, cond, how, states, grad, suffix(how, first)))
        )
    assert peaks[0] == peaks[1] > 0
