"""Flow-DPPO (arXiv 2606.11025): rows masked by their KL from the policy that drew them."""

import math
from dataclasses import replace

import helpers_algorithms
import pytest
import torch
from helpers_algorithms import LATENT, SIGMAS, Outputs, close, flow, move, randn, transitions

from diffalign import algorithms
from diffalign.algorithms import surrogate
from diffalign.algorithms.flow_grpo import FlowGRPO
from diffalign.algorithms.grpo_guard import GRPOGuard
from diffalign.dynamics import Gaussian, Levels, Prediction

make = helpers_algorithms.make  # the fixture

FLOW = flow(torch.tensor(SIGMAS, dtype=torch.float64))
ALPHAS = torch.linspace(0.1, 1, 11, dtype=torch.float64)
VP = Levels(1000 * (1 - ALPHAS), ALPHAS, (1 - ALPHAS.square()).sqrt())
STEPS = torch.arange(8).repeat(4)  # the ninth is as good as without noise in some kernels
METHODS = [
    FlowGRPO(trust="kl"),
    FlowGRPO(trust="kl", log_prob="cps", step_weight="noise"),
    GRPOGuard(trust="kl"),
    GRPOGuard(trust="kl", ratio_norm=False),
]
methods = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)


def moved(n, size=0.1):
    """Outputs of a policy that has moved from the one that drew the rows."""
    old = randn(n, *LATENT)
    return {"old": old, "default": (old + size * randn(n, *LATENT)).requires_grad_()}


def gradient(method, policy, batch):
    loss, metrics = method.loss(policy, batch)
    return torch.autograd.grad(loss, policy.outputs["default"])[0], metrics


@methods
def test_the_first_update_is_that_of_the_ratio(method):
    outputs = moved(32)
    outputs["default"] = outputs["old"].clone().requires_grad_()
    policy, batch = transitions(FLOW, 0.7, STEPS, outputs, on_policy=True)
    found, metrics = gradient(replace(method, kl_max=1e-300), policy, batch)
    expected, _ = gradient(replace(method, trust="ratio"), policy, batch)
    assert expected.norm() > 1e-4
    close(found, expected, 1e-15)
    assert not metrics["trust_kl"].any()
    assert not metrics["masked"].any()


@methods
def test_no_trust_region_is_a_ratio_without_clip(method):
    policy, batch = transitions(FLOW, 0.7, STEPS, moved(32))
    found, metrics = gradient(replace(method, kl_max=math.inf), policy, batch)
    expected, _ = gradient(replace(method, trust="ratio", clip_range=math.inf), policy, batch)
    assert expected.norm() > 1e-4
    close(found, expected, 1e-15)
    assert not metrics["masked"].any()


@methods
def test_beyond_the_region_only_rows_that_come_back_keep_gradient(method):
    policy, batch = transitions(FLOW, 0.7, STEPS, moved(32))
    _, free = gradient(replace(method, kl_max=math.inf), policy, batch)
    # half of the rows are beyond
    method = replace(method, kl_max=free["trust_kl"].median().item())
    found, metrics = gradient(method, policy, batch)
    expected, _ = gradient(replace(method, kl_max=math.inf), policy, batch)
    step = batch.transition(batch.predict(policy))
    log_ratio = step.log_prob(batch.x_next) - batch.log_prob_old
    if isinstance(method, GRPOGuard) and method.ratio_norm:
        log_ratio = surrogate.ratio_norm(step, batch.mean_old, log_ratio)
    gone = (log_ratio.exp() > 1) & (batch.advantage > 0)
    gone |= (log_ratio.exp() < 1) & (batch.advantage < 0)
    masked = gone & (metrics["trust_kl"] >= method.kl_max)
    assert 0 < masked.sum() < gone.sum() < 32
    assert torch.equal(metrics["masked"].bool(), masked)
    assert not found[masked].any()
    # the mean is over all rows, so that the others count as before
    assert torch.equal(found[~masked], expected[~masked])
    assert expected[~masked].flatten(1).any(1).all()


