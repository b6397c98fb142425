"""Whatever the configs of a pipeline say is drawn as the pipeline draws it, or refused in words."""

import inspect
import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import SIDE, load
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from families import BUILDERS, tiny_vae
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

from diffalign import policies
from diffalign.policies import lora_files, schedulers
from diffalign.sampling.pipeline import Drawing, draw
from diffalign.sampling.rollout import Sampling, rollout

SCHEDULER = "scheduler/scheduler_config.json"
INDEX = "model_index.json"


def changed(folder, target, part, change, scheduler=None):
    """A copy of a pipeline with `change` in the config of a part (None: without the key)."""
    copy = Path(shutil.copytree(folder, target))
    changes = {part: change}
    if scheduler is not None:
        changes = {SCHEDULER: change | {"_class_name": scheduler}}
        changes[INDEX] = {"scheduler": ["diffusers", scheduler]}
    for name, values in changes.items():
        config = json.loads((copy / name).read_text()) | values
        (copy / name).write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return str(copy)


def apart(folder, pipe, steps=5):
    """The largest difference of a pixel between a policy's and a pipeline's picture."""
    policy = load(folder)
    sampling = Sampling(policy.levels(steps), "ode", 0.0, 3.0)
    states = rollout(policy, policy.encode(["a dog"]), sampling, [1], 1).states
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        "a dog", latents=states[:, 0], num_inference_steps=steps, guidance_scale=3.0,
        height=SIDE, width=SIDE, output_type="pt",
    ).images  # fmt: skip
    assert expected.std() > 0.01
    return (policy.decode(states[:, -1]) - expected).abs().max()


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("sd-epsilon", {"timestep_spacing": "trailing"}),
        ("sd-epsilon", {"timestep_spacing": "trailing", "set_alpha_to_one": True}),
        ("sd-epsilon", {"steps_offset": 0}),
        ("sd-epsilon", {"steps_offset": None, "clip_sample": None}),  # as the class has them
        ("sd-epsilon", {"clip_sample": True, "clip_sample_range": 0.1}),  # the pipeline does not
        ("sd-epsilon", {"beta_schedule": "linear", "beta_end": 0.02}),
        ("sd-epsilon", {"beta_schedule": "squaredcos_cap_v2"}),
        ("sd-epsilon", {"prediction_type": "v_prediction"}),
        ("sd-epsilon", {"num_train_timesteps": 500}),
        ("sd-v", {"rescale_betas_zero_snr": False}),
        ("sd-v", {"timestep_spacing": "leading", "steps_offset": 0}),
    ],
)
def test_settings_of_a_ddim_scheduler(pipelines, tmp_path, kind, change):
    folder = changed(pipelines[kind], tmp_path / "other", SCHEDULER, change)
    assert apart(folder, policies.pipeline(folder)) < 2e-3
    drawn, peeked = load(folder).levels(5), policies.peek(folder, 5, SIDE)[0]
    assert all(torch.equal(getattr(drawn, k), getattr(peeked, k)) for k in ("t", "sigma"))


@pytest.mark.parametrize(
    ("scheduler", "left_out", "spacing", "end"),
    [
        ("EulerDiscreteScheduler", {}, "linspace", 0),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, "linspace", 0.0291),
        ("DPMSolverSinglestepScheduler", {"timestep_spacing": "trailing"}, "linspace", 0),
        ("PNDMScheduler", {"rescale_betas_zero_snr": True}, "leading", 0.0291),
    ],
)
def test_what_a_config_leaves_open_is_the_default_of_its_own_class(
    pipelines, tmp_path, scheduler, left_out, spacing, end
):
    open_ = {"timestep_spacing": None, "set_alpha_to_one": None}
    folder = changed(
        pipelines["sd-epsilon"], tmp_path / "other", SCHEDULER, open_ | left_out, scheduler
    )
    levels, _ = policies.peek(folder, 10, SIDE)
    first = {"linspace": 999, "leading": 901}[spacing]
    assert levels.t[0] == first
    assert levels.sigma[-1].item() == pytest.approx(end, abs=1e-3)
    assert torch.equal(load(folder).levels(10).sigma, levels.sigma)


