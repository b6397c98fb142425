"""The soft composition reward: it counts, it follows its definition, and its gradient is true."""

import random

import pytest
import torch
from test_ocr_composition import grounding_dino, owl, photos, pixels  # noqa: F401

from diffalign.emoji_world import detector as emoji
from diffalign.emoji_world.scenes import KINDS, alterations, caption, render, sample_scene
from rewards import build, check, gradients_of
from rewards.composition import MARGIN, Composition
from rewards.soft_composition import DOUBT, SURPLUS, Evidence, soft_scores

EMOJI = "diffalign.emoji_world.detector:evidence"


def soft(**options):
    return Composition(EMOJI, soft=True, **options)


def seen(shares, others=None, boxes=None, colors=None, mass=1.0):
    shares = torch.tensor(shares, dtype=torch.double)
    m = shares.shape[1]
    return Evidence(
        shares,
        torch.zeros(m).double() if others is None else torch.tensor(others).double(),
        torch.zeros(m, 4).double() if boxes is None else torch.tensor(boxes).double(),
        {k: torch.tensor(v).double() for k, v in (colors or {}).items()},
        mass,
    )


def value(evidence, *clauses, classes=("dog", "cat")):
    return soft_scores([evidence], [list(classes)], [{"include": list(clauses)}], MARGIN).item()


def test_counts():
    two = {"class": "dog", "count": 2}
    assert value(seen([[1, 1, 0], [0, 0, 0]]), two) == 1
    assert value(seen([[1, 0, 0], [0, 0, 0]]), two) == 0.5
    assert value(seen([[1, 1, 1], [0, 0, 0]]), two) == 0.5
    assert value(seen([[2, 2], [0, 0]], mass=2.0), two) == 1  # an object is two places
    # half a dog in a place that is something for sure
    half = 1 - 0.5 - SURPLUS * 0.25
    assert value(seen([[0.5, 0.5], [0, 0]], others=[0.5, 0]), two) == pytest.approx(
        half - DOUBT * 0.25 / 2
    )


def test_a_batch_of_different_prompts_is_scored_as_each_alone():
    torch.manual_seed(0)
    hues = {"red": [1.0, 0.2, 0.5], "blue": [0.0, 0.8, 0.5]}
    dogs, cat = {"class": "dog", "count": 2}, {"class": "cat", "count": 1}
    beside = [dogs, {**cat, "position": ["left of", 0]}]
    below = [{**cat, "color": "blue"}, {**dogs, "position": ["below", 0]}]
    prompts = [[dogs], beside, [{**dogs, "color": "red"}], below, [dogs, cat], [cat]]
    pictures = []
    for i, _ in enumerate(prompts):
        corner = torch.rand(3, 2)
        boxes = torch.cat([corner, corner + 0.2], 1).tolist()
        shares, others = torch.rand(2, 3).tolist(), torch.rand(3).tolist()
        pictures.append(seen(shares, others, boxes, hues, mass=1.0 + i / 10))
    orders = [["dog", "cat"], ["cat", "dog"]] * len(prompts)
    known = [{"include": p} for p in prompts]
    together = soft_scores(pictures, orders[: len(prompts)], known, MARGIN)
    for one, order, picture, prompt in zip(together, orders, pictures, prompts, strict=False):
        assert one.item() == pytest.approx(value(picture, *prompt, classes=order), abs=1e-12)


def test_a_relation_pulls_objects_that_stand_far_from_it():
    """One above the other where they should be side by side: what is gained by a small step."""

    def gain(offset):
        boxes = [[0.3, 0.1, 0.5, 0.3], [0.3 - offset, 0.6, 0.5 - offset, 0.8]]
        clauses = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}]
        clauses[1]["position"] = ["left of", 0]
        return value(seen([[1, 0], [0, 1]], boxes=boxes), *clauses)

    assert gain(0.1) - gain(0) > 0.01


def test_surplus_is_of_each_object_asked_for():
    one, two = {"class": "dog", "count": 1}, {"class": "dog", "count": 2}
    assert value(seen([[1, 0], [0, 0]], others=[0, 1]), one) == 1 - SURPLUS
    assert value(seen([[1, 1, 0], [0, 0, 0]], others=[0, 0, 1]), two) == 1 - SURPLUS / 2


def test_colors():
    red = {"class": "dog", "count": 2, "color": "red"}
    hues = {"red": [1.0, 0.0, 1.0], "blue": [0.0, 1.0, 0.0]}
    assert value(seen([[1, 1, 0], [0, 0, 0]], colors=hues), red) == (1 + 0.5) / 2
    assert value(seen([[1, 0, 1], [0, 0, 0]], colors=hues), red) == 1
    with pytest.raises(ValueError, match="a green dog is asked for"):
        value(seen([[1, 0, 1], [0, 0, 0]], colors=hues), red | {"color": "green"})


