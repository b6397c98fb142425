"""Weights that cannot be had or do not fit: one sentence each, for pipelines and for rewards."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SIDE, load
from families import tiny_vae
from helpers_clip import tiny_clip, tiny_open_clip
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

import rewards
from diffalign import policies
from diffalign.config import TrainConfig
from diffalign.emoji_world import verifier
from diffalign.training.plan import Plan
from rewards.device import default_device
from rewards.loading import LoadingError, optional, pretrained, reading

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


def cut(path, size=2000):
    path.write_bytes(path.read_bytes()[:size])


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n")


def edited(path, **change):
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def as_bin(path, size=None):
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    if size is not None:
        cut(path.with_suffix(".bin"), size)


DAMAGE = {
    "cut": (lambda d: cut(d / UNET), "is damaged: .*unet.* is cut short"),
    "short": (lambda d: cut(d / UNET, -4), "is damaged: .*unet.* bytes and should have"),
    "empty": (lambda d: cut(d / TEXT, 0), "is damaged: .*text_encoder.* is cut short"),
    "pointer": (lambda d: pointer(d / TEXT), "is a Git LFS pointer.*git lfs pull"),
    "cut pickle": (lambda d: as_bin(d / UNET, 3000), "is damaged .*copy it again"),
    "no JSON": (lambda d: (d / "unet/config.json").write_text("{"), "unet/config.json is no JSON"),
    "half a config": (lambda d: (d / "vae/config.json").write_text("{}"), "incomplete: its conf"),
    "no weights": (lambda d: (d / UNET).unlink(), "is incomplete .*unet.*give a complete folder"),
    "no part": (lambda d: shutil.rmtree(d / "unet"), "is incomplete .*unet/config.json"),
    "no tokens": (lambda d: [f.unlink() for f in (d / "tokenizer").iterdir()], "its tokenizer"),
    "width": (
        lambda d: edited(d / "unet/config.json", block_out_channels=[16, 16]),
        r"do not fit its config .*conv_in.*of different models",
    ),
    "text width": (
        lambda d: edited(d / "text_encoder/config.json", hidden_size=32),
        "do not fit its config .* is of another shape",
    ),
    "random": (
        lambda d: edited(d / "text_encoder/config.json", num_hidden_layers=3),
        r"no weights for encoder\.layers\.2.* and 15 others, which would be random",
    ),
    "class": (
        lambda d: edited(d / "model_index.json", unet=["diffusers", "NoSuchModel"]),
        "cannot be loaded .*NoSuchModel",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_pipeline_that_is_damaged_or_incomplete(pipelines, tmp_path, what):
    folder = Path(shutil.copytree(pipelines["sd-epsilon"], tmp_path / "sd"))
    damage, message = DAMAGE[what]
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        policies.load(str(folder))
    assert str(caught.value).startswith(f"model.name={str(folder)!r} ")
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_read(pipelines, tmp_path):
    folder = Path(shutil.copytree(pipelines["sd-epsilon"], tmp_path / "sd"))
    as_bin(folder / UNET)
    ours, theirs = load(str(folder)).network, load(pipelines["sd-epsilon"]).network
    assert torch.equal(ours.conv_in.weight, theirs.conv_in.weight)


@pytest.mark.parametrize("kind", ["sdxl", "flux-dev"])
def test_a_pipeline_of_fp16_files_alone(pipelines, tmp_path, capfd, kind):
    policies.pipeline(pipelines[kind]).save_pretrained(tmp_path / "half", variant="fp16")
    assert not list((tmp_path / "half").rglob("*model.safetensors"))
    capfd.readouterr()
    ours = load(str(tmp_path / "half"))
    assert "unsafe serialization" not in capfd.readouterr().err
    for name, value in load(pipelines[kind]).network.state_dict().items():
        assert torch.equal(ours.network.state_dict()[name], value)


def test_a_tiny_vae(pipelines, tmp_path):
    policy, name = load(pipelines["sd-v"]), tiny_vae(tmp_path / "tiny")
    weights = tmp_path / "tiny" / "diffusion_pytorch_model.safetensors"
    expected = policy.decode(torch.ones(1, *policy.latent_shape))
    policy.add_tiny_vae(name)
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    policy.add_tiny_vae(name)
    drawn = policy.decode(torch.ones(1, *policy.latent_shape), tiny=True)
    assert not torch.allclose(drawn, expected, atol=1e-2)
    cut(weights.with_name("diffusion_pytorch_model.fp16.safetensors"), 500)
    with pytest.raises(ValueError, match=r"model\.tiny_vae=.* is damaged"):
        policy.add_tiny_vae(name)


def without(path, key):
    state = load_file(path)
    (gone,) = [k for k in state if k.endswith(key)]
    save_file({k: v for k, v in state.items() if k != gone}, path, {"format": "pt"})


def test_rewards(tmp_path, monkeypatch):
    """None is ever drawn at random or loaded in part."""
    folder = Path(tiny_clip(tmp_path / "clip"))
    oc = Path(tiny_open_clip(tmp_path / "oc"))
    weights, whole = folder / "model.safetensors", (folder / "model.safetensors").read_bytes()
    image = torch.rand(1, 3, 32, 32)
    clip = {"clip": {"model": str(folder)}}
    expected = rewards.build(clip)(image, ["a dog"])
    weights.rename(folder / "model.fp16.safetensors")
    assert torch.equal(rewards.build(clip)(image, ["a dog"]), expected)
    (folder / "model.fp16.safetensors").rename(weights)
    references = tmp_path / "reference"
    references.mkdir()

    def refused(spec, message):
        with pytest.raises(ValueError, match=message) as caught:
            rewards.build(spec)
        assert str(caught.value).startswith(f"rewards.{next(iter(spec))}: ")
        assert "\n" not in str(caught.value)

    without(weights, "visual_projection.weight")
    for name in ("clip", "pickscore"):
        missing = r"no weights for visual_projection\.weight, which would be random"
        refused({name: {"model": str(folder)}}, missing)
    refused({"similarity": {"model": str(folder)}}, missing)
    weights.write_bytes(whole)
    edited(folder / "config.json", projection_dim=5)
    refused(clip, "do not fit its config .*projection.* is of another shape")
    cut(weights)
    refused(clip, r"model=.* is damaged: .*model\.safetensors is cut short")
    weights.unlink()
    refused(clip, "is incomplete")
    detector = {"composition": {"detector": str(folder)}}
    refused(detector, "detector=")
    cut(oc / "open_clip_model.safetensors")
    refused({"clip": {"model": str(oc)}}, "is damaged: .*open_clip_model.safetensors is cut short")
    cut(head := oc / "open_clip_model.safetensors", 4)
    refused({"aesthetic": {"head": str(head)}}, "head=.* is damaged")
    (tmp_path / "h.pt").write_bytes(b"no pickle")
    refused({"aesthetic": {"head": str(tmp_path / "h.pt")}}, "head=.* is damaged")
    torch.save({"a": Path("code")}, tmp_path / "h.pt")
    refused({"aesthetic": {"head": str(tmp_path / "h.pt")}}, "head=.* Python objects beside")
    with pytest.raises(ValueError, match=r"the verifier .* is incomplete"):
        verifier.load("emoji-verifier", tmp_path)


def raised(kind, text="", cause=None):
    def load(source, **options):
        error = kind.__new__(kind)
        Exception.__init__(error, text)
        raise error from cause

    return load


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (raised(errors.GatedRepoError), "gated.*huggingface.co/org/m.*HF_TOKEN"),
        (raised(errors.RepositoryNotFoundError), "nor on the hub; check the spelling"),
        (raised(OSError, "x", errors.OfflineModeIsEnabled("no")), r"not on this machine.*hf downl"),
        (raised(OSError, "We couldn't connect to 'https://hub'"), "not on this machine, and "),
        (raised(errors.LocalEntryNotFoundError, "offline"), "not on this machine"),
        (raised(ConnectionError), "not on this machine"),
        (raised(errors.HFValidationError), "nor a hub id, ORG/NAME"),
        (raised(ImportError, "T5 requires the SentencePiece library"), "pip install sentencep"),
        (raised(ValueError, "Couldn't instantiate, you need tiktoken"), "pip install sentencep"),
        (raised(RuntimeError, "size mismatch for a.weight"), "do not fit its config"),
        (raised(EOFError, "Ran out of input"), "is damaged .*hub's cache"),
        (raised(PermissionError, "denied"), "may not be read"),
        (raised(TypeError, "else. And more"), r"cannot be loaded \(TypeError: else\)"),
    ],
)
def test_what_libraries_raise(load, message):
    with pytest.raises(LoadingError, match=f"^model='org/m' .*{message}"):
        pretrained(load, "model='org/m'", "org/m")


def test_memory_and_interrupts_are_left_alone():
    for kind in (MemoryError, KeyboardInterrupt, torch.OutOfMemoryError):
        with pytest.raises(kind), reading("m", "x"):
            raise kind


def test_a_variant_is_only_asked_for_where_there_are_no_other_files():
    asked = []

    def load(source, **options):
        asked.append(options)
        raise OSError("Error no file named model.safetensors" if len(asked) == 1 else "no fp16")

    with pytest.raises(LoadingError, match=r"is incomplete .*no file named"):
        pretrained(load, "m", "x", dtype=1)
    assert asked == [{"dtype": 1}, {"variant": "fp16", "dtype": 1}]


def test_a_file_that_may_be_missing(tmp_path):
    assert optional(raised(OSError), "m", str(tmp_path), ("a.json",)) is None
    gone = raised(OSError, "org/m does not appear to have a file named a.json")
    assert optional(gone, "m", "org/m", ("a.json",)) is None
    with pytest.raises(LoadingError, match="not on this machine"):
        optional(raised(OSError, "couldn't connect to the hub"), "m", "org/m", ("a.json",))


def test_other_warnings_of_a_library_are_still_heard(tmp_path, caplog):
    """Weights that the network has no use for are a warning, here as in transformers."""
    folder = Path(tiny_clip(tmp_path / "clip"))
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"spare": torch.ones(1)}, path, {"format": "pt"})
    pretrained(CLIPModel.from_pretrained, "m", str(folder))
    assert "UNEXPECTED" in caplog.text
    caplog.clear()
    before = logging.getLogger("transformers").handlers, logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)  # as TRANSFORMERS_VERBOSITY=error
    pretrained(CLIPModel.from_pretrained, "m", str(folder))
    assert "UNEXPECTED" not in caplog.text
    without(path, "visual_projection.weight")
    with pytest.raises(LoadingError, match="would be random"):
        pretrained(CLIPModel.from_pretrained, "m", str(folder))
    assert logging.getLogger("transformers").handlers == before[0]
    logging.getLogger("transformers").setLevel(before[1])


def test_one_choice_of_the_device(monkeypatch):
    for cuda, mps, expected in ((1, 1, "cuda"), (0, 1, "mps"), (0, 0, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: bool(cuda))
        backend = SimpleNamespace(is_available=lambda mps=mps: bool(mps))
        monkeypatch.setattr(torch.backends, "mps", backend)
        assert default_device() == expected


def test_guidance_that_a_model_does_not_take_is_refused(pipelines):
    """FLUX.1-schnell ignores it, and a run that says otherwise misleads."""
    assert policies.guided_by(pipelines["flux-dev"]) == "input"
    assert policies.guided_by(pipelines["sd-v"]) == "cfg"
    base = {"model": {"name": pipelines["flux-schnell"], "resolution": SIDE}}
    base |= {"rewards": {"jpeg": 1.0}, "algorithm": {"type": "flow_grpo"}}
    for section in ("sampler", "eval"):
        sampler = {"kernel": "flow_sde", "eta": 0.7, "steps": 4}
        settings = {"sampler": sampler, "eval": {}} | base
        Plan.make(TrainConfig.from_dict(settings))
        settings[section] = settings[section] | {"guidance": 3.5}
        with pytest.raises(ValueError, match=rf"{section}\.guidance=3.5 does nothing"):
            Plan.make(TrainConfig.from_dict(settings))
