"""Diversity, and what moves the weights of a run: schedules, averages."""

import sys
from types import SimpleNamespace

import pytest
import test_trainer
import torch
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file
from test_trainer import adapter, redness
from torch import nn

from diffalign import TrainConfig, policies
from diffalign.config import AdvantageConfig, OptimConfig
from diffalign.config.decoding import ConfigError
from diffalign.policies import lora
from diffalign.record.metrics import read_metrics
from diffalign.training.advantages import combined_advantages, group_advantages
from diffalign.training.guard import diversity, thumbnails
from diffalign.training.optimizer import Optimizer
from diffalign.training.plan import Plan

make = test_trainer.make  # the fixture


def constants(*values):
    """Thumbnails of one colour each."""
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 32, 32)


def test_diversity_of_constant_pictures_is_the_mean_distance_of_their_values():
    assert diversity(constants(0.25, 0.25, 0.25), [7, 7, 7]) == 0.0
    assert diversity(constants(0.0, 1.0), [0, 0]) == pytest.approx(1.0)
    # pairs 0.2, 0.6, 0.4 of prompt 0 and 0.5 of prompt 1; prompt 2 has no pair
    pictures, prompts = constants(0.0, 0.2, 0.6, 0.1, 0.6, 0.9), [0, 0, 0, 1, 1, 2]
    assert diversity(pictures, prompts) == pytest.approx((0.4 + 0.5) / 2)


def test_diversity_needs_pairs():
    assert diversity(constants(0.0, 1.0), [0, 1]) is None
    assert diversity(constants(0.0)[:0], []) is None


def test_diversity_does_not_depend_on_the_order():
    pictures, prompts = torch.rand(12, 3, 32, 32), torch.arange(12) % 4
    order = torch.randperm(12)
    again = diversity(pictures[order], prompts[order])
    assert again == pytest.approx(diversity(pictures, prompts), rel=1e-6)


def test_thumbnails_are_means_over_areas():
    images = torch.rand(2, 3, 64, 96, requires_grad=True)
    small = thumbnails(images)
    assert not small.requires_grad
    expected = images.unfold(2, 2, 2).unfold(3, 3, 3).mean((-1, -2))
    torch.testing.assert_close(small, expected.detach())


class Weights:
    """What an Optimisation asks of a policy."""

    sharding = None

    def __init__(self):
        self.named = {"default": [nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(2, 2))]}

    def trainable_parameters(self):
        return self.named["default"]

    def add_copy(self, name):
        self.named[name] = [nn.Parameter(p.detach().clone()) for p in self.named["default"]]

    def weights(self, name="default"):
        return self.named[name]


def optimizer(policy=None, steps=12, **options):
    accelerator = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    config = OptimConfig(**{"lr": 1e-2, **options})
    return Optimizer(policy or Weights(), [], config, accelerator, "float32", steps)  # type: ignore[arg-type]


def step(o):
    """One step on a loss; returns the learning rate that was used."""
    o.backward(sum((p - 2).square().sum() for p in o.parameters))
    o.step()
    return o.adamw.param_groups[0]["lr"]


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rates_are_those_of_the_diffusers_scheduler(schedule, warmup):
    options = {"lr_schedule": schedule, "warmup": warmup}
    adamw = torch.optim.AdamW([nn.Parameter(torch.ones(1))], 1e-2)
    reference = get_scheduler(schedule, adamw, num_warmup_steps=warmup, num_training_steps=12)
    expected = []
    for _ in range(12):
        expected.append(reference.get_last_lr()[0])
        adamw.step()
        reference.step()
    first = optimizer(**options)
    used = [step(first) for _ in range(5)]
    resumed = optimizer(**options)
    resumed.load_state_dict(first.state_dict())
    used += [step(resumed) for _ in range(7)]
    expected[:warmup] = [1e-2 * (n + 1) / warmup for n in range(warmup)]  # none is 0
    assert used == pytest.approx(expected)


def test_resumed_optimizer_moves_weights_as_if_it_had_not_stopped():
    options = {"lr_schedule": "cosine", "warmup": 2, "ema": 0.5}
    whole, first, resumed = (optimizer(**options) for _ in range(3))
    for _ in range(6):
        step(whole)
    for _ in range(3):
        step(first)
    for name in ("default", "ema"):
        for p, q in zip(resumed.policy.weights(name), first.policy.weights(name), strict=True):
            p.data.copy_(q)
    resumed.load_state_dict(first.state_dict())
    for _ in range(3):
        step(resumed)
    for name in ("default", "ema"):
        for p, q in zip(resumed.policy.weights(name), whole.policy.weights(name), strict=True):
            assert torch.equal(p, q)


