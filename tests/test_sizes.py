"""Pictures that are not square, and of several sizes in one run."""

import json

import pytest
import torch
from conftest import load, side_of
from families import BUILDERS
from families_qwen import ask
from processes import FSDP, ROOT, run

from diffalign import TrainConfig, Trainer, policies
from diffalign.config.decoding import ConfigError
from diffalign.config.prompts import Buckets, Prompt, PromptSampler
from diffalign.record import checkpoint
from diffalign.sampling.pipeline import settings
from diffalign.sampling.rollout import Sampling, rollout
from diffalign.training.plan import Plan

REWARDS = "def red(images, prompts):\n    return images[:, 0].mean((1, 2))\n"


@pytest.mark.parametrize("kind", sorted(BUILDERS))
def test_pictures_that_are_not_square_are_those_of_diffusers(pipelines, kind):
    side = side_of(kind)
    size = [2 * side, side]
    policy = load(pipelines[kind], resolution=size)
    paths = rollout(
        policy, policy.encode(["a red dog"]), Sampling(policy.levels(4), "ode", 0.0, 2.0), [1], 1
    )
    drawn = policy.decode(paths.final)
    assert drawn.shape[2:] == tuple(size)
    pipe = policies.pipeline(pipelines[kind])
    pipe.set_progress_bar_config(disable=True)
    if kind == "sd-turbo":
        from diffusers import DDIMScheduler

        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    how = {"num_inference_steps": 4, "height": size[0], "width": size[1]}
    expected = ask(pipe, ["a red dog"], paths.states[:, 0], 2.0, **how)
    assert (drawn - expected).abs().max() < 2e-3
    with policy.resized(side):
        assert policy.latent_shape[1] == policy.latent_shape[2]
    assert policy.latent_shape == policies.peek(pipelines[kind], 2, size)[1]


def test_sizes_alternate_as_their_shares(tmp_path):
    sizes = [(8, 8)] * 30 + [(8, 16)] * 10
    prompts = [Prompt("a", {"resolution": list(s)}) for s in sizes]
    sampler = Buckets(prompts, 4, seed=3)
    drawn = [sampler.size(k) for k in range(40)]
    assert drawn.count((8, 8)) == 30
    assert {drawn[i : i + 4].count((8, 8)) for i in range(0, 40, 4)} == {3}
    for k in range(40):
        ids = sampler.epoch(k)
        assert len(set(ids)) == 4
        assert {sizes[i] for i in ids} == {drawn[k]}
    again = Buckets(prompts, 4, seed=3)  # in any order
    assert [again.epoch(k) for k in (39, 2, 17)] == [sampler.epoch(k) for k in (39, 2, 17)]
    assert sampler.seen(range(40), slice(0, 4)) == set(range(40))
    one, plain = Buckets([Prompt("a")] * 9, 4, seed=3), PromptSampler(9, 4, 3)
    assert [one.epoch(k) for k in range(9)] == [plain.epoch(k) for k in range(9)]
    with pytest.raises(ValueError, match=r"of one size, and of \(8, 16\) there are 2; use fewer"):
        Buckets(prompts[:9] + prompts[-2:], 4)


