"""Algorithms against their authors' numbers and the identities of their papers."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import helpers_algorithms
import pytest
import torch
from conftest import load
from helpers_algorithms import (
    LATENT,
    SD3,
    Outputs,
    close,
    flow,
    golden,
    matched,
    randn,
    random_rows,
    transitions,
)

from diffalign import algorithms
from diffalign.algorithms import Transitions, surrogate
from diffalign.algorithms.awm import AWM, pseudo_log_prob
from diffalign.algorithms.ddpo import DDPO
from diffalign.algorithms.dpok import DPOK
from diffalign.algorithms.flow_grpo import FlowGRPO
from diffalign.algorithms.fpo import FPO
from diffalign.algorithms.grpo_guard import GRPOGuard
from diffalign.algorithms.matching import flow_time, matching_loss
from diffalign.algorithms.nft import SCHEDULES, DiffusionNFT
from diffalign.algorithms.rwr import RWR
from diffalign.dynamics import Gaussian, Prediction
from diffalign.sampling.rollout import Sampling

make = helpers_algorithms.make  # the fixture


@pytest.mark.parametrize(
    ("weighting", "name"),
    [("uniform", "Uniform"), ("t", "t"), ("t2", "t**2"), ("huber", "huber"), ("ghuber", "ghuber")],
)
def test_awm_log_probabilities_are_those_of_the_authors(weighting, name):
    data = golden("forward_matching.safetensors")
    batch = matched(data["x0"], data["noise"], data["t"], data["advantage"], on_policy=False)
    policy = Outputs(default=data["pred"], old=data["pred_old"])
    for copy, suffix in (("default", "new"), ("old", "old")):
        with policy.adapter(copy):
            loss = matching_loss(policy, batch, batch.predict(policy))
        log_prob = pseudo_log_prob(loss, flow_time(batch.level), weighting)
        close(log_prob, data[f"awm.{name}.log_prob_{suffix}"], 1e-6)

    loss, metrics = AWM(weighting=weighting, slow_weight=0.0).loss(policy, batch)
    ratio = (data[f"awm.{name}.log_prob_new"] - data[f"awm.{name}.log_prob_old"]).exp()
    close(loss, (-data["advantage"] / 5 * ratio).mean(), 1e-6)
    close(metrics["ratio_drift"], (ratio - 1).abs(), 2e-6)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_nft_loss_is_that_of_the_authors(beta):
    data = golden("forward_matching.safetensors")
    batch = matched(data["x0"], data["noise"], data["t"], data["advantage"])
    policy = Outputs(default=data["pred"], old=data["pred_old"])
    loss, _ = DiffusionNFT(beta=beta, kl_weight=0.0).loss(policy, batch)
    assert loss.item() == pytest.approx(data[f"nft.beta{beta}.loss"].item(), rel=1e-6)


@pytest.mark.parametrize("index", [1, 5])
def test_ratios_are_those_of_the_authors(index):
    data = golden("flow_dynamics.safetensors")
    levels, key = flow(data["sigmas"]), f"Flow-SDE.i{index}."
    step, advantage = torch.full((3,), index), torch.tensor([1.0, -2.0, 0.5])
    batch = Transitions(
        Sampling(levels, "flow_sde", 0.3, 1.0),
        None,
        data[key + "x_t"],
        levels[step],
        advantage,
        advantage,
        False,
        step,
        data[key + "x_next"],
        data[key + "log_prob"],
        data[key + "mean"],
    )
    policy = Outputs(default=data[key + "guard.velocity_new"])
    transition = batch.transition(batch.predict(policy))
    log_ratio, _ = surrogate.log_ratio(transition.log_prob(batch.x_next), batch)
    close(log_ratio.exp(), data[key + "ppo.ratio"], 1e-5)
    guard = surrogate.ratio_norm(transition, batch.mean_old, log_ratio)
    close(guard.exp(), data[key + "guard.ratio"], 1e-5)

    for method, name in (
        (FlowGRPO(clip_range=0.5), "ppo.ratio"),
        (GRPOGuard(clip_range=0.5, reweight=False), "guard.ratio"),
    ):
        loss, metrics = method.loss(policy, batch)
        close(loss, (-advantage * data[key + name]).mean(), 1e-5)
        close(metrics["ratio_drift"], (data[key + name] - 1).abs(), 1e-5)


def test_guard_ratio_is_unbiased():
    """log ρ̂ = mean_D(z δ), also where the rows are of different steps."""
    old, delta, z = (randn(3, *LATENT) for _ in range(3))
    std = torch.tensor([0.1, 0.5, 2.0]).double().view(3, 1, 1, 1)
    x_next, new = old + std * z, Gaussian(old + delta, std)
    log_ratio = new.log_prob(x_next) - Gaussian(old, std).log_prob(x_next)
    close(surrogate.ratio_norm(new, old, log_ratio), (z * delta).flatten(1).mean(1), 1e-12)


def test_gradients_at_ratio_one():
    """Importance sampling, the score function and Guard agree, Guard but for the step's std."""
    step = torch.tensor([1, 4, 8])
    velocity = randn(3, *LATENT).requires_grad_()
    outputs = {"default": velocity, "old": velocity.detach()}
    policy, batch = transitions(SD3, 0.7, step, outputs, on_policy=True)
    scored = -batch.advantage * batch.transition(batch.predict(policy)).log_prob(batch.x_next)
    (expected,) = torch.autograd.grad(scored.mean(), velocity)
    s = batch.sampling.stds[step].view(3, 1, 1, 1)
    for method, factor in (
        (DDPO(), 1),
        (DDPO(estimator="sf"), 1),
        (FlowGRPO(), 1),
        (FlowGRPO(log_prob="cps"), 2 * s.square()),
        (DPOK(kl_weight=0.0), 1),
        (GRPOGuard(reweight=False), s),
    ):
        loss, metrics = method.loss(policy, batch)
        assert not metrics["ratio_drift"].any()
        close(torch.autograd.grad(loss, velocity)[0], expected * factor, 1e-9)


