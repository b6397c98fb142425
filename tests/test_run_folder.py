"""A run folder is a model wherever one is asked for, with what it trained."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import SIDE, load, perturb

from diffalign import policies
from diffalign.commands import evaluate
from diffalign.config import TrainConfig
from diffalign.policies.run_folder import Model, resolve
from diffalign.sampling.pipeline import Sampler
from diffalign.sampling.rollout import Sampling, rollout
from diffalign.training.plan import Plan

KINDS = ("sd-epsilon", "sdxl", "sd3", "flux-dev")


def picture(policy):
    sampling = Sampling(policy.levels(3), "ode", 0.0, 2.0)
    return policy.decode(rollout(policy, policy.encode(["a dog"]), sampling, [1], 1).final)


def run(folder, base, whole=False, scale=0.2, **model):
    """A run folder as training leaves it; returns it and its picture."""
    policy = load(str(base), train_all=whole, merge_lora=model.get("merge_lora"))
    if not whole:
        policy.add_lora(2, 4.0, seed=len(str(folder)))
    perturb(policy, scale)
    policy.save(Path(folder))
    settings = {"name": str(base), "lora_rank": 0 if whole else 2, "resolution": SIDE, **model}
    (Path(folder) / "config.yaml").write_text(yaml.safe_dump({"model": settings}))
    return str(folder), picture(policy)


def same(a, b):
    assert b.std() > 0.01
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whole", [False, True])
def test_a_run_is_loaded_with_what_it_trained(pipelines, tmp_path, kind, whole):
    base = pipelines[kind]
    folder, expected = run(tmp_path / "run", base, whole)
    same(picture(policies.load(folder)), expected)  # at the run's own resolution
    assert not torch.allclose(picture(load(base)), expected, atol=1e-3)
    assert policies.family(folder) is policies.family(base)
    levels, shape = policies.peek(folder, 3)
    assert shape == policies.peek(base, 3, SIDE)[1]
    assert torch.equal(levels.sigma, policies.peek(base, 3, SIDE)[0].sigma)
    TrainConfig.from_dict({"model": {"name": folder}, "rewards": {"jpeg": 1.0}})
    # plain diffusers draws the same from its noise as from that of the policy
    sampler = Sampler(folder)
    assert sampler.noise([1]).shape[1:] == shape
    network = getattr(sampler.pipe, policies.family(base).denoiser)
    ours = policies.load(folder).network
    state = network.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(state[name], value)


def test_runs_on_runs(pipelines, tmp_path):
    """A LoRA on a whole denoiser on a LoRA, with a LoRA merged first, and a best/ folder."""
    base = pipelines["sd-epsilon"]
    first, _ = run(tmp_path / "a", base)
    second, _ = run(tmp_path / "b", first, whole=True, scale=0.05)
    third, expected = run(tmp_path / "c", second, merge_lora=first)
    assert resolve(third) == Model(base, second, (first, third), SIDE)
    same(picture(policies.load(third)), expected)
    best = shutil.copytree(third, tmp_path / "d" / "best")
    (best / "config.yaml").rename(tmp_path / "d" / "config.yaml")
    same(picture(policies.load(str(best))), expected)
    with pytest.raises(ValueError, match="d' is a run that has saved no weights yet"):
        policies.check(str(tmp_path / "d"))


@pytest.mark.parametrize("kind", ["sd-epsilon", "flux-dev"])
@pytest.mark.parametrize("whole", [False, True])
def test_the_reference_of_a_run_that_starts_from_a_run_is_that_run(
    pipelines, tmp_path, kind, whole
):
    folder, expected = run(tmp_path / "run", pipelines[kind], whole)
    policy = policies.load(folder, train_all=True)
    perturb(policy, 0.05)
    tuned = picture(policy)
    assert not torch.allclose(tuned, expected, atol=1e-3)
    with policy.reference():
        same(picture(policy), expected)
    same(picture(policy), tuned)
    policy = policies.load(folder)
    policy.add_lora(2)
    perturb(policy)
    with policy.reference():
        same(picture(policy), expected)


def test_a_whole_denoiser_is_merged_as_a_lora_is(pipelines, tmp_path):
    base = pipelines["sd-v"]
    folder, expected = run(tmp_path / "run", base, whole=True)
    policy = load(base)
    policies.merge(policy.pipe, folder)
    same(picture(policy), expected)
    with pytest.raises(ValueError, match="whole unet, which cannot be scaled"):
        policies.merge(policy.pipe, folder, 0.5)
    with pytest.raises(ValueError, match="trained a unet, and a StableDiffusion3Pipeline has none"):
        policies.merge(load(pipelines["sd3"]).pipe, folder)
    with pytest.raises(ValueError, match=r"run' holds a whole unet that is not of"):
        policies.check_lora(folder, "--lora", pipelines["sdxl"])
    with pytest.raises(ValueError, match="of another size"):
        policies.merge(load(pipelines["sdxl"]).pipe, folder)


def test_eval_takes_runs(pipelines, tmp_path, monkeypatch, capsys):
    drawn = []

    def draw(policy, texts, *_):
        drawn.append(picture(policy))
        return drawn[-1].expand(len(texts), -1, -1, -1)

    monkeypatch.setattr(evaluate, "draw", draw)
    monkeypatch.setattr(evaluate, "load_prompts", lambda _: ["a red dog"])
    real = torch.zeros(1, 3, 8, 8), ["a red dog"]
    monkeypatch.setattr(evaluate, "real_scenes", lambda _: real)
    base = pipelines["sd-v"]
    runs = [run(tmp_path / name, base, whole) for name, whole in (("lora", 0), ("whole", 1))]
    for folder, expected in runs:
        drawn.clear()
        assert evaluate.main([folder]) == 0
        assert evaluate.main([base, "--lora", folder]) == 0
        same(drawn[0], expected)
        assert np.isfinite(drawn[1]).all()  # the base at its own size
        assert drawn[2].shape == drawn[1].shape
        assert not torch.equal(drawn[2], drawn[1])
    assert "| lora, verifier | lora, referee |" in capsys.readouterr().out


def test_what_is_no_run(pipelines, tmp_path):
    lora, _ = run(tmp_path / "lora", pipelines["sd-v"])
    config = tmp_path / "lora" / "config.yaml"

    def refused(match):
        with pytest.raises(ValueError, match=match):
            policies.check(lora)

    config.write_text(yaml.safe_dump({"model": {"name": lora}}))
    refused("goes back to itself")
    config.write_text(yaml.safe_dump({"model": {"name": "./gone"}}))
    refused(r"config.yaml names the model of .*'./gone' is not a folder")
    config.write_text("model: 3")
    refused("names no model")
    config.unlink()
    refused("no config.yaml says of which model; give that model here, and this folder as --lora")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        Plan.make(TrainConfig.from_dict({"model": {"name": str(tmp_path / "empty")}}))
