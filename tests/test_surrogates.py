"""Reward gradients: which steps each algorithm keeps, and sweeps against autograd."""

from __future__ import annotations

from dataclasses import replace

import helpers_algorithms
import pytest
import torch
from conftest import perturb
from helpers_algorithms import (
    close,
    randn,
)
from test_rollout import toy
from test_trainer import gradients, redness

from diffalign.algorithms.alignprop import AlignProp
from diffalign.algorithms.draft import DRaFT
from diffalign.algorithms.drtune import DRTune
from diffalign.algorithms.refl import ReFL
from diffalign.config.prompts import divided
from diffalign.dynamics import noised
from diffalign.policies import Cond
from diffalign.sampling.adjoint import Surrogate, adjoint_sweep
from diffalign.sampling.rollout import Noise, Sampling, sample_seed
from diffalign.training.learning import Samples

make = helpers_algorithms.make  # the fixture


def draw(method, steps, seed=0):
    return method.surrogate(steps, torch.Generator().manual_seed(seed))


def test_presets_coincide():
    assert draw(AlignProp(truncation="fixed", start=0), 7) == draw(DRaFT(last=None), 7)
    assert draw(AlignProp(truncation="fixed", start=6), 7) == draw(DRaFT(last=1), 7)
    assert draw(DRaFT(last=1, renoised=0), 7) == draw(DRaFT(last=1), 7) == Surrogate((6,))
    assert draw(DRTune(active=7, stop=0.0), 7) == Surrogate(tuple(range(7)), detach=True)
    assert draw(ReFL(last=1), 7) == Surrogate((6,), at=6, detach=True)


def test_draws_of_alignprop():
    steps, n = 50, 2000
    sizes = {}
    for how in ("uniform", "gaussian", "bernoulli"):
        plans = [draw(AlignProp(truncation=how), steps, seed) for seed in range(n)]
        assert all(p.at is None and not p.detach for p in plans)
        sizes[how] = torch.tensor([len(p.active) for p in plans]).double()
        if how != "bernoulli":
            assert all(p.active == tuple(range(p.active[0], steps)) for p in plans)
    # 25 ± 14.7, 25 ± 2.9, and int(N(42, 5)) in 1 … 49: 9.1 ± 4.5, as the specification has them
    assert sizes["uniform"].mean().item() == pytest.approx(25.5, abs=1)
    assert sizes["bernoulli"].mean().item() == pytest.approx(25, abs=0.3)
    assert sizes["gaussian"].mean().item() == pytest.approx(9.1, abs=0.5)
    assert [round(sizes[k].std().item()) for k in ("bernoulli", "gaussian")] == [3, 4]
    assert sizes["gaussian"].max() <= steps - 1


def test_draws_of_refl_and_drtune():
    late = {draw(ReFL(), 40, seed).at for seed in range(200)}
    assert late == set(range(30, 40))
    for seed in range(200):
        plan = draw(DRTune(active=3, stop=0.4), 25, seed)
        assert 25 - 10 <= plan.at <= 24
        stride = (plan.at + 1) // 3
        assert plan.active == tuple(plan.active[0] + stride * k for k in range(3))
        assert plan.active[-1] <= plan.at
    assert {draw(DRTune(), 25, seed).at for seed in range(200)} == set(range(15, 25))


def by_autograd(policy, how, cond, noises, plan, penalty=None):
    """The reward's input, the states before it and the penalties, as the surrogate defines them."""
    x, states, extra = noises[0], [noises[0]], 0.0
    for i in range(how.steps):
        seen = policy.predict(x.detach() if plan.detach else x, how.levels[i], cond, how.guidance)
        native = seen.native if i in plan.active else seen.native.detach()
        seen = policy.parametrize(x, native, how.levels[i])
        if penalty is not None and i in plan.active:
            extra = extra + penalty(x, seen, i)
        if i == plan.at:
            return seen.x0, states, extra
        x = how.step(x, seen, i).sample(noises[i + 1])
        states.append(x)
    return x, states, extra


