"""`diffalign score`: pairing pictures with prompts, resuming, refusing."""

from __future__ import annotations

import csv
import json
import re

import pytest
import torch
from PIL import Image

from diffalign.commands import cli
from diffalign.commands.score import score
from rewards import from_arguments, jpeg_kilobytes
from rewards.files import load_image

SPEC = {"jpeg": {}, "letters": {"type": "test_score:letters"}}


def letters(images, prompts):
    return [float(len(p)) for p in prompts]


@pytest.fixture
def pictures(tmp_path):
    """Five pictures, one of another size, and a folder inside."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    torch.manual_seed(0)
    for i, name in enumerate(["a.png", "b.png", "c.png", "d.webp", "more/e.png"]):
        side = 24 if i == 2 else 16
        pixels = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_scores_are_those_of_the_pictures(pictures, tmp_path):
    lines = [f"prompt {i}" * i for i in range(1, 6)]
    (tmp_path / "p.txt").write_text("\n".join(lines))
    out = tmp_path / "deep" / "scores.csv"
    means = score(str(pictures), SPEC, str(tmp_path / "p.txt"), str(out), batch=2)
    rows = read(out)
    names = ["a.png", "b.png", "c.png", "d.webp", "more/e.png"]
    assert [row["image"] for row in rows] == names
    assert [row["prompt"] for row in rows] == lines
    for row in rows:
        size = -jpeg_kilobytes(load_image(pictures / row["image"])).item()
        assert float(row["jpeg"]) == pytest.approx(size, abs=1e-5)
        assert float(row["letters"]) == len(row["prompt"])
    assert means["letters"] == sum(map(len, lines)) / 5


def test_named_pictures(pictures, tmp_path):
    names = ["more/e.png", "d.webp", "c.png", "b.png", "a.png"]
    entries = [{"image": n, "prompt": f"of {n}"} for n in names]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, entries)))
    out = tmp_path / "s.csv"
    score(str(pictures), SPEC, str(file), str(out))
    assert all(row["prompt"] == f"of {row['image']}" for row in read(out))
    file.write_text("\n".join(map(json.dumps, entries[1:])))
    with pytest.raises(ValueError, match=r"no prompt for more/e\.png"):
        score(str(pictures), SPEC, str(file), str(tmp_path / "t.csv"))


def test_an_interrupted_call_goes_on(pictures, tmp_path, monkeypatch):
    out = tmp_path / "s.csv"
    score(str(pictures), SPEC, None, str(out), batch=2)
    whole = out.read_text()
    lines = whole.splitlines(keepends=True)
    out.write_text("".join(lines[:3]) + lines[3][:4])  # cut off within a row
    scored, original = [], letters
    monkeypatch.setattr("test_score.letters", lambda i, p: scored.extend(p) or original(i, p))
    score(str(pictures), SPEC, None, str(out), batch=2)
    assert out.read_text() == whole
    assert len(scored) == 3
    monkeypatch.setattr("rewards.build", None)  # nothing is loaded where nothing is left
    score(str(pictures), SPEC, None, str(out), batch=2)
    assert out.read_text() == whole


def test_refusals(pictures, tmp_path):
    out = tmp_path / "s.csv"
    score(str(pictures), SPEC, None, str(out))
    with pytest.raises(ValueError, match="has the columns image, prompt, jpeg, letters, not"):
        score(str(pictures), {"jpeg": {}}, None, str(out))
    (pictures / "aa.png").write_bytes((pictures / "a.png").read_bytes())
    with pytest.raises(ValueError, match=r"goes on with b\.png .* where the folder has aa\.png"):
        score(str(pictures), SPEC, None, str(out))
    (tmp_path / "p.txt").write_text("one\ntwo")
    with pytest.raises(ValueError, match="has 2 prompts for the 6 pictures"):
        score(str(pictures), SPEC, str(tmp_path / "p.txt"), str(tmp_path / "t.csv"))
    (pictures / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png cannot be read as a picture"):
        score(str(pictures), SPEC, None, str(tmp_path / "t.csv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        score(str(tmp_path / "empty"), SPEC, None, str(out))
    with pytest.raises(ValueError, match="did you mean 'jpeg'"):
        score(str(pictures), {"jpge": {}}, None, str(tmp_path / "t.csv"))


TEXTS = ["a dog\r\nand a cat", 'x, "y"', "z\ra\n\nb", "пёс 🐶", " two  words"]


def test_line_breaks_in_prompts_are_kept_and_gone_on_with(pictures, tmp_path):
    file, out = tmp_path / "p.jsonl", tmp_path / "s.csv"
    file.write_text("\n".join(json.dumps({"prompt": t}) for t in TEXTS))
    score(str(pictures), SPEC, str(file), str(out))
    assert [row["prompt"] for row in read(out)] == [t.strip() for t in TEXTS]
    whole = out.read_bytes()
    for end in range(0, len(whole), 3):  # a crash may cut it anywhere
        out.write_bytes(whole[:end])
        score(str(pictures), SPEC, str(file), str(out))
        assert out.read_bytes() == whole


def test_what_is_no_table_of_scores_is_not_overwritten(pictures, tmp_path):
    out = tmp_path / "s.csv"
    for data in (b"a note", b"a,b\n", b"image,prompt,jpeg,letters\n\xff\n", b'a\n"b\0c\n'):
        out.write_bytes(data)
        with pytest.raises(ValueError, match=r"s\.csv .*choose another --out"):
            score(str(pictures), SPEC, None, str(out))
        assert out.read_bytes() == data
    out.write_text("image,prompt,clip\n")  # as a call leaves it whose reward could not be loaded
    score(str(pictures), SPEC, None, str(out))
    assert len(read(out)) == 5
    with pytest.raises(ValueError, match="no table of scores"):
        score(str(pictures), SPEC, None, str(tmp_path))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([{"image": "a.png"}, {"image": "./a.png"}], "two prompts for ./a.png"),
        ([{"image": ["a.png"]}], "is ['a.png'], not the path"),
        ([{"image": "a.png"}, {}], '1 of 2 lines have an "image"'),
    ],
)
def test_pictures_named_wrongly(pictures, tmp_path, entries, words):
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": "a"} | e) for e in entries))
    with pytest.raises(ValueError, match=re.escape(words)):
        score(str(pictures), SPEC, str(file), str(tmp_path / "s.csv"))


def test_folders_and_batches_are_checked(pictures, tmp_path):
    out = str(tmp_path / "s.csv")
    for folder, words in (("none", "does not exist"), ("pictures/a.png", "is a file, give its")):
        with pytest.raises(ValueError, match=words):
            score(str(tmp_path / folder), SPEC, None, out)
    with pytest.raises(ValueError, match="--batch 0 scores nothing"):
        score(str(pictures), SPEC, None, out, batch=0)
    with pytest.raises(OSError, match="cannot be written"):
        score(str(pictures), SPEC, None, str(pictures / "a.png" / "s.csv"))
    (pictures / "folder.png").mkdir()
    (pictures / "a.png").rename(pictures / "a.PNG")
    score(str(pictures), SPEC, None, out)
    assert read(out)[0]["image"] == "a.PNG"
    Image.new("RGB", (8, 8)).save(pictures / "caf\udce9.png")
    with pytest.raises(ValueError, match="bytes that are not UTF-8"):
        score(str(pictures), SPEC, None, str(tmp_path / "t.csv"))


def test_the_command(pictures, tmp_path, capsys):
    out = str(tmp_path / "s.csv")
    arguments = [str(pictures), "--out", out, "--reward", 'jpeg={"quality": 50}']
    assert cli.score(arguments) == 0
    assert out in capsys.readouterr().out
    assert len(read(out)) == 5
    assert cli.score([str(pictures), "--out", out, "--reward", "jpeg={"]) == 1
    assert "not JSON" in capsys.readouterr().err
    with pytest.raises(ValueError, match="twice"):
        from_arguments(["jpeg", "jpeg"])
    with pytest.raises(ValueError, match="wants its options"):
        from_arguments(["jpeg=2"])
