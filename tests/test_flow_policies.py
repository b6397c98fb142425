"""What is special to SD3 and FLUX; what every family must do is in test_policies."""

import json
import shutil

import pytest
import torch
from diffusers import FluxPipeline
from families_flow import FLOW_BUILDERS
from families_qwen import ask

from diffalign import policies
from diffalign.emoji_world.workshop.t5 import build_t5_tokenizer
from diffalign.policies.base import Policy
from diffalign.policies.flow import flow_levels
from diffalign.sampling.rollout import Sampling, rollout

PROMPTS = ["a red dog", "a cat on a blue background"]
STEPS = 6
EULER = "FlowMatchEulerDiscreteScheduler"


@pytest.fixture(params=sorted(FLOW_BUILDERS))
def folder(request, pipelines) -> str:
    return pipelines[request.param]


def pictures(policy, guidance):
    """Noise and pictures of the deterministic sampler."""
    sampling = Sampling(policy.levels(STEPS), "ode", 0.0, guidance)
    states = rollout(policy, policy.encode(PROMPTS), sampling, [1, 2], 2).states
    return states[:, 0], policy.decode(states[:, -1])


def diffusers_pictures(pipe, latents, guidance, side, **options):
    pipe.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": STEPS, "height": side, "width": side, **options}
    return ask(pipe, PROMPTS, latents, guidance, **how)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
@pytest.mark.parametrize("side", [None, 12])
def test_pictures_and_schedule_are_those_of_diffusers(folder, guidance, side):
    """Also at 3x3 tokens; the sigmas and timesteps the pipeline has set itself, bit for bit."""
    policy = policies.load(folder, resolution=side)
    latents, drawn = pictures(policy, guidance)
    pipe = policies.pipeline(folder)
    expected = diffusers_pictures(pipe, latents, guidance, side or 8)
    assert expected.std() > 0.01
    assert (drawn - expected).abs().max() < 2e-3
    levels = policy.levels(STEPS)
    assert torch.equal(levels.sigma, pipe.scheduler.sigmas)
    assert torch.equal(levels.t[:-1], pipe.scheduler.timesteps)
    assert levels.sigma[-1] == levels.t[-1] == 0
    peeked, shape = policies.peek(folder, STEPS, side)
    assert torch.equal(peeked.sigma, levels.sigma)
    assert shape == policy.latent_shape == tuple(latents.shape[1:])


@pytest.mark.parametrize("side", [64, 128])
def test_schedules_of_the_hub(side):
    """The published scheduler configs at 512 and 1024 pixels, from the formulas."""
    tokens, shape = (side // 2) ** 2, (16, side, side)
    dev = {"_class_name": EULER, "shift": 3.0, "use_dynamic_shifting": True}
    sigma = torch.linspace(1, 1 / 28, 28, dtype=torch.float64)
    # FLUX.1-dev: mu from 0.5 at 256 tokens to 1.15 at 4096
    shift = torch.tensor(0.5 + 0.65 * (tokens - 256) / (4096 - 256), dtype=torch.float64).exp()
    expected = (shift * sigma / (1 + (shift - 1) * sigma)).float()
    levels = flow_levels(dev, 28, shape, linspace=True)
    torch.testing.assert_close(levels.sigma[:-1], expected, atol=1e-6, rtol=1e-6)
    # FLUX.1-schnell: no shift at any resolution
    levels = flow_levels({"_class_name": EULER, "shift": 1.0}, 4, shape, linspace=True)
    torch.testing.assert_close(levels.sigma, torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    # SD3.5: shift 3 at any resolution, down to the scheduler's own last sigma
    levels = flow_levels({"_class_name": EULER, "shift": 3.0}, 40, shape, linspace=False)
    sigma = torch.linspace(1, 3 * 0.001 / 1.002, 40)
    torch.testing.assert_close(levels.sigma[:-1], 3 * sigma / (1 + 2 * sigma))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_class_name": "FlowMatchHeunDiscreteScheduler"},
            "FlowMatchHeun.*with a plain FlowMatch",
        ),
        ({"stochastic_sampling": True}, "with stochastic_sampling"),
        ({"invert_sigmas": True}, "with invert_sigmas"),
    ],
)
def test_other_schedulers_are_refused(folder, tmp_path, change, message):
    path = shutil.copytree(folder, tmp_path / "other") / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        policies.peek(str(tmp_path / "other"), STEPS)


def test_resolutions_that_are_refused(pipelines):
    with pytest.raises(ValueError, match=r"resolution=36 needs 9 tokens.*for 8; use 32 pixels"):
        policies.peek(pipelines["sd3"], STEPS, 36)
    # 10 pixels are whole latents, and no whole tokens
    for kind in ("sd3", "flux-dev"):
        with pytest.raises(ValueError, match=r"resolution=10 is not a multiple of 4.*token"):
            policies.peek(pipelines[kind], STEPS, 10)


def adapted(policy: Policy) -> set[str]:
    """Names of the layers with a LoRA, numbers of blocks left out."""
    names = (n.split(".lora_A")[0] for n, _ in policy.network.named_parameters() if "lora_A" in n)
    return {n.replace("transformer_blocks.", "").split(".", 1)[1] for n in names}


