"""What a run keeps of its evaluations, and the report and film made of it: no model is needed."""

from __future__ import annotations

import errno
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffalign import TrainConfig, Trainer, report
from diffalign.commands import cli
from diffalign.record import pictures
from diffalign.record.metrics import Tracker
from diffalign.report import film
from diffalign.report.charts import Axis, Line, chart, number
from diffalign.report.run import read, short_names
from diffalign.verdict import VERDICTS

NASTY = """a "dog" <script>alert('x')</script> & <b>bold</b> ${body} 猫"""


def fake_run(folder, epochs=4, prompts=6, size=(16, 16), seed=0, kl=True, verdicts=(), **config):
    """A run folder as training leaves it, evaluated every epoch; pictures are noise. verdicts:
    the guard's, by epoch."""
    texts = [NASTY, *(f"prompt {i}" for i in range(1, prompts))]
    tracker, generator = Tracker(folder), torch.Generator().manual_seed(seed)
    for epoch in range(epochs + 1):
        values = [i / 10 + epoch * (i - 1) / 10 for i in range(prompts) for _ in range(2)]
        scores = {"reward": values, "jpeg": [v - 1 for v in values], "judge": [0.5] * 2 * prompts}
        scores |= {"kl": [epoch / 1000] * 2 * prompts} if kl else {}
        row = {f"eval/{k}": sum(v) / len(v) for k, v in scores.items()} | {"eval/diversity": 0.2}
        if epoch:
            row |= {"reward_mean": epoch / 3, "denoiser_calls": 100, "reward_calls": 8}
            row |= {"seconds": 90.0, "reward_seconds": 9.0}
            row |= {name: dict(verdicts).get(epoch) == name for name in VERDICTS}
        tracker.log(epoch, row)
        drawn = [
            Image.fromarray(
                torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=generator)
                .numpy()
            )
            for _ in texts
        ]  # fmt: skip
        pictures.save(folder, epoch, texts, drawn, scores)
    tree = {
        "model": {"name": "assets/emoji-sd", "lora_rank": 8},
        "algorithm": {"type": "ddpo", "clip_range": 0.001},
        "rewards": {"jpeg": 1.0},
        "data": {"groups": 4, "group_size": 2},
        "train": {"epochs": 9, "lr": 1e-3},
        "eval": {"rewards": {"judge": {"type": "clip"}}},
        "log": {"dir": str(folder)},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree | config))
    return folder


class Page(HTMLParser):
    """The text of a page and what it refers to; refuses tags that do not close, and references."""

    VOID = ("meta", "img", "input", "br", "source")

    def __init__(self, path):
        super().__init__()
        self.open, self.words, self.references = [], [], []
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())
        assert all(r.startswith("data:") for r in self.references), self.references

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.references += [v for k, v in attrs if k in ("src", "href", "srcset")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)


def test_pictures_are_kept_with_their_scores(tmp_path):
    drawn = [Image.new("RGB", (12, 8), (k, 2 * k, 255 - k)) for k in (3, 50, 90)]
    scores = {"reward": [1, 2, 3, 4, 5, 6], "clip": [0.5, math.nan, math.inf, 1, 1, 1]}
    pictures.save(tmp_path, 12, ["a", NASTY, "c"], drawn, scores)
    pictures.save(tmp_path, 2, ["a", NASTY, "c"], drawn[::-1], scores)
    first, last = pictures.load(tmp_path)
    assert (first.epoch, last.epoch) == (2, 12)
    assert last.prompts == ["a", NASTY, "c"]
    assert last.scores == {
        "reward": [[1, 2], [3, 4], [5, 6]],
        "clip": [[0.5, None], [None, 1], [1, 1]],
    }
    assert last.notes(1) == {"reward": 3}
    # small pictures are kept to the bit
    assert [p.tobytes() for p in last.pictures] == [p.tobytes() for p in drawn]
    pictures.drop(tmp_path, after=2)
    assert [e.epoch for e in pictures.load(tmp_path)] == [2]
    assert len(list((tmp_path / "pictures").iterdir())) == 2
    assert pictures.load(tmp_path / "nothing") == []


