"""Guidance that leaves out calls: in the same way in rollouts, scoring and gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import helpers_algorithms
import pytest
import torch
from conftest import load, perturb

from diffalign.config.decoding import ConfigError
from diffalign.dynamics import Levels, Prediction
from diffalign.policies.guidance import Guidance
from diffalign.policies.unet import UNetPolicy
from diffalign.sampling.adjoint import Surrogate, adjoint_sweep
from diffalign.sampling.guide import Guide
from diffalign.sampling.rollout import Sampling, rollout

make = helpers_algorithms.make  # the fixture

STEPS, PROMPTS = 6, ["a", "b", "c"]


@pytest.fixture(params=["sd-v", "sd3"])
def drawing(request, pipelines):
    """A policy, its conditioning and a stochastic kernel."""
    policy = load(pipelines[request.param])
    policy.add_lora(2)
    perturb(policy)
    kernel = "flow_sde" if policy.predicts == "flow" else "ddim"
    return policy, policy.encode(PROMPTS), Sampling(policy.levels(STEPS), kernel, 0.7, 3.0)


def drawn(policy, cond, how, **options):
    before = policy.calls
    paths = rollout(policy, cond, how, range(len(cond)), batch=len(cond), **options)
    return paths, policy.calls - before


def test_a_schedule_of_all_steps_is_none_at_all(drawing):
    policy, cond, how = drawing
    plain, calls = drawn(policy, cond, how)
    for same in (Guidance(3.0), Guidance(3.0, low=-1.0), Guidance(3.0, adaptive=1e-9)):
        paths, same_calls = drawn(policy, cond, replace(how, guidance=same))
        assert torch.equal(paths.final, plain.final)
        assert torch.equal(paths.log_prob, plain.log_prob)
        assert same_calls == calls == 3 * 2 * STEPS


def test_a_schedule_of_no_step_is_no_guidance(drawing):
    policy, cond, how = drawing
    plain, calls = drawn(policy, cond, replace(how, guidance=1.0))
    none, none_calls = drawn(policy, cond, replace(how, guidance=Guidance(3.0, -1.0, 0.0)))
    assert torch.equal(none.final, plain.final)
    assert none_calls == calls == 3 * STEPS


@pytest.mark.parametrize("share", [0.5, 0.4, 1.0])
def test_a_cut_off_guides_the_first_steps(drawing, share):
    policy, cond, how = drawing
    cut = replace(how, guidance=Guidance(3.0).until(share, how.levels))
    first = math.ceil(share * STEPS)
    assert cut.guided(UNetPolicy) == [True] * first + [False] * (STEPS - first)
    assert drawn(policy, cond, cut)[1] == 3 * sum(cut.branches(UNetPolicy)) == 3 * (STEPS + first)


def test_an_interval_leaves_out_the_infinite_noise_level_of_the_start(drawing):
    _, _, how = drawing
    inner = replace(how, guidance=Guidance(3.0, 0.28, 5.42))
    ratio = (how.levels.sigma / how.levels.alpha)[:-1]
    assert inner.guided(UNetPolicy) == [0.28 < r <= 5.42 for r in ratio.tolist()]
    assert not inner.guided(UNetPolicy)[0]
    assert any(inner.guided(UNetPolicy))


def test_scoring_guides_where_the_rollout_did(drawing):
    """In micro-batches that mix guided and other steps too, in one call of the rows it takes."""
    policy, cond, how = drawing
    cut = replace(how, guidance=Guidance(3.0).until(0.5, how.levels))
    paths, _ = drawn(policy, cond, cut)
    steps = cut.drawn[torch.tensor([0, -1, 1])]
    rows = torch.arange(3)
    before = policy.calls
    again = cut.transition(policy, paths.states[rows, steps], steps, cond)
    assert policy.calls - before == 3 + sum(cut.guided(UNetPolicy)[i] for i in steps.tolist()) == 5
    log_prob = again.log_prob(paths.states[rows, steps + 1])
    assert (log_prob - paths.log_prob[rows, steps]).abs().max() < 1e-5
    everywhere = how.transition(policy, paths.states[rows, steps], steps, cond)
    assert not torch.allclose(everywhere.mean[1], again.mean[1], atol=1e-3)


def test_the_sweep_is_autograd_with_a_cut_off(drawing):
    policy, cond, how = drawing
    cut = replace(how, kernel="ode", guidance=Guidance(3.0).until(0.5, how.levels))
    states = drawn(policy, cond, cut)[0].states
    grad, active = torch.randn_like(states[:, 0]), tuple(range(STEPS))
    adjoint_sweep(policy, cond, cut, states, grad, Surrogate(active))
    swept = [p.grad.clone() for p in policy.trainable_parameters()]
    policy.network.zero_grad()
    x = states[:, 0]
    for i in range(STEPS):
        x = cut.transition(policy, x, i, cond).mean
    x.backward(grad)
    for ours, p in zip(swept, policy.trainable_parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, atol=1e-4, rtol=1e-3)


def test_the_scale_of_cfg_zero_star_is_of_each_sample():
    u, c = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    found = Guidance(3.0, star=True).combine(u, c)
    for i in range(2):
        s = (c[i] * u[i]).sum() / (u[i].square().sum() + 1e-8)
        torch.testing.assert_close(found[i], s * u[i] + 3.0 * (c[i] - s * u[i]))
    # where both branches point the same way, guidance changes nothing
    torch.testing.assert_close(Guidance(3.0, star=True).combine(2 * c, c), c)


def test_reuse_is_exact_where_the_direction_is_constant(drawing, monkeypatch):
    policy, cond, how = drawing
    reuse = replace(how, kernel="ode", guidance=Guidance(3.0, reuse=2))
    assert reuse.branches(UNetPolicy) == [2, 2, 2, 2, 2, 1]
    # the steps that count are those that are guided, wherever an interval puts them
    ratio = (how.levels.sigma / how.levels.alpha).tolist()
    late = replace(how, guidance=Guidance(3.0, -1.0, ratio[1], reuse=2))
    assert late.branches(UNetPolicy) == [1, 2, 2, 2, 2, 2]
    assert drawn(policy, cond, replace(late, kernel="ode"))[1] == 3 * sum(late.branches(UNetPolicy))
    direction = torch.randn(1, *policy.latent_shape)

    def call(x, t, text, guidance):
        # the rows of the negative prompt come first
        other = torch.arange(len(x)) < len(x) - len(PROMPTS)
        return 0.1 * x - direction * other.view(-1, 1, 1, 1)

    monkeypatch.setattr(policy, "call", call)
    plain, _ = drawn(policy, cond, replace(how, kernel="ode"))
    paths, calls = drawn(policy, cond, reuse)
    torch.testing.assert_close(paths.final, plain.final, atol=1e-4, rtol=1e-4)
    assert calls == 3 * sum(reuse.branches(UNetPolicy))


def test_what_is_remembered_depends_on_the_sample_alone(drawing):
    policy, cond, how = drawing
    for options in ({"adaptive": 0.5}, {"reuse": 2}, {"adaptive": 0.5, "reuse": 2}):
        one = replace(how, kernel="ode", guidance=Guidance(3.0, **options))
        whole, calls = drawn(policy, cond, one)
        before = policy.calls
        parts = rollout(policy, cond, one, range(3), batch=1)
        assert policy.calls - before == calls
        torch.testing.assert_close(parts.final, whole.final, atol=1e-4, rtol=1e-4)


def test_a_sample_that_guidance_hardly_moves_is_guided_no_more(drawing, monkeypatch):
    policy, cond, how = drawing
    one = replace(how, guidance=Guidance(3.0, adaptive=0.1))
    guide, x = Guide(policy, one), torch.ones(3, *policy.latent_shape)
    gap = torch.tensor([0.01, 1.0, 1.0]).view(3, 1, 1, 1)

    def branches(x, level, cond, rows):
        c = torch.ones_like(x)
        return (c * (1 - gap[: len(x)]))[rows], c

    monkeypatch.setattr(policy, "branches", branches)
    monkeypatch.setattr(policy, "parametrize", lambda x, f, level: Prediction(f, f, f))
    guide(x, 0, cond)
    assert guide.on.tolist() == [1, 2]


def test_what_remembers_can_be_neither_scored_nor_swept(drawing):
    policy, cond, how = drawing
    x = torch.randn(3, *policy.latent_shape)
    one = replace(how, kernel="ode", guidance=Guidance(3.0, reuse=2))
    with pytest.raises(ValueError, match="depends on earlier steps"):
        one.transition(policy, x, 0, cond)
    states = torch.randn(3, STEPS + 1, *policy.latent_shape)
    with pytest.raises(ValueError, match="depends on earlier steps"):
        adjoint_sweep(policy, cond, one, states, x, Surrogate((0, 1)))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"low": 1.0, "high": 1.0}, "no level"),
        ({"reuse": 0}, "reuse=0"),
        ({"adaptive": 0.0}, "0.0"),
    ],
)
def test_options_out_of_range(options, why):
    with pytest.raises(ValueError, match=why):
        Guidance(3.0, **options)


@pytest.mark.parametrize(
    ("algorithm", "options", "why"),
    [
        ("ddpo", {"sampler.guidance": 3.0, "sampler.guidance_reuse": 2}, "earlier steps left"),
        ("draft", {"sampler.guidance": 3.0, "sampler.guidance_adaptive": 0.2}, "earlier steps"),
        ("awm", {"sampler.guidance": 1.0, "sampler.guidance_until": 0.5}, "there is no guidance"),
        ("awm", {"sampler.guidance": 3.0, "sampler.guidance_star": True}, "for flow models"),
        ("awm", {"sampler.guidance": 3.0, "sampler.guidance_interval": [3, 1]}, r"\[low, high\]"),
        (
            "awm",
            {"sampler.guidance": 3.0, "sampler.guidance_interval": [1e6, 1e7]},
            r"none of sampler.steps=\d+, .*use sampler.guidance=1",
        ),
        (
            "awm",
            {"sampler.guidance": 3.0, "sampler.guidance_until": 1.5},
            "guidance_until=1.5 is no share",
        ),
        (
            "awm",
            {"eval.guidance": 1.0, "eval.guidance_reuse": 2},
            "eval.guidance_reuse=2 cannot be: .*eval.guidance=1",
        ),
    ],
)
def test_refused(make, algorithm, options, why):
    with pytest.raises((ConfigError, ValueError), match=why):
        make(algorithm, **{"sampler.kernel": "ddim" if algorithm == "ddpo" else "ode", **options})


@pytest.mark.parametrize("algorithm", ["ddpo", "awm", "draft"])
def test_the_plan_knows_the_calls(make, algorithm):
    kernel = "ddim" if algorithm == "ddpo" else "ode"
    options = {"sampler.guidance": 3.0, "sampler.guidance_until": 0.5, "sampler.kernel": kernel}
    trainer = make(algorithm, **options)
    before, cost = trainer.policy.calls, trainer.plan.calls_per_epoch
    trainer.run_epoch(0)
    calls = trainer.policy.calls - before
    if algorithm == "awm":  # its noise levels are drawn, those of guidance among them
        assert calls == pytest.approx(cost, rel=0.2)
    else:
        assert calls == cost


def test_a_level_knows_whether_it_is_guided():
    levels = Levels(torch.zeros(3), torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1.0, 0.5, 0.0]))
    assert Guidance(2.0).inside(levels).tolist() == [True, True, False]
    assert Guidance(2.0, 0.0, 1.0).inside(levels).tolist() == [False, True, False]
