"""Every family against diffusers itself: sampling, guidance, adapters, saving and loading.

All of it runs on each kind of `families.BUILDERS`, at a small resolution.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SIDE, load, perturb, side_of
from diffusers import AutoencoderTiny, DDIMScheduler, DiffusionPipeline
from families import BUILDERS, tiny_vae
from families_qwen import ask
from safetensors.torch import save_file

from diffalign import policies
from diffalign.policies import Cond, lora
from diffalign.sampling.rollout import Sampling, rollout

PROMPTS = ["a red dog", "a cat on a blue background", "a rocket"]


def sampling(policy, steps=5, kernel="ddim", eta=0.0, guidance=1.0):
    return Sampling(policy.levels(steps), kernel, eta, guidance)


def pictures(policy, guidance=3.0, steps=5, kernel="ddim"):
    paths = rollout(
        policy,
        policy.encode(PROMPTS),
        sampling(policy, steps, kernel, guidance=guidance),
        [1, 2, 3],
        2,
    )
    return paths.states[:, 0], policy.decode(paths.final)


def diffusers_pipeline(folder):
    """The pipeline as anyone loads it; one whose own sampler is stochastic gets DDIM instead."""
    pipe = policies.pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    if "Ancestral" in type(pipe.scheduler).__name__:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    return pipe


def diffusers_pictures(pipe, latents, guidance=3.0, steps=5, side=None):
    side = side or side_of(pipe.config._name_or_path)
    return ask(pipe, PROMPTS, latents, guidance, num_inference_steps=steps, height=side, width=side)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("kernel", ["ddim", "ode"])
def test_deterministic_sampler_is_that_of_diffusers(folder, kernel, guidance):
    latents, drawn = pictures(load(folder), guidance, 10, kernel)
    expected = diffusers_pictures(diffusers_pipeline(folder), latents, guidance, 10)
    assert expected.std() > 0.01
    assert (drawn - expected).abs().max() < 2e-3


def test_resolution_is_that_of_diffusers(folder):
    side = 2 * side_of(folder)
    latents, drawn = pictures(load(folder, resolution=side))
    expected = diffusers_pictures(diffusers_pipeline(folder), latents, side=side)
    assert drawn.shape[2:] == (side, side)
    assert (drawn - expected).abs().max() < 2e-3
    said = rf"model\.resolution={side + 1} is not a multiple.*nearest is {side}"
    with pytest.raises(ValueError, match=said):
        policies.peek(folder, 5, side + 1)


def test_one_step_of_a_turbo_model_is_that_of_its_own_sampler(pipelines):
    policy = load(pipelines["sd-turbo"])
    latents, drawn = pictures(policy, guidance=0.0, steps=1)
    pipe = DiffusionPipeline.from_pretrained(pipelines["sd-turbo"])
    pipe.set_progress_bar_config(disable=True)
    # Euler shows the network sigma z, and DDIM z
    expected = diffusers_pictures(pipe, latents / policy.levels(1).sigma[0], 0.0, 1)
    assert expected.std() > 0.01
    assert (drawn - expected).abs().max() < 2e-3


def test_set_alpha_to_one_counts_only_for_samplers_that_know_it(pipelines):
    """The hub's Turbo and SDXL carry set_alpha_to_one=False, and their samplers end at sigma 0."""
    ends = {k: policies.peek(pipelines[k], 4)[0].sigma[-1].item() for k in BUILDERS if "sd" in k}
    assert ends.pop("sd-epsilon") == pytest.approx(0.0291, abs=1e-3)  # DDIM, which knows it
    assert set(ends.values()) == {0.0}


