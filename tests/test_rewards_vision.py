"""Aesthetic, PickScore, HPS and similarity against the libraries and pipelines they replace."""

import json
import random
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from helpers_clip import tiny_clip, tiny_open_clip
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import rewards.pickscore
from diffalign.emoji_world.scenes import caption, sample_scene
from diffalign.emoji_world.tensors import pixels
from rewards import build, check, clip_pixels
from rewards.aesthetic import Aesthetic, load_head
from rewards.clip import Clip
from rewards.files import load_image
from rewards.hps import HPS
from rewards.pickscore import PickScore
from rewards.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, pad_square
from rewards.similarity import Similarity

ROOT = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2] / "shared"
HEAD = SHARED / "weights" / "sac+logos+ava1-l14-linearMSE.pth"
PROMPTS = ["a red circle", "two blue squares next to a very small green star", "a cat"]
BICUBIC = TF.InterpolationMode.BICUBIC


class Mlp(nn.Module):
    """LAION's head as they define it; ``relu`` takes their activations out of the comments."""

    def __init__(self, width, relu=False):
        super().__init__()
        layers = []
        for size, dropout in ((1024, [0.2]), (128, [0.2]), (64, [0.1]), (16, [])):
            layers += [nn.Linear(width, size), *[nn.ReLU()] * relu, *map(nn.Dropout, dropout)]
            width = size
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)

    def forward(self, x):
        return self.layers(x)


def pil(images):
    return [Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()) for x in images]


def tiny_dino(folder, processor=True):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Dinov2Model(Dinov2Config(**sizes, image_size=42, patch_size=7))
    g = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15, generator=g) if parameter.ndim > 1 else None
    model.save_pretrained(folder)
    if processor:  # DINOv2's own: the shortest side to 256, a crop of 224
        stats = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
        crop = {"height": 28, "width": 28}
        processor = BitImageProcessor(size={"shortest_edge": 32}, crop_size=crop, **stats)
        processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def images():
    """Three smooth pictures of 40x60, multiples of 1/255 so that a PNG holds them exactly."""
    g = torch.Generator().manual_seed(0)
    x = F.interpolate(torch.rand(3, 3, 8, 12, generator=g), (40, 60), mode="bicubic")
    tint = torch.tensor([[0.4, 0.0, 0.0], [0.0, 0.4, 0.1], [0.1, 0.2, 0.4]]).view(3, 3, 1, 1)
    return ((0.1 + 0.4 * x + tint).clamp(0, 1) * 255).round() / 255


@pytest.fixture(scope="module")
def kit(tmp_path_factory, images):
    """Tiny checkpoints in the real formats."""
    import open_clip

    root = tmp_path_factory.mktemp("kit")
    parts = {"clip": tiny_clip(root / "clip"), "dino": tiny_dino(root / "dino")}
    parts["open_clip"] = tiny_open_clip(root / "open_clip")
    config = json.loads((root / "open_clip" / "open_clip_config.json").read_text())
    (root / "tiny-h.json").write_text(json.dumps(config["model_cfg"]))
    open_clip.add_model_config(root / "tiny-h.json")
    state = load_file(root / "open_clip" / "open_clip_model.safetensors")
    parts["hps"] = str(root / "HPS_tiny.pt")
    torch.save({"state_dict": state, "epoch": 1}, parts["hps"])
    torch.manual_seed(3)
    parts["head"] = str(root / "head.pth")
    torch.save(Mlp(24).state_dict(), parts["head"])
    parts["references"] = str(root / "references")
    Path(parts["references"]).mkdir()
    for i in range(2):
        pil(images)[i].save(root / "references" / f"{i}.png")
    return parts


MAKERS = {
    "aesthetic": lambda kit, **dtype: Aesthetic(kit["clip"], kit["head"], **dtype),
    "pickscore": lambda kit, **dtype: PickScore(kit["clip"], **dtype),
    "hps": lambda kit, **dtype: HPS(checkpoint=kit["hps"], arch="tiny-h", **dtype),
    "crop": lambda kit, **dtype: HPS("v2.1", kit["hps"], "tiny-h", "crop", **dtype),
    "dino": lambda kit, **dtype: Similarity(kit["dino"], kit["references"], **dtype),
    "clip": lambda kit, **dtype: Similarity(kit["clip"], kit["references"], **dtype),
}