@pytest.mark.parametrize(("x", "held"), [(0.1, True), (0.6, False), (0.3, False)])
def test_positions(x, held):
    cat = {"class": "cat", "count": 1}
    dog = {"class": "dog", "count": 1, "position": ["left of", 0]}
    boxes = [[x, 0.3, x + 0.2, 0.5], [0.3, 0.3, 0.5, 0.5]]
    found = value(seen([[1, 0], [0, 1]], boxes=boxes), cat, dog)
    assert found == pytest.approx(1.0 if held else 2 / 3, abs=0.14)
    # a dog that is not there is not left of the cat
    assert value(seen([[0, 0], [0, 1]], boxes=boxes), cat, dog) == pytest.approx(1 / 3)


def test_it_counts_real_scenes():
    rng, off = random.Random(7), []
    for _ in range(60):
        scene = sample_scene(rng, "count", reserved=None)
        name = scene.items[0].name
        (found,) = emoji.evidence(pixels([render(scene)]), [[name]])
        off.append((found.shares.sum() / found.mass).item() - len(scene.items))
    off = torch.tensor(off)
    print(f"\nsoft count - count: {off.mean():+.3f}, |.| {off.abs().mean():.3f}")
    assert off.abs().mean() < 0.3
    assert off.mean().abs() < 0.25


def test_altered_scenes_are_worth_less():
    rng, means, reward = random.Random(6), {}, soft()
    for i in range(40):
        scene = sample_scene(rng, KINDS[i % len(KINDS)], reserved=None)
        known = emoji.metadata(caption(scene))
        for what, altered in alterations(scene, rng).items():
            if what != "background":
                images = pixels([render(scene), render(altered)])
                means.setdefault(what, []).append(reward(images, ["p"] * 2, [known] * 2))
    for what, values in means.items():
        own, other = torch.stack(values).mean(0).tolist()
        print(f"\n{what}: {own:.3f}, altered {other:.3f} ({len(values)} scenes)", end="")
        assert own >= 0.7, what
        assert other < own - 0.15, what


def slopes(reward, images, prompts, known, h):
    """Of the sum of scores along its gradient: what the gradient says, and differences."""
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(x, prompts, known).sum(), x)
    along = gradient / gradient.norm()

    def at(step):
        with torch.no_grad():
            return reward(images + step * along, prompts, known).double().sum()

    return gradient.norm().item(), ((at(h) - at(-h)) / (2 * h)).item()


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_verifier(kind):
    rng = random.Random(8)
    scenes = [sample_scene(rng, kind, reserved=None) for _ in range(3)]
    # faded, so that nothing is certain
    images = 0.4 + 0.3 * (pixels([render(s) for s in scenes]) - 0.5)
    prompts = [caption(s) for s in scenes]
    said, found = slopes(soft(), images, prompts, [emoji.metadata(p) for p in prompts], 1e-2)
    assert said > 0
    assert found == pytest.approx(said, rel=0.05)


def test_gradient_of_grounding_dino(grounding_dino):  # noqa: F811
    has_gradient(grounding_dino)


def test_gradient_of_owl(owl):  # noqa: F811
    has_gradient(owl)


def has_gradient(folder):
    torch.manual_seed(0)
    known = [{"include": [{"class": "dog", "count": 2}]}] * 2
    reward = Composition(folder, soft=True, threshold=0.4)
    images = torch.rand(2, 3, 64, 64)
    images = (images * 255).round() / 255  # what the processor sees
    x = images.clone().requires_grad_()
    found = reward(x, ["p"] * 2, known)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_zero_shot_evidence_is_its_detections(grounding_dino):  # noqa: F811
    reward = Composition(grounding_dino, soft=True, threshold=0.4)
    images, classes = photos(), [["dog", "teddy bear"]] * 3
    for found, hard in zip(
        reward.detect.evidence(images, classes), reward.detect(images, classes), strict=True
    ):
        sure = (found.shares > 0.5).sum(1).tolist()
        labels = [d.label for d in hard]
        assert sure == [labels.count("dog"), labels.count("teddy bear")]


def test_options():
    spec = {"composition": {"detector": EMOJI, "soft": True}}
    assert gradients_of(spec) == {"composition": True}
    assert gradients_of({"composition": {"detector": EMOJI}}) == {"composition": False}
    prompt = "two cats"
    check(spec, [prompt], [emoji.metadata(prompt)])
    total = build(spec)
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    values = total(images, [prompt] * 2, [emoji.metadata(prompt)] * 2)
    assert values.requires_grad
    for options in ({"mode": "strict"}, {"clip": "assets/emoji-clip"}):
        with pytest.raises(ValueError, match="soft=true needs mode=partial and no clip"):
            soft(**options)
    with pytest.raises(ValueError, match="is not an object of EmojiWorld"):
        emoji.evidence(torch.rand(1, 3, 64, 64), [["nobody"]])