def row_weights(method):
    """What a row of each stochastic step counts: at ρ = 1 the loss is -mean(A w)."""
    velocity = randn(9, *LATENT)
    outputs = {"default": velocity, "old": velocity}
    policy, batch = transitions(SD3, 0.7, torch.arange(9), outputs, on_policy=True)
    rows = [replace(batch, advantage=row) for row in -9 * torch.eye(9)]
    return torch.stack([method.loss(policy, row)[0] for row in rows])


def test_guard_divides_by_what_an_output_does_to_the_step():
    how = Sampling(SD3, "flow_sde", 0.7, 1.0)
    moved = how.sensitivity(Outputs())[:9]
    # where sigma < 1, without the first step, there is a closed form
    dt = SD3.sigma[1:9] - SD3.sigma[2:10]
    close(moved[1:], dt * (1 + 0.7**2 / 2), 1e-6)
    x, u = randn(2, *LATENT), randn(2, *LATENT).requires_grad_()
    for i in range(9):
        mean = how.step(x, Prediction.from_flow(x, u, SD3[i]), i).mean
        (slope,) = torch.autograd.grad(mean.sum(), u)
        close(slope.abs(), moved[i].expand_as(u), 1e-6)
    weights = row_weights(GRPOGuard())
    close(weights, (1 / moved) / (1 / moved).mean(), 1e-5)
    close(row_weights(GRPOGuard(reweight=False)), torch.ones(9))


def test_noise_weights_are_those_of_tempflow():
    """2.25 s for SD3's ten steps, of which the last is not trained."""
    published = torch.tensor([1.58, 1.67, 1.21, 1.00, 0.88, 0.79, 0.72, 0.64, 0.51])
    close(row_weights(FlowGRPO(step_weight="noise")), published, 1e-2)


def test_cps_score_is_the_plain_square():
    """exp(mean_D (x' - μ_old)² - mean_D (x' - μ)²), what Flow-CPS has for a ratio."""
    outputs = {"default": randn(3, *LATENT), "old": randn(3, *LATENT)}
    policy, batch = transitions(SD3, 0.7, torch.tensor([1, 4, 8]), outputs)
    mean = batch.transition(batch.predict(policy)).mean
    new, old = ((batch.x_next - m).square().flatten(1).mean(1) for m in (mean, batch.mean_old))
    _, metrics = FlowGRPO(log_prob="cps").loss(policy, batch)
    close(metrics["ratio_drift"], ((old - new).exp() - 1).abs(), 1e-6)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_nft_is_affine_in_the_advantage(beta):
    outputs = {"default": randn(1, *LATENT), "old": randn(1, *LATENT)}
    batch, method = random_rows(torch.zeros(1)), DiffusionNFT(beta=beta, kl_weight=0.0)

    def loss(advantage):
        rows = replace(batch, advantage=torch.tensor([advantage]).double())
        return method.loss(Outputs(**outputs), rows)[0].item()

    values = [loss(a) for a in (-5.0, -2.5, 0.0, 2.5, 5.0)]
    steps = [b - a for a, b in itertools.pairwise(values)]
    assert steps == pytest.approx([steps[0]] * 4, rel=1e-9)
    assert abs(steps[0]) > 1e-2
    assert (loss(9.0), loss(-9.0)) == pytest.approx((values[-1], values[0]))