def test_without_tolerance_only_corrections_are_learnt():
    log_ratio = torch.tensor([0.1, 0.1, -0.1, -0.1, 0.0, 0.1], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 0.0])
    loss, mask = surrogate.masked(log_ratio, advantage, torch.full((6,), 0.3), 0.0)
    assert mask.tolist() == [True, False, False, True, False, False]
    (found,) = torch.autograd.grad(loss.sum(), log_ratio)
    close(found, torch.where(mask, 0, -advantage * log_ratio.exp()), 1e-7)
    # the threshold itself is beyond
    for tau, any_masked in ((0.3, True), (0.301, False), (math.inf, False)):
        _, mask = surrogate.masked(log_ratio, advantage, torch.full((6,), 0.3), tau)
        assert mask.any() == any_masked


def test_a_ratio_that_overflows_leaves_no_nan():
    log_ratio = torch.tensor([1e4, 1e4], requires_grad=True)
    loss, _ = surrogate.masked(log_ratio, torch.tensor([1.0, -1.0]), torch.ones(2), 1e-5)
    (found,) = torch.autograd.grad(loss.sum(), log_ratio)
    assert loss.isfinite().all()
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("kernel", "eta", "path"),
    [
        ("flow_sde", 0.7, "flow"),
        ("dance_sde", 0.3, "flow"),
        ("cps", 0.8, "flow"),
        ("ddim", 1.0, "flow"),
        ("cps", 0.5, "epsilon"),
        ("ddim", 0.6, "epsilon"),
        ("ddim", 1.0, "v"),
    ],
)
def test_the_kl_is_that_of_the_outputs(monkeypatch, kernel, eta, path):
    """D = (c/s)² mean_D (f_θ - f_old)² / 2, c = |∂μ/∂f|."""
    of = {"flow": "from_flow", "epsilon": "from_epsilon", "v": "from_v"}[path]
    monkeypatch.setattr(Outputs, "parametrize", staticmethod(getattr(Prediction, of)))
    outputs = moved(32)
    policy, batch = transitions(FLOW if path == "flow" else VP, eta, STEPS, outputs, kernel=kernel)
    _, metrics = FlowGRPO(trust="kl").loss(policy, batch)
    w = (batch.sampling.sensitivity(policy) / batch.sampling.stds)[STEPS]
    change = (outputs["default"] - outputs["old"]).detach().square().flatten(1).mean(1)
    close(metrics["trust_kl"], w.square() * change / 2, 1e-10)
    assert (metrics["trust_kl"] > 1e-6).all()


def test_twice_the_noise_is_a_quarter_of_the_kl():
    policy, batch = transitions(FLOW, 0.7, STEPS, moved(32))
    step = batch.transition(batch.predict(policy))
    found = []
    for factor in (1, 2):
        wider = Gaussian(step.mean, factor * step.std)
        _, metrics = FlowGRPO(trust="kl").objective(randn(32), wider, batch)
        found.append(metrics["trust_kl"])
    close(found[1], found[0] / 4, 1e-12)
    assert (found[0] > 1e-6).all()


def test_the_ratio_says_it_only_in_the_mean():
    """E[log ρ] = -D, with a standard deviation of √(2D/n) over n elements."""
    n, one = 4000, moved(1)
    outputs = {k: v.detach().expand(n, *LATENT) for k, v in one.items()}
    policy, batch = transitions(FLOW, 0.7, torch.full((n,), 4), outputs)
    _, metrics = FlowGRPO(trust="kl").loss(policy, batch)
    d = metrics["trust_kl"]
    close(d, d[:1].expand(n), 1e-12)
    step = batch.transition(batch.predict(policy))
    log_ratio = step.log_prob(batch.x_next) - batch.log_prob_old
    spread = (2 * d[0] / math.prod(LATENT)).sqrt()
    assert (log_ratio.mean() + d[0]).abs() < 3 * spread / n**0.5 < d[0] / 2
    assert log_ratio.std().item() == pytest.approx(spread.item(), rel=0.05)


