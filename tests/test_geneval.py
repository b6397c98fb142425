"""GenEval's rules with a scripted detector, and against a restatement of the benchmark's code."""

import json
import random

import numpy as np
import pytest
import torch

from diffalign.config.prompts import for_rewards, load
from rewards import build, check, check_gradient
from rewards.composition import Detection
from rewards.geneval import GenEval, summary

COLORS = ["red", "green", "blue"]
RELATIONS = ["left of", "right of", "above", "below"]
ROWS = [  # as evaluation_metadata.jsonl has them, one a tag
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}]},
    {
        "tag": "two_object",
        "include": [{"class": "cup", "count": 1}, {"class": "bench", "count": 1}],
    },
    {
        "tag": "counting",
        "include": [{"class": "cup", "count": 2}],
        "exclude": [{"class": "cup", "count": 3}],
    },
    {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}]},
    {
        "tag": "position",
        "include": [
            {"class": "bench", "count": 1},
            {"class": "cup", "count": 1, "position": ["left of", 0]},
        ],
    },
    {
        "tag": "color_attr",
        "include": [
            {"class": "cup", "count": 1, "color": "red"},
            {"class": "bench", "count": 1, "color": "blue"},
        ],
    },
]


def seen(label, score=0.95, x=0, y=0, color="red", size=10):
    return Detection(label, score, (x, y, x + size, y + size), color)


def score(detections, known, mode="binary", **options):
    reward = GenEval(lambda images, classes: [detections], mode, **options)
    return reward(torch.zeros(1, 3, 64, 64), ["a"], [known]).item()


def both(detections, known, **options):
    return score(detections, known, **options), score(detections, known, "continuous", **options)


def test_the_rules_one_by_one():
    single, two, counting, colors, position, attributes = ROWS
    assert both([seen("bench"), seen("bench", x=30)], single) == (1, 1)  # surplus is free
    assert both([seen("cup")], single) == (0, 0)
    assert both([seen("cup")], two) == (0, 0.5)
    cups = [seen("cup", x=20 * k) for k in range(4)]
    assert [both(cups[:n], counting) for n in range(4)] == [(0, 0.5), (0, 0.5), (1, 1), (0, 0.5)]
    assert both([seen("cup", 0.5, color="red"), seen("cup", 0.9, color="blue")], colors) == (0, 0.5)
    assert both([seen("cup", 0.9, color="red"), seen("cup", 0.5, color="blue")], colors) == (1, 1)
    assert both([seen("cup", x=0), seen("bench", x=40)], position) == (1, 1)
    assert both([seen("cup", x=40), seen("bench", x=0)], position) == pytest.approx((0, 2 / 3))
    assert both([seen("cup", x=0)], position) == pytest.approx((0, 1 / 3))  # no target
    red, blue = seen("cup", color="red"), seen("bench", x=30, color="blue")
    assert both([red, blue], attributes) == (1, 1)
    assert both([seen("cup", color="blue"), blue], attributes) == (0, 3 / 4)


def test_thresholds_of_the_tags():
    cups = [seen("cup", 0.5), seen("cup", 0.5, x=30)]
    assert score(cups, ROWS[2]) == 1
    assert score(cups, ROWS[2], counting_threshold=0.9) == 0
    assert score([seen("cup", 0.5)], ROWS[3], counting_threshold=0.9) == 1
    assert score([seen("cup", 0.2)], ROWS[3]) == 0
    assert score([seen("cup", x=k) for k in range(9)], ROWS[2], max_per_class=2) == 1