@pytest.fixture
def tree(pipelines, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    lines = [{"prompt": f"a red dog {i}", "resolution": s} for i in range(4) for s in (8, [8, 16])]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {
        "model": {"name": pipelines["sdxl"], "resolution": 8, "lora_rank": 2},
        "algorithm": {"type": "ddpo"},
        "sampler": {"steps": 2, "batch": 4},
        "rewards": {"mine:red": 1.0},
        "data": {"prompts": str(tmp_path / "p.jsonl"), "groups": 2, "group_size": 2},
        "train": {"epochs": 4},
        "eval": {"prompts": str(tmp_path / "p.jsonl"), "images_per_prompt": 1},
        "log": {"dir": str(tmp_path / "run")},
    }


def test_a_run_of_several_sizes(tree, tmp_path, monkeypatch):
    seen = []
    trainer = Trainer(TrainConfig.from_dict(tree))
    decode = trainer.policy.decode

    def watched(x0, *args, **kwargs):
        made = decode(x0, *args, **kwargs)
        seen.append(tuple(made.shape[2:]))
        return made

    monkeypatch.setattr(trainer.policy, "decode", watched)
    trainer.run_epoch(0)
    first = set(seen)
    seen.clear()
    trainer.run_epoch(1)
    assert {*first, *seen} == {(8, 8), (8, 16)}
    assert len(first) == len(set(seen)) == 1
    seen.clear()
    figures = trainer.evaluate("base")
    assert sorted(set(seen)) == [(8, 8), (8, 16)]
    assert figures["eval/reward"] > 0
    trainer.tracker.close()


def test_a_run_of_several_sizes_ends_and_reports(tree, tmp_path):
    Trainer(TrainConfig.from_dict(tree)).train()
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_evaluations_have_a_size_of_their_own(tree, tmp_path, monkeypatch):
    (tmp_path / "q.txt").write_text("a red dog\na cat\n")
    tree["data"]["prompts"] = tree["eval"]["prompts"] = str(tmp_path / "q.txt")
    tree["eval"]["resolution"] = [16, 8]
    trainer = Trainer(TrainConfig.from_dict(tree))
    trainer.evaluate("base")
    assert trainer.evaluation.pictures[0].size == (8, 16)  # width, height
    assert trainer.policy.resolution == 8
    trainer.tracker.close()


@pytest.mark.parametrize(
    ("section", "value", "said"),
    [
        (
            "model",
            [8, 9],
            r"model\.resolution=\[8, 9\] is not a multiple.*nearest is \[8, 8\]",
        ),
        ("model", [8, 8, 8], r"model\.resolution=\[8, 8, 8\] is no size"),
        ("model", [8, 0], r"model\.resolution=\[8, 0\] is no size"),
        ("eval", 9, r"eval\.resolution: \(9, 9\) is not a multiple of 2"),
    ],
)
def test_bad_sizes_are_refused(tree, section, value, said):
    tree[section]["resolution"] = value
    with pytest.raises((ConfigError, ValueError), match=said):
        Plan.make(TrainConfig.from_dict(tree))


def test_a_prompts_bad_size_names_the_prompt(tree, tmp_path):
    for size, said in ((9, "is not a multiple of 2"), ("wide", "is no size")):
        lines = [{"prompt": f"a cat {i}", "resolution": size} for i in range(4)]
        (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
        with pytest.raises(ValueError, match=rf"a cat \d.*{said}"):
            Plan.make(TrainConfig.from_dict(tree))


def test_sizes_on_the_command_line(pipelines, tmp_path, monkeypatch):
    from diffalign.commands.cli import sample

    out = tmp_path / "out"
    how = f"--model {pipelines['flux-dev']} --steps 2 --guidance 1 --seeds 0 --resolution 8x16"
    paths = ["--grid", str(tmp_path / "g.png"), "--out", str(out)]
    assert sample([*how.split(), "--prompts", "a cat", *paths]) == 0
    from PIL import Image

    (picture,) = out.glob("*.png")
    assert Image.open(picture).size == (16, 8)


def test_pictures_on_request_have_the_size_of_evaluations(tree):
    trainer = Trainer(TrainConfig.from_dict(tree))
    while trainer.policy.resolution != (8, 16):  # an epoch of the other size
        trainer.run_epoch(trainer.epoch)
        trainer.epoch += 1
    (picture,) = trainer.sample(["a red dog 0"], seeds=[1])
    assert picture.size == (8, 8)
    trainer.config.eval.resolution = [16, 8]
    (picture,) = trainer.sample(["a red dog 0"], seeds=[1])
    assert picture.size == (8, 16)
    trainer.tracker.close()


def test_sample_draws_a_run_at_the_size_it_was_looked_at(tree, tmp_path):
    config = TrainConfig.from_dict(tree)
    config.eval.resolution = [16, 8]
    config.save(tmp_path / "run" / "config.yaml")
    assert settings([str(tmp_path / "run")], {})["resolution"] == [16, 8]
    config.eval.resolution = None
    config.save(tmp_path / "run" / "config.yaml")
    assert settings([str(tmp_path / "run")], {})["resolution"] == 8


@pytest.mark.parametrize("rank", [2, 0])
def test_a_run_of_several_sizes_resumes_bit_for_bit(tree, tmp_path, rank):
    tree["model"]["lora_rank"] = rank
    weights = []
    for name, parts in (("whole", (4,)), ("parts", (1, 3, 4))):
        for epochs in parts:
            tree["train"]["epochs"], tree["log"]["dir"] = epochs, str(tmp_path / name)
            Trainer(TrainConfig.from_dict(tree), resume="latest").train()
        weights.append(checkpoint.load(tmp_path / name)["adapter"])
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


@pytest.mark.parametrize(("environ", "rank"), [({}, 2), (FSDP, 0)])
def test_two_processes_draw_several_sizes(tree, tmp_path, environ, rank):
    tree["model"]["lora_rank"] = rank
    tree["log"]["dir"] = str(tmp_path / "two")
    TrainConfig.from_dict(tree).save(tmp_path / "c.yaml")
    environ = {**environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    status, output = run(2, ["train.py", tmp_path / "c.yaml"], **environ)
    if rank:
        assert status == 0, output
        assert checkpoint.load(tmp_path / "two")["epoch"] == 4
        return
    assert status == 1
    assert "ask for several sizes" in output
    how = [tmp_path / "c.yaml", "--eval.resolution", "8"]
    status, output = run(2, ["train.py", *how], **environ)
    assert status == 0, output
    assert checkpoint.load(tmp_path / "two")["epoch"] == 4