def test_schedule_spans_the_updates_of_the_whole_run(make):
    options = {"train.lr_schedule": "linear", "train.updates_per_epoch": 2, "train.inner_epochs": 2}
    trainer = make("ddpo", **{"train.epochs": 2, "train.warmup": 2}, **options)
    trainer.train()
    rows = read_metrics(trainer.dir)[1:]  # of the last of four updates each
    assert [row["lr"] for row in rows] == pytest.approx([1e-2 * 5 / 6, 1e-2 * 1 / 6])


def test_average_of_the_weights_is_saved_and_evaluated(make, monkeypatch):
    trainer = make("draft", **{"train.ema": 0.4, "train.epochs": 6, "train.updates_per_epoch": 2})
    policy, taken = trainer.policy, []
    taken.append([p.detach().clone() for p in policy.weights()])
    real = trainer.optimizer.step

    def recorded():
        norm = real()
        taken.append([p.detach().clone() for p in policy.weights()])
        return norm

    monkeypatch.setattr(trainer.optimizer, "step", recorded)
    after = trainer.train()["after"]["eval/reward"]
    average = taken[0]
    for n, now in enumerate(taken[1:], 1):
        d = min(0.4, (1 + n) / (10 + n))
        average = [d * a + (1 - d) * p for a, p in zip(average, now, strict=True)]
    torch.testing.assert_close([*map(torch.Tensor.detach, policy.weights("ema"))], average)

    # it is what the file holds and what was evaluated, and is not what was trained
    plain = trainer.evaluate("plain")["eval/reward"]
    trained = adapter(trainer)
    for p, a in zip(policy.weights(), average, strict=True):
        p.data.copy_(a)
    assert trainer.evaluate("average")["eval/reward"] == pytest.approx(after, abs=1e-7)
    assert abs(plain - after) > 1e-5
    assert (adapter(trainer) - trained).abs().max() > 1e-3
    saved = load_file(trainer.dir / lora.WEIGHTS)
    policy.save(trainer.dir / "expected")
    expected = load_file(trainer.dir / "expected" / lora.WEIGHTS)
    assert saved.keys() == expected.keys()
    for k in saved:
        torch.testing.assert_close(saved[k], expected[k])


def test_average_of_the_weights_survives_a_resume(make):
    options = {"train.ema": 0.9, "train.epochs": 2}
    whole = make("draft", run="whole", **options)
    whole.train()
    make("draft", **options | {"train.epochs": 1}).train()
    resumed = make("draft", resume=True, **options)
    resumed.train()
    for p, q in zip(resumed.policy.weights("ema"), whole.policy.weights("ema"), strict=True):
        assert torch.equal(p, q)


def test_8_bit_optimizer_without_its_package_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r"adamw8bit needs bitsandbytes; pip install .* adamw$"):
        optimizer(optimizer="adamw8bit")


def test_8_bit_optimizer_is_refused_before_the_model_is_loaded(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)

    def loaded(*_):
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(policies, "load", loaded)
    with pytest.raises(ConfigError, match="adamw8bit needs bitsandbytes"):
        make("ddpo", **{"train.optimizer": "adamw8bit"})


GROUPS = torch.tensor([0, 0, 1, 1])
PARTS = {"a": torch.tensor([0.0, 2.0, 0.0, 4.0]), "b": torch.tensor([10.0, 0.0, 0.0, 10.0])}
WEIGHTS = {"a": 3.0, "b": -1.0}


def combined(combine, parts=PARTS, weights=WEIGHTS, **options):
    total = sum(weights[k] * parts[k] for k in weights)
    config = AdvantageConfig(combine=combine, **{"std": "group", **options})
    return combined_advantages(total, parts, weights, GROUPS, config)


def close(values, expected, tol=1e-3):
    torch.testing.assert_close(values, torch.tensor(expected), atol=tol, rtol=0)


def test_sum_compares_the_total():
    # totals -10, 6, 0, 2
    close(combined("sum"), [-1.0, 1.0, -1.0, 1.0])
    close(combined("sum", std="global"), [x / 34.75**0.5 for x in (-8.0, 8.0, -1.0, 1.0)])


def test_normalized_is_the_weighted_mean_of_advantages():
    # of a -1, 1, -1, 1 and of b 1, -1, -1, 1
    close(combined("normalized"), [-1.0, 1.0, -0.5, 0.5])
    # stds over the epoch 1.6583 and 5
    expected = [-0.75 / 2.75**0.5 - 0.25, 0.75 / 2.75**0.5 + 0.25]
    expected += [-1.5 / 2.75**0.5 + 0.25, 1.5 / 2.75**0.5 - 0.25]
    close(combined("normalized", std="global"), expected)