@pytest.mark.parametrize("penalized", [False, True])
@pytest.mark.parametrize("path", ["epsilon", "v", "flow"])
@pytest.mark.parametrize(
    "plan",
    [
        draw(DRTune(active=6, stop=0.0), 6),
        Surrogate((1, 3), at=4, detach=True),  # DRTune; the step looked at need not be active
        Surrogate((0, 2, 4), at=4, detach=True),
        draw(ReFL(), 6),
        Surrogate((0, 2, 3, 5)),  # AlignProp as first released
        Surrogate((1, 4)),
        Surrogate((1, 2, 3), at=3),
        Surrogate((0,), at=0),
    ],
    ids=lambda p: f"{p.active}-{p.at}-{p.detach}",
)
def test_sweep_equals_autograd(plan, path, penalized):
    policy, levels = toy(path)
    how = Sampling(levels, "ddim", 0.7, 2.5)
    cond, noises = Cond({"prompt": randn(3, 4)}, {}), randn(7, 3, 4)
    base = toy(path)[0]
    for p in base.net.parameters():
        p.data += 0.1 * torch.randn_like(p)

    def penalty(x, seen, i):
        with torch.no_grad():
            other = base.predict(x, how.levels[i], cond, how.guidance)
        return (seen.native - other.native).square().sum()

    penalty = penalty if penalized else None
    parameters = list(policy.net.parameters())

    def reward(x):
        return (x.square().sum(1) - x[:, 0]).mean()

    x, states, extra = by_autograd(policy, how, cond, noises, plan, penalty)
    expected = torch.autograd.grad(reward(x) + extra, parameters)
    assert all(e.norm() > 1e-6 for e in expected)
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(reward(x), x)
    adjoint_sweep(policy, cond, how, torch.stack(states, 1).detach(), grad, plan, penalty)
    for p, e in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, e, atol=1e-12, rtol=1e-10)


def test_drtune_of_all_steps_is_the_sum_of_velocities():
    """x_K = x_0 + Σ Δσ_i v(sg[x_i]), FlowBP's Sparse with all steps active."""
    policy, levels = toy("flow")
    how = Sampling(levels, "ode", 0.0, 2.5)
    cond, noises = Cond({"prompt": randn(3, 4)}, {}), randn(7, 3, 4)
    plan = draw(DRTune(active=6, stop=0.0), 6)
    with torch.no_grad():
        states = torch.stack(by_autograd(policy, how, cond, noises, plan)[1], 1)
    x = states[:, 0]
    for i in range(6):
        seen = policy.predict(states[:, i], levels[i], cond, 2.5)
        x = x + (levels.sigma[i + 1] - levels.sigma[i]) * seen.native
    close(x, states[:, -1], 1e-12)
    grad = randn(3, 4)
    expected = torch.autograd.grad(x, list(policy.net.parameters()), grad)
    adjoint_sweep(policy, cond, how, states, grad, plan)
    for p, e in zip(policy.net.parameters(), expected, strict=True):
        close(p.grad, e, 1e-12)


def flat(grads):
    return torch.cat([g.flatten() for g in grads])


def reward_of(policy, x):
    return redness(policy.decode(x, differentiable=True), None)


@pytest.mark.parametrize("kind", ["sd-v", "sd3"])
@pytest.mark.parametrize("renoised", [0, 2])
def test_draft_lv_averages_over_its_copies(make, monkeypatch, kind, renoised):
    trainer = make("draft", kind=kind, **{"algorithm.renoised": renoised, "sampler.kernel": "ode"})
    perturb(trainer.policy)
    policy, how, parameters = trainer.policy, trainer.sampling, trainer.optimizer.trained
    data, (plan,) = trainer._sample(0), trainer.learner.surrogates(0)
    states = trainer.learner._draw(data, torch.arange(4), plan)
    seeds = [sample_seed(0, *key, "renoise") for key in data.keys]
    noise, level = Noise(seeds, policy.latent_shape, policy.device), how.levels[3]
    starts = [states[:, 3]]
    starts += [noised(states[:, 4], noise.draw(), level) for _ in range(renoised)]
    expected = []
    for x in starts:
        final = how.transition(policy, x, 3, data.cond).mean
        expected.append(flat(torch.autograd.grad(-reward_of(policy, final).mean(), parameters)))
    (found,) = gradients(trainer, monkeypatch)
    mean = torch.stack(expected).mean(0)
    assert mean.norm() > 1e-5
    assert (found - mean).norm() < 1e-4 * mean.norm()


