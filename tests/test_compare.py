"""`diffalign grid`: what its columns are, on a tiny pipeline with two LoRAs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load, perturb
from PIL import Image

from diffalign import policies
from diffalign.commands import cli
from diffalign.commands import grid as compare
from diffalign.commands.grid import interpolation, scales
from diffalign.config.prompts import Prompt
from diffalign.drawing import grids
from diffalign.sampling.pipeline import Sampler

STEPS, GUIDANCE, SIDE = 2, 2.0, 16
HOW = {"steps": STEPS, "guidance": GUIDANCE, "resolution": SIDE}


@pytest.fixture(scope="module")
def loras(pipelines, tmp_path_factory):
    """The folders of two LoRAs on the same pipeline, and of a whole denoiser."""
    root = tmp_path_factory.mktemp("runs")
    for name, scale in (("a", 0.3), ("b", -0.4)):
        torch.manual_seed(0)
        policy = load(pipelines["sd-v"])
        policy.add_lora(2, alpha=3, seed=len(name))
        perturb(policy, scale)
        policy.save(root / name)
    policy = load(pipelines["sd-v"], train_all=True)
    perturb(policy, 0.05)
    policy.save(root / "whole")
    return [str(root / name) for name in ("a", "b", "whole")]


@pytest.fixture
def model(pipelines):
    return pipelines["sd-v"]


@pytest.fixture
def drawn(monkeypatch):
    """What was handed to the grid: columns, prompts, scores."""
    seen = []
    draw = grids.comparison_grid

    def recorded(columns, prompts, scores=None, cell=None):
        seen[:] = [columns, prompts, scores]
        return draw(columns, prompts, scores, cell)

    monkeypatch.setattr(grids, "comparison_grid", recorded)
    return seen


def weight(sampler, x):
    """The output of a layer that has LoRAs, for x."""
    network = sampler.pipe.unet
    name = next(n for n, m in network.named_modules() if n.endswith("attn1.to_q"))
    return network.get_submodule(name)(x)


def test_the_update_is_scaled_and_mixed_not_its_factors(model, loras):
    a, b, _ = loras
    sampler = Sampler(model)
    x = torch.randn(3, 16)
    base = weight(sampler, x)

    def change(weights):
        sampler.use(weights)
        return weight(sampler, x) - base

    one, other = change({a: 1.0}), change({b: 1.0})
    assert one.norm() > 0.1
    torch.testing.assert_close(change({a: 0.25}), 0.25 * one)
    torch.testing.assert_close(change({a: 1.5}), 1.5 * one)
    torch.testing.assert_close(change({a: 0.25, b: 0.75}), 0.25 * one + 0.75 * other)
    assert change({}).abs().max() == 0
    torch.testing.assert_close(change({b: 1.0}), other)
    assert change({a: 0.0}).abs().max() == 0


def test_columns_are_those_of_single_models(model, loras, drawn):
    a, b, whole = loras
    columns = {"whole": {whole: 1.0}, **scales(a, [0, 0.5, 1]), **interpolation(a, b, 3)}
    image = compare.compare(model, ["a cat", "a dog"], columns, seeds=[3, 5], **HOW)
    shown, prompts, _ = drawn
    # a scale of 0 is the base model, which is there already
    names = ["base", "whole", "scale 0.5", "scale 1", "a", "0.5 a + 0.5 b", "b"]
    assert list(shown) == names
    assert prompts == ["a cat (seed 3)", "a cat (seed 5)", "a dog (seed 3)", "a dog (seed 5)"]
    pixels = {k: [np.asarray(p) for p in v] for k, v in shown.items()}
    assert all(np.array_equal(*pair) for pair in zip(pixels["a"], pixels["scale 1"], strict=True))
    different = ["base", "whole", "scale 0.5", "scale 1", "0.5 a + 0.5 b", "b"]
    for i, one in enumerate(different):
        for other in different[i + 1 :]:
            assert not np.array_equal(pixels[one][0], pixels[other][0]), (one, other)
    # each as a pipeline alone draws it, the same noise along a row
    for name, weights in (("base", {}), ("b", {b: 1.0}), ("whole", {whole: 1.0})):
        alone = Sampler(model)
        alone.use(weights)
        texts, seeds = ["a cat", "a cat", "a dog", "a dog"], [3, 5, 3, 5]
        again = alone.draw(texts, seeds, STEPS, GUIDANCE, SIDE)
        assert all(np.array_equal(x, y) for x, y in zip(again, pixels[name], strict=True)), name
    assert image.width > 7 * 192


def test_seeds_are_the_columns_where_nothing_is_compared(model, drawn):
    compare.compare(model, ["a cat", "a dog"], seeds=[1, 4], rewards={"jpeg": 1.0}, **HOW)
    shown, prompts, scores = drawn
    assert list(shown) == list(scores) == ["seed 1", "seed 4"]
    assert prompts == ["a cat", "a dog"]
    sampler = Sampler(model)
    (alone,) = sampler.draw(["a dog"], [4], STEPS, GUIDANCE, SIDE)
    difference = np.asarray(shown["seed 4"][1], int) - np.asarray(alone, int)
    assert abs(difference).max() <= 1  # in another batch


def brightness(images, prompts):
    return images.mean((1, 2, 3))


brightness.differentiable = True


def test_scores_are_of_the_pictures_above_them(model, loras, drawn):
    prompts = [Prompt("a cat", {"rewards": ["bright"]}), Prompt("a dog")]
    spec = {"bright": {"type": "test_compare:brightness", "weight": 3.0}, "jpeg": {}}
    other = [Image.new("RGB", (16, 16), "white")] * 2
    columns = {"a": {loras[0]: 1.0}}
    compare.compare(model, prompts, columns, rewards=spec, pictures={"search": other}, **HOW)
    shown, _, scores = drawn
    assert list(shown) == list(scores) == ["base", "a", "search"]
    for name, pictures in shown.items():
        for picture, score in zip(pictures, scores[name], strict=True):
            assert score["bright"] == pytest.approx(np.asarray(picture).mean() / 255, abs=1e-5)
    # a reward that does not score a prompt says nothing of it
    assert list(scores["a"][0]) == ["bright"]
    assert scores["search"][1] == {
        "bright": pytest.approx(1.0),
        "jpeg": scores["search"][1]["jpeg"],
    }


@pytest.mark.parametrize("kind", ["sd-v", "sd3"])
def test_iterations_of_reno_are_columns(pipelines, kind, drawn):
    spec = {"test_compare:brightness": 1.0}
    texts = ["a cat", "a dog"]
    how = HOW | {"steps": 1, "guidance": 1.0}
    compare.compare(pipelines[kind], texts, rewards=spec, reno=[12, 1, 4], **how)
    shown, _, scores = drawn
    assert list(shown) == ["base", "ReNO 1", "ReNO 4", "ReNO 12"]
    for row in range(2):
        plain, first = (np.asarray(shown[k][row], int) for k in ("base", "ReNO 1"))
        assert abs(plain - first).max() <= 2  # by diffusers and by our sampler
        found = [scores[k][row]["test_compare:brightness"] for k in ("ReNO 1", "ReNO 4", "ReNO 12")]
        assert found == sorted(found)
        assert found[-1] > found[0]


def test_the_command_draws_as_the_run_was_evaluated(model, loras, tmp_path, capsys, drawn):
    run = Path(loras[0])
    (run / "config.yaml").write_text(
        json.dumps({"model": {"name": model, "resolution": SIDE}, "eval": {"steps": STEPS}})
    )
    out = tmp_path / "grid.png"
    arguments = ["--prompts", "a cat", "--runs", str(run), "--lora-scales", "0.5", "1"]
    arguments += ["--out", str(out), "--cell", "64", "--reward", "jpeg"]
    assert cli.grid(arguments) == 0
    assert capsys.readouterr().out.endswith(f"{out}\n")
    assert list(drawn[0]) == ["base", "scale 0.5", "scale 1"]
    settings = json.loads(Image.open(out).info["diffalign"])
    assert settings["model"] == model
    assert (settings["steps"], settings["guidance"], settings["resolution"]) == (STEPS, 3.0, SIDE)
    assert settings["columns"]["scale 0.5"] == {str(run): 0.5}
    assert settings["prompts"] == ["a cat"]
    both = ["--runs", loras[0], loras[1], "--steps", "3", "--seeds", "0,2"]
    assert cli.grid(["--prompts", "a cat", *both, "--out", str(out)]) == 0
    assert list(drawn[0]) == ["base", "a", "b"]
    assert json.loads(Image.open(out).info["diffalign"])["steps"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.jpg"], r"--out 'x.jpg' does not end in \.png"),
        (["--runs", "./missing"], r"--runs './missing' does not exist"),
        (["--interpolate", "./missing", "WHOLE"], r"--interpolate './missing' does not exist"),
        (["--runs", "WHOLE", "--lora-scales", "1"], "holds a whole denoiser, and only a LoRA"),
        (["--lora-scales", "0.5"], r"--lora-scales \[0.5\] needs a LoRA.*give --runs"),
        (["--interpolate", "A", "B", "--points", "1"], "--points 1 leaves nothing between"),
        (["--runs", "A", "A"], "one is given twice"),
        (["--seeds", "x"], "--seeds 'x' is not understood"),
        (["--reward", "jpge"], "did you mean 'jpeg'"),
        (["--reno", "5"], "--reno needs something to optimise; give --reward"),
        (["--reno", "0", "--reward", "jpeg"], "--reno 0 is no number of iterations"),
        (["--model", "./nothing"], "is not a folder"),
        (["--resolution", "0"], "--resolution 0 is no size"),
        (["--resolution", "12"], "--resolution 12 is no multiple of 8"),
        (["--guidance", "nan"], "--guidance nan is no guidance scale"),
        (["--runs", "A", "--lora-scales", "inf"], "--lora-scales inf is no factor"),
        (["--cell", "0"], "--cell 0 shows nothing"),
        (["--out", "."], r"does not end in \.png"),
    ],
)
def test_refusals_before_a_model_is_loaded(
    model, loras, arguments, message, capsys, monkeypatch, tmp_path
):
    def refuse(*args, **kwargs):
        raise AssertionError("the pipeline was loaded")

    monkeypatch.setattr(policies, "pipeline", refuse)
    monkeypatch.chdir(tmp_path)
    paths = dict(zip(("A", "B", "WHOLE"), loras, strict=True))
    arguments = [paths.get(word, word) for word in arguments]
    given = [] if "--model" in arguments else ["--model", model]
    assert cli.grid(["--prompts", "a cat", *given, *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error), error


def test_mixing_needs_loras(model, loras):
    with pytest.raises(ValueError, match="a whole denoiser cannot be scaled or mixed"):
        Sampler(model).use({loras[2]: 0.5})
    with pytest.raises(ValueError, match="'x' has 1 pictures for the 2 rows"):
        compare.compare(model, ["a", "b"], pictures={"x": [Image.new("RGB", (8, 8))]})


@pytest.mark.parametrize("side", [64, 512])
def test_a_grid_of_any_pictures_is_legible(side):
    """Text is at least 13 px high and nothing is written outside the canvas or over a picture."""
    red = Image.new("RGB", (side, side), (255, 0, 0))
    names = {"base": [red], "a very long name of a run": [red], "scale 0.5": [red]}
    scores = {k: [{"clip": 0.123456, "a_reward_with_a_long_name": -2.0}] for k in names}
    image = grids.comparison_grid(names, ["a long prompt, " * 30], scores)
    pixels = np.asarray(image).astype(int)
    shown = max(192, side)
    assert (pixels == (255, 0, 0)).all(-1).sum() == 3 * shown**2
    ink = (pixels.sum(-1) < 300) & ~(pixels == (255, 0, 0)).all(-1)
    rows, columns = np.nonzero(ink)
    assert 4 <= columns.min() < columns.max() < image.width - 4
    assert 4 <= rows.min() < rows.max() < image.height - 4
