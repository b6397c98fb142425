"""The gradient noise scale: unbiased where it is known, and that of the loop's own gradients."""

import math

import helpers_algorithms
import pytest
import torch
from accelerate import Accelerator
from helpers_algorithms import move
from torch import nn

from diffalign.commands import cli
from diffalign.record.metrics import Meter
from diffalign.training import saving
from diffalign.training.learning import Update
from diffalign.training.noise_scale import HOPELESS, TELLING, NoiseScale, Parts, scale

make = helpers_algorithms.make  # the fixture

MEAN = torch.tensor([0.3, -0.1, 0.2, 0.0])
COVARIANCE = torch.tensor([1.0, 2.0, 0.5, 0.25])  # a diagonal


def update(groups, generator, parameters, factor=1.0):
    """The figures of an update whose pictures have independent gradients; a micro-batch each."""
    split, n = Parts(parameters, groups, factor), len(groups)
    parameters[0].grad = None
    for done in range(1, n + 1):
        g = MEAN + COVARIANCE.sqrt() * torch.randn(4, generator=generator)
        old = parameters[0].grad
        parameters[0].grad = factor * g / n if old is None else old + factor * g / n
        split.learnt(done)
    return split.figures((parameters[0].grad / factor).norm(), n, Accelerator(cpu=True))


@pytest.mark.parametrize("groups", [list(range(6)), [0, 0, 0, 1, 2, 2], [0, 0, 0, 1, 1, 1]])
@pytest.mark.parametrize("factor", [1.0, 1024.0])
def test_known_covariance(groups, factor):
    generator, weight = torch.Generator().manual_seed(0), nn.Parameter(torch.zeros(4))
    found = [update(groups, generator, [weight], factor) for _ in range(4000)]
    for name, truth in (
        ("gradient_signal", MEAN.square().sum()),
        ("gradient_noise", COVARIANCE.sum()),
    ):
        values = torch.stack([f[name] for f in found])
        error = values.std() / len(values) ** 0.5
        assert values.mean() == pytest.approx(truth.item(), abs=3 * error.item()), name


def test_one_part_tells_nothing():
    weight = nn.Parameter(torch.zeros(4))
    assert update([0, 0, 0], torch.Generator(), [weight]) == {}


def test_a_picture_in_part_ends_nothing():
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    split = Parts([weight], [0, 1], 1.0)
    for done in (0.5, 1.5):
        split.learnt(done)
    assert not split._squares
    split.learnt(2)
    assert split._pictures == [2]


def test_scale_and_its_error():
    torch.manual_seed(0)
    seen = [(0.5 + 0.1 * a, 10 + b) for a, b in torch.randn(400, 2).tolist()]
    found = scale(seen)
    assert found["noise_scale"] == pytest.approx(20, rel=0.03)
    expected = 20 * math.hypot(0.1 / 0.5, 1 / 10) / 20
    assert found["noise_scale_error"] == pytest.approx(expected, rel=0.1)
    assert found["noise_scale_least"] < found["noise_scale"]
    assert scale(seen[:1]) == {}
    # no signal: only a bound
    assert set(scale([(-1.0, 10.0), (1.1, 12.0), (-0.5, 11.0)])) == {"noise_scale_least"}


def test_words_come_once_and_only_for_noise():
    for signal, told in ((1e-3, 1), (1.0, 0)):
        noise_scale, lines = NoiseScale(pictures=16), []
        for i in range(2 * TELLING):
            metrics = {"gradient_signal": signal * (1 + 0.01 * (i % 2)), "gradient_noise": 10.0}
            metrics |= noise_scale.add(metrics)
            lines += noise_scale.worries(metrics)
        assert len(lines) == told
        if told:
            assert metrics["noise_scale"] > HOPELESS * 16
            assert "an update has 16 pictures and its noise scale is about 9,9" in lines[0]
    again = NoiseScale(16)
    again.load_state_dict(noise_scale.state_dict())
    assert again == noise_scale