def test_gdpo_divides_by_the_spread_over_the_epoch():
    """GDPO's equations, whatever advantage.std is."""
    spread = ((1 + 1 + 0.25 + 0.25) / 4) ** 0.5
    for options in ({}, {"std": AdvantageConfig().std}, {"std": "global"}):
        close(combined("gdpo", **options), [x / spread for x in (-1.0, 1.0, -0.5, 0.5)])
    assert combined("gdpo").std(correction=0).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("std", ["group", "global"])
@pytest.mark.parametrize("combine", ["normalized", "gdpo"])
def test_a_missing_reward_does_not_dilute_the_others(combine, std):
    """Four prompts: scored by both, by a, by b, by none, and one image of the first lacks b."""
    groups = torch.arange(4).repeat_interleave(3)
    a, b = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    a[6:], b[3:6], b[9:], b[2] = torch.nan, torch.nan, torch.nan, torch.nan
    total = 3 * a.nan_to_num(0) - b.nan_to_num(0)
    config = AdvantageConfig(combine=combine, std=std, clip=100.0)
    found = combined_advantages(total, {"a": a, "b": b}, WEIGHTS, groups, config)
    std = "group" if combine == "gdpo" else std
    of_a, of_b = (group_advantages(x, groups, std) for x in (a, b))
    expected = torch.cat([(3 * of_a - of_b)[:2] / 4, of_a[2:6], -of_b[6:9], torch.zeros(3)])
    if combine == "gdpo":
        expected = expected / (expected[:9].std(correction=0) + 1e-4)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    nothing = {k: torch.full((12,), torch.nan) for k in "ab"}
    assert not combined_advantages(nothing["a"], nothing, WEIGHTS, groups, config).any()


@pytest.mark.parametrize("combine", ["normalized", "gdpo"])
def test_the_unit_of_a_part_does_not_matter(combine):
    scaled = PARTS | {"b": 1000 * PARTS["b"] + 7}
    close(combined(combine, scaled), combined(combine).tolist())
    assert not torch.allclose(combined("sum", scaled), combined("sum"), atol=0.1)


@pytest.mark.parametrize("combine", ["sum", "normalized", "gdpo"])
def test_parts_of_weight_0_are_ignored(combine):
    monitor = PARTS | {"c": torch.tensor([5.0, -3.0, 0.0, 1.0])}
    again = combined(combine, monitor, WEIGHTS | {"c": 0.0})
    assert torch.equal(again, combined(combine))
    alone = combined(combine, {"a": PARTS["a"], "c": monitor["c"]}, {"a": 2.0, "c": 0.0})
    assert torch.equal(alone, group_advantages(2 * PARTS["a"], GROUPS, "group"))


@pytest.mark.parametrize("combine", ["sum", "normalized", "gdpo"])
def test_combined_advantages_are_clipped_last(combine):
    whole = combined(combine, clip=100.0)
    close(combined(combine, clip=0.4), whole.clamp(-0.4, 0.4).tolist(), 1e-6)


def test_advantages_in_training_are_the_combined_ones(make):
    rewards = {redness: 3.0, "jpeg": -1.0}
    trainer = make("ddpo", rewards=rewards, **{"advantage.combine": "gdpo"})
    weights = trainer.reward.weights
    assert weights == {"redness": 3.0, "jpeg": -1.0}
    parts = {"redness": PARTS["a"], "jpeg": PARTS["b"]}
    total = 3 * PARTS["a"] - PARTS["b"]
    advantage, whitened, _ = trainer._advantages(total, parts, GROUPS)
    assert torch.equal(advantage, combined("gdpo"))
    close(whitened, [x / 34.75**0.5 for x in (-9.5, 6.5, 0.5, 2.5)])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampler": {"steps": 4, "window": 5}}, "sampler.window=5 is wider than the 4 steps"),
        (
            {"sampler": {"window": 3, "window_range": [2, 4]}},
            "sampler.window=3 is wider than the 2 steps",
        ),
        ({"sampler": {"window": 0}}, "sampler.window=0 must be more than 0"),
        ({"sampler": {"tail": 2}}, "sampler.tail=2 follows a window; set sampler.window"),
        *(
            ({"sampler": {"window_range": reach}}, f"sampler.window_range={reach} is not [first,")
            for reach in ([3], [2, 2], [4, 2], [-1, 2], [0, 21], [0, 1, 2], [])
        ),
        ({"sampler": {"window": 1, "window_epochs": 0}}, "sampler.window_epochs=0 must be more"),
        ({"sampler": {"window_schedule": "progress"}}, "did you mean 'progressive'?"),
        ({"train": {"ema": 1.0}}, "train.ema=1.0 is a decay; use less than 1"),
        ({"train": {"ema": -0.1}}, "train.ema=-0.1 must be 0 or more"),
        ({"train": {"warmup": -1}}, "train.warmup=-1 must be 0 or more"),
        ({"train": {"lr_schedule": "cosin"}}, "did you mean 'cosine'?"),
        ({"train": {"optimizer": "adam"}}, "did you mean 'adamw'?"),
        ({"advantage": {"combine": "gpdo"}}, "did you mean 'gdpo'?"),
        ({"eval": {"guard": "halt"}}, "valid: off, warn, stop"),
        ({"eval": {"guard_drop": 0}}, "eval.guard_drop=0.0 must be more than 0"),
    ],
)
def test_refused_settings(changes, words):
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_dict(changes).check()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_branches_need_one_step_and_one_noise():
    branches = {"window_schedule": "branch"}
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_dict({"sampler": branches}).check()
    lines = str(caught.value).split("\n")
    assert lines[0].startswith("sampler.window=None branches have one stochastic step; use 1")
    assert lines[1].startswith("sampler.same_noise=False branches share a trunk; use true")
    right = branches | {"window": 1, "same_noise": True}
    TrainConfig.from_dict({"sampler": right}).check()
    tracker = {"sampler": right, "advantage": {"baseline": "tracker"}}
    with pytest.raises(ConfigError, match="'tracker' does not know branches; use group"):
        TrainConfig.from_dict(tracker).check()


