"""LoRA files of every origin are read as meant, or refused by their headers before a model is."""

import json
from pathlib import Path

import pytest
import torch
from conftest import SIDE, load, perturb
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from diffalign import policies
from diffalign.policies import lora_files
from diffalign.policies.run_folder import WEIGHTS
from diffalign.sampling.pipeline import Drawing, Sampler, draw
from diffalign.sampling.rollout import Sampling, rollout

KINDS = ("sd-epsilon", "sdxl", "sd3", "flux-dev")


def picture(policy):
    sampling = Sampling(policy.levels(3), "ode", 0.0, 2.0)
    return policy.decode(rollout(policy, policy.encode(["a dog"]), sampling, [1], 1).final)


def trained(folder, target, alpha=None, targets=None):
    policy = load(folder)
    policy.add_lora(2, alpha, targets)
    perturb(policy)
    return policy.save(Path(target)), picture(policy)


def merged(folder, lora):
    policy = load(folder)
    policies.merge(policy.pipe, str(lora))
    return picture(policy)


def same(a, b):
    assert b.std() > 0.01
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_that_peft_writes(pipelines, tmp_path, kind):
    """Ranks and alphas of their own for some layers, and alpha / sqrt(r)."""
    policy = load(pipelines[kind])
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False,
        rank_pattern={"to_k": 3}, alpha_pattern={".*to_k": 5}, use_rslora=True,
    )  # fmt: skip
    base = picture(policy)
    tuned = get_peft_model(policy.network, config)
    expected = picture(policy)
    assert (expected - base).abs().max() > 1e-2
    tuned.save_pretrained(str(tmp_path / "adapter"))
    same(merged(pipelines[kind], tmp_path / "adapter"), expected)
    policies.check_lora(str(tmp_path / "adapter"), "--lora", pipelines[kind])
    sampler = Sampler(pipelines[kind])
    sampler.use({str(tmp_path / "adapter" / "adapter_model.safetensors"): 1.0})
    assert sampler.pipe.get_active_adapters()


def test_settings_of_peft_that_are_not_read(pipelines, tmp_path):
    policy = load(pipelines["sd-v"])
    plain = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    get_peft_model(policy.network, plain).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    settings = json.loads(path.read_text())
    for change, message in (
        ({"peft_type": "LOHA"}, "is a LOHA by its adapter_config"),
        ({"use_dora": True}, "has use_dora=True"),
        ({"modules_to_save": ["conv_in"]}, "has modules_to_save="),
        ({"bias": "all"}, "has bias='all'"),
    ):
        path.write_text(json.dumps(settings | change))
        with pytest.raises(ValueError, match=message):
            policies.check_lora(str(tmp_path), "--lora")
        with pytest.raises(ValueError, match=message):
            policies.merge(policy.pipe, str(tmp_path))
    path.write_text("{")
    with pytest.raises(ValueError, match=r"--lora .* is damaged: .*adapter_config.json is no JSON"):
        policies.check_lora(str(tmp_path), "--lora")
    path.unlink()
    with pytest.raises(ValueError, match=r"no adapter_config\.json beside it says its lora_alpha"):
        policies.check_lora(str(tmp_path), "--lora")


def as_kohya(state, part, alpha):
    """sd-scripts' names, with an alpha that is not the rank."""
    found = {}
    for key, value in state.items():
        layer, side, _ = key.rsplit(".", 2)
        layer = f"lora_{part}_" + layer.removeprefix(f"{part}.").replace(".", "_")
        found[f"{layer}.{'lora_down' if side == 'lora_A' else 'lora_up'}.weight"] = value
        found[f"{layer}.alpha"] = torch.tensor(alpha)
    return found


def scaled(state, factor):
    return {k: v * factor if "lora_B" in k else v for k, v in state.items()}


@pytest.mark.parametrize("kind", ["sd-epsilon", "sdxl"])
def test_kohyas_files_and_their_alpha(pipelines, tmp_path, kind):
    path, expected = trained(pipelines[kind], tmp_path / "run")
    state = load_file(path)
    # alpha / rank = 2 there, so half as much here
    save_file(as_kohya(scaled(state, 0.5), "unet", 4.0), tmp_path / "k.safetensors")
    policies.check_lora(str(tmp_path / "k.safetensors"), "--lora", pipelines[kind])
    same(merged(pipelines[kind], tmp_path / "k.safetensors"), expected)