def test_pictures_that_cannot_be_read_are_named(tmp_path):
    run = fake_run(tmp_path, epochs=3)
    (run / "pictures" / "epoch_0003.webp").unlink()  # is left out
    assert [shot.epoch for shot in pictures.load(run)] == [0, 1, 2]
    (run / "pictures" / "epoch_0001.webp").write_bytes(b"RIFF half")
    with pytest.raises(ValueError, match=r"epoch_0001\.webp cannot be read .*; remove it"):
        report.write([run])
    (run / "pictures" / "epoch_0000.json").write_text("{")
    with pytest.raises(ValueError, match=r"epoch_0000\.json cannot be read .*; remove it"):
        report.write([run])


def test_large_pictures_are_shrunk_to_fit_on_a_sheet():
    tall = torch.rand(3, 1024, 512)
    assert pictures.fitted(tall, 16).size == (512, 1024)
    assert pictures.fitted(tall, 64).size == (256, 512)
    assert pictures.fitted(tall[:, :64, :64], 1000).size == (64, 64)


def test_report_of_a_run(tmp_path):
    path = report.write([fake_run(tmp_path / "run", verdicts={3: "over_optimised"})])
    assert path == tmp_path / "run" / "report.html"
    page = Page(path)
    assert "<script>alert" not in page.source
    assert "<b>bold" not in page.source
    assert NASTY in page.text
    for piece in (
        "Held-out reward 0.250 → 0.850 in 4 of 9 epochs",
        "Over-optimised from epoch 3 (1 of 4 evaluations)",
        "ddpo (clip_range 0.001)",
        "LoRA of rank 8",
        "a judge, no part of the reward",
        # of the changes of -0.4, 0, ..., 1.6 there are six
        "+0.60 ± 0.31",
        "Best pictures: the reward rose most from base to epoch 4 prompt 5",
        f"Worst pictures: the reward fell most, or rose least, from base to epoch 4 {NASTY}",
        "6 prompts, means over 2 pictures each, the largest fall first",
        "6 min 0 s 1 min 30 s 10%",
    ):
        assert piece in page.text, piece
    assert page.source.count('class="warn"><path') == 6  # a mark in every chart over epochs
    # a column for every evaluation and prompt, the first and the last chosen
    assert len(re.findall(r'<img data-column="0" class="left "', page.source)) == 6
    assert len(re.findall(r'<img data-column="4" class="right"', page.source)) == 6
    assert page.source.count("<img") == 6 * 5 + 1  # and the film
    assert page.source.count("data:image/webp;base64,UklGR") == 6 * 5 + 2
    # people would rather look: pictures are above numbers
    order = [page.text.index(k) for k in ("Best pictures", "a judge, no part", "Film, evaluation")]
    assert order == sorted(order)


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        (
            {1: "improved", 4: "improved"},
            "Improved (at the last of 4 evaluations): the held-out reward rose by more than chance "
            "explains, and neither a judge nor the diversity was found to fall.",
        ),
        (
            {1: "improved"},
            "No significant change (at the last of 4 evaluations): the held-out reward neither",
        ),
        (
            {3: "over_optimised", 4: "over_optimised"},
            "Over-optimised from epoch 3 (2 of 4 evaluations): a judge or the diversity fell while "
            "the reward was above the base model’s.",
        ),
        (
            {2: "over_optimised", 3: "collapsed", 4: "collapsed"},
            "Over-optimised from epoch 2 (1 of 4 evaluations): a judge or the diversity fell while "
            "the reward was above the base model’s. Collapsed from epoch 3 (2 of 4 evaluations): a "
            "judge or the diversity fell, and the reward did not rise.",
        ),
        (
            {1: "failed", 4: "improved"},
            "Failed from epoch 1 (1 of 4 evaluations): the reward fell below the base model’s. "
            "Improved (at the last of 4 evaluations)",
        ),
    ],
)
def test_verdicts_in_words(tmp_path, verdicts, said):
    run = fake_run(tmp_path, verdicts=verdicts)
    page = Page(report.write([run]))
    assert said in page.text
    assert "Not found" not in page.text
    assert "No judge" not in page.text
    first = min((e for e, name in verdicts.items() if name != "improved"), default=None)
    words = {"over_optimised": "over-optimised"}
    if first is None:
        assert 'class="warn"' not in page.source
    else:
        name = words.get(verdicts[first], verdicts[first])
        assert page.source.count(f">{name}</text>") == 6  # in every chart over epochs