def test_guidance_is_one_call_and_equals_two(policy, monkeypatch):
    if not policy.uses_cfg:
        pytest.skip("guidance is an input of this network")
    perturb(policy)
    sizes = []
    call = policy.call

    def counted(x, t, text, guidance):
        sizes.append(len(x))
        return call(x, t, text, guidance)

    monkeypatch.setattr(policy, "call", counted)
    x = torch.randn(3, *policy.latent_shape)
    level = policy.levels(5)[2]
    cond = policy.encode(PROMPTS)
    unconditional = policy.predict(x, level, Cond(cond.negative, cond.negative), 0.0).native
    conditional = policy.predict(x, level, cond, 0.0).native
    assert sizes == [3, 3]
    guided = policy.predict(x, level, cond, guidance=4.0)
    assert sizes == [3, 3, 6]
    w = policy.weighed(4.0).scale
    expected = unconditional + w * (conditional - unconditional)
    expected = policy.renormed(expected, conditional)
    torch.testing.assert_close(guided.native, expected, atol=1e-5, rtol=1e-5)


def test_views_of_a_prediction_agree(policy):
    x = torch.randn(3, *policy.latent_shape)
    level = policy.levels(5)[2]
    seen = policy.predict(x, level, policy.encode(PROMPTS), guidance=4.0)
    torch.testing.assert_close(
        level.alpha * seen.x0 + level.sigma * seen.eps, x, atol=1e-5, rtol=1e-5
    )
    again = policy.parametrize(x, seen.native, level)
    assert torch.equal(again.x0, seen.x0)


def test_empty_negative_prompt(pipelines):
    """SDXL draws with zeros, unless a negative prompt is given; SD with the embedding of ""."""
    xl, sd = load(pipelines["sdxl"]), load(pipelines["sd-v"])
    for value in xl.encode(["", "a cat"]).negative.values():
        assert not value.any()
    cond = xl.encode(["", "a cat"], negative="a dog")
    expected = xl.encode(["a dog"]).positive
    for name, value in cond.negative.items():
        assert value.any()
        assert torch.equal(value[:1], expected[name])
    cond = sd.encode(["", "a cat"])
    assert torch.equal(cond.negative["prompt"][0], cond.positive["prompt"][0])


def test_a_level_per_sample_equals_a_loop(policy):
    levels, cond = policy.levels(5), policy.encode(PROMPTS)
    x = torch.randn(3, *policy.latent_shape)
    index = torch.tensor([4, 0, 2])
    together = policy.predict(x, levels[index], cond, 2.0).native
    for i in range(3):
        alone = policy.predict(x[i : i + 1], levels[int(index[i])], cond[slice(i, i + 1)], 2.0)
        torch.testing.assert_close(together[i : i + 1], alone.native, atol=1e-5, rtol=1e-4)


def test_levels_end_at_the_data(policy):
    levels = policy.levels(10)
    assert len(levels) == 11
    assert (levels.sigma[1:] < levels.sigma[:-1]).all()
    power = 1 if type(policy).denoiser == "transformer" else 2
    torch.testing.assert_close(levels.alpha**power + levels.sigma**power, torch.ones(11))


def test_lora_starts_as_the_base_and_reference_returns_to_it(policy):
    base = pictures(load(policy.pipe.config._name_or_path))[1]
    assert torch.equal(pictures(policy)[1], base)
    perturb(policy)
    tuned = pictures(policy)[1]
    assert not torch.allclose(tuned, base, atol=1e-4)
    names = [n for n, p in policy.network.named_parameters() if p.requires_grad]
    with policy.reference():
        assert torch.equal(pictures(policy)[1], base)
    assert torch.equal(pictures(policy)[1], tuned)
    assert [n for n, p in policy.network.named_parameters() if p.requires_grad] == names


