"""What `sample.py --out` writes: read by `score` as it stands, and drawn again by `--noise`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import SIDE, load, perturb, side_of
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffalign import policies
from diffalign.commands import cli
from diffalign.commands.score import score
from diffalign.config.prompts import load as load_prompts
from diffalign.sampling.pipeline import Sampler, parse_seeds
from diffalign.sampling.rollout import Noise


def brightness(images, prompts):
    return images.mean((1, 2, 3))


brightness.differentiable = True


def dark(images, prompts):
    return 1 - brightness(images, prompts)


SPEC = {"bright": {"type": "test_redraw:brightness"}}


def strict(text: str):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {p.name: np.asarray(Image.open(p), int) for p in sorted(folder.glob("*.png"))}


def sample(tmp_path: Path, name: str, *arguments: str) -> dict[str, np.ndarray]:
    """The pictures of a call, by their names in the folder `name`."""
    given = [*arguments, "--grid", str(tmp_path / "g.png"), "--out", str(tmp_path / name)]
    assert cli.sample(given) == 0
    return pixels(tmp_path / name)


def of_run(folder: Path, model: str, **evaluation) -> Path:
    """A folder as a run leaves it: a LoRA and the settings it was evaluated with."""
    policy = load(model)
    policy.add_lora(2)
    perturb(policy, 0.5)
    policy.save(folder)
    tree = {"model": {"name": model, "resolution": SIDE}, "eval": evaluation}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder


def test_pictures_are_those_of_the_pipeline_itself(folder):
    sampler = Sampler(folder)
    texts, seeds = ["a cat", "a dog"], [3, 5]
    side = side_of(folder)
    drawn = sampler.draw(texts, seeds, 2, 2.0, side)
    expected = sampler.pipe(
        prompt=texts, num_inference_steps=2, height=side, width=side,
        **policies.family(folder).guided(2.0, 2),
        generator=[torch.Generator().manual_seed(s) for s in seeds],
        **policies.text_options(sampler.pipe),
    ).images  # fmt: skip
    for ours, theirs in zip(drawn, expected, strict=True):
        assert np.array_equal(ours, theirs)
    noise = sampler.noise(seeds, side)
    assert torch.equal(noise, Noise(seeds, noise.shape[1:], "cpu").draw())
    other = sampler.draw(texts, seeds, 2, 2.0, side, noise.flip(0))
    assert not np.array_equal(other[0], drawn[0])


@pytest.mark.parametrize("kind", ["sd-turbo", "sdxl", "sd3", "flux-schnell"])
def test_noise_redraws_plain_pictures(pipelines, kind, tmp_path):
    how = ["--model", pipelines[kind], "--steps", "2", "--guidance", "1", "--resolution", str(SIDE)]
    first = sample(tmp_path, "a", *how, "--prompts", "a cat", "a dog", "--seeds", "0-2")
    again = sample(tmp_path, "b", "--noise", str(tmp_path / "a" / "noise.safetensors"))
    assert len(first) == 6
    assert list(first) == list(again)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    kept = load_file(tmp_path / "a" / "noise.safetensors")
    assert sorted(kept) == list(first)
    assert torch.equal(kept["000_seed2.png"], kept["001_seed2.png"])
    assert {x.dtype for x in kept.values()} == {torch.float32}
    for name in ("prompts.jsonl", "noise.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_noise_redraws_a_lora_and_the_base_beside_it(pipelines, tmp_path):
    run = str(of_run(tmp_path / "run", pipelines["sd-v"], steps=2, guidance=2.0))
    both = ["--lora", run, "--compare", "--prompts", "a cat", "--seeds", "1,4"]
    first = sample(tmp_path, "a", *both, "--lora-scale", "0.5")
    noise = ["--noise", str(tmp_path / "a" / "noise.safetensors")]
    again = sample(tmp_path, "b", *noise)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["000_seed1.png"], first["001_seed1.png"])
    # what is given replaces what the file says
    whole = sample(tmp_path, "c", *noise, "--lora-scale", "1", "--prompts", "a dog")
    expected = sample(tmp_path, "d", *both[:3], "--prompts", "a dog", "--seeds", "1,4")
    assert all(np.array_equal(whole[name], expected[name]) for name in expected)
    lines = [strict(line) for line in (tmp_path / "a" / "prompts.jsonl").read_text().splitlines()]
    assert [line.get("lora") for line in lines] == [None, None, run, run]


def test_what_a_prompt_file_says_of_a_prompt_stays(pipelines, tmp_path):
    """Secrets are left out of settings; metadata goes to the rewards as it is, and is redrawn."""
    file, said = tmp_path / "p.jsonl", {"prompt": "a cat", "token": "sks", "n": 3}
    file.write_text(json.dumps(said) + "\n", "utf-8")
    how = ["--model", pipelines["sd-v"], "--steps", "1", "--guidance", "1"]
    sample(tmp_path, "a", *how, "--prompts", str(file), "--seeds", "0")
    sample(tmp_path, "b", "--noise", str(tmp_path / "a" / "noise.safetensors"))
    for name in ("a", "b"):
        (line,) = (tmp_path / name / "prompts.jsonl").read_text("utf-8").splitlines()
        assert said.items() <= json.loads(line).items()


SEARCHES = {
    "best_of_n": ("sd-v", "--best-of-n --best-of-n.n 3 --steps 2 --guidance 2"),
    "smc": ("sd-v", "--smc --smc.end 0.9 --steps 3 --guidance 1"),
    "flow_map": ("sd3", "--flow-map --flow-map.gradient 1 --steps 3 --guidance 1"),
    "reno": ("flux-schnell", "--reno --reno.iterations 3 --steps 1 --guidance 1"),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_noise_redraws_what_a_search_found(pipelines, name, tmp_path):
    kind, line = SEARCHES[name]
    search = [*line.split(), "--model", pipelines[kind], "--resolution", "16"]
    search += ["--rewards.test_redraw:brightness", "1", "--prompts", "a cat", "a dog"]
    first = sample(tmp_path, "a", *search, "--seeds", "3")
    again = sample(tmp_path, "b", "--noise", str(tmp_path / "a" / "noise.safetensors"))
    assert list(first) == list(again) == ["000_seed3.png", "001_seed3.png"]
    # in another batch than in the search, so rounded otherwise
    assert max(abs(first[k] - again[k]).max() for k in first) <= 1
    with safe_open(tmp_path / "a" / "noise.safetensors", framework="pt") as file:
        about = strict(file.metadata()["diffalign"])["001_seed3.png"]
        draws = len(file.get_tensor("001_seed3.png"))
    chance = 2 if name in ("smc", "flow_map") else 0  # the last of the 3 steps has none
    assert draws == 1 + chance
    assert (about["prompt"], about["seed"], about["method"]) == ("a dog", 3, name)
    assert about["kernel"] == {"smc": "ddim", "flow_map": "flow_sde"}.get(name, "ode")


def test_what_is_written_is_scored_as_it_stands(pipelines, tmp_path):
    prompts = [
        {"prompt": "a cat", "rewards": ["bright"], "note": "x", "image": "old.png", "seed": 9},
        {"prompt": "a dog\u2028of 2 lines", "note": None},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    how = ["--model", pipelines["sd-v"], "--resolution", str(SIDE), "--steps", "1"]
    how += ["--prompts", str(tmp_path / "p.jsonl"), "--seeds", "0,5"]
    plain = sample(tmp_path, "plain", *how)
    search = ["--best-of-n", "--best-of-n.n", "2", "--rewards.test_redraw:dark", "1"]
    search += ["--rewards.bright.type", "test_redraw:brightness", "--rewards.bright.weight", "2"]
    found = sample(tmp_path, "found", *how, *search)
    assert len(plain) == len(found) == 4
    for name, pictures in (("plain", plain), ("found", found)):
        file = tmp_path / name / "prompts.jsonl"
        lines = [strict(line) for line in file.read_text().split("\n")[:-1]]
        seeds = [0, 5, 0, 5]
        assert [line["seed"] for line in lines] == seeds
        assert [line["prompt"] for line in lines[::2]] == [p["prompt"] for p in prompts]
        assert [line["note"] for line in lines] == ["x", "x", None, None]
        means = score(str(tmp_path / name), SPEC, str(file), str(tmp_path / f"{name}.csv"))
        bright = [picture.mean() / 255 for picture in pictures.values()]
        assert means["bright"] == pytest.approx(sum(bright) / 4, abs=1e-3)
        assert [p.text for p in load_prompts(file)] == [line["prompt"] for line in lines]
        for line in lines:
            about = strict(Image.open(tmp_path / name / line["image"]).info["diffalign"])
            assert (about["prompt"], about["seed"]) == (line["prompt"], line["seed"])
            assert about.get("scores") == line.get("scores")
            assert about["steps"] == 1
            if name == "found":
                bright = pictures[line["image"]].mean() / 255
                assert line["scores"]["bright"] == pytest.approx(bright, abs=0.01)
    # a reward that does not score a prompt says nothing of it
    assert set(lines[0]["scores"]) == {"reward", "bright"}
    assert set(lines[2]["scores"]) == {"reward", "bright", "test_redraw:dark"}
    strict((tmp_path / "found" / "trace.json").read_text())
    how += ["--prompts", str(tmp_path / "found" / "prompts.jsonl"), "--seeds", "0"]
    assert len(sample(tmp_path, "again", *how)) == 4


@pytest.fixture
def kept(pipelines, tmp_path):
    """The noise of a plain picture, of a search with chance, and of one that leaves the sampler."""
    how = ["--resolution", str(SIDE), "--prompts", "a cat", "--seeds", "0", "--guidance", "1"]
    how += ["--model", pipelines["sd-v"]]
    reward = ["--rewards.test_redraw:brightness", "1"]
    sample(tmp_path, "PLAIN", *how, "--steps", "2")
    sample(tmp_path, "SMC", *how, *reward, "--smc", "--smc.end", "0.9", "--steps", "3")
    guided = ["--universal-guidance", "--universal-guidance.strength", "100"]
    sample(tmp_path, "GUIDED", *how, *reward, *guided, "--steps", "2")
    return tmp_path


def test_noise_that_cannot_be_drawn_is_refused(pipelines, kept, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("the pipeline was loaded")

    monkeypatch.setattr(policies, "pipeline", refuse)
    whole = (kept / "PLAIN" / "noise.safetensors").read_bytes()
    (kept / "cut").write_bytes(whole[:-7])
    (kept / "text").write_text("noise")
    save_file({"a.png": torch.zeros(1, 4, 4, 4)}, kept / "bare")
    (tmp := dict(load_file(kept / "PLAIN" / "noise.safetensors")))["000_seed0.png"].fill_(np.nan)
    with safe_open(kept / "PLAIN" / "noise.safetensors", framework="pt") as file:
        save_file(tmp, kept / "nan", file.metadata())
        for name, change in {
            "steps": ('"steps": 2', '"steps": "many"'),
            "kernel": ('"kernel": null', '"kernel": "odd"'),
            "less": ('"lora_scale": 1.0, ', ""),
        }.items():
            about = file.metadata()["diffalign"]
            assert change[0] in about
            noise = {"000_seed0.png": torch.zeros(1, 4, 4, 4)}
            save_file(noise, kept / name, {"diffalign": about.replace(*change)})
        about = about.replace("000_seed0.png", "../x.png")
        save_file({"../x.png": torch.zeros(1, 4, 4, 4)}, kept / "up", {"diffalign": about})
    cases = [
        ("steps", [], "steps='many' of 000_seed0.png in"),
        ("kernel", [], "unknown kernel 'odd'"),
        ("less", [], "does not say the lora_scale of 000_seed0.png"),
        ("up", [], "'../x.png' is no name of a picture"),
        ("PLAIN", ["--model", pipelines["sd3"]], "of a UNet model, and"),
        ("PLAIN", ["--resolution", "16"], "is noise (4, 4, 4) of a UNet model"),
        ("PLAIN", ["--resolution", "0"], "--resolution 0 is no size"),
        ("PLAIN", ["--model", "./nothing"], "is not a folder"),
        ("PLAIN", ["--lora", "./nothing"], "--lora './nothing' does not exist"),
        ("PLAIN", ["--prompts", "a", "b", "c"], "3 prompts for the pictures of"),
        ("PLAIN", ["--seeds", "3"], "leave --seeds out"),
        ("PLAIN", ["--best-of-n", "--rewards.jpeg", "1"], "leave --best-of-n out"),
        ("SMC", ["--steps", "4"], "has 3 draws for 000_seed0.png, and 4 steps take 4"),
        ("GUIDED", [], "universal_guidance leaves the sampler on the way"),
        ("cut", [], "is not whole, or no noise.safetensors"),
        ("text", [], "is not whole, or no noise.safetensors"),
        ("bare", [], "is not whole, or no noise.safetensors"),
        ("nan", [], "or not finite"),
        ("nowhere", [], "does not exist; give the noise.safetensors"),
    ]
    for name, options, message in cases:
        path = kept / name if not (kept / name).is_dir() else kept / name / "noise.safetensors"
        assert cli.sample(["--noise", str(path), *options]) == 1, (name, options)
        error = capsys.readouterr().err
        assert error.startswith("error: "), error
        assert message in error
    assert cli.sample(["--noise", str(kept)]) == 1
    assert "is a folder; give the noise.safetensors" in capsys.readouterr().err


def test_seeds():
    assert parse_seeds("0-3,7, 2") == [0, 1, 2, 3, 7]
    for text in ("", "3-1", "0,3-1", "-5", "1,", "x", "1.5", "0-", str(2**63)):
        with pytest.raises(ValueError, match="is not understood; write 0-7"):
            parse_seeds(text)
    with pytest.raises(ValueError, match="more than 10000 a prompt"):
        parse_seeds("0-99999999999999")


@pytest.mark.parametrize("search", [[], ["--best-of-n", "--rewards.jpeg", "1"]])
def test_what_cannot_be_drawn_is_refused_before_the_model_is_loaded(
    pipelines, search, tmp_path, monkeypatch, capsys
):
    def refuse(*args, **kwargs):
        raise AssertionError("the pipeline was loaded")

    monkeypatch.setattr(policies, "pipeline", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "old").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "old" / "007_seed0.png")
    for option, message in {
        "--resolution=0": "--resolution 0 is no size",
        "--resolution=-8": "--resolution -8 is no size",
        "--resolution=9": "is not a multiple of 2",
        "--steps=0": "--steps 0 draws nothing",
        "--guidance=-1": "--guidance -1 is no guidance scale",
        "--guidance=nan": "--guidance nan is no guidance scale",
        "--lora-scale=inf": "--lora-scale inf is no factor",
        "--seeds=3-1": "--seeds '3-1' is not understood",
        "--grid=folder.png": "--grid 'folder.png' is a folder",
        "--grid=file/grid.png": "is a file, and no folder",
        "--out=file": "is a file, and no folder",
        "--out=old": "holds 007_seed0.png, which is not of this call",
        "--out=.": "--grid 'grid.png' lies in --out '.'",
    }.items():
        given = ["--model", pipelines["sd-v"], "--prompts", "a cat", *search, option]
        assert cli.sample(given) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
    given = ["--model", pipelines["sd-v"], "--prompts", "a cat", "--resolution", "12"]
    if not search:  # which draws it by a sampler of our own
        assert cli.sample(given) == 1
        assert "--resolution 12 is no multiple of 8" in capsys.readouterr().err
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert cli.sample(["--model", pipelines["sd-v"], "--prompts", "a cat", *search]) == 1
    assert "cannot be written to" in capsys.readouterr().err


def test_the_empty_prompt_is_drawn_and_scored(pipelines, tmp_path):
    how = ["--model", pipelines["sd-v"], "--resolution", str(SIDE), "--steps", "1"]
    sample(tmp_path, "out", *how, "--prompts", "", "a cat", "--seeds", "0")
    file = str(tmp_path / "out" / "prompts.jsonl")
    assert [p.text for p in load_prompts(file)] == ["", "a cat"]
    assert score(str(tmp_path / "out"), SPEC, file, str(tmp_path / "s.csv"))["bright"] > 0
    again = sample(tmp_path, "again", "--noise", str(tmp_path / "out" / "noise.safetensors"))
    assert all(np.array_equal(again[k], v) for k, v in pixels(tmp_path / "out").items())


def test_settings_are_those_of_the_run(pipelines, tmp_path, capsys):
    run = of_run(tmp_path / "run", pipelines["sd-v"], steps=3, guidance=1.5)
    of_run(run / "best", pipelines["sd-v"])
    (run / "best" / "config.yaml").unlink()
    grid = tmp_path / "new" / "g.png"

    def drawn(*arguments):
        capsys.readouterr()
        given = [*arguments, "--prompts", "a cat", "--seeds", "0", "--grid", str(grid)]
        assert cli.sample(given) == 0
        about = strict(Image.open(grid).info["diffalign"])
        keys = ("model", "steps", "guidance", "resolution", "dtype")
        return [about[k] for k in keys], capsys.readouterr().out

    whole = [pipelines["sd-v"], 3, 1.5, SIDE, "float32"]
    file = run / "best" / "pytorch_lora_weights.safetensors"
    for lora in (run, run / "best", file):
        found, said = drawn("--lora", str(lora))
        assert found == whole
        assert said.splitlines()[0] == (
            f"as in {run / 'config.yaml'}: model {whole[0]}, resolution {SIDE}, steps 3, "
            "guidance 1.5"
        )
    found, said = drawn("--lora", str(run), "--steps", "2", "--model", pipelines["sd-epsilon"])
    assert found == [pipelines["sd-epsilon"], 2, 1.5, SIDE, "float32"]
    assert said.splitlines()[0].endswith(f": resolution {SIDE}, guidance 1.5")
    search = ["--best-of-n", "--best-of-n.n", "1", "--rewards.jpeg", "1"]
    assert drawn("--lora", str(run), *search)[0] == whole
    (run / "config.yaml").unlink()  # any LoRA
    found, said = drawn("--lora", str(run), "--model", pipelines["sd-v"], "--resolution", "8")
    assert found == [pipelines["sd-v"], 20, 3.0, 8, "float32"]
    assert said == f"{grid}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{model: 3}", "model is 3, no section of settings"),
        ("{eval: {steps: many}}", "steps='many' in .*config.yaml is not an int"),
        ("{model: {dtype: float8}}", "dtype='float8' in .*config.yaml is not known"),
        ("model: {", "config.yaml:"),
        ("[1]", r"holds \[1\], not a mapping"),
    ],
)
def test_a_damaged_run_is_said_to_be(pipelines, tmp_path, text, message, capsys):
    (tmp_path / "config.yaml").write_text(text)
    for command in (cli.sample, cli.grid):
        option = "--lora" if command is cli.sample else "--runs"
        (tmp_path / "pytorch_lora_weights.safetensors").touch()
        assert command([option, str(tmp_path), "--prompts", "a cat"]) == 1
        error = capsys.readouterr().err
        assert re.search(message, error), error