def test_nft_gradient_at_the_old_policy():
    """None for neither good nor bad; that of plain regression for r = 1, and its mirror for 0."""
    old = randn(1, *LATENT)
    velocity = old.clone().requires_grad_()
    batch, method = random_rows(torch.zeros(1)), DiffusionNFT(beta=0.5, kl_weight=0.0)
    policy = Outputs(default=velocity, old=old)
    found = []
    for advantage in (0.0, 5.0, -5.0):
        rows = replace(batch, advantage=torch.tensor([advantage]))
        found.append(torch.autograd.grad(method.loss(policy, rows)[0], velocity)[0])
    error = batch.predict(policy).x0 - batch.x0
    regression = 5 * error.square().mean() / error.detach().abs().mean()
    (expected,) = torch.autograd.grad(regression, velocity)
    close(found[1], expected)
    close(found[2], -expected)
    assert found[0].norm() < 1e-12 * expected.norm()


def test_awm_and_fpo_gradient_on_policy():
    """ρ = 1: the gradient of the advantage-weighted pseudo-likelihood, divided by 5 for AWM."""
    velocity = randn(4, *LATENT).requires_grad_()
    batch = random_rows(torch.tensor([1.0, 1.0, -3.0, -3.0]).double())
    batch, policy = replace(batch, times=2), Outputs(default=velocity)
    loss = matching_loss(policy, batch, batch.predict(policy))
    (plain,) = torch.autograd.grad((batch.advantage * loss).mean(), velocity)
    (awm,) = torch.autograd.grad(
        AWM(weighting="uniform", slow_weight=0.0, times=2).loss(policy, batch)[0], velocity
    )
    (fpo,) = torch.autograd.grad(FPO(times=2).loss(policy, batch)[0], velocity)
    close(awm, plain / 5)
    close(fpo, plain)


def test_fpo_has_one_ratio_a_sample():
    batch = replace(random_rows(randn(6)), times=3, on_policy=False)
    batch = replace(batch, advantage=torch.tensor([1.0, 1.0, 1.0, -2.0, -2.0, -2.0]))
    policy = Outputs(default=randn(6, *LATENT), old=randn(6, *LATENT))
    losses = []
    for name in ("default", "old"):
        with policy.adapter(name):
            losses.append(matching_loss(policy, batch, batch.predict(policy)).view(2, 3).mean(1))
    ratio = (losses[1] - losses[0]).exp()
    advantage = torch.tensor([1.0, -2.0])
    expected = (-advantage * ratio).maximum(-advantage * ratio.clamp(0.95, 1.05)).mean()
    close(FPO(times=3).loss(policy, batch)[0], expected)


def test_awm_is_drawn_to_its_slow_copy():
    batch = random_rows(torch.zeros(2).double())
    policy = Outputs(default=randn(2, *LATENT), slow=randn(2, *LATENT))
    distance = (policy.outputs["default"] - policy.outputs["slow"]).square().mean()
    close(AWM(slow_weight=3.0).loss(policy, batch)[0], 3 * distance)


def test_rwr_weighs_by_exponential_advantages():
    batch = random_rows(torch.tensor([1.0, -2.0]).double())
    policy = Outputs(default=randn(2, *LATENT))
    losses = (policy.outputs["default"] - (batch.noise - batch.x0)).square().flatten(1).mean(1)
    weights = torch.tensor([2.0, -4.0]).double().exp()
    close(RWR(temperature=0.5).loss(policy, batch)[0], (weights * losses).mean())


@pytest.mark.parametrize("kind", ["sd-v", "sd3"])
@pytest.mark.parametrize("time", ["schedule", "uniform", "logit_normal"])
def test_levels_of_a_sample_are_stratified(pipelines, kind, time):
    policy = load(pipelines[kind])
    how = Sampling(policy.levels(9), "ode", 0.0, 1.0)
    method = RWR(times=4, time=time, first=1)
    levels = method.levels(policy, how, torch.tensor([0.0, 0.5, 1.0]))
    sigma = levels.sigma.view(3, 4).double()
    if time == "schedule":
        # seven levels in four parts: all but the first and the last of the eight that have noise
        chosen = [
            [how.levels.sigma.tolist().index(v) for v in row]
            for row in levels.sigma.view(3, 4).tolist()
        ]
        assert chosen == [[1, 2, 4, 6], [1, 3, 5, 7], [2, 4, 6, 7]]
    else:
        assert (sigma.diff(dim=1) > 0).all()
        assert (sigma.diff(dim=0) >= 0).all()
    constant = levels.alpha + levels.sigma if kind == "sd3" else levels.alpha**2 + levels.sigma**2
    close(constant, torch.ones(12), 1e-6)


