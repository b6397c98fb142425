"""The UNet family against diffusers itself: sampling, guidance, adapters, saving and loading."""

import json
import shutil

import pytest
import torch
from conftest import perturb
from diffusers import StableDiffusionPipeline

from diffalign import policies
from diffalign.policies import lora
from diffalign.rollout import Sampling, rollout

PROMPTS = ["a red dog", "a cat on a blue background", "a rocket"]


def sampling(policy, steps=5, kernel="ddim", eta=0.0, guidance=1.0):
    return Sampling(policy.levels(steps), kernel, eta, guidance)


def pictures(policy, guidance=3.0, steps=5):
    paths = rollout(
        policy, policy.encode(PROMPTS), sampling(policy, steps, guidance=guidance), [1, 2, 3], 8
    )
    return paths.states[:, 0], policy.decode(paths.final)


def diffusers_pictures(pipe, latents, guidance=3.0, steps=5):
    out = pipe(
        PROMPTS,
        latents=latents,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="pt",
    )
    return out.images


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kernel", ["ddim", "ode"])
def test_deterministic_sampler_is_that_of_diffusers(folder, kernel, guidance):
    policy = policies.load(folder)
    paths = rollout(
        policy, policy.encode(PROMPTS), sampling(policy, 10, kernel, 0.0, guidance), [1, 2, 3], 2
    )
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    expected = diffusers_pictures(pipe, paths.states[:, 0], guidance, 10)
    assert expected.std() > 0.01
    assert (policy.decode(paths.final) - expected).abs().max() < 2e-3


def test_guidance_is_one_call_and_equals_two(policy, monkeypatch):
    perturb(policy)
    sizes = []
    call = policy.call

    def counted(x, t, text):
        sizes.append(len(x))
        return call(x, t, text)

    monkeypatch.setattr(policy, "call", counted)
    x = torch.randn(3, *policy.latent_shape)
    level = policy.levels(5)[2]
    cond = policy.encode(PROMPTS)
    unconditional = policy.predict(x, level, policy.encode([""] * 3)).native
    conditional = policy.predict(x, level, cond).native
    assert sizes == [3, 3]
    guided = policy.predict(x, level, cond, guidance=4.0)
    assert sizes == [3, 3, 6]
    expected = unconditional + 4.0 * (conditional - unconditional)
    torch.testing.assert_close(guided.native, expected, atol=1e-5, rtol=1e-5)
    alpha, sigma = level.alpha, level.sigma
    torch.testing.assert_close(alpha * guided.x0 + sigma * guided.eps, x, atol=1e-5, rtol=1e-5)


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
    torch.testing.assert_close(levels.alpha**2 + levels.sigma**2, torch.ones(11))


def test_lora_starts_as_the_base_and_reference_returns_to_it(policy):
    base = pictures(policies.load(policy.pipe.config._name_or_path))[1]
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
    lora.add(policy.network, 2, None, ["to_q", "to_k", "to_v", "to_out.0"], seed=5, name="old")
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
    policy = policies.load(folder)
    lora.add(policy.network, 2, alpha, ["to_q", "to_v"], seed=0)
    perturb(policy)
    latents, expected = pictures(policy)
    path = policy.save_lora(tmp_path)
    assert path.name == "pytorch_lora_weights.safetensors"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    plain = diffusers_pictures(pipe, latents)
    pipe.load_lora_weights(tmp_path)
    drawn = diffusers_pictures(pipe, latents)
    assert (drawn - plain).abs().max() > 1e-2
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


def test_unknown_lora_target_is_named(folder):
    with pytest.raises(ValueError, match=r"'to_x', which matches no layer.*to_q"):
        lora.add(policies.load(folder).network, 2, None, ["to_q", "to_x"], seed=0)


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
    assert sorted(seen) == ["", "a cat", "a dog"]
    assert torch.equal(first.positive["prompt"][:2].flip(0), again.positive["prompt"])


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
    with pytest.raises(ValueError, match="KandinskyPipeline; supported: StableDiffusionPipeline"):
        policies.load(str(other))


def test_peek_reads_no_weights_and_agrees(folder, policy, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    for path in copy.rglob("*.safetensors"):
        path.unlink()
    levels, shape = policies.peek(str(copy), 5)
    assert shape == tuple(policy.latent_shape)
    assert torch.equal(levels.sigma, policy.levels(5).sigma)