def test_refl_at_the_last_step_of_a_flow_is_draft(make, monkeypatch):
    found = []
    for algorithm in ("refl", "draft"):
        trainer = make(algorithm, run=algorithm, kind="sd3", **{"algorithm.last": 1})
        perturb(trainer.policy)
        found += gradients(trainer, monkeypatch)
    assert found[0].norm() > 1e-5
    assert (found[0] - found[1]).norm() < 1e-4 * found[1].norm()


def stated(trainer, data, rows, plan):
    """Reward loss and penalty of an update as the docstrings have them, of an unrolled chain."""
    policy, how = trainer.policy, trainer.sampling
    cond, seeds = data.cond[rows], [sample_seed(0, *data.keys[j]) for j in rows.tolist()]
    noise, distance = Noise(seeds, policy.latent_shape, policy.device), 0.0
    x = noise.draw()
    for i in range(how.steps):
        shown = x.detach() if plan.detach else x
        native = policy.predict(shown, how.levels[i], cond, how.guidance).native
        if i in plan.active:
            with policy.reference():
                base = policy.predict(shown, how.levels[i], cond, how.guidance).native
            distance = distance + (native - base).square().mean() / len(plan.active)
        else:
            native = native.detach()
        seen = policy.parametrize(x, native, how.levels[i])
        if i == plan.at:
            return -reward_of(policy, seen.x0).mean(), distance
        x = how.step(x, seen, i).mean
        if how.stochastic[i]:
            x = x + how.stds[i] * noise.draw()
    return -reward_of(policy, x).mean(), distance


STEPS_TOGETHER = [
    ("draft", {"algorithm.last": None}),
    ("draft", {"algorithm.last": 3, "sampler.kernel": "ddim"}),
    ("alignprop", {"algorithm.truncation": "bernoulli"}),
    ("drtune", {"algorithm.active": 3, "algorithm.stop": 0.0}),
    ("drtune", {"algorithm.active": 2}),
]


@pytest.mark.parametrize(("algorithm", "options"), STEPS_TOGETHER)
def test_the_gradient_of_the_penalty_is_that_of_the_unrolled_chain(
    make, monkeypatch, algorithm, options
):
    weight = 5.0
    options = {"sampler.kernel": "ode", "algorithm.kl_weight": weight, "sampler.steps": 5} | options
    trainer = make(algorithm, **options)
    perturb(trainer.policy)
    data, (plan,) = trainer._sample(0), trainer.learner.surrogates(0)
    assert len(plan.active) > 1
    parameters = trainer.optimizer.trained
    loss, distance = stated(trainer, data, torch.arange(4), plan)
    reward_part = flat(torch.autograd.grad(loss, parameters, retain_graph=True))
    expected = flat(torch.autograd.grad(loss + weight * distance, parameters))
    (found,) = gradients(trainer, monkeypatch)
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert (reward_part - expected).norm() > 0.1 * expected.norm()


def test_the_penalty_is_the_same_with_checkpointing(make, monkeypatch):
    """Which calls the network again in the backward pass, when the adapters are on again."""
    found = []
    for checkpointing in (False, True):
        options = {"algorithm.last": 3, "algorithm.kl_weight": 5.0, "sampler.kernel": "ode"}
        options["model.gradient_checkpointing"] = checkpointing
        trainer = make("draft", run=str(checkpointing), **options)
        perturb(trainer.policy)
        found += gradients(trainer, monkeypatch)
    assert found[0].norm() > 1e-3
    assert (found[0] - found[1]).norm() < 1e-5 * found[0].norm()