def test_verdicts_without_judges_and_of_runs_that_knew_one_only(tmp_path):
    run = fake_run(tmp_path, verdicts={4: "improved"}, eval={})
    page = Page(report.write([run]))
    assert "explains, and the diversity did not fall. No judge watched" in page.text
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in lines:
        row["eval/reward"], row["improved"] = None, False
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    assert "the held-out reward cannot be compared over the run" in Page(report.write([run])).text
    for row in lines:
        for name in VERDICTS[1:]:
            row.pop(name, None)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    page = Page(report.write([run]))
    assert "Not found over-optimised in 4 evaluations." in page.text
    assert "Improved" not in page.text


def test_a_part_that_is_the_reward_is_left_out(tmp_path):
    folder = fake_run(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in lines:
        row["eval/jpeg"] = row["eval/reward"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (run,) = read([folder])
    assert run.measures == ["reward", "judge", "kl", "diversity"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "0 epochs."),
        ([{"step": 0, "eval/reward": 0.5}], "0 epochs."),
        ([{"step": 1, "reward_mean": 0.5}], "1 epoch."),
        ([{"step": 1, "reward_mean": None}, {"step": 2, "loss": 1.0}], "2 epochs."),
        (
            [
                {"step": 0, "eval/reward": 1e9, "eval/kl": None, "eval/x<y": -1e-7},
                {"step": 1, "reward_mean": -3.0, "eval/reward": None, "eval/kl": 0.0},
                {"step": 2, "reward_mean": 4.0, "eval/reward": 2e9, "eval/x<y": 3e-7},
            ],
            "Held-out reward 1,000,000,000 → 2,000,000,000 in 2 epochs.",
        ),
    ],
)
def test_odd_runs(tmp_path, rows, said):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(report.write([tmp_path]))
    assert said in page.text
    for missing in ("None", "nan", "inf "):
        assert missing not in page.text


