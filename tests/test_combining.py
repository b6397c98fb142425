"""Several rewards together: constraints, ensembles, missing values, gradients, views, threads."""

from __future__ import annotations

import json
import threading
import time
from functools import partial

import pytest
import test_trainer
import torch
from conftest import peak_saved
from PIL import Image
from test_trainer import adapter, redness, rows_of

import rewards
from rewards.files import load_image
from rewards.gradients import merge

make = test_trainer.make  # the fixture


def value(images, prompts):
    """The first pixel."""
    return images[:, 0, 0, 0]


value.differentiable = True


def minus_value(images, prompts):
    return -images[:, 0, 0, 0]


minus_value.differentiable = True


def images_of(*values):
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 8, 8).clone()


def test_min_and_lower_bound():
    images = images_of(0.2, 0.6)
    members = {value: 1.0, minus_value: 1.0}
    low = rewards.build({"low": {"type": "ensemble", "of": members}})
    torch.testing.assert_close(low(images, ["a", "b"]), torch.tensor([-0.2, -0.6]))
    bound = rewards.build(
        {"low": {"type": "ensemble", "of": members, "how": "mean_std", "penalty": 0.5}}
    )
    # mean 0, population std 0.2 and 0.6
    torch.testing.assert_close(bound(images, ["a", "b"]), torch.tensor([-0.1, -0.3]))
    assert bound.differentiable
    agreeing = rewards.Ensemble({value: 1, "twin": {"type": "test_combining:value"}}, "mean_std")
    x = images.requires_grad_()
    (grad,) = torch.autograd.grad(agreeing(x, ["a", "b"]).sum(), x)
    assert grad.isfinite().all()
    assert grad[0, 0, 0, 0] == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"of": {"jpeg": 1}}, "two rewards or more"),
        ({"of": {"jpeg": 1, "jpge": 1}}, "did you mean 'jpeg'"),
        ({"of": {"jpeg": 1, value: 1}, "how": "median"}, "min, mean_std"),
        ({"of": {"jpeg": 1, value: 1}, "penalty": -1}, "penalty=-1"),
    ],
)
def test_ensembles_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        rewards.check({"careful": {"type": "ensemble", **options}})


def test_a_constraint_finds_its_multiplier():
    """maximise -x² subject to x >= 1/2: at the optimum x = 1/2, λ = 2x = 1."""
    total = rewards.build({minus_value: 1, "floor": {"type": value, "at_least": 0.5, "weight": 0}})
    x = 0.0
    for _ in range(400):
        x += 0.05 * (total.weights["floor"] - 2 * x)  # ascent on -x² + λ x
        total.adapt({"floor": x})
    assert x == pytest.approx(0.5, abs=0.01)
    assert total.weights["floor"] == pytest.approx(1, abs=0.02)
    kept = total.state_dict()
    other = rewards.build({minus_value: 1, "floor": {"type": value, "at_least": 0.5}})
    other.load_state_dict(kept)
    assert other.weights == total.weights
    total.adapt({"floor": 1e6})
    assert total.weights["floor"] == 0  # never negative


def test_constraints_are_checked():
    with pytest.raises(ValueError, match="every reward is a constraint"):
        rewards.check({"jpeg": {"at_least": 1}})
    for bad in ({"at_least": "x"}, {"at_least": 1, "rate": 0}, {"at_least": 1, "weight": -1}):
        with pytest.raises(ValueError, match=r"rewards\.jpeg"):
            rewards.check({value: 1, "jpeg": bad})


def test_rewards_of_some_prompts_only():
    total = rewards.build({value: 1.0, "down": {"type": minus_value, "weight": 10}})
    images, known = images_of(0.1, 0.2, 0.3), [{"rewards": ["value"]}, {"rewards": ["down"]}, {}]
    summed, parts = total.score(images, ["a", "b", "c"], known)
    torch.testing.assert_close(parts["value"], torch.tensor([0.1, torch.nan, 0.3]), equal_nan=True)
    torch.testing.assert_close(parts["down"], torch.tensor([torch.nan, -0.2, -0.3]), equal_nan=True)
    torch.testing.assert_close(summed, torch.tensor([0.1, -2.0, -2.7]))
    for wrong in ([], ["valeu"], "value"):
        with pytest.raises(ValueError, match="metadata; give a list"):
            rewards.check({value: 1}, ["a"], [{"rewards": wrong}])