def fake_hub(monkeypatch, file):
    """Every download gives ``file``; returns the list of what was asked for."""
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *f: asked.append(f) or file)
    return asked


@pytest.mark.skipif(not HEAD.exists(), reason="LAION's head is not in this checkout")
def test_aesthetic_head_matches_golden():
    golden, head = load_file(SHARED / "golden" / "rewards.safetensors"), load_head(HEAD)
    score = head(golden["aesthetic.unit_features"]).squeeze(-1)
    assert (score - golden["aesthetic.score"]).abs().max() < 1e-5
    assert abs(head.weight.norm().item() - 17.996) < 1e-3
    assert abs(head.bias.item() - 5.2366) < 1e-4


@pytest.mark.parametrize("form", ["pth", "safetensors", "folder"])
@pytest.mark.parametrize("relu", [False, True])
def test_head_equals_its_mlp(tmp_path, relu, form):
    torch.manual_seed(1)
    mlp = Mlp(24, relu).eval()
    path = tmp_path / ("model.safetensors" if form == "folder" else f"head.{form}")
    (torch.save if form == "pth" else save_file)(mlp.state_dict(), path)
    head = load_head(tmp_path if form == "folder" else path)
    x = F.normalize(torch.randn(50, 24), dim=-1)
    assert mlp(x).std() > 0.05
    assert torch.allclose(head(x), mlp(x), atol=1e-5)
    assert isinstance(head, nn.Sequential if relu else nn.Linear)
    assert sum(isinstance(m, nn.ReLU) for m in head.modules()) == 4 * relu


def test_other_heads(tmp_path, kit, images):
    linear, x, path = nn.Linear(99, 1), torch.randn(5, 99), str(tmp_path / "head.pth")
    for prefix in ("", "linear."):
        torch.save({prefix + k: v for k, v in linear.state_dict().items()}, path)
        assert torch.allclose(load_head(path)(x), linear(x))
    with pytest.raises(ValueError, match="takes 99 features and the model gives 24; use the CLIP"):
        Aesthetic(kit["clip"], path)(images, PROMPTS)
    torch.save({"fc.weight": torch.zeros(1, 3)}, path)
    with pytest.raises(ValueError, match=r"its keys are fc\.weight; expected weight and bias of"):
        load_head(path)


def test_aesthetic_equals_the_pil_pipeline(kit, images, monkeypatch):
    from transformers import CLIPModel

    model, mlp = CLIPModel.from_pretrained(kit["clip"]).eval(), Mlp(24).eval()
    mlp.load_state_dict(torch.load(kit["head"], weights_only=True))
    rows = [TF.center_crop(TF.resize(x, 32, BICUBIC), [32, 32]) for x in pil(images)]
    rows = torch.stack([TF.normalize(TF.to_tensor(x), CLIP_MEAN, CLIP_STD) for x in rows])
    with torch.no_grad():
        features = model.get_image_features(pixel_values=rows).pooler_output
        expected = mlp(F.normalize(features, dim=-1)).squeeze(-1)
    got = MAKERS["aesthetic"](kit)(images, PROMPTS)
    assert expected.std() > 0.05
    assert torch.allclose(got, expected, atol=0.02)
    target = expected.mean().item()
    aimed = Aesthetic(kit["clip"], kit["head"], target=target)(images, PROMPTS)
    assert torch.allclose(aimed, -(got - target).abs())
    asked = fake_hub(monkeypatch, kit["head"])
    assert torch.equal(Aesthetic(kit["clip"], "org/repo:a+b/head.pth")(images, PROMPTS), got)
    assert torch.equal(Aesthetic(kit["clip"])(images, PROMPTS), got)
    default = ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
    assert asked == [("org/repo", "a+b/head.pth"), default]


