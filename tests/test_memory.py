"""The memory that `--dry-run` names, from configs alone."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import pytest
import torch

from diffalign.config import TrainConfig
from diffalign.training.memory import Peak, need
from diffalign.training.plan import Plan

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import architectures
import memory as benchmark


def test_peak_counts_what_is_alive():
    with Peak() as peak:
        a = torch.zeros(1000)
        b = a + 1
        view = b[:10]
        assert peak.alive == 8000
        del a
        gc.collect()
        assert peak.alive == 4000
        del b
        assert peak.alive == 4000  # the view holds it
        del view
        assert peak.alive == 0
    assert peak.peak == 8000


@pytest.mark.parametrize("config", benchmark.CONFIGS)
def test_within_15_percent_of_a_run(config):
    """The others are in benchmarks/results/memory.md."""
    found = benchmark.alone(config, "emoji-flux")
    assert found["expected"] == pytest.approx(found["measured"], rel=0.15)


def plan_of(model, **options):
    tree = {"model": {"name": str(model)}, "eval": {"prompts": None}, "rewards": {"jpeg": 1.0}}
    for key, value in options.items():
        *section, name = key.split("__")
        (tree.setdefault(section[0], {}) if section else tree)[name] = value
    return Plan.make(TrainConfig.from_dict(tree))


def configs_of_sd15(folder):
    """The configs of a released architecture, without weights."""
    a = architectures.MODELS["sd15"]
    index = {
        "_class_name": a.pipeline.__name__,
        "scheduler": ["diffusers", type(a.scheduler).__name__],
    }
    with torch.device("meta"):
        parts = {
            a.denoiser: a.network(**a.config),
            "vae": architectures.AutoencoderKL(**VAE | a.vae),
        }
    for name, part in parts.items():
        part.save_config(folder / name)
        index[name] = ["diffusers", type(part).__name__]
    a.scheduler.save_config(folder / "scheduler")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/tokenizer_config.json").write_text('{"model_max_length": 77}')
    for name in ("tokenizer", "text_encoder", "safety_checker", "feature_extractor"):
        index[name] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    return a


VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


def test_a_model_of_full_size_is_not_read(tmp_path):
    """From its configs: its weights are those of as many parameters, and checkpointing saves."""
    a = configs_of_sd15(tmp_path)
    options = {"model__dtype": "bfloat16", "train__micro_batch": 2, "sampler__batch": 2}
    found = need(plan_of(tmp_path, **options), "cpu")
    assert found.always["denoiser"] == pytest.approx(2e9 * a.billions, rel=0.01)
    less = need(plan_of(tmp_path, model__gradient_checkpointing=True, **options), "cpu")
    micro = [x.phases["update"]["one micro-batch"] for x in (less, found)]
    assert micro[0] < 0.5 * micro[1]
    text = found.describe()
    assert text.startswith("memory     ")
    assert "GiB of tensors at most, in the update" in text


def test_what_trains_has_gradients_and_an_optimizer(pipelines):
    lora = need(plan_of(pipelines["sd-v"], model__resolution=8), "cpu").always
    assert lora["gradients and optimizer"] == 3 * lora["LoRA"] > 0
    whole = need(plan_of(pipelines["sd-v"], model__resolution=8, model__lora_rank=0), "cpu").always
    assert whole["gradients and optimizer"] == 3 * whole["denoiser"]
    half = need(
        plan_of(pipelines["sd-v"], model__resolution=8, model__dtype="bfloat16"), "cpu"
    ).always
    assert half["denoiser"] == lora["denoiser"] / 2


def test_an_anchor_of_a_whole_network_is_measured_from_a_second_one(pipelines):
    options = {"model__resolution": 8, "algorithm": {"type": "ddpo", "kl_weight": 0.1}}
    tree = [{"model__lora_rank": rank, **options} for rank in (0, 4)]
    whole, lora = (need(plan_of(pipelines["sd-v"], **t), "cpu").always for t in tree)
    assert whole["base model"] == whole["denoiser"]
    assert not lora["base model"]  # it is the model without its LoRA


def test_evaluations_count_with_their_own_guidance(pipelines, tmp_path):
    (tmp_path / "held_out.txt").write_text("a\nb\n")

    def found(**options):
        return need(plan_of(pipelines["sd-v"], model__resolution=8, **options), "cpu").phases

    assert "evaluation" not in found()
    prompts = {"eval__prompts": str(tmp_path / "held_out.txt")}
    plain, guided = (found(**prompts, eval__guidance=g)["evaluation"] for g in (1.0, 3.0))
    assert guided["one batch"] >= plain["one batch"] > 0