def test_a_missing_reward_has_no_gradient():
    total = rewards.build({value: 1.0, "down": {"type": minus_value, "weight": 10}})
    x = images_of(0.1, 0.2).requires_grad_()
    summed, _ = total.score(x, ["a", "b"], [{"rewards": ["value"]}, {"rewards": ["down"]}])
    (grad,) = torch.autograd.grad(summed.sum(), x)
    assert grad[:, 0, 0, 0].tolist() == [1, -10]


def squares(images, prompts):
    return images.square().flatten(1).mean(1)


squares.differentiable = True


@pytest.mark.parametrize(
    "asked",
    [
        [None, None, None, None],
        [["squares"], None, ["down", "value"], []],
        [["squares"], ["squares"], ["squares"], []],  # nobody asks the others
    ],
)
def test_gradient_is_that_of_the_summed_scores(asked):
    torch.manual_seed(0)
    down = {"type": minus_value, "weight": -0.5}
    total = rewards.build({squares: 2.0, value: 0.0, "down": down})
    images, prompts = torch.rand(4, 3, 8, 8), list("abcd")
    known = [{} if names is None else {"rewards": names} for names in asked]
    x = images.clone().requires_grad_()
    expected, expected_parts = total.score(x, prompts, known)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    before = total.images
    found, parts, grad = total.gradient(images, prompts, known)
    torch.testing.assert_close(grad, slope)
    torch.testing.assert_close(found, expected.detach(), equal_nan=True)
    assert list(parts) == list(expected_parts)
    for name, values in parts.items():
        torch.testing.assert_close(values, expected_parts[name].detach(), equal_nan=True)
        assert not values.requires_grad
    assert total.images - before == 4
    assert not images.requires_grad
    found, _, grad = total.gradient(images, prompts, [{"rewards": []}] * 4)
    assert found.isnan().all()
    assert not grad.any()


def test_gradient_holds_the_graph_of_one_reward_at_a_time():
    peaks = []
    for names in ("a", "abc"):
        total = rewards.build({name: {"type": squares} for name in names})
        peaks.append(peak_saved(partial(total.gradient, images_of(0.1, 0.2), ["a", "b"])))
    assert peaks[0] == peaks[1] > 0


def test_what_does_not_count_needs_no_gradient():
    def blind(images, prompts):
        return images[:, 0, 0, 0].round()

    images, prompts = images_of(0.2, 0.7), ["a", "b"]
    with pytest.raises(ValueError, match=r"rewards\.blind is not differentiable"):
        rewards.build({value: 1.0, blind: 0.1}).require_differentiable()
    total = rewards.build({value: 3.0, blind: 0.0})
    total.require_differentiable()
    summed, parts, grad = total.gradient(images, prompts)
    assert parts["blind"].tolist() == [0, 1]
    torch.testing.assert_close(summed, 3 * parts["value"])
    assert grad[:, 0, 0, 0].tolist() == [3, 3]
    assert grad.sum() == 6


def test_rewards_run_in_threads_and_keep_their_order():
    names = []

    def slow(images, prompts):
        names.append(threading.current_thread().name)
        time.sleep(0.2 if len(names) == 1 else 0)
        return images[:, 0, 0, 0]

    total = rewards.build({"a": {"type": slow}, "b": {"type": slow}})
    with torch.no_grad():
        _, parts = total.score(images_of(0.1, 0.9), ["x", "y"])
    assert list(parts) == ["a", "b"]
    assert torch.equal(parts["a"], parts["b"])
    assert all(name.startswith("reward") for name in names)