def test_default_lora_targets(pipelines):
    """As in Flow-GRPO: no MLP and no `attn2` of SD3, no MLP of FLUX's single-stream blocks."""
    sd3, flux = policies.load(pipelines["sd3"]), policies.load(pipelines["flux-dev"])
    names = [n for n, _ in sd3.network.named_modules()]
    assert "transformer_blocks.0.attn2.to_q" in names
    for policy in (sd3, flux):
        policy.add_lora(2)
        assert adapted(policy) == set(policy.lora_targets)
    assert len(sd3.lora_targets) == 8
    assert len(flux.lora_targets) == 12
    single = [
        n.split(".", 2)[2].split(".lora_A")[0]
        for n, _ in flux.network.named_parameters()
        if n.startswith("single_") and "lora_A" in n
    ]
    assert sorted(single) == ["attn.to_k", "attn.to_q", "attn.to_v"]


def test_diffusers_loads_a_lora_on_the_default_targets(folder, tmp_path):
    policy = policies.load(folder)
    policy.add_lora(2, alpha=5.0)
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.trainable_parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    latents, expected = pictures(policy, 2.0)
    policy.save(tmp_path)
    pipe = policies.pipeline(folder)
    plain = diffusers_pictures(pipe, latents, 2.0, 8)
    pipe.load_lora_weights(tmp_path)
    drawn = diffusers_pictures(pipe, latents, 2.0, 8)
    assert (drawn - plain).abs().max() > 1e-2
    assert (drawn - expected).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["flux-dev", "flux-schnell"])
def test_guidance_of_flux_is_an_input_of_one_call(pipelines, kind):
    policy = policies.load(pipelines[kind])
    x, cond = torch.randn(2, *policy.latent_shape), policy.encode(PROMPTS)
    level = policy.levels(STEPS)[2]
    outputs = [policy.predict(x, level, cond, w).native for w in (1.0, 3.5)]
    assert policy.calls == 4
    assert torch.equal(*outputs) == (kind == "flux-schnell")


def test_flux_packs_as_its_pipeline(pipelines, monkeypatch):
    policy = policies.load(pipelines["flux-dev"], resolution=12)
    network, seen = policy.network.forward, {}

    def forward(hidden_states, **options):
        seen.update(options, packed=hidden_states)
        return network(hidden_states, **options)

    monkeypatch.setattr(policy.network, "forward", forward)
    x = torch.randn(2, *policy.latent_shape)
    policy.predict(x, policy.levels(STEPS)[1], policy.encode(PROMPTS), 3.5)
    assert torch.equal(seen["packed"], FluxPipeline._pack_latents(x, *x.shape))
    places = FluxPipeline._prepare_latent_image_ids(2, 3, 3, "cpu", torch.float32)
    assert torch.equal(seen["img_ids"], places)
    assert seen["guidance"].tolist() == [3.5, 3.5]
    torch.testing.assert_close(seen["timestep"], policy.levels(STEPS).sigma[1].expand(2))


def test_length_of_prompts(pipelines):
    """By default the T5 tokenizer's own; without T5 SD3 appends as many zeros as it is told."""
    lengths = {"sd3": 32 + 256, "sd3-t5": 32 + 24, "flux-dev": 24}
    for kind, length in lengths.items():
        assert policies.load(pipelines[kind]).encode(PROMPTS).positive["prompt"].shape[1] == length
    policy = policies.load(pipelines["sd3"])
    policy.max_sequence_length = 3
    tokens = policy.encode(PROMPTS).positive["prompt"]
    assert tokens.shape[1] == 32 + 3
    assert not tokens[:, 32:].any()
    latents, drawn = pictures(policy, 2.0)
    pipe = policies.pipeline(pipelines["sd3"])
    expected = diffusers_pictures(pipe, latents, 2.0, 8, max_sequence_length=3)
    assert (drawn - expected).abs().max() < 2e-3
    assert (drawn - diffusers_pictures(pipe, latents, 2.0, 8)).abs().max() > 2e-3


def test_a_vae_without_shift(pipelines):
    policy = policies.load(pipelines["flux-dev"])
    x0 = torch.randn(1, *policy.latent_shape)
    policy.vae.register_to_config(shift_factor=0.0)
    expected = policy.decode(x0)
    policy.vae.register_to_config(shift_factor=None)
    assert torch.equal(policy.decode(x0), expected)


def test_t5_tokenizer_as_the_pipelines_call_it(tmp_path):
    """Words are split as prompts are, so that none of them is out of reach."""
    tokenizer = build_t5_tokenizer(["Hot-air balloon", "it's", "a", "a", ","], 24)
    known = {"<pad>", "</s>", "<unk>", "hot", "-", "air", "balloon", "it", "'", "s", "a", ","}
    assert set(tokenizer.get_vocab()) == known
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert len(again) == len(tokenizer) == len(known)
    texts = ["a hot-air BALLOON, a", "", "zebra " * 20]
    out = again(
        texts,
        padding="max_length",
        max_length=9,
        truncation=True,
        return_length=False,
        return_overflowing_tokens=False,
        return_tensors="pt",
    )
    assert out.input_ids.shape == (3, 9)
    words = [again.convert_ids_to_tokens(row) for row in out.input_ids]
    assert words[0] == ["a", "hot", "-", "air", "balloon", ",", "a", "</s>", "<pad>"]
    assert words[1] == ["</s>"] + ["<pad>"] * 8
    assert words[2] == ["<unk>"] * 8 + ["</s>"]
    assert again(texts, padding="longest", return_tensors="pt").input_ids.shape == (3, 21)
