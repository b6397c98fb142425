"""`sample.py --reno` and the other methods: what the command line says, and what it writes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import perturb
from PIL import Image

import rewards
from diffalign import policies
from diffalign.commands import cli
from diffalign.commands import search as command
from diffalign.drawing import grids
from diffalign.optimize_noise import METHODS
from diffalign.optimize_noise.options import split

SIDE = 16


def brightness(images, prompts):
    return images.mean((1, 2, 3))


brightness.differentiable = True


def blind(images, prompts):
    return images.mean((1, 2, 3)).round(decimals=3)


def test_the_command_line_is_split():
    line = "--best-of-n --best-of-n.n 7 --rewards.clip.model M --rewards.jpeg=0.5 --seeds 3"
    line += " --budget.denoiser-calls 40 --sampler.kernel ddim --prompts x y"
    method, wanted, rest = split(line.split())
    assert method == "best_of_n"
    assert wanted.options == {"n": 7}
    assert wanted.rewards == {"clip": {"weight": 1.0, "model": "M"}, "jpeg": 0.5}
    assert wanted.budget.denoiser_calls == 40
    assert wanted.sampler.kernel == "ddim"
    assert rest == ["--seeds", "3", "--prompts", "x", "y"]
    assert split(["--guidance", "2", "--prompts", "--x"])[::2] == (
        None,
        ["--guidance", "2", "--prompts", "--x"],
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--reno --smc --rewards.jpeg 1", "one method at a time"),
        ("--reno.iterations 3", "belongs to a search; add one of"),
        ("--rewards.jpeg 1", "belongs to a search; add one of"),
        ("--smc --reno.iterations 3 --rewards.jpeg 1", "is not of --smc, the method asked for"),
        ("--reno", "a search needs rewards"),
        ("--reno --rewards.jpeg 1 --budget.calls 3", "unknown key 'budget.calls'"),
        ("--reno --rewards.jpge 1", "did you mean 'jpeg'"),
        ("--reno --rewards.jpeg 1 --reno.iteration 3", "did you mean 'reno.iterations'"),
        ("--reno --rewards.jpeg 1 --reno.iterations 0", "use 1 or more"),
        (
            "--zero-order --rewards.jpeg 1 --zero-order.neighbours 0",
            "zero_order.neighbors=0 is out",
        ),
        ("--smc --rewards.jpeg 1 --sampler.kernel flow_sde", "needs a flow model"),
        ("--smc --rewards.jpeg 1 --sampler.kernel sde", "unknown kernel 'sde'"),
        ("--reno --rewards.jpeg 1", "rewards.jpeg is not differentiable"),
        ("--smc --rewards.jpeg 1 --sampler.kernel ode", "draws nothing on the way"),
        ("--paths --rewards.jpeg 1 --steps 1", "sampler.steps=1 has no inside"),
        ("--flow-map --rewards.jpeg 1 --flow-map.top 9", "keeps more than particles=4"),
        ("--critique --rewards.jpeg 1", "can criticise a picture"),
        (
            "--flow-map --flow-map.look-ahead ./nothing --rewards.jpeg 1",
            "--flow-map.look-ahead './nothing' does not exist",
        ),
        ("--best-of-n --rewards.jpeg 1 --budget.seconds -1", "budget.seconds=-1.0 is no budget"),
        ("--best-of-n --rewards.jpeg 1 --compare", "--compare is for a LoRA"),
        ("--best-of-n --rewards.jpeg 1 --grid x.jpg", "does not end in .png"),
        ("--best-of-n --rewards.jpeg 1 --steps 0", "--steps 0 draws nothing"),
        ("--steps 0", "--steps 0 draws nothing"),
        ("--best-of-n --rewards.jpeg 1 --lora ./nothing", "--lora './nothing' does not exist"),
    ],
)
def test_refusals_before_a_model_is_loaded(pipelines, arguments, message, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("the pipeline was loaded")

    monkeypatch.setattr(policies, "pipeline", refuse)
    given = ["--model", pipelines["sd-v"], "--prompts", "a cat", *arguments.split()]
    capsys.readouterr()  # what building the pipeline said
    assert cli.sample(given) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


WORK = {
    "smc": ["--smc.end", "0.9"],
    "reno": ["--reno.iterations", "2"],
    "dno": ["--dno.iterations", "2"],
}


@pytest.fixture
def seen(monkeypatch):
    """What the last grid shows: columns, prompts, scores."""
    seen, draw = {}, grids.comparison_grid

    def recorded(columns, prompts, scores=None, cell=None):
        seen.update(columns=columns, prompts=prompts, scores=scores)
        return draw(columns, prompts, scores, cell)

    monkeypatch.setattr(grids, "comparison_grid", recorded)
    return seen


@pytest.mark.parametrize("kind", ["sd-v", "sd3"])
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"critique"}))
def test_every_method_from_the_command_line(pipelines, kind, method, tmp_path, seen):
    steps = 1 if method == "reno" else 4
    out, grid = tmp_path / "out", tmp_path / "grid.png"
    flag = method.replace("_", "-")
    arguments = f"--{flag} --model {pipelines[kind]} --steps {steps} --resolution {SIDE}"
    arguments += " --guidance 1 --rewards.test_search_command:brightness 2 --seeds 0,3"
    arguments += f" --grid {grid} --out {out} --budget.denoiser_calls 30"
    assert cli.sample([*arguments.split(), *WORK.get(method, []), "--prompts", "cat", "dog"]) == 0
    header = method.replace("_", " ")
    assert list(seen["columns"]) == ["plain", header]
    assert seen["prompts"] == ["cat [0]", "cat [3]", "dog [0]", "dog [3]"]
    for before, after in zip(seen["scores"]["plain"], seen["scores"][header], strict=True):
        assert after["reward"] >= before["reward"]
        assert after["reward"] == pytest.approx(2 * after["test_search_command:brightness"])
    settings = json.loads(Image.open(grid).info["diffalign"])
    chance = {"sd-v": "ddim", "sd3": "flow_sde"}[kind]
    assert settings["kernel"] == (chance if method in ("smc", "flow_map", "dno") else "ode")
    traces = json.loads((out / "trace.json").read_text())
    assert [t["seed"] for t in traces] == [0, 3, 0, 3]
    for row, trace in enumerate(traces):
        picture = np.asarray(Image.open(out / trace["image"]))
        shown = seen["columns"][header][row]
        assert np.array_equal(picture, np.asarray(grids.to_pil(shown)))
        assert trace["prompt"] == trace["text"]
        assert trace["trace"][-1]["best"] == seen["scores"][header][row]["reward"]


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("sd-v", "--best-of-n --best-of-n.n 9 --steps 2 --guidance 2 --budget.denoiser_calls 22"),
        ("flux-schnell", "--reno --reno.iterations 4 --steps 1 --guidance 1"),
    ],
)
def test_prompts_searched_for_at_once_have_what_they_have_alone(
    pipelines, kind, line, tmp_path, monkeypatch
):
    tasks, search = [], command.search

    def counted(task, *rest):
        tasks.append(len(task))
        return search(task, *rest)

    monkeypatch.setattr(command, "search", counted)

    def found(*arguments: str) -> list[tuple[np.ndarray, float]]:
        out = tmp_path / f"{len(tasks)}"
        given = [*line.split(), "--model", pipelines[kind], "--resolution", str(SIDE), *arguments]
        given += ["--rewards.test_search_command:brightness", "1", "--grid", f"{tmp_path}/g.png"]
        assert cli.sample([*given, "--out", str(out)]) == 0
        traces = json.loads((out / "trace.json").read_text())
        calls = [trace["trace"][-1]["denoiser_calls"] for trace in traces]
        pictures = [np.asarray(Image.open(out / trace["image"]), int) for trace in traces]
        return list(zip(pictures, calls, strict=True))

    together = found("--prompts", "cat", "dog", "--seeds", "0,3")
    apart = found("--prompts", "cat", "dog", "--seeds", "0,3", "--sampler.batch", "3")
    assert tasks == [4, 3, 1]
    alone = [found("--prompts", p, "--seeds", s)[0] for p in ("cat", "dog") for s in ("0", "3")]
    for several in (together, apart):
        for (picture, calls), (expected, spent) in zip(several, alone, strict=True):
            assert calls == spent
            assert abs(picture - expected).max() <= 1  # in another batch
    if "best-of-n" in line:
        assert {calls for _, calls in together} == {24}  # of two steps with guidance: 4 a picture


@pytest.fixture
def broken(pipelines, tmp_path, monkeypatch, seen):
    """broken(error, call) -> exit status and traces of three searches, of three calls of a reward
    each, where the given call (counted from 1 on) raises the error."""

    def broken(error, call):
        calls = []

        def fragile(images, prompts):
            calls.append(prompts)
            if len(calls) == call:
                raise error
            return brightness(images, prompts)

        monkeypatch.setattr("test_search_command.blind", fragile)
        out, grid = tmp_path / "out", tmp_path / "grid.png"
        arguments = f"--best-of-n --best-of-n.n 3 --model {pipelines['sd-v']} --steps 1"
        arguments += f" --resolution {SIDE} --rewards.test_search_command:blind 1 --seeds 0"
        arguments += f" --sampler.batch 1 --grid {grid} --out {out} --prompts cat dog fox"
        status = cli.sample(arguments.split())
        assert len(calls) == call
        if not seen:
            assert not grid.exists()
            return status, []
        assert json.loads(Image.open(grid).info["diffalign"])["method"] == "best_of_n"
        traces = json.loads((out / "trace.json").read_text())
        assert [trace["prompt"] for trace in traces] == seen["prompts"]
        assert sorted(file.name for file in out.glob("*.png")) == [t["image"] for t in traces]
        assert all(len(column) == len(traces) for column in seen["columns"].values())
        return status, traces

    return broken


def test_ctrl_c_in_a_plain_sample_keeps_the_pictures_before_it(broken):
    assert broken(KeyboardInterrupt(), 1) == (130, [])
    status, traces = broken(KeyboardInterrupt(), 4)
    assert status == 130
    assert [(t["prompt"], len(t["trace"])) for t in traces] == [("cat", 3)]


def test_ctrl_c_in_a_search_keeps_its_best_too(broken, capsys):
    status, traces = broken(KeyboardInterrupt(), 6)
    assert status == 0
    assert [(t["prompt"], len(t["trace"])) for t in traces] == [("cat", 3), ("dog", 2)]
    assert "stopped" in capsys.readouterr().out


@pytest.mark.parametrize("call", [4, 5, 6])
def test_a_reward_that_fails_keeps_the_pictures_before_it(broken, call, capsys):
    status, traces = broken(rewards.RewardError("no answer", "blind"), call)
    assert status == 1
    assert (traces[0]["prompt"], len(traces[0]["trace"])) == ("cat", 3)
    # the second search has its plain picture after the fourth call, then another
    assert [len(trace["trace"]) for trace in traces[1:]] == {4: [], 5: [1], 6: [2]}[call]
    error = capsys.readouterr().err
    assert "error: reward 'test_search_command:blind' raised" in error
    assert "no answer" in error


def saved_lora(model, folder):
    policy = policies.load(model, resolution=SIDE)
    policy.add_lora(2)
    perturb(policy, 0.5)
    policy.save(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "method", "reward"),
    [
        ("sd-v", "--best-of-n --best-of-n.n 2", "blind"),
        ("sd3", "--reno --reno.iterations 2", "brightness"),
    ],
)
def test_a_lora_is_searched_with(pipelines, kind, method, reward, tmp_path):
    """Its scale 0 is the base model."""
    lora = ["--lora", str(saved_lora(pipelines[kind], tmp_path / "lora")), "--lora-scale"]

    def best(name: str, *extra: str) -> np.ndarray:
        arguments = f"{method} --model {pipelines[kind]} --steps 2 --seeds 0"
        arguments += f" --resolution {SIDE} --rewards.test_search_command:{reward} 1"
        arguments += f" --grid {tmp_path / 'grid.png'} --out {tmp_path / name} --prompts cat"
        assert cli.sample([*arguments.split(), *extra]) == 0
        return np.asarray(Image.open(tmp_path / name / "000_seed0.png"), int)

    base, none, tuned = best("base"), best("none", *lora, "0"), best("tuned", *lora, "1")
    assert abs(base - none).max() <= 1
    assert abs(base - tuned).max() > 10


@pytest.mark.parametrize("kind", ["sd-v", "sd3"])
def test_a_lora_looks_ahead(pipelines, kind, tmp_path):
    lora = saved_lora(pipelines[kind], tmp_path / "lora")

    def trace(*extra: str) -> list[dict[str, float]]:
        arguments = f"--flow-map --flow-map.gradient 1 --model {pipelines[kind]} --steps 3"
        arguments += f" --flow-map.particles 2 --resolution {SIDE} --guidance 1 --seeds 0"
        arguments += " --rewards.test_search_command:brightness 1"
        arguments += f" --grid {tmp_path / 'grid.png'} --out {tmp_path / 'out'} --prompts cat"
        assert cli.sample([*arguments.split(), *extra]) == 0
        (found,) = json.loads((tmp_path / "out" / "trace.json").read_text())
        return found["trace"]

    alone, ahead = trace(), trace("--flow-map.look-ahead", str(lora))
    assert alone[0]["reward"] == ahead[0]["reward"]  # the plain picture is the model's own
    assert alone[1]["reward"] != ahead[1]["reward"]
    assert alone[1]["denoiser_calls"] == 3 + 2 * 3
    assert ahead[1]["denoiser_calls"] == 3 + 2 * 3 + 2 * 2  # it is shifted at the first two steps
