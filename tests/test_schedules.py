"""Levels computed from a scheduler's config are those of diffusers' scheduler, bit for bit."""

import itertools
import random

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffalign.policies import schedulers
from diffalign.policies.flow import flow_levels
from diffalign.policies.unet import UNetPolicy

EULER = "FlowMatchEulerDiscreteScheduler"
CHOICES = {
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "timestep_spacing": ["leading", "trailing"],
    "rescale_betas_zero_snr": [False, True],
    "set_alpha_to_one": [False, True],
    "steps_offset": [0, 1],
    "num_train_timesteps": [1000, 500],
    "beta_end": [0.012, 0.02],
}


@pytest.mark.parametrize("steps", [1, 3, 7, 20, 50])
def test_ddim(steps):
    every = [dict(zip(CHOICES, v, strict=True)) for v in itertools.product(*CHOICES.values())]
    for change in random.Random(steps).sample(every, 30):
        given = {"beta_start": 0.00085, "prediction_type": "v_prediction", **change}
        config = schedulers.as_ddim(
            "StableDiffusionXLPipeline",
            {"_class_name": "DDIMScheduler", "clip_sample": False} | given,
        )
        scheduler = DDIMScheduler(**{k: v for k, v in config.items() if k != "_class_name"})
        scheduler.set_timesteps(steps)
        abar, t = schedulers.alphas_cumprod(config), schedulers.timesteps(config, steps)
        assert torch.equal(abar, scheduler.alphas_cumprod), config
        assert torch.equal(t, scheduler.timesteps), config
        levels = UNetPolicy.schedule(config, steps, (4, 8, 8))
        final = torch.as_tensor(scheduler.final_alpha_cumprod).double().sqrt().float()
        assert levels.alpha[-1] == final
        assert torch.equal(levels.t[:-1], scheduler.timesteps.float())


def test_ddim_with_betas_of_its_own_and_linspace():
    betas = torch.linspace(1e-4, 2e-2, 100).tolist()
    config = schedulers.as_ddim(
        "StableDiffusionXLPipeline",
        {
            "_class_name": "EulerDiscreteScheduler",
            "trained_betas": betas,
            "num_train_timesteps": 100,
        },
    )
    assert config["timestep_spacing"] == "linspace"
    scheduler = DDIMScheduler(**{k: v for k, v in config.items() if k != "_class_name"})
    scheduler.set_timesteps(6)
    assert torch.equal(schedulers.alphas_cumprod(config), scheduler.alphas_cumprod)
    assert torch.equal(schedulers.timesteps(config, 6), scheduler.timesteps)


@pytest.mark.parametrize("linspace", [False, True])
@pytest.mark.parametrize("steps", [1, 4, 28, 50])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"shift": 3.0},
        {"shift": 1.7, "num_train_timesteps": 500},
        {"shift": 3.0, "use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"use_dynamic_shifting": True, "base_shift": 0.7, "max_shift": 2.0, "shift_terminal": 0.1},
        {"shift": 2.0, "shift_terminal": 0.02, "max_image_seq_len": 8192},
    ],
)
def test_flow(change, steps, linspace):
    if steps == 1 and change.get("shift_terminal"):  # where diffusers has NaN
        with pytest.raises(ValueError, match=r"shift_terminal.* use 2 or more"):
            flow_levels({"_class_name": EULER, **change}, 1, (16, 8, 8), linspace)
        return
    scheduler = FlowMatchEulerDiscreteScheduler(**change)
    for side in (16, 64, 128):
        mu = None
        if change.get("use_dynamic_shifting"):
            c, tokens = scheduler.config, (side // 2) ** 2
            slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
            mu = c.base_shift + slope * (tokens - c.base_image_seq_len)
        if linspace:
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        else:
            scheduler.set_timesteps(steps, mu=mu)
        levels = flow_levels({"_class_name": EULER, **change}, steps, (16, side, side), linspace)
        assert torch.equal(levels.sigma, scheduler.sigmas)
        assert torch.equal(levels.t[:-1], scheduler.timesteps)
        assert levels.t[-1] == 0


@pytest.mark.parametrize("name", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_sigmas_that_are_not_the_models_own_are_refused(name):
    with pytest.raises(ValueError, match=f"with {name}.*plain FlowMatch"):
        flow_levels({"_class_name": EULER, name: True}, 4, (16, 8, 8), linspace=False)
