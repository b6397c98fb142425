"""`make demo`, with runs of an epoch or two."""

from __future__ import annotations

import re

import pytest
import torch
import yaml
from test_report import Page

from diffalign.commands import demo
from diffalign.emoji_world.evaluate import right
from diffalign.report.run import read


def test_blue_is_a_reward_of_pixels():
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    found = demo.blue(images, ["a", "b"])
    red, green, blue = images.detach().mean((2, 3)).T
    torch.testing.assert_close(found.detach(), blue - (red + green) / 2)
    found.sum().backward()
    assert (images.grad[:, 2] > 0).all()
    assert (images.grad[:, :2] < 0).all()


def test_the_page_of_the_demo(tmp_path, monkeypatch, capsys):
    (tmp_path / "held_out.jsonl").write_text(
        '{"prompt": "two dogs on a gray background", "include": [{"class": "dog", "count": 2}]}\n'
        '{"prompt": "two cats on a blue background", "include": [{"class": "cat", "count": 2}]}\n'
    )
    for name in ("counting", "hacked"):
        tree = yaml.safe_load((demo.CONFIGS / f"emoji_{name}.yaml").read_text())
        tree["data"]["groups"] = tree["train"]["epochs"] = 2
        tree["eval"] |= {"prompts": str(tmp_path / "held_out.jsonl"), "every": 1}
        (tmp_path / f"emoji_{name}.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.setattr(demo, "CONFIGS", tmp_path)
    monkeypatch.setattr(demo, "TRIED", 2)
    demo.main([str(tmp_path / "demo")])
    page = tmp_path / "demo" / "index.html"
    assert capsys.readouterr().out.rstrip().endswith(page.as_uri())
    text = Page(page).text
    heads = ["A search, without training", "A training run: counting", "A hacked run"]
    assert sorted(heads, key=text.index) == heads
    assert re.search(r"finds \d of the first pictures right and \d of the last: [+-]\d.\d+ ±", text)
    assert "2 epochs of 2 pictures" in text
    assert "two dogs on a gray background" in text


@pytest.mark.slow
def test_the_demo_shows_what_it_says(tmp_path):
    """Five minutes on two cores: numbers come right more often, and the hacked run is flagged."""
    demo.main([str(tmp_path)])
    counting, hacked = (read([tmp_path / name])[0] for name in ("counting", "hacked"))
    first, last = (
        sum(right(s.pictures, s.prompts)) for s in (counting.shots[0], counting.shots[-1])
    )
    assert last >= first + 3  # of 60
    assert counting.change("reward").gain > 0.1
    assert counting.change("judge").gain > 0
    assert not counting.warnings
    assert hacked.change("reward").gain > 0.1
    assert hacked.change("judge").gain < 0
    assert hacked.warnings


@pytest.mark.parametrize("name", ["counting", "hacked"])
def test_held_out_numbers_are_not_trained_on(name):
    tree = yaml.safe_load((demo.CONFIGS / f"emoji_{name}.yaml").read_text())
    train, held = (demo.load_prompts(tree[k]["prompts"]) for k in ("data", "eval"))
    assert not {p.text for p in train} & {p.text for p in held}

    def asked(prompts):
        return {(c["class"], c["count"]) for p in prompts for c in p.metadata.get("include", [])}

    assert not asked(train) & asked(held)