@pytest.mark.parametrize("kind", ["sd-epsilon", "flux-dev"])
def test_other_spellings(pipelines, tmp_path, kind):
    """Alphas beside diffusers' names, lora.down and lora.up, pickled files."""
    path, expected = trained(pipelines[kind], tmp_path / "run")
    state = load_file(path)
    layers = {k.rsplit(".", 2)[0] for k in state}
    alphas = {f"{layer}.alpha": torch.tensor(4.0) for layer in layers}
    save_file(scaled(state, 0.5) | alphas, tmp_path / "a.safetensors")
    same(merged(pipelines[kind], tmp_path / "a.safetensors"), expected)
    torch.save(state, tmp_path / "pytorch_lora_weights.bin")
    same(merged(pipelines[kind], tmp_path / "pytorch_lora_weights.bin"), expected)
    if kind == "sd-epsilon":
        new = {"lora_A": "lora.down", "lora_B": "lora.up"}
        old = {k.replace(a, b): v for k, v in state.items() for a, b in new.items() if a in k}
        save_file(old, tmp_path / "o.safetensors")
        policies.check_lora(str(tmp_path / "o.safetensors"), "--lora", pipelines[kind])
        same(merged(pipelines[kind], tmp_path / "o.safetensors"), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_of_another_model(pipelines, tmp_path, monkeypatch, kind):
    """By name where the family differs, by width where it does not; before weights are read."""
    own, _ = trained(pipelines[kind], tmp_path / "own")
    policies.check_lora(str(own), "--lora", pipelines[kind])
    for other in KINDS:
        if other == kind:
            continue
        folder = str(trained(pipelines[other], tmp_path / other)[0].parent)
        with monkeypatch.context() as patch:
            patch.setattr(policies, "pipeline", lambda *_, **__: pytest.fail("read weights"))
            how = {"model": pipelines[kind], "prompts": ["a dog"], "seeds": "0"}
            how["resolution"] = SIDE
            with pytest.raises(ValueError, match=r"^--lora .*give one that was trained on such a"):
                draw(Drawing(**how, lora=folder))
            with pytest.raises(ValueError, match=r"^--merge-lora .*trained on such a model"):
                draw(Drawing(**how, merge_lora=folder))
        with pytest.raises(ValueError, match="the LoRA '"):  # also where nobody has checked it
            policies.merge(load(pipelines[kind]).pipe, folder)


def test_blocks_as_other_programs_call_them():
    """UNet, SD3 and FLUX under ComfyUI's and kohya's names are told apart without a mapping."""
    names = {
        "StableDiffusionXLPipeline": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "FluxPipeline": "lora_unet_double_blocks_0_img_attn_qkv",
        "StableDiffusion3Pipeline": "diffusion_model.joint_blocks.0.x_block.attn.qkv",
    }
    network = {"a.weight": (4, 4)}
    for mine, layer in names.items():
        lora = {f"{layer}.lora_down.weight": (2, 4), f"{layer}.lora_up.weight": (4, 2)}
        for pipeline in names:
            if pipeline == mine:
                lora_files.compare(lora, network, pipeline, "--lora", "x")
            else:
                with pytest.raises(ValueError, match=f"nothing for a {pipeline}"):
                    lora_files.compare(lora, network, pipeline, "--lora", "x")


def test_what_is_no_lora(pipelines, tmp_path):
    base = pipelines["sd-v"]
    path, _ = trained(base, tmp_path / "run")
    state = load_file(path)

    def refused(name, message):
        with pytest.raises(ValueError, match=message):
            policies.check_lora(str(tmp_path / name), "--lora", base)
        with pytest.raises(ValueError, match=message):
            policies.check_lora(str(tmp_path / name), "--lora")

    tensors = {"a.safetensors": {"conv.weight": torch.ones(2, 2)}}
    tensors["h.safetensors"] = {"lora_unet_x.hada_w1_a": torch.ones(2, 2)}
    tensors["d.safetensors"] = as_kohya(state, "unet", 2.0) | {"x.dora_scale": torch.ones(2)}
    for name, found in tensors.items():
        save_file(found, tmp_path / name)
    refused("a.safetensors", "holds no LoRA: its tensors are called as 'conv.weight'")
    refused("h.safetensors", "is a LoHa, and only plain LoRAs are read")
    refused("d.safetensors", "is a DoRA")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-8])
    refused("cut.safetensors", "is damaged: .* bytes and should have")
    (tmp_path / "head.safetensors").write_bytes(b"\x10" + bytes(7) + b"{no header here}")
    refused("head.safetensors", "is damaged: .* has a damaged header")
    refused("gone.safetensors", "does not exist; give a run folder or a hub id")
    (tmp_path / "two").mkdir()
    refused("two", "holds no .safetensors file")
    for name in ("x", "y"):
        save_file(state, tmp_path / "two" / f"{name}.safetensors")
    refused("two", "holds several files, x.safetensors, y.safetensors; give one of them")
    (tmp_path / "two" / "y.safetensors").unlink()
    policies.check_lora(str(tmp_path / "two"), "--lora", base)
    # a layer that this model does not have
    extra = {k.replace("to_q", "to_x"): v for k, v in state.items()}
    save_file(extra, tmp_path / "extra.safetensors")
    with pytest.raises(ValueError, match=r"has weights for '.*to_x', and not all for a Stable"):
        policies.check_lora(str(tmp_path / "extra.safetensors"), "--lora", base)
    policies.check_lora("org/lora", "--lora", base)  # the hub is asked when it is read


def test_a_lora_on_the_hub(pipelines, tmp_path, monkeypatch):
    from huggingface_hub import errors

    path, expected = trained(pipelines["sd-v"], tmp_path / "run")
    asked = []

    def download(repository, name):
        asked.append(name)
        if name == WEIGHTS and repository == "org/lora":
            return str(path)
        raise errors.LocalEntryNotFoundError("Cannot find it, and outgoing traffic is disabled")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    same(merged(pipelines["sd-v"], "org/lora"), expected)
    assert asked == [WEIGHTS]
    with pytest.raises(ValueError, match=r"^the LoRA 'org/none' is not on this machine"):
        merged(pipelines["sd-v"], "org/none")