@pytest.mark.parametrize("library", ["clip", "open_clip"])
def test_aesthetic_keeps_no_text_tower(kit, images, library):
    full, reward = Clip(kit[library]), Aesthetic(kit[library], kit["head"])
    assert torch.equal(reward.clip.image_features(images), full.image_features(images))
    size = [sum(p.numel() for p in r.parameters()) for r in (reward, full)]
    assert size[0] < 0.7 * size[1]


def test_embedded_models():
    rng = random.Random(0)
    scenes = [sample_scene(rng, "single", reserved=True) for _ in range(24)]
    shown, texts = pixels(scenes).float() / 255, [caption(s) for s in scenes]
    score = PickScore(str(ROOT / "assets" / "emoji-pickscore"))
    assert (score(shown, texts) > score(shown, texts[1:] + texts[:1])).float().mean() > 0.8
    folders = (ROOT / "assets" / name for name in ("emoji-clip", "emoji-aesthetic"))
    beauty = Aesthetic(*map(str, folders))
    values = beauty(shown, texts)
    assert ((values > 2) & (values < 11)).all()
    assert beauty(torch.lerp(shown, shown.mean((2, 3), True), 0.8), texts).mean() < values.mean()


def test_pickscore_is_clips_logit(kit, images, tmp_path, monkeypatch):
    expected = Clip(kit["clip"], scale="logit")(images, PROMPTS)  # equal to transformers' logits
    assert torch.equal(PickScore(kit["clip"])(images, PROMPTS), expected)
    bare = str(tmp_path / "PickScore_v1")  # as published: no tokenizer
    shutil.copytree(kit["clip"], bare, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ValueError, match=r"PickScore_v1 has no tokenizer; set `processor` to"):
        Clip(bare)
    assert torch.equal(PickScore(bare, processor=kit["clip"])(images, PROMPTS), expected)
    monkeypatch.setattr(rewards.pickscore, "PROCESSOR", kit["clip"])
    assert torch.equal(PickScore(bare)(images, PROMPTS), expected)


