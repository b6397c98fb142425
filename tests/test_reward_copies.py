"""A reward that writes into what it is given changes nothing for anybody else."""

import copy

import pytest
import torch

import rewards

PROMPTS = ["b", "a", "c"]
METADATA = [{"of": ["x"]}, {"of": ["y"]}, {}]


def mean(images, prompts):
    return images.mean((1, 2, 3))


def texts(images, prompts, metadata):
    """Which prompts and metadata were seen, as numbers."""
    return [ord(p) + 10.0 * len(m.get("of", ())) for p, m in zip(prompts, metadata, strict=True)]


def spoiler(images, prompts, metadata):
    values = images.mean((1, 2, 3))
    images.mul_(255).clamp_(0, 1)
    prompts.sort()
    for known in metadata:
        known.setdefault("of", []).append("spoilt")
    return values


def bright(images, prompts, metadata):
    """Preprocesses in place, as mean(255 u), with gradient."""
    spoiler(images.detach().clone(), prompts, metadata)
    return images.mul_(255).mean((1, 2, 3))


mean.differentiable = bright.differentiable = True


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("first", [True, False])
def test_other_rewards_and_the_caller_see_what_was_drawn(context, first):
    images, others = torch.rand(3, 3, 8, 8), {mean: 1.0, texts: 1.0}
    spec = {spoiler: 1.0} | others if first else others | {spoiler: 1.0}
    total, before = rewards.build(spec), images.clone()
    metadata = copy.deepcopy(METADATA)
    with context():
        parts = total.score(images, prompts := list(PROMPTS), metadata)[1]
    expected = before.mean((1, 2, 3))
    torch.testing.assert_close(parts["mean"], expected)
    torch.testing.assert_close(parts["spoiler"], expected)
    assert parts["texts"].tolist() == [98 + 10, 97 + 10, 99]
    assert torch.equal(images, before)
    assert (prompts, metadata) == (PROMPTS, METADATA)


def test_a_reward_that_works_in_place_has_its_gradient():
    images = torch.rand(3, 3, 8, 8)
    total, before = rewards.build({bright: 2.0, mean: 1.0, "again": {"type": mean}}), images.clone()
    slope = torch.full_like(images, (2 * 255 + 2) / images[0].numel())
    torch.testing.assert_close(total.gradient(images, PROMPTS, METADATA)[2], slope)
    leaf = images.requires_grad_()
    values = total(leaf, PROMPTS, METADATA)
    torch.testing.assert_close(torch.autograd.grad(values.sum(), leaf)[0], slope)
    assert torch.equal(images.detach(), before)


def test_views_and_members_of_an_ensemble_are_given_copies():
    images = torch.rand(3, 3, 8, 8)
    spec = {"many": {"type": texts, "augment": 3}, "spoilt": {"type": spoiler, "augment": 3}}
    ensemble = rewards.build({"least": {"type": "ensemble", "of": spec}})
    metadata = copy.deepcopy(METADATA)
    for total in (rewards.build(spec), ensemble):
        parts = total.score(images, list(PROMPTS), metadata)[1]
        if "many" in parts:
            assert parts["many"].tolist() == [98 + 10, 97 + 10, 99]
        assert metadata == METADATA


class Learner(rewards.Reward):
    learns = True

    def forward(self, images, prompts, metadata=None):
        return images.mean((1, 2, 3))

    def learn(self, images, prompts, metadata=None):
        return {"seen": spoiler(images, prompts, metadata).mean().item()}


def test_rewards_that_learn_do_so_from_the_same_images():
    images, metadata = torch.rand(3, 3, 8, 8), copy.deepcopy(METADATA)
    total = rewards.build({"one": {"type": Learner}, "two": {"type": Learner}, mean: 1.0})
    seen = {"seen": pytest.approx(images.mean().item())}
    assert total.learn(images, list(PROMPTS), metadata) == {"one": seen, "two": seen}
    assert metadata == METADATA


def test_a_text_in_place_of_a_list_is_refused():
    with pytest.raises(ValueError, match=r"prompts='abc' is one text; give a list"):
        rewards.build({mean: 1.0})(torch.rand(3, 3, 8, 8), "abc")
