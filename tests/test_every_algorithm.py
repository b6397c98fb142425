"""Every algorithm on every family, and its copies through the loop."""

from __future__ import annotations

import math

import helpers_algorithms
import pytest
import torch
from conftest import perturb
from helpers_algorithms import (
    FLOWS,
    KINDS,
    LATENT,
    SD3,
    close,
    move,
    randn,
    trained,
    transitions,
)
from test_trainer import gradients

from diffalign.algorithms import ALGORITHMS, Needs, Transitions
from diffalign.algorithms.dpok import DPOK

make = helpers_algorithms.make  # the fixture


@pytest.mark.parametrize(
    "options",
    [
        {"window": 2, "window_schedule": "progressive", "tail": 1},
        {"window": 1, "window_schedule": "branch", "same_noise": True},
    ],
)
def test_mixed_samplers_train(make, monkeypatch, options):
    options = {f"sampler.{k}": v for k, v in options.items()}
    options |= {"sampler.kernel": "flow_sde", "sampler.eta": 0.7, "data.group_size": 6}
    trainer = make("flow_grpo", kind="sd3", **options)
    move(trainer)
    before, kept = trained(trainer), []
    advantages = trainer._advantages

    def recorded(total, parts, groups):
        kept.append((groups, advantages(total, parts, groups)))
        return kept[-1][1]

    monkeypatch.setattr(trainer, "_advantages", recorded)
    metrics = trainer.run_epoch(0)
    assert metrics["mismatch_max"] < 1e-5
    assert metrics["ratio_drift"] == 0
    assert not torch.equal(trained(trainer), before)
    # branches are compared among those of the same step
    ((groups, (advantage, *_)),) = kept
    assert len(groups.unique()) == (6 if options["sampler.window"] == 1 else 2)
    for group in groups.unique():
        assert advantage[groups == group].sum().abs() < 1e-3


def frozen(trainer):
    """Everything but adapters, by name."""
    parts = trainer.policy.pipe.components.items()
    return {
        f"{part}.{name}": value.clone()
        for part, module in parts
        if isinstance(module, torch.nn.Module)
        for name, value in module.state_dict().items()
        if "lora_" not in name
    }


def in_family(algorithm, kind):
    """Options that suit both."""
    needs, flows = ALGORITHMS[algorithm].needs, kind in FLOWS
    options = {"sampler.steps": 3}
    if needs is Needs.FINAL:
        options["sampler.kernel"] = "ode"
    elif flows and algorithm in ("flow_grpo", "grpo_guard"):
        options |= {"sampler.kernel": "flow_sde", "sampler.eta": 0.7}
    return options