def test_what_is_not_finite_is_left_out():
    noise_scale = NoiseScale(16)
    noise_scale.add({"gradient_signal": math.nan, "gradient_noise": 1.0})
    noise_scale.add({})
    assert noise_scale.seen == []


def summed(trainer, rows, data, credit, plan):
    """The gradient that some of an epoch's samples have in its update."""
    trainer.optimizer.adamw.zero_grad()
    n = trainer.plan.samples
    if credit is None:
        split = trainer.learner.sweep(data, Update(rows, n, n), plan, Meter(), {}, [])
    else:
        split = trainer.learner.accumulate(data, credit, Update(rows, n, n), True, Meter())
    return split, torch.cat([p.grad.flatten() for p in trainer.optimizer.trained])


@pytest.mark.parametrize("algorithm", ["ddpo", "awm", "draft"])
def test_parts_are_the_gradients_of_prompts(make, algorithm):
    options = {
        "ddpo": {"train.micro_batch": 3},  # the last of the 4 steps has no chance in it
        "awm": {"sampler.kernel": "ode", "train.micro_batch": 2},
        "draft": {"sampler.kernel": "ode", "train.micro_batch": 2},
    }
    trainer = make(algorithm, **options[algorithm], **{"data.groups": 3})
    move(trainer)
    data, credit, plan = trainer._sample(0), None, None
    if algorithm == "draft":
        (plan, *_) = trainer.learner.surrogates(0)
    else:
        credit, _ = trainer.credit(data)
    n = trainer.plan.samples
    prompts = [key[1] for key in data.keys]
    split, whole = summed(trainer, torch.arange(n), data, credit, plan)
    ends = torch.tensor(split._pictures).cumsum(0).tolist()
    assert len(ends) > 1
    assert ends[-1] == n
    assert all(e == n or prompts[e - 1] != prompts[e] for e in ends)
    each = [
        summed(trainer, torch.arange(a, b), data, credit, plan)[1]
        for a, b in zip([0, *ends], ends, strict=False)
    ]
    torch.testing.assert_close(sum(each), whole, rtol=1e-3, atol=1e-6)
    for found, g in zip(split._squares, each, strict=True):
        assert found.item() == pytest.approx(g.square().sum().item(), rel=1e-3)


def test_a_run_logs_it_and_goes_on_with_it(make):
    trainer = make("awm", **{"sampler.kernel": "ode", "train.micro_batch": 2, "train.epochs": 3})
    rows = [trainer.run_epoch(i) for i in range(3)]
    assert all({"gradient_signal", "gradient_noise"} <= row.keys() for row in rows)
    assert "noise_scale_least" not in rows[0]
    seen = trainer.noise_scale.seen
    assert seen == [(r["gradient_signal"], r["gradient_noise"]) for r in rows]
    assert saving.state(trainer)["noise_scale"] == {"seen": seen}


def test_the_command(pipelines, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red apple\na blue car\na green leaf\n")
    config = tmp_path / "c.yaml"
    config.write_text(
        f"model: {{name: {pipelines['sd-v']}, resolution: 16}}\n"
        "sampler: {steps: 3, batch: 4}\nrewards: {jpeg: 1.0}\n"
        f"data: {{prompts: {prompts}, groups: 3, group_size: 4}}\n"
        "train: {micro_batch: 4}\n"
    )
    assert cli.probe([str(config), "--epochs", "3"]) == 0
    out = capsys.readouterr().out
    for text in ("3 updates of 12 pictures (3 prompts)", "all that is trained", "step 0, sigma/"):
        assert text in out, out
    assert not (tmp_path / "runs").exists()
    for options, why in (
        (["--epochs", "1"], "leaves nothing to compare"),
        (["--data.groups", "1"], "give one part of a gradient"),
    ):
        assert cli.probe([str(config), *options]) == 1
        assert why in capsys.readouterr().err