def test_the_sign_of_guards_ratio_tells_which_descent_raises_the_kl():
    outputs = moved(32)
    policy, batch = transitions(FLOW, 0.7, STEPS, outputs)
    method = GRPOGuard(trust="kl", kl_max=math.inf)
    descent = -gradient(method, policy, batch)[0]
    step = batch.transition(batch.predict(policy))
    kl = step.kl(Gaussian(batch.mean_old, step.std)).sum()
    (rise,) = torch.autograd.grad(kl, outputs["default"])
    raises = (rise * descent).flatten(1).sum(1) > 0
    _, metrics = replace(method, kl_max=1e-300).loss(policy, batch)
    assert torch.equal(metrics["masked"].bool(), raises)
    assert 0 < raises.sum() < 32


@pytest.mark.parametrize("algorithm", ["flow_grpo", "grpo_guard"])
def test_several_updates_of_a_rollout(make, monkeypatch, algorithm):
    """The means are those that the sampler drew from, so that D starts at 0 and rises."""
    options = {"sampler.kernel": "flow_sde", "sampler.eta": 0.7, "train.inner_epochs": 3}
    options |= {"algorithm.trust": "kl", "train.micro_batch": 64, "algorithm.kl_max": 1e-9}
    trainer = make(algorithm, kind="sd3", **options)
    move(trainer)
    seen, kind, loss = [], algorithms.ALGORITHMS[algorithm], algorithms.ALGORITHMS[algorithm].loss

    def recorded(self, policy, batch):
        value, metrics = loss(self, policy, batch)
        step = batch.transition(batch.predict(policy))
        drift = (step.mean.detach() - batch.mean_old).abs().max()
        seen.append((drift, metrics["trust_kl"], metrics["masked"]))
        return value, metrics

    monkeypatch.setattr(kind, "loss", recorded)
    metrics = trainer.run_epoch(0)
    drifts, divergences, masks = zip(*seen, strict=True)
    assert drifts[0] < 1e-5
    assert [bool(d.any()) for d in divergences] == [False, True, True]
    assert divergences[2].mean() > divergences[1].mean()
    assert [bool(m.any()) for m in masks] == [False, True, True]
    assert metrics["trust_kl"] == pytest.approx(torch.stack(divergences).mean().item())
    assert 0 < metrics["masked"] < 1
    assert "clip_high" not in metrics


@pytest.mark.parametrize(
    ("method", "stored"),
    [(FlowGRPO(), False), (GRPOGuard(), True), (GRPOGuard(ratio_norm=False), False)]
    + [(method, True) for method in METHODS],
)
def test_means_are_stored_where_they_are_used(method, stored):
    assert method.stores_means is stored


def test_a_clip_stores_no_means(make):
    for trust in ("ratio", "kl"):
        trainer = make("flow_grpo", run=trust, **{"algorithm.trust": trust})
        assert (trainer._sample(0).paths.means is not None) == (trust == "kl")


@pytest.mark.parametrize("algorithm", ["flow_grpo", "grpo_guard"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trust": "clip"}, r"trust='clip'.*ratio.*kl"),
        ({"trust": "kl", "kl_max": 0.0}, r"kl_max=0 must be positive"),
        ({"trust": "kl", "kl_max": -1e-5}, r"kl_max=-1e-05 must be positive"),
        ({"trust": "kl", "kl_max": math.nan}, r"kl_max=nan is no number"),
        ({"trust": "kl", "kl_max": "many"}, r"kl_max.*many"),
        ({"trust": "kl", "tau": 1e-5}, r"unknown key 'algorithm\.tau'"),
    ],
)
def test_bad_options_are_refused(algorithm, options, message):
    with pytest.raises(ValueError, match=message):
        algorithms.build({"type": algorithm, **options})


def test_an_infinite_region_may_be_written():
    for written in ("inf", math.inf):
        options = {"type": "flow_grpo", "trust": "kl", "kl_max": written}
        assert algorithms.build(options).kl_max == math.inf