@pytest.fixture
def plan(pipelines, tmp_path):
    """plan(algorithm, sampler, group_size) -> Plan of a tiny UNet of four stochastic steps."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\n")

    def plan(algorithm, sampler, group_size=4):
        tree = {
            "model": {"name": pipelines["sd-v"]},
            "algorithm": {"type": algorithm},
            "sampler": {"steps": 5, "batch": 1, **sampler},
            "data": {"prompts": str(prompts), "groups": 2, "group_size": group_size},
            "eval": {"prompts": None},
        }
        return Plan.make(TrainConfig.from_dict(tree), {redness: 1.0})

    return plan


BRANCH = {"window": 1, "window_schedule": "branch", "same_noise": True}


@pytest.mark.parametrize(
    ("size", "valid"),
    [(6, [8, 12]), (9, [8, 12]), (14, [12, 16]), (2, [8, 12]), (4, [8, 12]), (8, []), (12, [])],
)
def test_branches_share_the_pictures_of_a_prompt_evenly(plan, size, valid):
    """And every step has two or more of them, since one alone has the advantage 0."""
    if not valid:
        assert plan("flow_grpo", BRANCH, size).samples == 2 * size
        return
    with pytest.raises(ConfigError) as caught:
        plan("flow_grpo", BRANCH, size)
    assert str(caught.value) == (
        f"data.group_size={size} does not give every one of the 4 steps that branch the same "
        f"number of images, 2 or more to compare; use {valid[0]} or {valid[1]}, or a shorter "
        "sampler.window_range"
    )
    for right in valid:
        plan("flow_grpo", BRANCH, right)


ODE = r"^sampler\.kernel=ode is deterministic.*use ddim or cps, or for a flow model flow_sde"
ETA = r"^sampler\.eta=0 makes sampler\.kernel=ddim deterministic.*raise sampler\.eta$"
ONE = r"^sampler\.steps=1 is the last step alone, which sampler\.kernel=cps.*use 2 steps or more"


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ({"kernel": "ode"}, ODE),
        ({"kernel": "ode", "eta": 0.0, "steps": 1}, ODE),
        ({"eta": 0.0}, ETA),
        ({"kernel": "cps", "steps": 1}, ONE),
    ],
)
def test_a_sampler_without_chance_is_refused_by_its_reason(plan, sampler, message):
    with pytest.raises(ConfigError, match=message) as caught:
        plan("ddpo", sampler)
    assert ("raise" in str(caught.value)) is (message == ETA)
    shared = message.replace("^", "makes all images of a prompt alike, since ").replace("$", ",")
    with pytest.raises(ConfigError, match=shared):
        plan("nft", sampler | {"same_noise": True})


def test_windows_cover_only_steps_with_chance(plan):
    with pytest.raises(ValueError, match=r"window_range=\[2, 5\] covers step 4.*end before 4"):
        plan("flow_grpo", {"window": 1, "window_range": [2, 5]})
    plan("flow_grpo", {"window": 1, "window_range": [2, 4]})


@pytest.mark.parametrize("algorithm", ["nft", "awm", "fpo", "rwr", "draft", "refl"])
def test_windows_are_for_policy_gradients(plan, algorithm):
    with pytest.raises(ConfigError, match=rf"window=2 is for policy gradients, and {algorithm} "):
        plan(algorithm, {"window": 2})