def test_nft_schedules():
    values = {k: [f(n) for n in (0, 74, 75, 100, 600)] for k, f in SCHEDULES.items()}
    assert values["none"] == [0] * 5
    assert values["slow"] == pytest.approx([0, 0.074, 0.075, 0.1, 0.5])
    assert values["late"] == pytest.approx([0, 0, 0, 0.1875, 0.999])


@pytest.mark.parametrize("kernel", ["flow_sde", "dance_sde", "cps", "ddim"])
def test_measures_of_the_distance_to_the_base(kernel):
    step = torch.tensor([2, 5])
    outputs = {k: randn(2, *LATENT) for k in ("default", "old", "base")}
    policy, batch = transitions(SD3, 0.7, step, outputs, on_policy=True, kernel=kernel)
    sigma, following = SD3.sigma[step].double(), SD3.sigma[step + 1].double()
    dt = sigma - following
    delta = (outputs["default"] - outputs["base"]).square().flatten(1).mean(1)
    # every mean is linear in the velocity
    if kernel.endswith("sde"):
        g2 = 0.7**2 * (sigma / (1 - sigma) if kernel == "flow_sde" else torch.ones(2))
        moved = (dt * (1 + g2 * (1 - sigma) / (2 * sigma))).square() * delta
        true, published = moved / (2 * g2 * dt), moved / (2 * g2)
    else:
        s = following * math.sin(0.7 * math.pi / 2)
        if kernel == "ddim":
            ratio = (1 - sigma) * following / ((1 - following) * sigma)
            s = 0.7 * following * (1 - ratio.square()).sqrt()
        keep = (following.square() - s.square()).sqrt()
        moved = (keep * (1 - sigma) - (1 - following) * sigma).square() * delta
        true = published = moved / (2 * s.square())
    expected = {"g_sqrt_dt": true, "g": published, "velocity": delta}
    plain, _ = DDPO().loss(policy, batch)
    for kl, distance in expected.items():
        loss, metrics = DDPO(kl=kl, kl_weight=3.0).loss(policy, batch)
        torch.testing.assert_close(metrics["kl"], distance, rtol=1e-5, atol=0, check_dtype=False)
        torch.testing.assert_close(
            loss - plain, 3 * distance.mean(), rtol=1e-5, atol=1e-8, check_dtype=False
        )


def test_dpok_weighs_its_distance_as_the_reference():
    """100 times the policy gradient, and 0.01 times the square of the outputs' difference."""
    outputs = {k: randn(3, *LATENT) for k in ("default", "old", "base")}
    policy, batch = transitions(SD3, 0.7, torch.tensor([1, 4, 6]), outputs, on_policy=True)
    loss, _ = DPOK().loss(policy, batch)
    distance = (outputs["default"] - outputs["base"]).square().mean()
    close(100 * loss, -100 * batch.advantage.mean() + 0.01 * distance, 1e-5)


def test_the_anchor_of_forward_matching():
    batch = random_rows(randn(2))
    policy = Outputs(**{k: randn(2, *LATENT) for k in ("default", "old", "base")})
    distance = (policy.outputs["default"] - policy.outputs["base"]).square().mean()
    for method in (AWM(slow_weight=0.0), DiffusionNFT(kl_weight=0.0), FPO(), RWR()):
        plain, _ = method.loss(policy, batch)
        anchored, metrics = replace(method, kl_weight=2.0).loss(policy, batch)
        close(anchored - plain, 2 * distance)
        close(metrics["kl"].mean(), distance)


