import json
from pathlib import Path

import pytest
import torch

from diffalign.training.advantages import PromptTracker, group_advantages, zero_variance_share

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "advantages.json"
IDS = torch.tensor([3, 7, 3, 1, 7, 3, 1, 7, 1, 3])
NAN = float("nan")


def golden():
    if not GOLDEN.exists():
        pytest.skip("golden numbers are not here")
    return json.loads(GOLDEN.read_text())


def close(a, b, tol=1e-6):
    torch.testing.assert_close(a, torch.as_tensor(b), atol=tol, rtol=0, check_dtype=False)


def random_rewards(seed=0):
    return torch.randn(len(IDS), generator=torch.Generator().manual_seed(seed))


def test_golden_groups():
    data = golden()
    names = sorted(set(data["prompts"]))
    ids = torch.tensor([names.index(p) for p in data["prompts"]])
    assert len(data["flow_grpo_groups"]) == 2
    for case in data["flow_grpo_groups"]:
        std = "global" if case["global_std"] else "group"
        close(group_advantages(torch.tensor(case["rewards"]), ids, std), case["advantages"])


@pytest.mark.parametrize("as_ids", [False, True])
def test_golden_tracker(as_ids):
    data = golden()
    names = sorted(set(data["prompts"]))
    keys = torch.tensor([names.index(p) for p in data["prompts"]]) if as_ids else data["prompts"]
    settings = data["ddpo_tracker"]
    tracker = PromptTracker(settings["buffer_size"], settings["min_count"])
    for epoch in settings["epochs"]:
        close(tracker.update(keys, torch.tensor(epoch["rewards"])), epoch["advantages"])


@pytest.mark.parametrize("std", ["group", "global"])
def test_groups_equal_a_loop(std):
    rewards = random_rewards()
    advantages = group_advantages(rewards, IDS, std)
    assert advantages.dtype == torch.float32
    values = rewards.double().tolist()

    def moments(v):
        mean = sum(v) / len(v)
        return mean, (sum((x - mean) ** 2 for x in v) / len(v)) ** 0.5

    for i, group in enumerate(IDS.tolist()):
        mean, spread = moments([v for v, g in zip(values, IDS.tolist(), strict=True) if g == group])
        spread = moments(values)[1] if std == "global" else spread
        assert advantages[i].item() == pytest.approx((values[i] - mean) / (spread + 1e-4), abs=1e-6)
    for group in IDS.unique():
        assert abs(advantages[group == IDS].sum()) < 1e-5
    order = torch.randperm(len(IDS), generator=torch.Generator().manual_seed(1))
    close(group_advantages(rewards[order], IDS[order], std), advantages[order])


@pytest.mark.parametrize("std", ["group", "global"])
def test_equal_rewards_give_exactly_zero(std):
    # 0.1 summed and divided is not 0.1, which over a std of 0 would be an advantage.
    assert not group_advantages(torch.full((10,), 0.1).double(), IDS, std, eps=1e-30).any()
    rewards = random_rewards().double()
    rewards[IDS == 7] = 0.1
    assert not group_advantages(rewards, IDS, std, eps=1e-30)[IDS == 7].any()
    assert not group_advantages(torch.tensor([1.0]), torch.tensor([0]), std).any()
    assert not PromptTracker(8, 2).update([0] * 3, torch.full((3,), 0.1)).any()


@pytest.mark.parametrize("std", ["group", "global"])
def test_missing_rewards(std):
    rewards = random_rewards()
    rewards[[0, 3, 6, 8]] = NAN  # one of group 3, all of group 1
    valid = ~rewards.isnan()
    advantages = group_advantages(rewards, IDS, std)
    assert not advantages[~valid].any()
    assert torch.equal(advantages[valid], group_advantages(rewards[valid], IDS[valid], std))
    assert not group_advantages(torch.full((10,), NAN), IDS, std).any()
    assert group_advantages(torch.empty(0), torch.empty(0, dtype=torch.long), std).shape == (0,)