@pytest.mark.parametrize(("algorithm", "options"), [STEPS_TOGETHER[i] for i in (1, 4)])
def test_every_update_differentiates_a_chain_of_its_own_weights(
    make, monkeypatch, algorithm, options
):
    options = {"sampler.kernel": "ode", "train.lr": 0.02} | options
    options |= {"train.updates_per_epoch": 2, "train.inner_epochs": 2, "train.micro_batch": 1}
    trainer = make(algorithm, **options)
    perturb(trainer.policy)
    policy, weights = trainer.policy, []
    step = trainer.optimizer.step

    def recorded():
        weights.append(policy.state_dict())
        return step()

    monkeypatch.setattr(trainer.optimizer, "step", recorded)
    found = gradients(trainer, monkeypatch)
    data, plans = trainer._sample(0), trainer.learner.surrogates(0)
    updates = list(trainer.learner._updates(0))
    assert len(found) == len(plans) == len(updates) == len(weights) == 4
    assert [len(update.mine) for update in updates] == [2] * 4
    for got, plan, update, then in zip(found, plans, updates, weights, strict=True):
        policy.load_state_dict(then)
        loss, _ = stated(trainer, data, update.mine, plan)
        expected = flat(torch.autograd.grad(loss, trainer.optimizer.trained))
        assert expected.norm() > 1e-5
        assert (got - expected).norm() < 1e-4 * expected.norm()
    assert (found[2] - found[0]).norm() > 0.01 * found[0].norm()


def test_shares_of_two_processes_add_up(make, monkeypatch):
    """Four updates of one sample each: every one finds a process that has nothing to draw."""
    options = {"train.updates_per_epoch": 4, "sampler.kernel": "ddim", "algorithm.last": 2}
    trainer = make("draft", **options | {"algorithm.kl_weight": 5.0})
    perturb(trainer.policy)
    taken, parameters = [], trainer.optimizer.trained

    def recorded():
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        taken.append(flat(grads))
        trainer.optimizer.adamw.zero_grad()
        return 0.0

    monkeypatch.setattr(trainer.optimizer, "step", recorded)
    data, plans = trainer._sample(0), trainer.learner.surrogates(0)
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        own = slice(0, 4) if world == 1 else slice(2 * rank, 2 * rank + 2)
        part = Samples(data.prompts[own], data.keys[own], data.cond[own])
        shares = divided(4, world)
        replace(trainer.learner, rank=rank, shares=shares).from_gradients(0, part, plans)
    whole, first, second = (torch.stack(taken[i : i + 4]) for i in (0, 4, 8))
    assert (whole.norm(dim=1) > 1e-4).all()
    assert (first.norm(dim=1) == 0).sum() == (second.norm(dim=1) == 0).sum() == 2
    assert (first + second - whole).norm() < 1e-5 * whole.norm()


@pytest.mark.parametrize("algorithm", ["draft", "alignprop", "refl", "drtune"])
def test_calls_of_several_updates_are_those_planned(make, algorithm):
    options = {"train.updates_per_epoch": 2, "train.inner_epochs": 2, "train.micro_batch": 1}
    options |= {"sampler.guidance": 1.0, "algorithm.kl_weight": 1.0, "sampler.steps": 5}
    trainer = make(algorithm, **options)
    calls = 0
    for plan in trainer.learner.surrogates(0):  # of two samples each
        drawn, looked = (5, 0) if plan.at is None else (plan.at, 1)
        calls += 2 * (drawn + looked + 2 * len(plan.active))
    assert trainer.run_epoch(0)["denoiser_calls"] == calls
    if algorithm == "draft":  # whose plans are not random
        assert trainer.plan.calls_per_epoch == calls


def test_reward_losses():
    rewards = torch.tensor([1.0, 3.0])
    assert DRaFT().reward_loss(rewards).tolist() == [-1.0, -3.0]
    assert AlignProp(target=2.0).reward_loss(rewards).tolist() == [1.0, 1.0]
    assert AlignProp().reward_loss(rewards).tolist() == [-1.0, -3.0]
    assert ReFL(hinge=2.0).reward_loss(rewards).tolist() == [1.0, 0.0]
    assert ReFL().reward_loss(rewards).tolist() == [-1.0, -3.0]