def test_kl_target_adapts_the_weight():
    method = DDPO(kl_weight=0.1, kl_target=0.02)
    used = [method.end_epoch({"kl": kl})["kl_weight"] for kl in (0.031, 0.029, 0.0134, 0.013)]
    assert used == pytest.approx([0.1, 0.2, 0.2, 0.2])
    assert method.end_epoch({"kl": 0.0}) == {}  # a fresh LoRA is the base model
    assert method.kl_weight == pytest.approx(0.1)
    resumed = DDPO(kl_weight=0.1, kl_target=0.02)
    resumed.load_state_dict(method.state_dict())
    assert resumed.kl_weight == method.kl_weight
    fixed = DDPO(kl_weight=0.3)
    assert fixed.end_epoch({"kl": 9.0}) == {}
    fixed.load_state_dict(method.state_dict())
    assert fixed.kl_weight == 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "ddpo", "estimator": "reinforce"}, r"estimator='reinforce'.*is.*sf"),
        ({"type": "ddpo", "clip_range": 0.0}, r"clip_range=0 must be positive"),
        ({"type": "ddpo", "kl": "l2"}, r"kl='l2'.*g_sqrt_dt.*g.*velocity"),
        ({"type": "ddpo", "kl_weight": -0.1}, r"kl_weight=-0\.1 must not be negative"),
        ({"type": "ddpo", "kl_target": 0.1}, r"kl_target=0\.1 adapts kl_weight, which is 0"),
        ({"type": "ddpo", "kl_weight": 1, "kl_target": 0.0}, r"kl_target=0 must be positive"),
        ({"type": "ddpo", "kl_weight": "inf"}, r"kl_weight=inf is not finite"),
        ({"type": "ddpo", "clip_range": "nan"}, r"clip_range=nan is no number"),
        ({"type": "dpok", "value_weight": -1.0}, r"value_weight=-1 must not be negative"),
        ({"type": "flow_grpo", "log_prob": "sum"}, r"log_prob='sum'.*gaussian.*cps"),
        ({"type": "flow_grpo", "step_weight": "std"}, r"step_weight='std'.*none.*noise"),
        ({"type": "grpo_guard", "clip_range": -1.0}, r"clip_range=-1 must be positive"),
        ({"type": "awm", "weighting": "snr"}, r"weighting='snr'.*uniform.*ghuber"),
        ({"type": "awm", "slow_weight": -1.0}, r"slow_weight=-1 must not be negative"),
        ({"type": "awm", "kl": "g"}, r"kl=g is of transitions.*use velocity"),
        ({"type": "awm", "times": 0}, r"times=0 must be positive"),
        ({"type": "awm", "first": -1}, r"first=-1 must not be negative"),
        ({"type": "nft", "beta": 0.0}, r"beta=0 must be positive"),
        ({"type": "nft", "old": "fast"}, r"old='fast'.*none.*slow.*late"),
        ({"type": "fpo", "time": "beta"}, r"time='beta'.*schedule.*uniform.*logit_normal"),
        ({"type": "rwr", "temperature": 0.0}, r"temperature=0 must be positive"),
        ({"type": "draft", "last": 0}, r"last=0 must be at least 1, or null"),
        ({"type": "draft", "renoised": -1}, r"renoised=-1 .*must not be negative"),
        ({"type": "draft", "renoised": 1, "last": 2}, r"renoised=1 goes with algorithm\.last=1"),
        ({"type": "alignprop", "truncation": "beta"}, r"truncation='beta'.*uniform.*bernoulli"),
        ({"type": "alignprop", "start": -1}, r"start=-1 must not be negative"),
        ({"type": "alignprop", "mean": 1.0}, r"mean=1 is a share of the steps"),
        ({"type": "refl", "last": 0}, r"last=0 must be positive"),
        ({"type": "drtune", "active": 0}, r"active=0 must be positive"),
        ({"type": "drtune", "stop": 1.0}, r"stop=1 is a share of the steps"),
        ({"type": "flow_gpro"}, r"unknown algorithm 'flow_gpro'.*flow_grpo"),
        ({"type": "nft", "betta": 1.0}, r"betta.*beta"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        algorithms.build(options)


def test_options_given_in_python_are_checked_too():
    with pytest.raises(ValueError, match=r"algorithm\.estimator='x' is unknown; use is or sf"):
        DDPO(estimator="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"algorithm\.clip_range=-1 must be positive"):
        DDPO(clip_range=-1.0)
    assert DDPO(clip_range=float("inf")).clip_range == float("inf")  # no clipping


@pytest.mark.parametrize(
    ("algorithm", "options", "message"),
    [
        ("alignprop", {"truncation": "fixed", "start": 4}, r"start=4 .*steps=4.*at most 3"),
        ("draft", {"last": 5}, r"last=5 exceeds sampler\.steps=4"),
        ("refl", {"last": 5}, r"last=5 exceeds sampler\.steps=4"),
        ("drtune", {"active": 4}, r"active=4 exceeds the 3 of sampler\.steps=4"),
        ("awm", {"first": 3}, r"first=3 leaves none of the sampler\.steps=4 levels"),
    ],
)
def test_options_beyond_the_sampler_are_refused(make, algorithm, options, message):
    with pytest.raises(ValueError, match=message):
        make(algorithm, **{f"algorithm.{k}": v for k, v in options.items()})
