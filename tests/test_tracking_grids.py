import csv
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.drawing.curves import draw_curves
from diffalign.drawing.grids import comparison_grid, image_grid, save_png, to_pil, wrap
from diffalign.record.metrics import Tracker, check_trackers, read_metrics


def table(run_dir):
    with open(run_dir / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_rows_are_on_disk_at_once_and_the_header_grows(tmp_path):
    tracker = Tracker(tmp_path / "run")
    tracker.log(0, {"reward_mean": torch.tensor(0.5), "loss": float("nan")})
    assert table(tmp_path / "run") == [{"step": "0", "reward_mean": "0.5", "loss": ""}]
    tracker.log(1, {"eval/a": 2, "loss": float("inf")})
    tracker.log(2, {"reward_mean": 1e-9})
    tracker.close()
    rows = table(tmp_path / "run")
    assert list(rows[0]) == ["step", "reward_mean", "loss", "eval/a"]
    assert rows[1] == {"step": "1", "reward_mean": "", "loss": "", "eval/a": "2.0"}
    assert float(rows[2]["reward_mean"]) == 1e-9
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert read_metrics(tmp_path / "run")[1] == {"step": 1, "eval/a": 2.0, "loss": None}
    with pytest.raises(ValueError, match="metric 'x'='fast' is not a number"):
        tracker.log(3, {"x": "fast"})
    assert not list((tmp_path / "run").glob(".*"))


def test_resume_drops_later_rows_and_a_torn_line(tmp_path):
    first = Tracker(tmp_path)
    for step in range(5):
        first.log(step, {"reward_mean": step} | ({"late": 1} if step == 4 else {}))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "rewa')
    second = Tracker(tmp_path, resume_step=2)
    second.log(3, {"reward_mean": 30})
    assert [(r["step"], r["reward_mean"]) for r in table(tmp_path)] == [
        ("0", "0.0"),
        ("1", "1.0"),
        ("2", "2.0"),
        ("3", "30.0"),
    ]
    assert "late" not in table(tmp_path)[0]
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1, 2, 3]
    assert Tracker(tmp_path / "new", resume_step=3).rows == []


def test_a_new_run_keeps_the_old_metrics(tmp_path):
    Tracker(tmp_path).log(0, {"a": 1})
    Tracker(tmp_path)
    assert read_metrics(tmp_path) == []
    assert (tmp_path / "metrics.previous.csv").read_text() == "step,a\n0,1.0\n"
    assert (tmp_path / "metrics.previous.jsonl").exists()