def test_merged_gradients():
    torch.manual_seed(0)
    g, ones = torch.randn(5, 3, 4, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(merge(g, ones), g.sum(1))
    weights = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(merge(g, weights), g[:, 0] - 2 * g[:, 1])
    # one steep reward rules the sum, not the normalized one
    steep = g * torch.tensor([1e6, 1.0, 1.0], dtype=torch.float64)[None, :, None]
    merged = merge(steep, ones, "normalized")
    assert torch.equal(merge(steep, ones, "normalised"), merged)  # the former spelling
    unit = (g / g.norm(dim=2, keepdim=True)).sum(1)
    torch.testing.assert_close(merged / merged.norm(dim=1, keepdim=True),
                               unit / unit.norm(dim=1, keepdim=True))  # fmt: skip
    # two rewards: what each loses is what it has against the other
    two = merge(g[:, :2], ones[:2], "pcgrad")
    a, b = g[:, 0], g[:, 1]
    dot = (a * b).sum(1, keepdim=True).clamp(max=0)
    expected = a - dot / b.square().sum(1, keepdim=True) * b
    expected = expected + b - dot / a.square().sum(1, keepdim=True) * a
    torch.testing.assert_close(two, expected)


def test_min_norm_raises_every_reward():
    torch.manual_seed(0)
    g = torch.randn(200, 3, 4, dtype=torch.float64)
    merged = merge(g, torch.ones(3, dtype=torch.float64), "min_norm")
    unit = g / g.norm(dim=2, keepdim=True)
    along = torch.einsum("nkd,nd->nk", unit, merged)
    assert (along > -1e-9).all()
    # two opposite rewards: nothing raises both
    opposite = torch.stack([g[:, 0], -g[:, 0]], 1)
    assert merge(opposite, torch.ones(2, dtype=torch.float64), "min_norm").abs().max() < 1e-6
    # a shortest vector of the hull: no other point of it is shorter
    scale = g.norm(dim=2).mean(1)
    shortest = merged.norm(dim=1) / scale
    for _ in range(200):
        chance = torch.rand(200, 3, dtype=torch.float64)
        point = torch.einsum("nk,nkd->nd", chance / chance.sum(1, keepdim=True), unit)
        assert (point.norm(dim=1) >= shortest - 1e-9).all()


def test_a_gradient_of_zero_takes_no_part():
    g = torch.tensor([[[3.0, 0.0], [0.0, 0.0]]])
    for how in ("sum", "normalized", "pcgrad", "min_norm"):
        torch.testing.assert_close(merge(g, torch.ones(2), how), torch.tensor([[3.0, 0.0]]))
    assert torch.equal(merge(0 * g, torch.ones(2), "min_norm"), torch.zeros(1, 2))


def test_views():
    torch.manual_seed(0)
    images = torch.rand(3, 3, 16, 24)
    total = rewards.build({"value": {"type": redness, "augment": 4}})
    assert total.differentiable
    scores = total(images, ["a"] * 3)
    assert torch.equal(total(images, ["a"] * 3), scores)
    torch.testing.assert_close(total(images[1:], ["a"] * 2), scores[1:])
    plain = rewards.build({"value": {"type": redness}})(images, ["a"] * 3)
    assert 0 < (scores - plain).abs().max() < 0.2
    x = images.double()[:1].requires_grad_()
    with pytest.raises(ValueError, match="augment=-1"):
        rewards.check({"jpeg": {"augment": -1}})
    assert torch.autograd.grad(total(x, ["a"]).sum(), x)[0].abs().sum() > 0


@pytest.mark.parametrize("how", ["sum", "normalized", "pcgrad", "min_norm"])
def test_reward_gradients_of_several_rewards_train(make, how):
    several = {redness: 1.0, value: 0.5}
    trainer = make("draft", rewards=several, **{"train.gradients": how})
    before = adapter(trainer)
    metrics = trainer.run_epoch(0)
    assert not torch.equal(adapter(trainer), before)
    assert {"reward_mean", "reward/redness_mean", "reward/value_mean"} <= set(metrics)


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("draft", {"train.gradients": "pcgrad", "train.micro_batch": 1}),
        ("ddpo", {"advantage.combine": "gdpo"}),
        ("ddpo", {"advantage.baseline": "tracker"}),
    ],
)
def test_prompts_with_rewards_of_their_own_train(make, tmp_path, algorithm, options):
    known = [["redness"], ["value"], ["redness", "value"], ["value"]]
    lines = [{"prompt": f"a red {o}", "rewards": k} for o, k in zip("abcd", known, strict=True)]
    file = tmp_path / "some.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    several = {redness: 1.0, value: 0.5}
    trainer = make(algorithm, rewards=several, **{"data.prompts": str(file)} | options)
    before = adapter(trainer)
    metrics = trainer.run_epoch(0)
    assert all(v == v for v in metrics.values())
    assert not torch.equal(adapter(trainer), before)


def test_rewards_that_compare_get_whole_groups(make):
    """Eight images a batch, six a prompt."""
    calls = []

    def rank(images, prompts):
        calls.append(list(prompts))
        return images.mean((1, 2, 3))

    rank.per_group = True
    options = {"data.groups": 4, "data.group_size": 6, "sampler.batch": 8}
    trainer = make("ddpo", rewards={rank: 1.0}, **options)
    metrics = trainer.run_epoch(0)
    assert metrics["reward_calls"] == 24
    assert all(call.count(p) == 6 for call in calls for p in call)
    assert "eval/rank" not in trainer.evaluate("base")  # its mean would say nothing


