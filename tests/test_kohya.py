"""LoRAs of UNets for the programs that read kohya's names (ComfyUI, A1111, Forge, InvokeAI)."""

import re

import pytest
import torch
from conftest import load, perturb
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file

from diffalign import policies
from diffalign.policies import export, lora
from diffalign.policies.unet import UNetPolicy
from diffalign.sampling.rollout import Sampling, rollout

# the configs of stable-diffusion-v1-5 and stable-diffusion-xl-base-1.0, where they differ from the
# class's defaults
SD15 = {"cross_attention_dim": 768}
XL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
NAME = re.compile(
    r"lora_unet_(down_blocks_\d|mid_block|up_blocks_\d)_attentions_\d_transformer_blocks_\d{1,2}_"
    r"attn[12]_to_(q|k|v|out_0)\.(lora_(up|down)\.weight|alpha)"
)


@pytest.mark.parametrize(("config", "projections"), [(SD15, 128), (XL, 560)])
def test_the_names_of_real_unets(config, projections):
    """Every projection, with its alpha, under the name that ComfyUI gives it: lora_unet_ and the
    name of the layer with _ for the dots."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        layers = {
            name: module
            for name, module in unet.named_modules()
            if isinstance(module, torch.nn.Linear) and name.endswith(UNetPolicy.lora_targets)
        }
        given = {}
        for name, module in layers.items():
            given[f"{name}.lora_A.weight"] = torch.empty(4, module.in_features)
            given[f"{name}.lora_B.weight"] = torch.empty(module.out_features, 4)
    found = export.kohya(given)
    assert len(found) == 3 * projections
    assert all(NAME.fullmatch(key) for key in found)
    expected = {"lora_unet_" + name.replace(".", "_") for name in layers}
    assert {key.split(".")[0] for key in found} == expected
    for name, module in layers.items():
        key = "lora_unet_" + name.replace(".", "_")
        assert found[f"{key}.lora_down.weight"].shape == (4, module.in_features)
        assert found[f"{key}.lora_up.weight"].shape == (module.out_features, 4)
    assert {float(v) for k, v in found.items() if k.endswith(".alpha")} == {4.0}


def picture(policy):
    sampling = Sampling(policy.levels(3), "ode", 0.0, 2.0)
    return policy.decode(rollout(policy, policy.encode(["a dog"]), sampling, [1], 1).final)


TARGETS = [
    "to_q",
    "to_out.0",
    "ff.net.0.proj",
    "proj_in",
    "conv1",
    "time_emb_proj",
    "conv_shortcut",
]


@pytest.mark.parametrize("kind", ["sd-epsilon", "sdxl"])
@pytest.mark.parametrize("targets", [None, TARGETS])
def test_read_back_it_draws_the_training_picture(pipelines, tmp_path, kind, targets):
    policy = load(pipelines[kind])
    policy.add_lora(2, 6.0, targets)
    perturb(policy)
    expected = picture(policy)
    policy.save(tmp_path)
    path = tmp_path / export.KOHYA
    other = load(pipelines[kind])
    plain = picture(other)
    other.pipe.load_lora_weights(str(path))
    assert (picture(other) - expected).abs().max() < 1e-4
    assert (plain - expected).abs().max() > 1e-2
    merged = load(pipelines[kind])
    policies.merge(merged.pipe, str(path))
    assert (picture(merged) - expected).abs().max() < 1e-4
    with safe_open(path, "pt") as file:
        said = file.metadata()
    assert said["format"] == "pt"
    assert said["ss_network_dim"] == said["ss_network_alpha"] == "2"
    assert (said.get("ss_base_model_version") == "sdxl_base_v1-0") == (kind == "sdxl")
    assert {v.dtype for v in load_file(path).values()} == {torch.float32}


def test_diffusers_takes_its_own_file_of_the_two(pipelines, tmp_path, caplog):
    policy = load(pipelines["sd-v"])
    policy.add_lora(2)
    perturb(policy)
    policy.add_copy("ema")
    perturb(policy)
    policy.save(tmp_path, "ema")
    files = {p.name for p in tmp_path.iterdir()}
    assert files == {lora.WEIGHTS, export.KOHYA}
    _, metadata = StableDiffusionPipeline.lora_state_dict(tmp_path)
    assert metadata is None
    state, alphas = StableDiffusionPipeline.lora_state_dict(tmp_path)
    assert alphas is None  # kohya's has them
    assert "more than one weights file" not in caplog.text
    averaged = policy.state_dict("ema")
    for key, value in averaged.items():
        assert torch.equal(state[f"unet.{key}"], value)
    kohya = load_file(tmp_path / export.KOHYA)
    assert len(kohya) == 3 * len(averaged) / 2