def test_named_adapters(policy):
    base = pictures(policy)[1]
    before = policy.trainable_parameters()
    policy.add_copy("old")
    assert all(torch.equal(a, b) for a, b in zip(before, policy.weights("old"), strict=True))
    perturb(policy)
    tuned = pictures(policy)[1]
    with policy.adapter("old"):
        assert torch.equal(pictures(policy)[1], base)
    assert torch.equal(pictures(policy)[1], tuned)
    after = policy.trainable_parameters()
    assert len(after) == len(before)
    assert all(a is b for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_diffusers_loads_the_lora_and_draws_the_training_picture(folder, tmp_path, alpha):
    policy = load(folder)
    policy.add_lora(2, alpha, ["to_q", "to_v"])
    perturb(policy)
    latents, expected = pictures(policy)
    path = policy.save(tmp_path)
    assert path.name == "pytorch_lora_weights.safetensors"
    kohya = ["kohya_lora.safetensors"] if policy.denoiser == "unet" else []
    assert sorted(p.name for p in tmp_path.iterdir()) == [*kohya, path.name]
    pipe = diffusers_pipeline(folder)
    plain = diffusers_pictures(pipe, latents)
    pipe.load_lora_weights(tmp_path)
    drawn = diffusers_pictures(pipe, latents)
    assert (drawn - plain).abs().max() > 2e-3
    assert (drawn - expected).abs().max() < 1e-4


def test_scale_multiplies_the_product(policy):
    perturb(policy)
    lora.set_scale(policy.network, 0.5)
    halved = pictures(policy)[1]
    lora.set_scale(policy.network, 1.0)
    state = lora.state_dict(policy.network)
    lora.load_state_dict(
        policy.network, {k: v / 2 if "lora_B" in k else v for k, v in state.items()}
    )
    torch.testing.assert_close(pictures(policy)[1], halved, atol=1e-5, rtol=1e-5)


def test_a_merged_lora_is_part_of_the_model(folder, tmp_path):
    trained = load(folder)
    trained.add_lora(2)
    perturb(trained)
    expected = pictures(trained)[1]
    trained.save(tmp_path)
    merged = load(folder, merge_lora=str(tmp_path))
    assert not merged.is_lora
    assert (pictures(merged)[1] - expected).abs().max() < 1e-4
    merged.add_lora(2)  # the reference of what is trained on top of it is the merged model
    perturb(merged)
    with merged.reference():
        assert (pictures(merged)[1] - expected).abs().max() < 1e-4


def test_only_the_denoisers_want_of_lora_keys_is_worth_a_warning(folder, tmp_path):
    trained = load(folder)
    trained.add_lora(2)
    trained.save(tmp_path)
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    loggers = [logging.getLogger(f"diffusers.loaders.{name}") for name in ("lora_base", "peft")]
    for logger in loggers:
        logger.addHandler(handler)
    policy = load(folder, merge_lora=str(tmp_path))
    assert not said
    other = {f"other.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}
    save_file(other, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match=f"has nothing for a {type(policy.pipe).__name__}"):
        load(folder, merge_lora=str(tmp_path))
    for logger in loggers:
        logger.removeHandler(handler)
    assert len(said) == 1
    assert type(policy.network).__name__ in said[0]


def test_unknown_lora_target_is_named(folder):
    with pytest.raises(ValueError, match=r"'to_x', which matches no layer.*to_q"):
        load(folder).add_lora(2, targets=["to_q", "to_x"])


def test_decode_in_slices_and_with_gradient(policy):
    x0 = torch.randn(5, *policy.latent_shape)
    whole = policy.decode(x0)
    assert whole.min() >= 0
    assert whole.max() <= 1
    policy.decode_batch = 2
    torch.testing.assert_close(policy.decode(x0), whole, atol=1e-5, rtol=1e-5)
    assert not policy.decode(x0.requires_grad_()).requires_grad
    policy.decode(x0, differentiable=True).sum().backward()
    assert x0.grad is not None
    assert x0.grad.abs().sum() > 0


def test_prompts_are_encoded_once(policy, monkeypatch):
    seen = []
    embed = policy.embed

    def counted(texts):
        seen.extend(texts)
        return embed(texts)

    monkeypatch.setattr(policy, "embed", counted)
    first = policy.encode(["a dog", "a cat", "a dog"])
    again = policy.encode(["a cat", "a dog"])
    empty = [policy.negative] if policy.uses_cfg and not policy.zero_negative else []
    assert sorted(seen) == [*empty, "a cat", "a dog"]
    assert torch.equal(first.positive["prompt"][:2].flip(0), again.positive["prompt"])


def test_freed_text_encoders(policy):
    cond = policy.encode(PROMPTS)
    policy.free_text_encoders()
    assert torch.equal(policy.encode(PROMPTS).positive["prompt"], cond.positive["prompt"])
    with pytest.raises(RuntimeError, match=r"'a new one' was not.*free_text_encoders=false"):
        policy.encode(["a new one"])


def test_bad_models_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        policies.check("./no/such/model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"model_index\.json"):
        policies.check(str(tmp_path / "empty"))
    other = shutil.copytree(folder, tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(
        json.dumps(index | {"_class_name": "KandinskyPipeline"})
    )
    with pytest.raises(ValueError, match=r"KandinskyPipeline; supported: .*StableDiffusion"):
        policies.load(str(other))


def test_peek_reads_no_weights_and_agrees(folder, policy, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    for path in copy.rglob("*.safetensors"):
        path.unlink()
    levels, shape = policies.peek(str(copy), 5, side_of(folder))
    assert shape == tuple(policy.latent_shape)
    assert torch.equal(levels.sigma, policy.levels(5).sigma)
    assert torch.equal(levels.t, policy.levels(5).t)


def test_hub_id_and_local_folder_take_the_same_path(tmp_path, pipelines):
    """A hub id as the hub's client finds it in its cache, offline."""
    sigmas = {}
    for kind in BUILDERS:
        repo = tmp_path / f"models--org--{kind}"
        shutil.copytree(pipelines[kind], repo / "snapshots" / "abc")
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("abc")
        sigmas[f"org/{kind}"] = policies.peek(pipelines[kind], 3, 4 * SIDE)[0].sigma.tolist()
    code = (
        "import json, sys; from diffalign import policies\n"
        "side, *names = json.loads(sys.argv[1])\n"
        "print(json.dumps({n: [policies.peek(n, 3, side)[0].sigma.tolist(),"
        " policies.load(n, resolution=side).levels(3).sigma.tolist()] for n in names}))"
    )
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    out = subprocess.run(
        [sys.executable, "-c", code, json.dumps([4 * SIDE, *sigmas])],
        cwd=Path(__file__).parents[1], env=env, check=True, capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads(out.stdout.splitlines()[-1])
    assert found == {name: [sigma, sigma] for name, sigma in sigmas.items()}


def gradient(policy):
    policy.network.zero_grad()
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    cond = policy.encode(PROMPTS[:2])
    # at the first level, whose time has no rounding error in half precision
    policy.predict(x, policy.levels(5)[0], cond, 2.0).native.square().mean().backward()
    # Qwen-Image's last block makes text that nothing reads
    grads = [p.grad for p in policy.trainable_parameters()]
    return torch.cat([g.flatten() for g in grads if g is not None])


def test_gradient_checkpointing_recomputes_in_eval_mode(policy):
    perturb(policy)
    calls = []
    for name, module in policy.network.named_modules():
        if name.endswith("to_q") and "refiner" not in name:  # Z-Image never recomputes those
            module.register_forward_hook(lambda *_: calls.append(1))
    assert not policy.network.training
    plain, forward = gradient(policy), len(calls)
    policy.network.enable_gradient_checkpointing()
    recomputed = gradient(policy)
    assert len(calls) - forward == 2 * forward > 0
    torch.testing.assert_close(recomputed, plain, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(folder, dtype):
    policy, half = load(folder), load(folder, dtype=dtype)
    x = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    seen = []
    for p in (policy, half):
        p.add_lora(2)
        perturb(p)
        seen.append(p.predict(x, p.levels(5)[0], p.encode(PROMPTS), 2.0))
    dtypes = {p.dtype for p in half.network.parameters() if not p.requires_grad}
    assert getattr(torch, dtype) in dtypes
    assert {p.dtype for p in half.trainable_parameters()} == {torch.float32}
    assert half.vae.dtype == seen[1].x0.dtype == torch.float32
    error = (seen[1].native - seen[0].native).norm() / seen[0].native.norm()
    limit = 0.05 if dtype == "bfloat16" else 0.01
    assert 0 < error < limit
    limit = 0.4 if dtype == "bfloat16" else 0.1
    assert (gradient(half) - gradient(policy)).norm() < limit * gradient(policy).norm()


def test_every_weight_of_the_denoiser(folder, tmp_path):
    """Full fine-tuning: reference, copies, saving; the export is the training-time network."""
    policy = load(folder, train_all=True)
    base = pictures(policy)[1]
    policy.add_copy("old")
    perturb(policy, 0.05)
    latents, tuned = pictures(policy)
    assert not torch.allclose(tuned, base, atol=1e-3)
    for context in (policy.reference(), policy.adapter("old")):
        with context:
            # the last bit of a float32 sum may depend on where its tensors lie in memory
            torch.testing.assert_close(pictures(policy)[1], base, atol=1e-6, rtol=1e-5)
    assert torch.equal(pictures(policy)[1], tuned)
    network = policy.network
    policy.load_state_dict(policy.state_dict("old"))
    assert torch.equal(pictures(policy)[1], base)
    perturb(policy, 0.05)
    path = policy.save(tmp_path / "run")
    assert path == policy.save(tmp_path / "run")  # again, over the first
    assert path == tmp_path / "run" / policy.denoiser
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    pipe = diffusers_pipeline(folder)
    setattr(pipe, policy.denoiser, type(network).from_pretrained(path))
    assert (diffusers_pictures(pipe, latents) - tuned).abs().max() < 2e-3
    assert len(policy.trainable_parameters()) == len(policy.weights("old"))


def test_gradient_inside_a_reference_is_its_own(pipelines):
    policy = load(pipelines["sd-v"], train_all=True)
    x = torch.randn(2, *policy.latent_shape, requires_grad=True)
    cond, level = policy.encode(PROMPTS[:2]), policy.levels(5)[2]
    (expected,) = torch.autograd.grad(policy.predict(x, level, cond).x0.sum(), x)
    perturb(policy)
    with policy.reference():
        out = policy.predict(x, level, cond).x0.sum()
    (inside,) = torch.autograd.grad(out, x)
    assert torch.equal(inside, expected)


def test_tiny_vae(pipelines, tmp_path):
    policy = load(pipelines["sd-v"])
    x0 = torch.randn(3, *policy.latent_shape, requires_grad=True)
    full = policy.decode(x0)
    assert torch.equal(policy.decode(x0, tiny=True), full)  # none was given
    name = tiny_vae(tmp_path / "tiny")
    policies.check_tiny_vae(name, pipelines["sd-v"])
    policy.add_tiny_vae(name)
    assert torch.equal(policy.decode(x0), full)
    drawn = policy.decode(x0, differentiable=True, tiny=True)
    # as StableDiffusionPipeline decodes with it
    pipe = DiffusionPipeline.from_pretrained(
        pipelines["sd-v"], vae=AutoencoderTiny.from_pretrained(name)
    )
    image = pipe.vae.decode(x0 / pipe.vae.config.scaling_factor, return_dict=False)[0]
    expected = pipe.image_processor.postprocess(image.detach(), output_type="pt")
    assert drawn.shape == full.shape
    torch.testing.assert_close(drawn, expected)
    (grad,) = torch.autograd.grad(drawn.sum(), x0)
    assert grad.abs().sum() > 0
    for wrong in (tiny_vae(tmp_path / "wide", channels=8), tiny_vae(tmp_path / "deep", blocks=3)):
        with pytest.raises(ValueError, match=r"tiny_vae=.*use one made for it"):
            policies.check_tiny_vae(wrong, pipelines["sd-v"])
    for missing in ("./nothing", pipelines["sd-v"] + "/vae"):
        with pytest.raises(ValueError, match=r"model\.tiny_vae="):
            policies.check_tiny_vae(missing, pipelines["sd-v"])


def test_levels_anywhere_agree_with_the_schedule(policy):
    """`at` returns the levels of a schedule when asked for the times of its steps."""
    schedule = policy.levels(4)[slice(0, 4)]
    on_unet = policy.denoiser == "unet"
    time = (schedule.t + 0.5) / len(policy.abar) if on_unet else schedule.sigma
    found = policy.at(time)
    for name in ("t", "alpha", "sigma"):
        torch.testing.assert_close(getattr(found, name), getattr(schedule, name))