def test_the_written_defaults_are_those_of_diffusers():
    kinds = 0
    for name, ours in schedulers.SCHEDULERS.items():
        signature = inspect.signature(getattr(diffusers, name)).parameters
        if "kwargs" in signature:  # a stand-in for a class that needs another package
            continue
        kinds += 1
        theirs = {k: p.default for k, p in signature.items()}
        for key, value in (schedulers.BETAS | ours).items():
            if key in theirs:
                assert theirs[key] == value, (name, key)
        known = {*schedulers.CHANGES_THE_PICTURE, "timestep_spacing", "steps_offset"}
        known |= {"set_alpha_to_one", "rescale_betas_zero_snr", "final_sigmas_type"}
        assert known & set(theirs) <= set(ours), name
    assert kinds >= 12


UNET, VAE = "unet/config.json", "vae/config.json"


@pytest.mark.parametrize(
    ("kind", "part", "change", "message"),
    [
        ("sd-epsilon", UNET, {"time_cond_proj_dim": 8}, "latent consistency models"),
        ("sd-epsilon", UNET, {"in_channels": 9}, "takes 9 channels and gives 4.*inpainting"),
        ("flux-dev", "transformer/config.json", {"in_channels": 32, "out_channels": 16}, "editing"),
        ("sd3", "transformer/config.json", {"patch_size": 4}, "patch_size=4"),
        ("sd-epsilon", UNET, {"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ("sd-epsilon", UNET, {"num_class_embeds": 10}, "num_class_embeds=10"),
        ("sdxl", UNET, {"encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type='image_pr"),
        ("sdxl", UNET, {"addition_embed_type": "image"}, "addition_embed_type='image'"),
        ("sd-epsilon", UNET, {"addition_embed_type": "text_time"}, "belong together"),
        ("sdxl", INDEX, {"requires_aesthetics_score": True}, "refiner"),
        ("sdxl", INDEX, {"vae": ["diffusers", "ConsistencyDecoderVAE"]}, "ConsistencyDecoderVAE"),
        ("sd-epsilon", VAE, {"latent_channels": 16}, "the VAE has 16"),
        ("sd-epsilon", SCHEDULER, {"prediction_type": "sample"}, "'sample'.*epsilon"),
        ("sd-epsilon", SCHEDULER, {"thresholding": True}, "thresholding=True"),
        ("sd-epsilon", SCHEDULER, {"timestep_spacing": "linspace"}, "timestep_spacing=linspace"),
        ("sd-epsilon", SCHEDULER, {"rescale_betas_zero_snr": True}, "v_prediction"),
        ("sd-epsilon", SCHEDULER, {"beta_schedule": "sigmoid"}, "beta_schedule=sigmoid"),
        ("sdxl", SCHEDULER, {"use_karras_sigmas": True}, "use_karras_sigmas=True"),
        ("sdxl", SCHEDULER, {"timestep_type": "continuous"}, "timestep_type=continuous"),
        ("sdxl", SCHEDULER, {"_class_name": "DDIMScheduler", "clip_sample": True}, "clip_sample"),
        ("sdxl", SCHEDULER, {"_class_name": "LCMScheduler"}, "LCMScheduler"),
        ("sdxl", SCHEDULER, {"_class_name": "EDMEulerScheduler"}, "no DDPM noise schedule"),
    ],
)
def test_what_is_refused_before_weights_are_read(
    pipelines, tmp_path, monkeypatch, kind, part, change, message
):
    folder = changed(pipelines[kind], tmp_path / "other", part, change)
    monkeypatch.setattr(policies, "pipeline", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=message):
        policies.load(folder)


def test_more_steps_than_timesteps(pipelines):
    with pytest.raises(ValueError, match=r"1000 steps from timestep 1000.*use fewer"):
        policies.peek(pipelines["sd-epsilon"], 1000, SIDE)


def test_a_unet_with_other_numbers_beside_the_text(pipelines, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(pipelines["sdxl"])
    unet = type(pipe.unet).from_config(
        pipe.unet.config, projection_class_embeddings_input_dim=12 + 5 * 4
    )
    pipe.register_modules(unet=unet)
    pipe.save_pretrained(tmp_path / "refiner")
    with pytest.raises(ValueError, match="takes 5 numbers"):
        load(str(tmp_path / "refiner"))


def test_statistics_of_the_latents(pipelines, tmp_path):
    """SDXL's pipeline takes both or neither, SD's none, and SD's no shift."""
    one = changed(pipelines["sdxl"], tmp_path / "one", VAE, {"latents_std": None})
    shifted = {"latents_mean": [1.0, 2, 3, 4], "latents_std": [2.0] * 4, "shift_factor": 0.5}
    sd = changed(pipelines["sd-v"], tmp_path / "sd", VAE, shifted)
    for folder in (one, sd):
        pipe = policies.pipeline(folder)
        pipe.scheduler = DDIMScheduler.from_config(load(folder).schedule_config)
        assert apart(folder, pipe) < 2e-3
    with pytest.raises(ValueError, match="latents_mean"):
        policies.check_tiny_vae(tiny_vae(tmp_path / "tiny"), pipelines["sdxl"])


def test_pictures_are_not_censored_where_training_saw_them(pipelines, tmp_path, capsys):
    """A safety checker that flags everything: sample.py draws all the same, and says so."""
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    tiny["num_attention_heads"] = 1
    vision = tiny | {"image_size": 8, "patch_size": 8, "projection_dim": 8}
    config = CLIPConfig(projection_dim=8, vision_config=vision, text_config=tiny)
    checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.data.fill_(-2.0)
    pipe = StableDiffusionPipeline.from_pretrained(pipelines["sd-v"])
    sizes = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    pipe.register_modules(safety_checker=checker, feature_extractor=CLIPImageProcessor(**sizes))
    pipe.save_pretrained(tmp_path / "sd")
    black = pipe("a dog", num_inference_steps=1, output_type="np", height=SIDE, width=SIDE)
    assert black.images.max() == 0  # the checker works
    how = {"steps": 2, "resolution": SIDE, "grid": str(tmp_path / "g.png")}
    how |= {"model": str(tmp_path / "sd"), "prompts": ["a dog"], "seeds": "0"}
    draw(Drawing(**how, out=str(tmp_path / "out")))
    assert capsys.readouterr().err.count("without its safety checker") == 1
    (file,) = (tmp_path / "out").glob("*.png")
    assert np.asarray(Image.open(file)).max() > 0


def test_a_part_without_its_config_or_with_a_list_for_one_is_named(tmp_path):
    BUILDERS["sd-epsilon"](tmp_path / "sd")
    config = tmp_path / "sd" / "text_encoder" / "config.json"
    config.write_text("[]")
    with pytest.raises(ValueError, match=r"text_encoder/config.json holds no settings; copy it"):
        policies.pipeline(str(tmp_path / "sd"))
    config.unlink()  # transformers would take the defaults of the class
    with pytest.raises(ValueError, match=r"has no .*text_encoder/config.json; give a complete"):
        policies.pipeline(str(tmp_path / "sd"))


@pytest.mark.parametrize(
    "settings",
    [
        [],
        {"peft_type": "LORA", "lora_alpha": "x"},
        {"peft_type": "LORA", "lora_alpha": None},
        {"peft_type": "LORA", "lora_alpha": 4, "alpha_pattern": [1]},
        {"peft_type": "LORA", "lora_alpha": 4, "alpha_pattern": {"(": 1}},
    ],
)
def test_peft_settings_that_are_not_understood_are_named(settings, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"--lora '.*adapter_config.json' .*copy it again"):
        lora_files.peft_settings(tmp_path / "adapter_model.safetensors", "--lora")