SHEET, TABLE = "pictures/epoch_0004.webp", "pictures/epoch_0004.json"
ONE = b'{"epoch": 4, "size": [16, 16], "prompts": ["a"], "scores": %s}'
SMALL = io.BytesIO()
Image.new("RGB", (8, 8)).save(SMALL, "WEBP")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", b'{"step": 0}\n{"step": 1, "x": "y"}\n{}\n', ":2 is not a row"),
        ("metrics.jsonl", b'{"step": 0}\n{"ste\n{"step": 2}\n', ":2 is not a row of metrics"),
        ("metrics.jsonl", b'{"step": 0}\n\xff\n', ":2: byte 0xff at offset 12 is not UTF-8"),
        ("config.yaml", b"train: {lr: 1", ":1: "),
        ("config.yaml", b"train: 3", ": train is 3, no section of settings"),
        (SHEET, b"RIFF", " cannot be read as a picture ("),
        (SHEET, SMALL.getvalue(), " is too small for its pictures; remove it"),
        (TABLE, b'{"epoch": 4, "pro', " cannot be read ("),
        (TABLE, b"[1]", " cannot be read ("),
        (TABLE, ONE[:-15], " cannot be read ("),
        (TABLE, ONE % b'{"reward": [[1.0], [2.0]]}', "the scores 'reward' are not those of 1"),
        (TABLE, ONE % b'{"reward": [["high"]]}', "the scores 'reward' are not those of 1"),
        (TABLE, ONE.replace(b"16, 16", b"0, 16") % b"{}", "it has no pictures"),
    ],
)  # fmt: skip
def test_a_damaged_run_is_said_to_be(tmp_path, file, content, message, capsys):
    run = fake_run(tmp_path / "run")
    (run / file).write_bytes(content)
    for command in ("report", "film") if file in (SHEET, TABLE) else ("report",):
        assert cli.COMMANDS[command][0]([str(run)]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {run / file}")
        assert message in error


def test_a_sheet_cut_short_is_said_to_be(tmp_path):
    run = fake_run(tmp_path / "run")
    whole = (run / SHEET).read_bytes()
    for length in (0, 20, len(whole) // 2, len(whole) - 1):
        (run / SHEET).write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"epoch_0004\.webp cannot be read"):
            report.write([run])


def test_settings_of_another_version_are_shown_and_not_understood(tmp_path):
    run = fake_run(tmp_path / "run")
    other = "rewards: {jpeg: 1}\neval: {rewards: [clip]}\ntrain: {epochs: many, lr: 0.1}\n"
    (run / "config.yaml").write_text(f"{other}model: {{name: [1]}}\ndata: null\nnew: {{key: 7}}\n")
    text = Page(report.write([run])).text
    assert "Learning rate 0.1" in text
    assert "epochs: many" in text
    assert "key: 7" in text


@pytest.mark.parametrize(
    ("command", "out", "message"),
    [
        ("report", "folder", "--out '.*folder' is a folder; give the name of a file in it"),
        ("report", "file/report.html", "file is a file, and no folder to write to"),
        ("film", "file", "file is a file, and no folder to write to"),
    ],
)
def test_places_that_cannot_be_written_to(tmp_path, command, out, message, capsys):
    run = fake_run(tmp_path / "run")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    assert cli.COMMANDS[command][0]([str(run), "--out", str(tmp_path / out)]) == 1
    assert re.search(f"error: .*{message}", capsys.readouterr().err)


def test_a_full_disk_is_said_to_be(tmp_path, monkeypatch, capsys):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    run = fake_run(tmp_path / "run")
    monkeypatch.setattr("os.replace", full)
    assert cli.report([str(run)]) == 1
    assert capsys.readouterr().err == (
        f"error: {run / 'report.html'}: cannot be written: No space left on device; "
        "make room, or choose another disk\n"
    )


def test_a_run_of_one_evaluation_and_none(tmp_path, capsys):
    run = fake_run(tmp_path / "run", epochs=0)
    assert len(list((run / "pictures").glob("*.json"))) == 1
    assert cli.film([str(run)]) == 0
    assert Image.open(run / "film.webp").n_frames == 1
    shutil.rmtree(run / "pictures")
    capsys.readouterr()
    for folder in (run, tmp_path, tmp_path / "nothing"):
        assert cli.film([str(folder)]) == 1
        assert "holds no pictures/epoch_*.json" in capsys.readouterr().err
    assert cli.film([str(run), "--cell", "0"]) == 1
    assert "--cell 0 is too few; use 1 or more" in capsys.readouterr().err


def test_runs_without_kl_or_single_pictures(tmp_path):
    folder = fake_run(tmp_path / "run", kl=False)
    shutil.rmtree(folder / "pictures")
    Image.new("RGB", (40, 90)).save(folder / "grid.png")
    page = Page(report.write([folder]))
    assert "Distance to the base model" not in page.text
    assert "The grids of the last evaluation" in page.text
    assert page.source.count("<img") == 1
    assert 'class="controls"' not in page.source


def test_several_runs(tmp_path, monkeypatch, capsys):
    a = fake_run(tmp_path / "a" / "run", verdicts={2: "over_optimised"})
    b = fake_run(tmp_path / "b" / "run", epochs=2, train={"epochs": 2, "lr": 5e-4})
    other = fake_run(tmp_path / "other", seed=1)
    monkeypatch.chdir(tmp_path)
    assert cli.report([str(a), str(b)]) == 0
    assert capsys.readouterr().out == "report.html\n"
    page = Page(tmp_path / "report.html")
    assert "2 runs" in page.text
    assert "A a/run" in page.text
    assert "setting A a/run B b/run train.epochs 9 2 train.lr 0.001 0.0005" in page.text
    # both began with the same pictures
    options = re.findall(r"<option[^>]*>([^<]*)", page.source)
    assert options[:3] == ["base", "a/run: epoch 4", "b/run: epoch 2"]
    assert page.source.count('class="line run1"') == 5 + 3  # over cost, and against the distance
    page = Page(report.write([a, other], tmp_path / "two.html"))
    assert re.findall(r"<option[^>]*>([^<]*)", page.source)[:2] == ["run: base", "other: base"]
    assert cli.report([str(a), str(a)]) == 1
    assert "one is given twice" in capsys.readouterr().err
    assert cli.report([str(tmp_path)]) == 1
    assert "no metrics.jsonl" in capsys.readouterr().err


def test_totals_of_different_rewards_are_not_compared(tmp_path):
    a = fake_run(tmp_path / "a")
    b = fake_run(tmp_path / "b", rewards={"jpeg": 2.0})
    page = Page(report.write([a, b], tmp_path / "two.html"))
    assert "held-out reward" not in page.text
    assert "held-out jpeg" in page.text
    assert "Best pictures" not in page.text  # by what?
    assert "reward" not in "".join(re.findall(r"<li>(\w+) <span", page.source))
    same = fake_run(tmp_path / "c")
    page = Page(report.write([a, same], tmp_path / "two.html"))
    assert "held-out reward" in page.text
    assert "Best pictures" in page.text


def test_a_report_stays_small(tmp_path):
    folder = fake_run(tmp_path / "run", epochs=4, prompts=16, size=(300, 300))
    path = report.write([folder])  # noise, which nothing compresses
    assert 1e6 < path.stat().st_size < 5e6


def test_axes_are_round_and_around_the_data():
    axis = Axis([0.613, 0.6253], 100, 0)
    assert [axis.label(t) for t in axis.ticks] == ["0.610", "0.615", "0.620", "0.625", "0.630"]
    assert axis(0.61) == 100
    assert axis(0.63) == pytest.approx(0)
    axis = Axis([1, 13], 0, 120, "inside", integer=True)
    assert [axis.label(t) for t in axis.ticks] == ["5", "10"]
    assert (axis(1), axis(13)) == (0, 120)
    for values in ([0.0], [7.0, 7.0], [1e-9, 3e-9], [-1e12, 1e12]):
        axis = Axis(values, 0, 1)
        assert len({axis.label(t) for t in axis.ticks}) == len(axis.ticks) > 1


def test_a_line_breaks_where_values_are_missing():
    drawn = chart("x", [Line([(0, 1.0), (1, None), (2, 3.0), (3, 4.0)], ["a"] * 4, "t")], "epoch")
    path = re.search(r'class="line t"><path d="([^"]*)"', drawn)
    assert path
    assert re.sub(r"[\d. ]", "", path[1]) == "MML"
    assert chart("x", [Line([(0, None)], ["a"], "t")], "epoch") == ""


def test_a_long_run_resumed_with_other_prompts(tmp_path):
    folder = fake_run(tmp_path / "run", epochs=2)
    with open(folder / "metrics.jsonl", "a") as file:
        for epoch in range(3, 5000):
            file.write(json.dumps({"step": epoch, "reward_mean": epoch % 7}) + "\n")
    whole = Page(report.write([folder]))
    assert "+0.30 ± 0.15" in whole.text
    assert len(whole.source) < 200_000
    path = folder / "pictures" / "epoch_0000.json"
    path.write_text(path.read_text().replace("prompt 5", "another"))
    page = Page(report.write([folder]))
    assert "±" not in page.text
    assert "Every held-out prompt" not in page.text
    assert page.source.count("<img") == 5 * 3  # of the prompts that all have
    film.film(folder, cell=16)
    assert Image.open(folder / "film.gif").n_frames == 2  # type: ignore[attr-defined]


def test_numbers():
    assert [number(x) for x in (0.43044, -0.00398, 1234567.0, 12.0, 0, None, -7.96e-5)] == [
        "0.430", "−0.00398", "1,234,567", "12.0", "0", "–", "−7.96e-5",
    ]  # fmt: skip
    assert short_names(["x/a/run", "y/b/run"]) == ["a/run", "b/run"]


def test_film(tmp_path, capsys):
    folder = fake_run(tmp_path / "run", epochs=3)
    assert cli.film([str(folder), "--prompts", "5", "--epochs", "3", "--cell", "32"]) == 0
    assert capsys.readouterr().out.split() == [
        str(folder / f"film.{s}") for s in ("png", "webp", "gif")
    ]
    strip = Image.open(folder / "film.png")
    assert json.loads(strip.info["diffalign"])["epochs"] == [0, 1, 2, 3]
    for suffix in ("webp", "gif"):
        shown = Image.open(folder / f"film.{suffix}")
        assert shown.n_frames == 4  # type: ignore[attr-defined]
        assert shown.width == 3 * 40 + 8  # five pictures are rows of three and two
    with pytest.raises(ValueError, match=r"holds no pictures/epoch_\*\.json"):
        film.film(tmp_path)
    assert cli.film([str(folder), "--epochs", "1"]) == 1
    assert "--epochs 1 is too few; use 2 or more" in capsys.readouterr().err


@pytest.fixture
def make(pipelines, tmp_path):
    """make(resume=False, **{"train.epochs": ...}) -> Trainer of the run folder "run"."""
    (tmp_path / "prompts.txt").write_text("a red dog\na cat\na blue bus\na tree\n")

    def make(resume=False, **overrides):
        tree = {
            "model": {"name": pipelines["sd-v"], "lora_rank": 2},
            "algorithm": {"type": "ddpo"},
            "sampler": {"steps": 4, "batch": 8},
            "rewards": {"jpeg": 1.0},
            "data": {"prompts": str(tmp_path / "prompts.txt"), "groups": 4, "group_size": 2},
            "train": {"epochs": 2, "checkpoint_every": 1},
            "eval": {"prompts": str(tmp_path / "prompts.txt"), "steps": 4, "every": 1},
            "log": {"dir": str(tmp_path / "run")},
        }
        for key, value in overrides.items():
            section, name = key.split(".")
            tree[section][name] = value
        return Trainer(TrainConfig.from_dict(tree), resume=resume)

    return make


def test_training_keeps_pictures_and_reports_and_resuming_goes_on(make, tmp_path):
    make().train()
    run = tmp_path / "run"
    kept = pictures.load(run)
    assert [e.epoch for e in kept] == [0, 1, 2]
    assert kept[0].prompts == ["a red dog", "a cat", "a blue bus", "a tree"]
    assert len(kept[0].pictures) == 4
    assert [len(row) for row in kept[0].scores["reward"]] == [2, 2, 2, 2]
    assert "in 2 epochs" in Page(run / "report.html").text
    (shot,) = (e for e in read([run])[0].shots if e.epoch == 1)
    means = [x for row in shot.scores["jpeg"] for x in row if x is not None]
    assert dict(read([run])[0].column("eval/jpeg"))[1] == pytest.approx(sum(means) / 8)
    # of epochs that were lost to a crash
    texts = ["a", "b"]
    pictures.save(run, 3, texts, [Image.new("RGB", (4, 4))] * 2, {"reward": [0, 1]})
    pictures.save(run, 7, texts, [Image.new("RGB", (4, 4))] * 2, {"reward": [0, 1]})
    before = [(run / f"pictures/epoch_000{k}.webp").read_bytes() for k in range(3)]
    make(resume=True, **{"train.epochs": 4, "eval.every": 4}).train()
    assert [e.epoch for e in pictures.load(run)] == [0, 1, 2, 4]
    assert [(run / f"pictures/epoch_000{k}.webp").read_bytes() for k in range(3)] == before
    assert "in 4 epochs" in Page(run / "report.html").text


def test_a_report_that_fails_does_not_end_the_run(make, tmp_path, monkeypatch, capsys):
    def fail(runs):
        raise OSError("disk full")

    monkeypatch.setattr(report, "write", fail)
    make(**{"train.epochs": 1}).train()
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()
    assert "no report.html, OSError('disk full')" in capsys.readouterr().out


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


def test_bands_are_of_the_change_over_the_prompts(tmp_path):
    run = read([fake_run(tmp_path / "run")])[0]
    found = run.gains("reward")
    # the change of prompt i at an epoch is epoch · (i - 1) / 10
    gains = np.arange(-1, 5) / 10
    for epoch in range(5):
        error = epoch * gains.std(ddof=1) / 6**0.5
        assert found[epoch] == pytest.approx((epoch * gains.mean(), error))
    assert run.change("reward")[2:] == found[4]
    text = chart("a", [Line(run.column("eval/reward"), [""] * 5, "judge", errors=[0.1] * 5)], "x")
    points = re.search(r'class="band" d="M(.*?)Z"', text)[1].split("L")
    assert len(points) == 10
    assert points[0].split()[0] == points[-1].split()[0]
    assert float(points[0].split()[1]) < float(points[-1].split()[1])  # pixels count downwards
    # points without an error are left out, and one alone is no band
    errors = [None, None, None, None, 0.1]
    line = Line(run.column("eval/reward"), [""] * 5, "judge", errors=errors)
    assert line.band() == [(4, pytest.approx(0.75), pytest.approx(0.95))]
    assert "band" not in chart("a", [line], "x")


def test_a_change_is_of_the_prompts_that_both_evaluations_scored(tmp_path):
    folder = fake_run(tmp_path / "run")
    path = folder / "pictures" / "epoch_0004.json"
    table = json.loads(path.read_text())
    table["scores"]["reward"][0] = [None, None]  # the only one that fell
    path.write_text(json.dumps(table))
    change = read([folder])[0].change("reward")
    assert change.gain == pytest.approx(4 * np.arange(5).mean() / 10)
    # without the pictures of the first evaluation there is no pair to compare
    assert read([folder])[0].gains("jpeg")[2][1] > 0
    (folder / "pictures" / "epoch_0000.json").rename(folder / "base.json")
    alone = read([folder])[0]
    assert alone.gains("jpeg") == {}
    assert alone.change("jpeg")[2:] == (pytest.approx(0.6), None)
    (folder / "base.json").rename(folder / "pictures" / "epoch_0000.json")
    # a measure stands under the evaluation that it is of, or not at all
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    rows[-1] = rows[-1].replace("eval/judge", "another")
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    assert read([folder])[0].change("judge") == (0.5, None, 0.0, 0.0)


def test_the_noise_scale_is_a_curve(tmp_path):
    assert "Signal or noise" not in Page(report.write([fake_run(tmp_path / "run")])).text
    tracker = Tracker(tmp_path / "run", resume_step=4)
    for epoch in (5, 6):
        row = {"noise_scale": 100.0 * epoch, "noise_scale_error": 9.0 + 1e3 * (epoch == 5)}
        row["noise_scale_least"] = 90.0 * epoch
        tracker.log(epoch, row)
    page = Page(report.write([tmp_path / "run"]))
    assert "Signal or noise" in page.text
    assert "epoch 6: noise scale: 600" in page.source
    assert "epoch 5: what it is at least: 450" in page.source
    assert "epoch 5: noise scale: 500" not in page.source  # it could be anything
    assert "epoch 6: pictures of an update: 8" in page.source  # 4 groups of 2


PROBE = """<script>
const range = document.querySelector("input[type=range]");
const image = document.querySelector(".stack img.right");
const seen = {};
const look = (name) => (seen[name] = getComputedStyle(image).clipPath);
seen.how = document.querySelector(".how").value;
const choose = (value) => {
  how.value = value;
  how.dispatchEvent(new Event("input"));
};
const how = document.querySelector(".how");
choose("cut");
look("at first");
range.value = 20;
range.dispatchEvent(new Event("input"));
look("moved");
const box = image.getBoundingClientRect();
const place = { bubbles: true, buttons: 1, clientX: box.left + 0.75 * box.width };
image.dispatchEvent(new PointerEvent("pointermove", place));
look("dragged");
const right = document.querySelectorAll("select")[1];
right.value = "1";
right.dispatchEvent(new Event("input"));
seen.shown = [...document.querySelectorAll("figure:has(.stack):first-of-type .stack img")]
  .map((i) => getComputedStyle(i).display);
seen.scores = document.querySelector(".pictures li").innerText;
const first = (name) => document.querySelector(`.stack img.${name}`);
const visible = () => ["left", "right"].map((name) => getComputedStyle(first(name)).visibility);
choose("flip");
seen.flipped = visible();
first("left").dispatchEvent(new PointerEvent("pointerdown", { bubbles: true, buttons: 1 }));
seen.held = visible();
first("left").dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
seen.released = visible();
const swap = document.querySelector(".swap");
swap.click();
seen.pressed = [...visible(), swap.ariaPressed];
swap.click();
choose("beside");
const [a, b] = ["left", "right"].map((name) => first(name).getBoundingClientRect());
seen.beside = a.right <= b.left && a.top === b.top && getComputedStyle(first("right")).clipPath;
seen.wide = document.documentElement.scrollWidth <= innerWidth;
document.title = JSON.stringify(seen);
console.error("the last message");
</script></body>"""


@pytest.mark.skipif(not CHROMIUM, reason="there is no chromium")
def test_in_a_browser(tmp_path):
    """No message on the console, no sideways scrolling, and the controls do what they say."""
    run = fake_run(tmp_path / "run", verdicts={3: "over_optimised"})
    path = report.write([run])
    path.write_text(path.read_text("utf-8").replace("</body>", PROBE), "utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--enable-logging=stderr", "--window-size=500,800", f"--user-data-dir={tmp_path}/c"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=2000", path.as_uri()],
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert len(console) == 1, console
    assert "the last message" in console[0]
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stdout[:500]
    seen = json.loads(title[1].replace("&gt;", ">"))
    assert seen["how"] == "beside"
    assert seen["at first"] == "inset(0px 0px 0px 50%)"
    assert seen["moved"] == "inset(0px 0px 0px 20%)"
    assert seen["dragged"] == "inset(0px 0px 0px 75%)"
    assert seen["shown"][:5] == ["block", "block", "none", "none", "none"]
    assert seen["scores"].split() == ["reward", "0.500", "0.900"]
    assert seen["flipped"] == seen["released"] == ["visible", "hidden"]
    assert seen["held"] == ["visible", "visible"]
    assert seen["pressed"] == ["visible", "visible", "true"]
    assert seen["beside"] == "none"
    assert seen["wide"]