def official_hps(image, size):
    """HPSv2's transform of a PIL image but the normalisation."""
    x = TF.to_tensor(image)
    scale = size / max(x.shape[1:])
    height, width = (round(n * scale) for n in x.shape[1:])
    x = TF.resize(x, [height, width], BICUBIC)
    pad_h, pad_w = size - height, size - width
    return TF.pad(x, [pad_w // 2, pad_h // 2, pad_w - pad_w // 2, pad_h - pad_h // 2], fill=0)


@pytest.mark.parametrize(
    ("height", "width"), [(40, 60), (61, 32), (500, 301), (100, 333), (224, 150), (64, 64)]
)
def test_pad_square_is_hps_transform(height, width):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    got = pad_square(TF.to_tensor(image)[None], 224)[0]
    assert torch.allclose(got, official_hps(image, 224), atol=1e-5)


def test_hps_is_clips_cosine_of_its_transforms(kit, images, monkeypatch):
    clip = Clip(f"tiny-h::{kit['hps']}")  # equal to open_clip's cosine; 32x32 is not resized
    padded = torch.stack([official_hps(x, 32) for x in pil(images)])
    cropped = TF.center_crop(TF.resize(images, [32], BICUBIC), [32])
    pad, crop = MAKERS["hps"](kit), MAKERS["crop"](kit)
    assert torch.allclose(pad(images, PROMPTS), clip(padded, PROMPTS), atol=1e-5)
    assert torch.allclose(crop(images, PROMPTS), clip(cropped, PROMPTS), atol=1e-5)
    assert (pad(images, PROMPTS) - crop(images, PROMPTS)).abs().min() > 1e-3
    square = images[..., :40]
    assert torch.allclose(pad(square, PROMPTS), crop(square, PROMPTS), atol=1e-6)
    asked = fake_hub(monkeypatch, kit["hps"])
    for version in ("v2.0", "v2.1"):
        HPS(version, arch="tiny-h")
    assert asked == [("xswu/HPSv2", f"HPS_{v}_compressed.pt") for v in ("v2", "v2.1")]


@pytest.mark.parametrize("processor", [True, False])
def test_dino_equals_transformers(kit, images, tmp_path, processor):
    from transformers import AutoModel
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    folder = kit["dino"] if processor else tiny_dino(tmp_path, processor=False)
    reward = Similarity(folder, kit["references"])
    if processor:
        rows = BitImageProcessorPil.from_pretrained(folder)(pil(images), return_tensors="pt")
        rows = rows.pixel_values
        levels = clip_pixels(images, **reward.tower.pixels, quantize=True) - rows
        assert (levels * torch.tensor(IMAGENET_STD).view(3, 1, 1) * 255).abs().max() < 2.01
    else:
        rows = torch.stack([TF.center_crop(TF.resize(x, 42, BICUBIC), [42]) for x in images])
        rows = TF.normalize(rows, IMAGENET_MEAN, IMAGENET_STD)
    with torch.no_grad():
        tokens = AutoModel.from_pretrained(folder)(pixel_values=rows).last_hidden_state[:, 0]
    cosines = F.normalize(tokens, dim=-1) @ F.normalize(tokens[:2], dim=-1).T
    assert cosines[2].max() < 0.98
    assert torch.allclose(reward(images, PROMPTS), cosines.mean(1), atol=2e-3)


def test_dino_of_another_make(tmp_path, images, kit):
    from transformers import BertConfig, BertModel, ViTConfig, ViTImageProcessor, ViTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    reward = Similarity(str(tmp_path / "vit"), kit["references"], "max")
    rows = TF.resize(images, [32, 32], BICUBIC) * 2 - 1
    token = F.normalize(reward.tower.model(rows).last_hidden_state[:, 0], dim=-1)
    assert torch.allclose(reward.tower.image_features(images), token, atol=1e-5)
    BertModel(BertConfig(**sizes, vocab_size=9)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="is a bert; use a clip or one of dinov2"):
        Similarity(str(tmp_path / "bert"), kit["references"])


@pytest.mark.parametrize("model", ["dino", "clip", "open_clip"])
def test_references(kit, images, model, tmp_path, monkeypatch):
    folder = kit["references"]
    files = [f"{folder}/0.png", f"{folder}/1.png"]
    one = [Similarity(kit[model], f)(images, PROMPTS) for f in files]
    assert torch.allclose(torch.stack([one[0][0], one[1][1]]), torch.ones(2), atol=1e-5)
    for references in (folder, files, [folder]):
        assert torch.allclose(Similarity(kit[model], references)(images, PROMPTS), sum(one) / 2)
    best = Similarity(kit[model], folder, reduce="max")
    assert torch.allclose(best(images, PROMPTS), torch.maximum(*one))
    metadata = [{"reference": files[1]}, {"reference": files}, {}]
    mixed = Similarity(kit[model], files[0])
    calls, encode = [], mixed.tower.image_features
    monkeypatch.setattr(mixed.tower, "image_features", lambda x: calls.append(1) or encode(x))
    with torch.inference_mode():
        mixed(images, PROMPTS, metadata)
    x = images.clone().requires_grad_()
    value = mixed(x, PROMPTS, metadata)
    value.sum().backward()  # fails on features cached as inference tensors
    expected = torch.stack([one[1][0], (one[0][1] + one[1][1]) / 2, one[0][2]])
    assert torch.allclose(value, expected, atol=1e-6)
    assert len(calls) == 4  # the images twice, each reference once
    with pytest.raises(ValueError, match="'a cat' has no reference image; set `references`"):
        Similarity(kit[model])(images, PROMPTS, metadata)


def test_reference_files(images, tmp_path):
    image = pil(images)[0]
    image.save(tmp_path / "x.png")
    exif = image.getexif()
    exif[0x0112] = 6  # taken with the camera on its side
    image.save(tmp_path / "rotated.png", exif=exif)
    image.putalpha(0)
    image.save(tmp_path / "clear.png")
    assert torch.equal(load_image(tmp_path / "x.png")[0], images[0])
    assert torch.equal(load_image(tmp_path / "rotated.png")[0], images[0].rot90(-1, (1, 2)))
    assert (load_image(tmp_path / "clear.png") == 1).all()
    with pytest.raises(ValueError, match=r"reference 'none\.png' does not exist"):
        Similarity.check_prompts(["a cat", "b"], [{}, {"reference": "none.png"}])


@pytest.mark.parametrize("kind", MAKERS)
def test_gradient(kit, images, kind):
    reward = MAKERS[kind](kit, dtype="float64")
    x = images.double().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(x, PROMPTS).sum(), x)
    assert all(not p.requires_grad for p in reward.parameters())
    assert reward.differentiable
    step = 1e-5
    for i, c, row, column in ((0, 0, 20, 30), (1, 1, 12, 25), (2, 2, 31, 40), (2, 0, 17, 33)):
        shift = torch.zeros_like(images, dtype=torch.float64)
        shift[i, c, row, column] = step
        with torch.no_grad():
            change = reward(x + shift, PROMPTS) - reward(x - shift, PROMPTS)
        numeric = change.sum() / (2 * step)
        assert (gradient[i, c, row, column] - numeric).abs() < 1e-5 * gradient.abs().max()
        assert numeric != 0


@pytest.mark.parametrize("kind", MAKERS)
def test_batch_equals_one_by_one_and_bfloat16_is_close(kit, images, kind):
    reward = MAKERS[kind](kit)
    together = reward(images, PROMPTS)
    assert together.shape == (3,)
    alone = [MAKERS[kind](kit)(images[i : i + 1], [PROMPTS[i]]) for i in range(3)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    assert together.std() > 1e-3
    half = MAKERS[kind](kit, dtype="bfloat16")(images, PROMPTS)
    assert half.dtype == torch.float32
    tolerance = {"aesthetic": 0.3, "pickscore": 0.1}.get(kind, 0.01)
    assert (half - together).abs().max() < tolerance
    if kind in ("pickscore", "hps"):
        text, reward.tower.text = reward.tower.text, None  # cached: not called again
        assert torch.equal(reward(images, PROMPTS), together)
        reward.tower.text = text
        reward._text_cache.clear()
        assert torch.equal(reward(images, PROMPTS), together)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("aesthetic:Aesthetic", {"target": "high"}, "target='high' is not a finite number; give"),
        ("aesthetic:Aesthetic", {"head": "none.pth"}, r"head='none\.pth' does not exist .* ORG/RE"),
        ("aesthetic:Aesthetic", {"model": "./none"}, r"model='\./none': \./none does not exist"),
        ("aesthetic:Aesthetic", {"dtype": "half"}, "dtype='half' is not one of float32"),
        ("pickscore:PickScore", {"processor": "./none"}, r"processor='\./none': .* give an exist"),
        ("pickscore:PickScore", {"scale": "100"}, "unknown option 'scale'"),
        ("clip:Clip", {"model": "a::b", "processor": "c"}, "processor='c' is for transformers"),
        ("hps:HPS", {"version": 2.1}, r"version=2\.1 is not one of v2\.0, v2\.1"),
        ("hps:HPS", {"transform": "squash"}, "transform='squash' is not one of pad, crop"),
        ("hps:HPS", {"checkpoint": "./none.pt"}, r"checkpoint='\./none\.pt' does not exist under"),
        ("similarity:Similarity", {"reduce": "min"}, "reduce='min' is not one of mean, max"),
        ("similarity:Similarity", {"references": "none"}, "reference 'none' does not exist under"),
        ("similarity:Similarity", {"references": []}, r"references=\[\] holds no image"),
    ],
)
def test_bad_options(kind, options, message):
    spec = {"x": {"type": f"rewards.{kind}", **options}}
    for refuse in (check, build):
        with pytest.raises(ValueError, match=rf"rewards\.x: .*{message}"):
            refuse(spec)