def benchmark(objects, known):
    """`evaluate` and `relative_position` of the benchmark, in other words."""

    def relations(a, b):
        corners = np.array([a.box, b.box]).reshape(2, 2, 2)
        (center_a, center_b), sizes = corners.mean(1), np.abs(corners[:, 1] - corners[:, 0]).sum(0)
        offset = center_a - center_b
        rest = np.maximum(np.abs(offset) - 0.1 * sizes, 0) * np.sign(offset)
        if (np.abs(rest) < 1e-3).all():
            return set()
        dx, dy = rest / np.linalg.norm(offset)
        signs = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}
        return {name for name, part in signs.items() if part > 0.5}

    correct, groups = True, []
    for ask in known["include"]:
        found = objects.get(ask["class"], [])[: ask["count"]]
        good = len(found) >= ask["count"]
        if good and "color" in ask:
            good = [one.color for one in found].count(ask["color"]) >= ask["count"]
        if good and "position" in ask:
            relation, target = ask["position"]
            good = groups[target] is not None and all(
                relation in relations(a, b) for a in found for b in groups[target]
            )
        groups.append(found if good else None)
        correct &= good
    for ask in known.get("exclude", []):
        correct &= len(objects.get(ask["class"], [])) < ask["count"]
    return correct


def test_random_pictures_are_scored_as_the_benchmark_does():
    rng, results = random.Random(0), []
    for _ in range(3000):
        known = json.loads(json.dumps(rng.choice(ROWS)))
        for clause in known["include"]:
            clause["count"] = rng.choice([1, 1, clause["count"], 2])
            if "position" in clause:
                clause["position"][0] = rng.choice(RELATIONS)
            if rng.random() < 0.2:
                clause["color"] = rng.choice(COLORS)
        kinds = [clause["class"] for clause in known["include"]]
        found = [
            seen(rng.choice(kinds), rng.uniform(0.35, 1), rng.randrange(50), rng.randrange(50),
                 rng.choice(COLORS), rng.randrange(5, 20))
            for _ in range(rng.randrange(6))
        ]  # fmt: skip
        objects = {kind: [o for o in found if o.label == kind] for kind in kinds}
        for group in objects.values():
            group.sort(key=lambda one: -one.score)
        binary, share = both(found, known)
        assert binary == benchmark(objects, known), (known, found)
        assert (share == 1) == (binary == 1)
        assert 0 <= share <= 1
        results.append(binary)
    assert 0.1 < np.mean(results) < 0.6


def test_the_benchmarks_own_file_is_read(tmp_path):
    file = tmp_path / "evaluation_metadata.jsonl"
    rows = [{**row, "prompt": f"a photo of {k}"} for k, row in enumerate(ROWS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts, metadata = for_rewards(load(file))
    check({"geneval": {"detector": "diffalign.emoji_world.detector:detect"}}, prompts, metadata)
    one = [{"cup": seen("cup"), "bench": seen("bench", x=40)}[k] for k in ("cup", "bench")]
    reward = build({"geneval": {"detector": lambda images, classes: [one] * len(images)}})
    values = reward(torch.zeros(len(rows), 3, 64, 64), prompts, metadata)
    assert values.tolist() == [1, 1, 0, 1, 1, 0]
    values = torch.cat([values, torch.tensor([0.0])])
    means = summary(values, [*metadata, metadata[0]])
    assert means["single_object"] == 0.5
    assert means["counting"] == 0
    assert means["overall"] == pytest.approx((0.5 + 1 + 0 + 1 + 1 + 0) / 6)  # not 4 / 7


def test_what_cannot_be_scored_is_refused():
    detect = {"detector": "diffalign.emoji_world.detector:detect"}
    for options, message in (
        ({"mode": "partial"}, "mode='partial' is not one of binary, continuous"),
        ({"soft": True}, "unknown option 'soft'"),
        ({"threshold": 2}, "threshold=2 is not a number"),
    ):
        with pytest.raises(ValueError, match=message):
            check({"geneval": {**detect, **options}})
    with pytest.raises(ValueError, match=r"'a cat': include is None .* the geneval reward needs"):
        check({"geneval": detect}, ["a cat"], [{"tag": "colors"}])
    with pytest.raises(ValueError, match="composition reward with soft=true"):
        check_gradient({"geneval": detect})