def test_read_metrics_refuses_what_is_not_metrics(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n[1]\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not a row"):
        read_metrics(tmp_path)


class FakeAccelerator:
    def __init__(self, main=True):
        self.is_main_process, self.calls = main, []
        self.trackers = [
            SimpleNamespace(name=name, log_images=partial(self.show, name))
            for name in ("tensorboard", "wandb", "trackio")
        ]
        self.images = []

    def show(self, name, values, **kwargs):
        self.images.append((name, values, kwargs))

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


def test_external_trackers(tmp_path, monkeypatch):
    monkeypatch.setattr("diffalign.record.metrics.check_trackers", lambda names: None)
    accelerator = FakeAccelerator()
    config = {"train": {"lr": 0.1}, "log": {"trackers": ["wandb"]}, "rewards": {}}
    tracker = Tracker(tmp_path, ["wandb"], config, accelerator)
    tracker.log(4, {"a": 1, "b": float("nan")})
    path = tracker.log_images(4, "grid/x", Image.new("RGB", (3, 2)))
    assert path is not None
    tracker.log_images(5, "grid", path)
    tracker.close()
    flat = {"train.lr": 0.1, "log.trackers": '["wandb"]', "rewards": "{}"}
    assert accelerator.calls == [
        ("init_trackers", ("diffalign",), {"config": flat}),
        ("log", ({"a": 1.0},), {"step": 4}),
        ("end_training", (), {}),
    ]
    assert path == tmp_path / "grids" / "grid_x_0004.png"
    assert path.exists()
    assert [(name, k["step"]) for name, _, k in accelerator.images] == [
        ("tensorboard", 4),
        ("wandb", 4),
        ("tensorboard", 5),
        ("wandb", 5),
    ]
    assert accelerator.images[0][1]["grid/x"].shape == (1, 2, 3, 3)


def test_only_the_main_process_writes(tmp_path):
    tracker = Tracker(tmp_path / "run", accelerator=FakeAccelerator(main=False))
    tracker.log(0, {"a": 1})
    assert tracker.log_images(0, "x", Image.new("RGB", (3, 2))) is None
    tracker.curve(tmp_path / "curve.png")
    tracker.close()
    assert not list(tmp_path.iterdir())


def test_check_trackers(monkeypatch):
    with pytest.raises(ValueError, match=r"'tensorbord' is not .* did you mean 'tensorboard'"):
        check_trackers(["tensorbord"])
    with pytest.raises(ValueError, match=r"'none' is not .*; valid: .*wandb"):
        check_trackers(["none"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'wandb' is not .*; pip install diffalign\[track\]"):
        check_trackers(["wandb"])
    with pytest.raises(ValueError, match="pip install mlflow"):
        check_trackers(["mlflow"])
    with pytest.raises(ValueError, match="needs an accelerator"):
        Tracker("unused", ["wandb"])
    check_trackers([])


def rows(n):
    return [
        {
            "step": k,
            "reward_mean": k**0.5,
            "loss": 1.0,
            "eval/a": None if k % 2 else -k,
            "eval/b": 7,
        }
        for k in range(n)
    ]


def test_curves(tmp_path):
    tracker = Tracker(tmp_path)
    for row in rows(12):
        tracker.log(row["step"], {k: v for k, v in row.items() if k != "step" and v is not None})
    tracker.curve(tmp_path / "plots" / "curve.png")
    image = Image.open(tmp_path / "plots" / "curve.png").convert("RGB")
    assert image.size == (3 * 640, 400)  # the loss has no panel
    colors = [{c for _, c in p.getcolors(1 << 20) or ()} for p in panels(image)]
    blue, orange = (0x25, 0x63, 0xEB), (0xD9, 0x77, 0x06)
    assert [blue in c for c in colors] == [True, False, False]
    assert [orange in c for c in colors] == [False, True, True]


def panels(image):
    return [image.crop((x, 0, x + 640, 400)) for x in range(0, image.width, 640)]


@pytest.mark.parametrize(
    "data",
    [
        [],
        [{"step": 3, "reward_mean": 0.0}],
        [{"step": 0, "reward_mean": None}],
        [{"step": 0, "reward_mean": 1e9}, {"step": 10**6, "reward_mean": -1e9}],
        [{"step": 5, "reward_mean": 1e-12}, {"step": 5, "reward_mean": 1.1e-12}],
        [{"step": k, "reward_mean": 1 + k * 1e-9} for k in range(3)],
    ],
)
def test_curves_of_odd_data(data):
    assert draw_curves(data).size == (640, 400)


def test_curve_goes_up_when_the_reward_does():
    image = np.asarray(draw_curves([{"step": k, "reward_mean": k} for k in range(100)])).astype(int)
    blue = (image[..., 2] - image[..., 0])[60:338, 90:610] > 80
    height = [np.nonzero(column)[0].mean() for column in blue[:, ::40].T]
    assert all(np.diff(height) < -10)  # rows count from the top


def test_to_pil():
    x = torch.tensor([-1.0, 0.0, 0.5, 0.999, 2.0, float("nan")]).expand(3, 1, 6)
    assert np.asarray(to_pil(x))[0, :, 0].tolist() == [0, 0, 128, 255, 255, 0]
    assert to_pil(x.bfloat16().requires_grad_()).size == (6, 1)
    with pytest.raises(ValueError, match=r"not \(1, 3, 2, 2\)"):
        to_pil(torch.zeros(1, 3, 2, 2))


def test_save_png(tmp_path):
    path = tmp_path / "a" / "b.png"
    save_png(Image.new("RGB", (2, 2)), path, {"prompt": "é 猫", "seed": 3})
    image = Image.open(path)
    assert json.loads(image.info["diffalign"]) == {"prompt": "é 猫", "seed": 3}
    save_png(Image.new("RGB", (2, 2)), path)
    assert [p.name for p in path.parent.iterdir()] == ["b.png"]
    with pytest.raises(ValueError, match=r"does not end in \.png"):
        save_png(image, tmp_path / "b.jpg")


RED, BLUE = torch.tensor([1.0, 0, 0]), torch.tensor([0, 0, 1.0])


def picture(color, size=64):
    return color.view(3, 1, 1).expand(3, size, size)


def test_comparison_grid_layout():
    columns = {
        "base": [picture(RED), picture(BLUE)],
        "trained": [to_pil(picture(BLUE)), picture(BLUE)],
    }
    scores = {"trained": [{"jpeg": 1.5, "clip": 0.2}, None]}
    grid = comparison_grid(columns, ["short", "a cat " * 100], scores)
    assert count(grid, (255, 0, 0)) == 192 * 192  # 64 px, three times
    assert count(grid, (0, 0, 255)) == 3 * 192 * 192
    assert grid.getpixel((0, 0)) == (255, 255, 255)
    ys, xs = np.nonzero((np.asarray(grid) == (255, 0, 0)).all(-1))
    # The long prompt is cut at the height of the pictures, and nothing is written over one.
    assert comparison_grid(columns, ["short", "x"], scores).height == grid.height
    assert np.ptp(xs) == np.ptp(ys) == 191


def count(image, color):
    return int((np.asarray(image) == color).all(-1).sum())


@pytest.mark.parametrize(
    ("size", "cell", "side"), [(64, None, 192), (512, None, 512), (1024, None, 512), (64, 100, 100)]
)
def test_comparison_grid_cells(size, cell, side):
    grid = comparison_grid({"a": [picture(RED, size)]}, ["x"], cell=cell)
    assert count(grid, (255, 0, 0)) == side * side


def test_comparison_grid_refuses():
    one = [picture(RED)]
    with pytest.raises(ValueError, match="at least one column and one prompt"):
        comparison_grid({}, ["x"])
    with pytest.raises(ValueError, match="column 'a' has 1 pictures for 2 prompts"):
        comparison_grid({"a": one}, ["x", "y"])
    with pytest.raises(ValueError, match="column 'a' has 2 scores for 1 prompts"):
        comparison_grid({"a": one}, ["x"], {"a": [1, 2]})
    with pytest.raises(ValueError, match=r"scores of 'b', which is not among \['a'\]"):
        comparison_grid({"a": one}, ["x"], {"b": [1]})


def test_image_grid():
    pictures = [picture(RED)] * 3
    plain, labeled = image_grid(pictures, 2), image_grid(pictures, 2, ["a", "b " * 40, "c"])
    assert plain.size == (2 * 72 + 8, 2 * 72 + 8)
    assert labeled.height > plain.height + 50
    assert count(plain, (255, 0, 0)) == count(labeled, (255, 0, 0)) == 3 * 64 * 64
    assert image_grid(pictures[:1], 9).width == 80
    with pytest.raises(ValueError, match="columns=0"):
        image_grid(pictures, 0)
    with pytest.raises(ValueError, match="0 images"):
        image_grid([], 2)
    with pytest.raises(ValueError, match="1 labels for 3 images"):
        image_grid(pictures, 2, ["a"])


def test_wrap():
    from PIL import ImageFont

    font = ImageFont.load_default(14)
    text = "three red hearts " + "x" * 90 + " end"
    lines = wrap(text, font, 100)
    assert all(font.getlength(line) <= 100 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert wrap(" \n", font, 100) == []