def test_a_constrained_run_moves_its_multiplier_and_resumes(make):
    several = {value: 1.0, "floor": {"type": redness, "at_least": 10.0, "rate": 0.1, "weight": 0}}
    whole = make("ddpo", run="whole", rewards=several, **{"train.epochs": 2})
    whole.train()
    rows = rows_of(whole)
    assert 0 < rows[1]["multiplier/floor"] < rows[2]["multiplier/floor"]
    half = make("ddpo", run="half", rewards=several)
    half.train()
    rest = make("ddpo", run="half", rewards=several, resume=True, **{"train.epochs": 2})
    assert rest.reward.weights["floor"] == rows[1]["multiplier/floor"]
    rest.train()
    assert torch.equal(adapter(rest), adapter(whole))
    assert rows_of(rest)[2] == rows[2]


@pytest.fixture
def dino(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    tiny = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(tiny).save_pretrained(tmp_path / "dino")
    return str(tmp_path / "dino")


def adversarial(dino, tmp_path, **options):
    folder = tmp_path / "real"
    if not folder.exists():
        folder.mkdir()
        for i in range(3):
            Image.new("RGB", (16, 16), (200, 20 * i, 0)).save(folder / f"{i}.png")
    return {
        "type": "adversarial", "model": dino, "references": str(folder), "lr": 1e-2, "steps": 5,
        "batch": 4, "hidden": 8,
    } | options  # fmt: skip


def test_the_discriminator_learns_and_is_remembered(dino, tmp_path):
    spec = {"adversarial": adversarial(dino, tmp_path, steps=40)}
    total = rewards.build(spec)
    judge = total.parts["adversarial"]
    made = torch.rand(6, 3, 16, 16) * torch.tensor([0.1, 0.5, 1.0])[None, :, None, None]
    real = torch.stack([load_image(f)[0] for f in judge.files])
    judge.learn(made, ["a"] * 6)
    figures = judge.learn(made, ["a"] * 6)
    assert figures["accuracy"] > 0.9
    assert judge(real, ["a"] * 3).min() > judge(made, ["a"] * 6).max()
    assert not any(p.requires_grad for p in judge.parameters())
    other = rewards.build(spec)
    other.load_state_dict(total.state_dict())
    again = other.parts["adversarial"]
    assert again.learn(made, ["a"] * 6) == judge.learn(made, ["a"] * 6)
    torch.testing.assert_close(again(made, ["a"] * 6), judge(made, ["a"] * 6), atol=0, rtol=0)
    # double precision, and the gradient it has to the pixels
    judge.double()
    x = made[:1].double().requires_grad_()
    (grad,) = torch.autograd.grad(judge(x, ["a"]).sum(), x)
    step = torch.zeros_like(x)
    step[0, 1, 7, 8] = 1e-4
    slope = (judge(x + step, ["a"]) - judge(x - step, ["a"])).item() / 2e-4
    assert grad[0, 1, 7, 8].item() == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("algorithm", ["ddpo", "draft"])
def test_a_learning_reward_trains_with_the_run_and_resumes(make, dino, tmp_path, algorithm):
    spec = {"adversarial": adversarial(dino, tmp_path)}
    whole = make(algorithm, run="whole", rewards=spec, **{"train.epochs": 2})
    whole.train()
    assert "reward/adversarial/accuracy" in rows_of(whole)[1]
    assert "eval/reward" not in rows_of(whole)[0]  # a value that changes by itself says nothing
    make(algorithm, run="half", rewards=spec).train()
    rest = make(algorithm, run="half", rewards=spec, resume=True, **{"train.epochs": 2})
    rest.train()
    assert torch.equal(adapter(rest), adapter(whole))
    assert rows_of(rest)[2] == rows_of(whole)[2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"references": "nowhere"}, "does not exist"),
        ({"patches": 2}, "0 to 1"),
        ({"steps": 0}, "1 up"),
    ],
)
def test_discriminators_are_checked(dino, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        rewards.check({"adversarial": adversarial(dino, tmp_path, **options)})


def test_scoring_overlaps_sampling(make):
    """The reward of the first chunk waits until the second has been sampled."""
    sampled = threading.Event()

    def patient(images, prompts):
        assert sampled.wait(30)
        return images.mean((1, 2, 3))

    trainer = make("ddpo", rewards={patient: 1.0})  # two chunks of eight
    decode, chunks = trainer.policy.decode, []

    def recorded(latents, **options):
        chunks.append(len(latents))
        if len(chunks) == 2:
            sampled.set()
        return decode(latents, **options)

    trainer.policy.decode = recorded
    metrics = trainer.run_epoch(0)
    assert chunks == [8, 8]
    assert metrics["reward_calls"] == 16
