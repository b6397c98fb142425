"""`diffalign blind`: the pairs are what they say, and the counting is right."""

import base64
import io
import json
import re

import pytest
from PIL import Image

from diffalign.commands import cli
from diffalign.record import pictures
from diffalign.report import blind

PROMPTS = ["a red cat", "two dogs </script>", "a blue car", "a tree"]


def folder(path, shade, names=PROMPTS):
    path.mkdir()
    for i, name in enumerate(names):
        Image.new("RGB", (8, 8), (shade, i, 0)).save(path / f"{name.replace('/', '-')}.png")
    return str(path)


def run(path):
    for epoch, shade in ((0, 10), (5, 20), (9, 30)):
        shots = [Image.new("RGB", (8, 8), (shade, i, 0)) for i in range(len(PROMPTS))]
        pictures.save(path, epoch, PROMPTS, shots, {"reward": [0.0] * len(PROMPTS)})
    return str(path)


def red(picture):
    return picture.getpixel((0, 0))[0]


def test_pairs_of_a_run_are_the_base_and_the_last(tmp_path):
    found = blind.pairs([run(tmp_path / "r")], 40, 0)
    assert sorted(p.prompt for p in found) == sorted(PROMPTS)
    assert {(red(p.a), red(p.b)) for p in found} == {(10, 30)}
    for pair in found:
        assert pair.a.getpixel((0, 0))[1] == PROMPTS.index(pair.prompt)
        assert [red(x) for x in pair.shown] == ([30, 10] if pair.swapped else [10, 30])


def test_sides_are_shuffled_and_a_seed_gives_them_again(tmp_path):
    names = [f"prompt {i}" for i in range(60)]
    sides = [folder(tmp_path / "a", 10, names), folder(tmp_path / "b", 20, names)]
    found = blind.pairs(sides, 40, 3)
    assert len(found) == 40
    assert 8 < sum(p.swapped for p in found) < 32
    again = blind.pairs(sides, 40, 3)
    assert [(p.prompt, p.swapped) for p in again] == [(p.prompt, p.swapped) for p in found]
    assert [p.prompt for p in blind.pairs(sides, 40, 4)] != [p.prompt for p in found]


def test_the_binomial():
    assert blind.interval(28, 40) == pytest.approx((0.5457, 0.8193), abs=1e-4)
    assert blind.interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert blind.chance(28, 40) == pytest.approx(0.01659, abs=1e-4)
    assert blind.chance(5, 10) == 1


def test_the_verdict_unblinds(tmp_path):
    found = blind.pairs([run(tmp_path / "r")], 40, 1)
    after = "".join("1" if p.swapped else "2" for p in found)
    before = "".join("2" if p.swapped else "1" for p in found)
    names = ("before", "after")
    assert "after beats before in 4 of 4 pairs that differ (0 do not): 100%" in blind.verdict(
        found, after, names
    )
    assert "in 0 of 4" in blind.verdict(found, before, names)
    assert "in 3 of 3 pairs that differ (1 do not)" in blind.verdict(found, after[:3] + "0", names)
    assert "no difference was seen in 4 pairs" in blind.verdict(found, "0000", names)
    for answers in ("11", "11x1"):
        with pytest.raises(ValueError, match="write as many digits"):
            blind.verdict(found, answers, names)


def test_the_page_holds_all_pairs_and_ends_no_script(tmp_path):
    page = blind.page(blind.pairs([run(tmp_path / "r")], 40, 0), ("before", "after"))
    data = re.search(r'id="data">(.*?)</script>', page, re.S)[1]
    found = json.loads(data)
    assert {p["prompt"] for p in found["pairs"]} == set(PROMPTS)
    first = base64.b64decode(found["pairs"][0]["a"].partition(",")[2])
    assert red(Image.open(io.BytesIO(first)).convert("RGB")) == 10
    assert page.count("</script>") == 2
    assert "${" in page
    assert "$${" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_command(tmp_path, capsys):
    a, b = folder(tmp_path / "a", 10), folder(tmp_path / "b", 20)
    out, sheet = str(tmp_path / "x.html"), str(tmp_path / "x.png")
    assert cli.COMMANDS["blind"][0]([a, b, "--out", out, "--sheet", sheet]) == 0
    assert capsys.readouterr().out.split() == [out, sheet]
    assert Image.open(sheet).height > 4 * blind.SIDE
    assert cli.COMMANDS["blind"][0]([a, b, "--answers", "1122"]) == 0
    assert "b beats a in" in capsys.readouterr().out
    empty = tmp_path / "empty"
    empty.mkdir()
    other = folder(tmp_path / "c", 20, ["nothing alike"])
    for arguments, why in (
        ([str(empty)], "holds neither the evaluations of a run nor pictures"),
        ([a, other], "no prompts or names in common"),
        ([a, b, other], "3 sides were given"),
        ([a, b, "--pairs", "0"], "--pairs 0 shows nothing"),
    ):
        assert cli.COMMANDS["blind"][0](arguments) == 1
        assert why in capsys.readouterr().err