def test_integer_rewards_and_clip():
    rewards = torch.tensor([0, 1, 0, 0, 5, 9, 2, 1, 0, 0])
    advantages = group_advantages(rewards, IDS)
    assert torch.equal(advantages, group_advantages(rewards.float(), IDS))
    assert (advantages != advantages.round()).any()
    assert torch.equal(group_advantages(rewards, IDS, clip=0.5), advantages.clamp(-0.5, 0.5))
    integers, floats = PromptTracker(8, 2), PromptTracker(8, 2)
    tracked = integers.update(IDS, rewards)
    assert torch.equal(tracked, floats.update(IDS, rewards.float()))
    again = PromptTracker(8, 2).update(IDS, rewards, clip=0.5)
    assert torch.equal(again, tracked.clamp(-0.5, 0.5))


def test_zero_variance_share():
    rewards = torch.arange(10.0)
    assert zero_variance_share(rewards, IDS) == 0
    rewards[IDS == 7] = 0.1
    assert zero_variance_share(rewards, IDS) == pytest.approx(1 / 3)
    rewards[IDS == 1] = torch.tensor([NAN, 2.0, NAN])
    assert zero_variance_share(rewards, IDS) == pytest.approx(2 / 3)
    assert zero_variance_share(torch.empty(0), torch.empty(0, dtype=torch.long)) == 0


def test_tracker_falls_back_to_the_batch_until_warm():
    tracker = PromptTracker(buffer_size=4, min_count=3)
    rewards = torch.tensor([1.0, 3.0, 8.0])
    close(tracker.update(["a", "a", "b"], rewards), (rewards - 4) / (rewards.std(correction=0)))
    a = tracker.update(["a", "b", "a"], torch.tensor([5.0, 0.0, 7.0]))
    pool = torch.tensor([1.0, 3.0, 5.0, 7.0])
    close(a[[0, 2]], (torch.tensor([5.0, 7.0]) - 4) / pool.std(correction=0), 1e-5)
    close(a[1], -4 / torch.tensor([5.0, 0.0, 7.0]).std(correction=0), 1e-5)
    assert dict(tracker.state_dict()["history"])["a"] == pool.tolist()
    tracker.update(["a"], torch.tensor([9.0]))
    assert dict(tracker.state_dict()["history"])["a"] == [3, 5, 7, 9]


def test_tracker_skips_missing_rewards():
    tracker, other = PromptTracker(8, 2), PromptTracker(8, 2)
    advantages = tracker.update(["a", "b", "a", "c"], torch.tensor([1.0, NAN, 2.0, 4.0]))
    assert advantages[1] == 0
    expected = other.update(["a", "a", "c"], torch.tensor([1.0, 2.0, 4.0]))
    assert torch.equal(advantages[[0, 2, 3]], expected)
    assert tracker.state_dict() == other.state_dict()


def test_tracker_state_survives_json():
    tracker, resumed = PromptTracker(4, 2), PromptTracker(4, 2)
    keys = [1, "1", 1, "a cat", "1"]
    tracker.update(keys, torch.rand(5))
    resumed.load_state_dict(json.loads(json.dumps(tracker.state_dict())))
    for _ in range(3):
        rewards = torch.rand(5)
        assert torch.equal(tracker.update(keys, rewards), resumed.update(keys, rewards))
    assert tracker.state_dict() == resumed.state_dict()


def test_errors():
    with pytest.raises(ValueError, match=r"rewards \(3,\) and group_ids \(10,\)"):
        group_advantages(torch.ones(3), IDS)
    with pytest.raises(ValueError, match=r"rewards \(3,\) and keys \(2,\)"):
        PromptTracker(4, 2).update(["a", "b"], torch.ones(3))
    with pytest.raises(ValueError, match="group_ids"):
        zero_variance_share(torch.ones(10, 1), IDS)
    with pytest.raises(ValueError, match="infinite"):
        group_advantages(torch.full((10,), float("inf")), IDS)
    with pytest.raises(ValueError, match="'group' or 'global'"):
        group_advantages(torch.ones(10), IDS, std="batch")  # pyright: ignore
    with pytest.raises(ValueError, match="min_count 5"):
        PromptTracker(buffer_size=4, min_count=5)
