"""The DDPM noise schedule that the scheduler of a UNet pipeline stands for, from its config alone.

The settings and defaults of diffusers' classes are written down here, so that none is imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
NARROW = {"beta_start": 0.00085, "beta_end": 0.012}
LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
SIGMAS = dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), False)
SOLVER = SIGMAS | {"thresholding": False, "use_flow_sigmas": False, "use_dynamic_shifting": False}
ZERO_SNR = {"rescale_betas_zero_snr": False}
ENDS = {"final_sigmas_type": "zero"}
DDIM = {**LEADING, **ZERO_SNR, "clip_sample": True, "thresholding": False, "set_alpha_to_one": True}
DDPM = {k: v for k, v in DDIM.items() if k != "set_alpha_to_one"} | {"variance_type": "fixed_small"}
MULTISTEP = SOLVER | ENDS | {"lambda_min_clipped": float("-inf"), "variance_type": None}

SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": DDIM,
    "DDIMParallelScheduler": DDIM,
    "DDPMScheduler": DDPM,
    "DDPMParallelScheduler": DDPM,
    "PNDMScheduler": LEADING | {"set_alpha_to_one": False},
    "LMSDiscreteScheduler": LINSPACE | SIGMAS,
    "EulerDiscreteScheduler": LINSPACE
    | SIGMAS
    | ZERO_SNR
    | ENDS
    | {"sigma_min": None, "sigma_max": None, "timestep_type": "discrete"},
    "EulerAncestralDiscreteScheduler": LINSPACE | ZERO_SNR,
    "HeunDiscreteScheduler": NARROW | LINSPACE | SIGMAS | {"clip_sample": False},
    "KDPM2DiscreteScheduler": NARROW | LINSPACE | SIGMAS,
    "KDPM2AncestralDiscreteScheduler": NARROW | LINSPACE | SIGMAS,
    "DPMSolverSDEScheduler": NARROW | LINSPACE | SIGMAS,
    "DPMSolverMultistepScheduler": LINSPACE | MULTISTEP | ZERO_SNR | {"use_lu_lambdas": False},
    "DPMSolverSinglestepScheduler": MULTISTEP,
    "DEISMultistepScheduler": LINSPACE | SOLVER,
    "UniPCMultistepScheduler": LINSPACE
    | SOLVER
    | ZERO_SNR
    | ENDS
    | {"sigma_min": None, "sigma_max": None},
}
"""The settings that each class knows beside BETAS, with their defaults. Other settings in a config
are left over from another class, and diffusers ignores them."""

CHANGES_THE_PICTURE = (
    *SOLVER, "clip_sample", "use_lu_lambdas", "sigma_min", "sigma_max", "timestep_type",
    "lambda_min_clipped",
)  # fmt: skip
NEUTRAL = (False, None, "discrete", float("-inf"))
KINDS = ("epsilon", "v_prediction")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def as_ddim(pipeline: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The complete config of a DDIMScheduler with the noise levels and timesteps of `config`.

    config: of the scheduler, whose class is `config["_class_name"]`; missing settings take that
    class's defaults. pipeline: the class of the pipeline; StableDiffusionPipeline always sets
    steps_offset to 1 and clip_sample to false. Raises ValueError for settings with which a plain
    DDIM sampler would not draw what the pipeline draws.
    """
    name = config["_class_name"]
    if name not in SCHEDULERS:
        raise ValueError(
            f"the scheduler {name} has no DDPM noise schedule that is known; save the pipeline "
            "with a DDIMScheduler, or another of the usual samplers"
        )
    known = {"timestep_spacing": "linspace", "steps_offset": 0} | BETAS | SCHEDULERS[name]
    full = known | {k: v for k, v in config.items() if k in known}
    if pipeline == "StableDiffusionPipeline":
        full |= {"steps_offset": 1, "clip_sample": False}
    odd = [f"{k}={full[k]}" for k in CHANGES_THE_PICTURE if full.get(k) not in NEUTRAL]
    kind, learned = full["prediction_type"], str(full.get("variance_type")).startswith("learned")
    odd += [f"variance_type={full['variance_type']}"] if learned else []
    if full["beta_schedule"] not in SCHEDULES and full["trained_betas"] is None:
        odd.append(f"beta_schedule={full['beta_schedule']}")
    if full["timestep_spacing"] == "linspace" and name in ("DDIMScheduler", "PNDMScheduler"):
        # diffusers steps to t - 1000 // steps, which is not the next of these timesteps
        odd.append("timestep_spacing=linspace")
    if odd:
        raise ValueError(
            f"{odd[0]} of the pipeline's {name} is not supported; save the pipeline with a plain "
            "DDIMScheduler (clip_sample=False, timestep_spacing leading or trailing)"
        )
    if kind not in KINDS:
        raise ValueError(
            f"prediction_type={kind!r} of the scheduler is not supported; known: {', '.join(KINDS)}"
        )
    if full.get("rescale_betas_zero_snr") and kind == "epsilon":
        raise ValueError(
            "rescale_betas_zero_snr of the scheduler leaves nothing of the picture at the first "
            "step, where prediction_type='epsilon' cannot be read; use a model of v_prediction"
        )
    to_data = full.get("set_alpha_to_one", full.get("final_sigmas_type") != "sigma_min")
    keys = (*BETAS, "timestep_spacing", "steps_offset")
    return {k: full[k] for k in keys} | {
        "_class_name": "DDIMScheduler",
        "rescale_betas_zero_snr": full.get("rescale_betas_zero_snr", False),
        "set_alpha_to_one": to_data,
        "clip_sample": False,
        "thresholding": False,
    }


def alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """abar (T,), float32, of a config that `as_ddim` made: the product of 1 - beta up to each of
    the T training timesteps, bit for bit that of DDIMScheduler."""
    first, last, n = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
    if config["trained_betas"] is not None:
        beta = torch.tensor(config["trained_betas"], dtype=torch.float32)
    elif config["beta_schedule"] == "linear":
        beta = torch.linspace(first, last, n)
    elif config["beta_schedule"] == "scaled_linear":
        beta = torch.linspace(first**0.5, last**0.5, n) ** 2
    else:  # the cosine of arXiv 2102.09672
        bar = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
        beta = torch.tensor([min(1 - bar[i + 1] / bar[i], 0.999) for i in range(n)])
    abar = torch.cumprod(1 - beta, 0)
    if config["rescale_betas_zero_snr"]:  # makes abar end at 0, arXiv 2305.08891
        root = abar.sqrt()
        end = root[-1].clone()
        root = (root - end) * (root[0] / (root[0] - end))
        bar = root**2
        beta = 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])
        abar = torch.cumprod(1 - beta, 0)
    return abar


def timesteps(config: Mapping[str, Any], steps: int) -> Tensor:
    """The training timesteps (steps,), long, from noise to data, that a DDIMScheduler with this
    config takes; `timestep_spacing` as in table 2 of arXiv 2305.08891."""
    n, spacing = config["num_train_timesteps"], config["timestep_spacing"]
    if spacing == "linspace":
        t = np.linspace(0, n - 1, steps).round()[::-1]
    elif spacing == "trailing":
        t = np.round(np.arange(n, 0, -n / steps)) - 1
    else:
        t = np.arange(steps)[::-1] * (n // steps) + config["steps_offset"]
    return torch.from_numpy(t.astype(np.int64))


FLOW = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "shift_terminal": None,
    "time_shift_type": "exponential",
}
"""The defaults of FlowMatchEulerDiscreteScheduler."""


def flow_sigmas(
    config: Mapping[str, Any],
    steps: int,
    tokens: int,
    linspace: bool | Sequence[float],
    mu: float | None = None,
) -> Tensor:
    """The sigmas (steps,), float32, from noise to data, that a FlowMatchEulerDiscreteScheduler with
    this config sets for a picture of `tokens` tokens; see `flow.flow_levels`."""
    c = FLOW | dict(config)
    n, shift = c["num_train_timesteps"], c["shift"]

    def shifted(sigma: Any) -> Any:
        return shift * sigma / (1 + (shift - 1) * sigma)

    if not isinstance(linspace, bool):
        sigma = np.array(linspace, dtype=np.float32)
    elif linspace:
        sigma = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    else:
        ends = torch.tensor([float(n), 1.0]) / n
        first, last = (ends if c["use_dynamic_shifting"] else shifted(ends)).tolist()
        sigma = np.linspace(first * n, last * n, steps) / n
    if c["use_dynamic_shifting"]:
        slope = (c["max_shift"] - c["base_shift"]) / (
            c["max_image_seq_len"] - c["base_image_seq_len"]
        )
        own: float = c["base_shift"] + slope * (tokens - c["base_image_seq_len"])
        mu = own if mu is None else mu
        mu = math.exp(mu) if c["time_shift_type"] == "exponential" else mu
        sigma = mu / (mu + (1 / sigma - 1))
    else:
        sigma = shifted(sigma)
    if c["shift_terminal"]:
        if steps == 1:
            raise ValueError(
                f"the scheduler's shift_terminal={c['shift_terminal']:g} is where the last of "
                "several steps begins, and with 1 step that is the first; use 2 or more"
            )
        rest = 1 - sigma
        sigma = 1 - rest / (rest[-1] / (1 - c["shift_terminal"]))
    return torch.from_numpy(sigma).float()