# the last block computes queries of the text, or text, that nothing reads
LAST = "transformer_blocks.1."
UNUSED = {"sd3": {f"{LAST}attn.add_q_proj"}}
UNUSED["qwen"] = {f"{LAST}attn.add_q_proj", f"{LAST}attn.to_add_out"}
UNUSED["qwen"] |= {f"{LAST}txt_mlp.net.0.proj", f"{LAST}txt_mlp.net.2"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_trains_every_family(make, algorithm, kind):
    trainer = make(algorithm, kind=kind, **in_family(algorithm, kind))
    move(trainer)
    parameters = dict(trainer.policy.network.named_parameters())
    before = {k: p.detach().clone() for k, p in parameters.items() if p.requires_grad}
    rest = frozen(trainer)
    metrics = trainer.run_epoch(0)
    still = {k.split(".lora")[0] for k, b in before.items() if torch.equal(b, parameters[k])}
    assert still == UNUSED.get(kind, set())
    after = frozen(trainer)
    assert rest.keys() == after.keys()
    assert [k for k in rest if not torch.equal(rest[k], after[k])] == []
    assert all(math.isfinite(v) for v in metrics.values()), metrics
    assert metrics["grad_norm"] > 0
    assert metrics.get("ratio_drift", 0) == 0
    if trainer.algorithm.needs is Needs.TRAJECTORY:
        assert metrics["mismatch_max"] < 1e-5


@pytest.mark.parametrize(
    ("algorithm", "kind"), [(a, KINDS[i % len(KINDS)]) for i, a in enumerate(ALGORITHMS)]
)
def test_every_algorithm_trains_in_bfloat16_with_an_anchor(make, algorithm, kind):
    options = {"model.dtype": "bfloat16", "algorithm.kl_weight": 0.1}
    options |= in_family(algorithm, kind)
    trainer = make(algorithm, kind=kind, **options)
    move(trainer)
    before = trained(trainer)
    metrics = trainer.run_epoch(0)
    assert all(math.isfinite(v) for v in metrics.values()), metrics
    assert metrics["kl"] > 0
    assert trained(trainer).dtype == torch.float32
    assert trained(trainer).isfinite().all()
    assert not torch.equal(trained(trainer), before)


def test_refl_trains_a_one_step_model(make, monkeypatch):
    """Its reward is of the first prediction, so the rollout takes no step at all."""
    options = {"sampler.steps": 1, "sampler.guidance": 0.0}
    found = []
    for algorithm in ("refl", "draft"):
        trainer = make(algorithm, run=algorithm, kind="sd-turbo", **options)
        perturb(trainer.policy)
        found += gradients(trainer, monkeypatch)
    assert found[1].norm() > 1e-5
    assert (found[0] - found[1]).norm() < 1e-4 * found[1].norm()


@pytest.mark.parametrize("algorithm", ["flow_grpo", "grpo_guard", "awm", "fpo", "nft"])
def test_second_update_is_off_policy(make, monkeypatch, algorithm):
    kind, options = ALGORITHMS[algorithm], in_family(algorithm, "sd3")
    options |= {"train.updates_per_epoch": 2, "train.micro_batch": 64, "data.group_size": 4}
    trainer = make(algorithm, kind="sd3", **options)
    move(trainer)
    seen, loss = [], kind.loss
    trainer.policy.add_copy("start")

    def recorded(self, policy, batch):
        with torch.no_grad(), policy.adapter("start"):
            start = batch.predict(policy)
        if "old" in trainer.copies:
            with torch.no_grad(), policy.adapter("old"):
                assert torch.equal(batch.predict(policy).native, start.native)
        if isinstance(batch, Transitions):
            close(batch.transition(start).log_prob(batch.x_next), batch.log_prob_old, 1e-5)
        if trainer.algorithm.stores_means:
            close(batch.transition(start).mean, batch.mean_old, 1e-5)
        value, metrics = loss(self, policy, batch)
        seen.append((batch, metrics))
        return value, metrics

    monkeypatch.setattr(kind, "loss", recorded)
    trainer.run_epoch(0)
    (first, ours), (second, theirs) = seen
    assert (first.on_policy, second.on_policy) == (True, False)
    drift = "old_distance" if algorithm == "nft" else "ratio_drift"
    assert not ours[drift].any()
    assert (theirs[drift] > 0).all()


@pytest.mark.parametrize("algorithm", ["awm", "fpo", "nft"])
def test_copies_follow_after_every_epoch(make, algorithm):
    # large steps, which a decay of 0.001 and one of 0 can be told apart by
    trainer = make(algorithm, **{"sampler.kernel": "ode", "train.epochs": 2, "train.lr": 0.1})
    move(trainer)
    policy = trainer.policy
    for epoch in range(2):
        before = {name: policy.state_dict(name) for name in trainer.copies}
        trainer.run_epoch(epoch)
        now = policy.state_dict()
        for name in trainer.copies:
            slow = name == "slow" or algorithm == "nft"
            d, copy = 0.001 * (epoch + 1) if slow else 0.0, policy.state_dict(name)
            for k in copy:
                close(copy[k], d * before[name][k] + (1 - d) * now[k], 1e-6)
                assert torch.equal(copy[k], now[k]) is not slow


def test_nft_rollouts_are_drawn_by_the_old_policy(make):
    finals = []
    for shift in (False, True):
        trainer = make("nft", run=str(shift), **{"sampler.kernel": "ode"})
        move(trainer)
        if shift:
            perturb(trainer.policy)
        finals.append(trainer._sample(0).paths.final)
    assert torch.equal(*finals)


def test_kl_target_in_training(make):
    options = {"algorithm.kl_weight": 4.0, "algorithm.kl_target": 1e-8, "train.epochs": 2}
    trainer = make("draft", **options)
    perturb(trainer.policy)
    metrics = trainer.run_epoch(0)
    assert metrics["kl"] > 1e-6
    assert (metrics["kl_weight"], trainer.algorithm.kl_weight) == (4.0, 8.0)


def test_dpok_learns_a_value():
    velocity = randn(3, *LATENT)
    outputs = dict.fromkeys(("default", "old", "base"), velocity)
    policy, batch = transitions(SD3, 0.7, torch.tensor([1, 4, 8]), outputs, on_policy=True)
    method, value = DPOK(value_weight=2.0), torch.tensor([0.5, 0.0, -1.0], requires_grad=True)
    method.value = lambda rows: value
    loss, metrics = method.loss(policy, batch)
    residual = batch.reward - value.detach()
    close(loss.detach(), (-residual + 2 * residual.square()).mean(), 1e-6)
    close(metrics["value_error"], residual.square(), 1e-6)
    # the value learns from its error alone
    close(torch.autograd.grad(loss, value)[0], -4 * residual / 3, 1e-6)


@pytest.mark.parametrize("kind", ["sd-v", "flux-dev"])
def test_dpok_resumes_with_its_value(make, kind):
    options = {"algorithm.value_weight": 1.0, "train.epochs": 2, "train.checkpoint_every": 1}

    def value(trainer):
        return torch.cat([v.flatten() for v in trainer.algorithm.state_dict()["value"].values()])

    whole = make("dpok", run="whole", kind=kind, **options)
    first = value(whole)
    whole.train()
    half = make("dpok", run="half", kind=kind, **options | {"train.epochs": 1})
    assert torch.equal(value(half), first)
    half.train()
    assert (value(half) != first).float().mean() > 0.5
    resumed = make("dpok", run="half", resume=True, kind=kind, **options)
    assert torch.equal(value(resumed), value(half))
    resumed.train()
    assert torch.equal(value(resumed), value(whole))
    assert torch.equal(trained(resumed), trained(whole))
    assert not torch.equal(value(resumed), value(half))
