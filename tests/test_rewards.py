"""Rewards against the libraries they replace, their gradients, and their error messages."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_clip import tiny_clip, tiny_open_clip
from PIL import Image
from safetensors.torch import load_file

import rewards
from rewards import Clip, FunctionReward, Jpeg, Reward, RewardError, build, check, clip_pixels
from rewards.jpeg import (
    FACTORS,
    _terms,
    jpeg_kilobytes,
    jpeg_kilobytes_surrogate,
    quantization_tables,
)
from rewards.preprocess import CLIP_STD

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "rewards.safetensors"
PROMPTS = ["a red circle", "two blue squares next to a very small green star", "a cat"]


@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.exists():
        pytest.skip("golden numbers are not in this checkout")
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def hf_clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("hf_clip"))


@pytest.fixture(scope="module")
def oc_clip(tmp_path_factory):
    return tiny_open_clip(tmp_path_factory.mktemp("open_clip"))


@pytest.fixture
def images():
    return torch.rand(3, 3, 40, 48, generator=torch.Generator().manual_seed(0))


def synthetic(height, width, n, seed):
    """n images in turn noise, blurred noise, flat shapes, and noise on a gradient."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        x = torch.rand(1, 3, height, width, generator=g)
        sigma, contrast = (torch.rand(2, generator=g) * torch.tensor([4.0, 0.3])).tolist()
        sigma += 0.3
        if i % 4:
            radius = int(3 * sigma)
            t = torch.arange(-radius, radius + 1)
            kernel = torch.softmax(-(t**2) / (2 * sigma**2), 0)
            kernel = (kernel[:, None] * kernel).expand(3, 1, -1, -1)
            x = F.conv2d(F.pad(x, (radius,) * 4, mode="reflect"), kernel, groups=3)
            x = (x - x.mean()) / x.std() * contrast + 0.5
        if i % 4 == 2:
            inside = (x.mean(1, keepdim=True) > 0.5).float()
            colors = torch.rand(2, 1, 3, 1, 1, generator=g)
            x = inside * colors[0] + (1 - inside) * colors[1]
        if i % 4 == 3:
            x = x * 0.3 + torch.linspace(0, 0.7, width)
        out.append(x.clamp(0, 1))
    return torch.cat(out)


def directional_error(f, x, seed=0, step=1e-5):
    """Relative error of <grad f, d> against a central difference along a random d."""
    x = x.detach().requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    (gradient,) = torch.autograd.grad(f(x).sum(), x)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0
    with torch.no_grad():
        numeric = (f(x + step * direction) - f(x - step * direction)).sum() / (2 * step)
    return float(((gradient * direction).sum() - numeric).abs() / numeric.abs())


def spearman(a, b):
    ranks = torch.stack([v.argsort().argsort().double() for v in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def test_clip_pixels_match_golden(golden):
    u = golden["images_uint8"].float() / 255
    error = (clip_pixels(u, quantize=True) - golden["clip224.pixel_values"]).abs().max()
    assert error < 2e-2, error
    free = (clip_pixels(u) - golden["clip224.pixel_values"]).abs()
    assert free.max() < 5e-2
    assert free.mean() < 5e-3


@pytest.mark.parametrize(
    ("height", "width"), [(64, 64), (97, 61), (61, 97), (500, 300), (224, 331), (224, 224)]
)
def test_clip_pixels_match_pil_processor(height, width):
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    except ModuleNotFoundError:  # before it was split off, the plain one was PIL's
        from transformers import CLIPImageProcessor as CLIPImageProcessorPil

    u8 = (synthetic(height, width, 2, height + width) * 255).round().to(torch.uint8)
    pil = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in u8]
    expected = CLIPImageProcessorPil()(images=pil, return_tensors="pt").pixel_values
    got = clip_pixels(u8.float() / 255, quantize=True)
    assert got.shape == expected.shape == (2, 3, 224, 224)
    # PIL's fixed-point filter breaks ties of a half its own way: rarely two levels of 1/255.
    levels = (got - expected).abs() * torch.tensor(CLIP_STD).view(3, 1, 1) * 255
    assert levels.max() < 2.01
    assert (levels > 0.01).float().mean() < 0.01
    assert (levels > 1.01).float().mean() < 1e-4


def test_clip_pixels_skip_resize_and_keep_precision(images):
    same = clip_pixels(images[..., :40], size=40, mean=(0, 0, 0), std=(1, 1, 1))
    assert torch.equal(same, images[..., :40])
    assert clip_pixels(images.bfloat16(), size=20).dtype == torch.float32
    assert clip_pixels(images.double(), size=20).dtype == torch.float64
    assert clip_pixels(images, size=20, crop=False).shape == (3, 3, 20, 20)


def test_quantize_is_straight_through(images):
    images = 0.4 + 0.2 * images  # no overshoot beyond [0, 1], where the clamp has no gradient
    x = images.clone().requires_grad_()
    clip_pixels(x, size=20, quantize=True).sum().backward()
    y = images.clone().requires_grad_()
    clip_pixels(y, size=20).sum().backward()
    assert torch.allclose(x.grad, y.grad, rtol=1e-3, atol=1e-5)


def test_jpeg_size_is_exact(golden):
    u = golden["images_uint8"].float() / 255
    assert torch.equal(jpeg_kilobytes(u), golden["jpeg.kilobytes_q95"])
    prompts = [""] * len(u)
    assert torch.equal(Jpeg()(u, prompts), -golden["jpeg.kilobytes_q95"])
    total = build({"jpeg_incompressibility": 1.0})
    assert torch.equal(total(u, prompts), golden["jpeg.kilobytes_q95"])


@pytest.mark.parametrize("quality", [1, 10, 49, 50, 75, 95, 100])
def test_quantization_tables_are_pils(quality, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "x.jpg", quality=quality)
    with Image.open(tmp_path / "x.jpg") as image:
        stored = image.quantization
        assert image.layer[0][1:3] == (2, 2)  # 4:2:0
    for i, table in enumerate(quantization_tables(quality)):
        assert table.flatten().tolist() == stored[i]


def test_surrogate_tracks_true_size(golden):
    """The figures quoted in the docstring of jpeg_kilobytes_surrogate."""
    for size in ((64, 64), (100, 75), (256, 256)):
        for quality, limit in ((95, 0.05), (50, 0.06)):
            u = synthetic(*size, 24, seed=1)
            true, estimate = jpeg_kilobytes(u, quality), jpeg_kilobytes_surrogate(u, quality)
            error = float(((estimate - true) / true).abs().mean())
            rank = spearman(estimate, true)
            print(f"{size} q{quality}: spearman {rank:.3f}, mean relative error {error:.3f}")
            assert rank > 0.95
            assert error < limit
    u = golden["images_uint8"].float() / 255
    blurred = [F.avg_pool2d(u, k, stride=1, padding=k // 2) for k in (3, 5, 9, 17)]
    levels = torch.cat([u, *blurred])
    true, estimate = jpeg_kilobytes(levels), jpeg_kilobytes_surrogate(levels)
    print(f"golden, blurred: spearman {spearman(estimate, true):.3f}", true, estimate)
    assert spearman(estimate, true) > 0.95


def test_surrogate_calibration():
    """Refit the three factors of the surrogate and compare them with the constants."""
    rows, sizes = [], []
    for size in ((32, 32), (64, 64), (160, 208)):
        u = synthetic(*size, 24, seed=0)
        for quality in (95, 75, 50):
            terms = _terms(u, quality)
            rows.append(torch.stack(terms, 1).double())
            sizes.append(jpeg_kilobytes(u, quality).double() * 8000 - 8 * 623)
    x, y = torch.cat(rows), torch.cat(sizes)
    weight = 1 / (y + 4000)
    fit = torch.linalg.lstsq(x * weight[:, None], (y * weight)[:, None]).solution[:, 0]
    print("fitted factors", fit.tolist())
    assert torch.allclose(fit, torch.tensor(FACTORS).double(), rtol=0.1)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 3, 21, 35)])
def test_surrogate_gradient(shape):
    u = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u = F.avg_pool2d(F.pad(u, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    assert directional_error(lambda x: Jpeg(surrogate=True)(x, []), u, step=1e-6) < 1e-6
    flat = torch.full(shape, 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(Jpeg(surrogate=True)(flat, []).sum(), flat)
    assert gradient.isfinite().all()


def test_surrogate_ascent_compresses():
    u = synthetic(64, 64, 4, seed=3).requires_grad_()
    before = jpeg_kilobytes(u)
    total = build({"jpeg": {"surrogate": True}})
    for _ in range(20):
        (gradient,) = torch.autograd.grad(total(u, [""] * 4).sum(), u)
        u = (u + 0.01 * gradient.sign()).clamp(0, 1).detach().requires_grad_()
    print("kB before and after", before, jpeg_kilobytes(u))
    noisy = before > 2
    assert noisy.sum() >= 3
    assert (jpeg_kilobytes(u)[noisy] < 0.95 * before[noisy]).all()


def test_clip_equals_transformers(hf_clip, images):
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(hf_clip).eval()
    tokenizer = AutoTokenizer.from_pretrained(hf_clip)
    tokens = tokenizer(
        PROMPTS, padding="max_length", truncation=True, max_length=20, return_tensors="pt"
    )
    with torch.no_grad():
        out = model(**tokens, pixel_values=clip_pixels(images, 32))
        expected = out.logits_per_image.diagonal()
    assert expected.std() > 0.1
    got = Clip(hf_clip, scale="logit")(images, PROMPTS)
    assert torch.allclose(got, expected, atol=1e-4)
    cosine = Clip(hf_clip)(images, PROMPTS)
    assert torch.allclose(cosine * model.logit_scale.exp(), expected, atol=1e-4)
    assert torch.allclose(Clip(hf_clip, scale="100")(images, PROMPTS), 100 * cosine)
    half = Clip(hf_clip, dtype="bfloat16")(images, PROMPTS)
    assert half.dtype == torch.float32
    assert torch.allclose(half, cosine, atol=0.03)


def test_clip_reads_preprocessor_config(tmp_path, images):
    from transformers import CLIPImageProcessor

    folder = tiny_clip(tmp_path)
    CLIPImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(folder)
    reward = Clip(folder)
    assert [*reward.tower.mean, *reward.tower.std] == [0.5] * 6
    assert reward.tower.crop is True


@pytest.mark.parametrize("form", ["folder", "local-dir", "arch::file"])
def test_clip_equals_open_clip(oc_clip, images, form, tmp_path):
    import open_clip

    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{oc_clip}")
    tokens = open_clip.get_tokenizer(f"local-dir:{oc_clip}")(PROMPTS)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    spec = {"folder": oc_clip, "local-dir": f"local-dir:{oc_clip}"}.get(form)
    if spec is None:  # an architecture open_clip knows, and a bare state dict
        config = json.loads((Path(oc_clip) / "open_clip_config.json").read_text())["model_cfg"]
        (tmp_path / "tiny-arch.json").write_text(json.dumps(config))
        open_clip.add_model_config(tmp_path / "tiny-arch.json")
        torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pt")
        spec = f"tiny-arch::{tmp_path}/weights.pt"
        mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    with torch.no_grad():
        features = model.eval().encode_image(clip_pixels(images, 32, mean, std))
        expected = F.cosine_similarity(features, model.encode_text(tokens))
    reward = Clip(spec)
    assert type(reward.tower).__name__ == "_OpenClip"
    assert torch.allclose(reward(images, PROMPTS), expected, atol=1e-5)
    assert expected.std() > 1e-3


@pytest.mark.parametrize("backend", ["transformers", "open_clip"])
def test_clip_gradient(hf_clip, oc_clip, images, backend):
    model = hf_clip if backend == "transformers" else oc_clip
    reward = Clip(model, backend=backend, dtype="float64")
    assert directional_error(lambda x: reward(x, PROMPTS), images.double()) < 1e-5
    assert all(p.grad is None and not p.requires_grad for p in reward.parameters())
    assert not reward.train().training


@pytest.mark.parametrize("backend", ["transformers", "open_clip"])
def test_clip_batch_equals_one_by_one(hf_clip, oc_clip, images, backend):
    reward = Clip(hf_clip if backend == "transformers" else oc_clip)
    together = reward(images, PROMPTS)
    fresh = Clip(hf_clip if backend == "transformers" else oc_clip)
    alone = torch.cat([fresh(images[i : i + 1], [PROMPTS[i]]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert (together - together.roll(1)).abs().min() > 1e-4


def test_text_cache(hf_clip, images, monkeypatch):
    reward = Clip(hf_clip)
    calls = []
    text = reward.tower.text
    monkeypatch.setattr(reward.tower, "text", lambda t: calls.append(len(t)) or text(t))
    with torch.inference_mode():
        first = reward(images, PROMPTS)
    x = images.clone().requires_grad_()
    second = reward(x, PROMPTS)
    second.sum().backward()  # fails on features cached as inference tensors
    assert torch.equal(first, second.detach())
    assert calls == [3]
    reward(images, [PROMPTS[0], "new", "new"])
    assert calls == [3, 1]
    monkeypatch.setattr(rewards.clip, "CACHED_PROMPTS", 2)
    assert torch.allclose(reward(images, PROMPTS), first)
    assert len(reward._text_cache) == 2
    assert torch.allclose(reward(images, PROMPTS), first, atol=1e-5)
    reward(images, [f"prompt {i}" for i in range(3)])
    assert len(reward._text_cache) == 2


def test_clip_refuses_a_foreign_tokenizer(tmp_path):
    folder = tiny_clip(tmp_path / "a")
    other = tiny_clip(tmp_path / "b", merges=100)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (Path(folder) / name).write_bytes((Path(other) / name).read_bytes())
    with pytest.raises(ValueError, match="another model's tokenizer"):
        Clip(folder)


def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


redness.differentiable = True


def as_list(images, prompts, metadata=None, bonus=0.0):
    return [
        float(len(p)) + bonus + (metadata[i]["x"] if metadata else 0) for i, p in enumerate(prompts)
    ]


def test_weighted_sum(hf_clip, images):
    total = build(
        {
            "clip": {"weight": "1e-1", "model": hf_clip},
            "judge": {"type": "clip", "model": hf_clip, "scale": "100"},
            "jpeg": 0.5,
            redness: -2,
            as_list: {"weight": 1.5, "bonus": 1.0},
        }
    )
    assert list(total.parts) == ["clip", "judge", "jpeg", "redness", "as_list"]
    metadata = [{"x": 10.0 * i} for i in range(3)]
    value, parts = total.score(images, PROMPTS, metadata)
    weights = dict(zip(total.parts, (0.1, 1.0, 0.5, -2.0, 1.5), strict=True))
    assert total.weights == weights
    assert torch.allclose(value, sum(weights[k] * parts[k] for k in weights))
    assert torch.equal(total(images, PROMPTS, metadata), value)
    assert torch.equal(parts["jpeg"], -jpeg_kilobytes(images))
    assert torch.equal(parts["redness"], redness(images, PROMPTS))
    lengths = torch.tensor([len(p) for p in PROMPTS])
    assert torch.equal(parts["as_list"], lengths + torch.tensor([1.0, 11.0, 21.0]))
    assert torch.equal(parts["judge"], 100 * parts["clip"])
    assert value.shape == (3,)
    assert value.dtype == torch.float32


def test_differentiability(hf_clip, images):
    total = build({"clip": {"model": hf_clip}, redness: 2.0})
    total.require_differentiable()
    assert total.differentiable
    x = images.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = total(x, PROMPTS)
    value.sum().backward()
    assert torch.allclose(value, total(images, PROMPTS), atol=1e-6)  # autocast has no say
    assert x.grad.abs().max() > 0
    mixed = build({redness: 1.0, "jpeg": 1.0})
    assert not mixed.differentiable
    with pytest.raises(ValueError, match=r"rewards\.jpeg is not.*rewards\.jpeg\.surrogate=true"):
        mixed.require_differentiable()

    def detached(images, prompts):
        return redness(images.detach(), prompts)

    detached.differentiable = True
    with pytest.raises(RewardError, match="do not depend on the images"):
        build({detached: 1.0})(x, PROMPTS)


def test_module_function(tmp_path, monkeypatch, images):
    (tmp_path / "my_rewards_for_test.py").write_text(
        "import torch\n"
        "from rewards import Reward\n"
        "def redness(images, prompts):\n    return images[:, 0].mean((1, 2)).numpy()\n"
        "class Net(torch.nn.Module):\n"
        "    differentiable = True\n"
        "    def __init__(self, gain=1.0):\n"
        "        super().__init__()\n"
        "        self.gain = torch.nn.Parameter(torch.tensor(gain))\n"
        "        self.drop = torch.nn.Dropout(0.9)\n"
        "    def forward(self, images, prompts):\n"
        "        return self.drop(self.gain * images).mean((1, 2, 3))\n"
        "class Brightness(Reward):\n"
        "    differentiable = True\n"
        "    def forward(self, images, prompts, metadata=None):\n"
        "        return images.mean((1, 2, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    module = "my_rewards_for_test"
    total = build(
        {
            f"{module}:redness": 0.2,
            "net": {"type": f"{module}:Net", "gain": 3.0},
            f"{module}:Brightness": 1.0,
        }
    )
    total.train()
    _, parts = total.score(images, PROMPTS)
    assert torch.allclose(parts[f"{module}:redness"], images[:, 0].mean((1, 2)))
    assert torch.allclose(parts["net"], 3 * images.mean((1, 2, 3)))
    assert torch.allclose(parts["net"], 3 * parts[f"{module}:Brightness"])
    assert [p.requires_grad for p in total.parameters()] == [False]
    for spec, message in (
        ({f"{module}:rednes": 1.0}, "has no 'rednes'"),
        ({"no_such_module_:f": 1.0}, "cannot import 'no_such_module_'"),
        ({f"{module}:Net": {"gian": 1.0}}, "did you mean 'gain'"),
        ({f"{module}:Brightness": {"gain": 1.0}}, "unknown option 'gain'"),
        ({f"{module}:redness": {"gain": 1.0}}, "unknown option 'gain'"),
    ):
        with pytest.raises(ValueError, match=message):
            check(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "at least one"),
        ({"jpge": 1.0}, r"'jpge'; did you mean 'jpeg'\? Known: .*jpeg.*module:function"),
        (
            {"jpeg": {"qualty": 90}},
            r"rewards\.jpeg: unknown option 'qualty'; did you mean 'quali",
        ),
        ({"jpeg": {"quality": 900}}, "quality=900"),
        ({"jpeg": "high"}, "weight 'high' is not a finite number"),
        ({"jpeg": math.nan}, "weight nan"),
        ({"jpeg": True}, "weight True"),
        ({"jpeg": None}, "weight None"),
        ({"vlm": 1.0}, "missing required option url, model"),
        ({"clip": {"model": "x", "scale": "cos"}}, "scale='cos' is not one of cosine, 100, logit"),
        ({"clip": {"model": "assets/none"}}, "assets/none does not exist"),
        ({"clip": {"model": "ViT-H-14::./none.pt"}}, r"none\.pt does not exist"),
        ({"clip": {"model": "local-dir:none"}}, "none does not exist"),
        ({"a": {"type": "clap", "model": "x"}}, r"rewards\.a: unknown reward 'clap'; did you mean"),
        ({Jpeg(): {"quality": 90}}, "unknown option 'quality'"),
        ({"jpeg": 1.0, Jpeg(): 1.0}, "two rewards are called 'jpeg'"),
    ],
)
def test_spec_errors(spec, message):
    with pytest.raises(ValueError, match=message):
        check(spec)
    with pytest.raises(ValueError, match=message):
        build(spec)


def test_check_loads_nothing():
    check({"clip": {"model": "nobody/such-a-hub-id"}, "jpeg": "1e-3"})


def test_reward_failures_are_never_silent(images):
    def nan(images, prompts):
        return np.array([1.0, np.nan, np.inf])

    def wrong(images, prompts):
        return torch.zeros(3, 1)

    def broken(images, prompts):
        raise KeyError("colour")

    with pytest.raises(RewardError, match=r"'nan' returned nan at index 1 .*two blue") as caught:
        build({"jpeg": 1.0, nan: 0.0})(images, PROMPTS)
    error = caught.value
    assert (error.reward, error.prompt, error.index) == ("nan", PROMPTS[1], 1)
    assert torch.equal(error.image, images[1])
    with pytest.raises(RewardError, match=r"'wrong' returned \(3, 1\); .* shape \(3,\)"):
        build({wrong: 1.0})(images, PROMPTS)
    with pytest.raises(RewardError, match=r"'broken' raised KeyError.*a red circle") as caught:
        build({broken: 1.0})(images, PROMPTS)
    assert isinstance(caught.value.__cause__, KeyError)
    assert (caught.value.index, caught.value.prompt) == (None, PROMPTS[0])
    overflowed = images.clone()
    overflowed[2, 0, 0, 0] = math.nan
    with pytest.raises(RewardError, match="'jpeg' was given an image that contains NaN") as caught:
        build({"jpeg": 1.0})(overflowed, PROMPTS)
    assert caught.value.index == 2
    for bad in ((images, PROMPTS[:2]), (images[0], PROMPTS), (images.byte(), PROMPTS)):
        with pytest.raises(ValueError, match=r"one per image|expected \(n, 3, H, W\)"):
            build({"jpeg": 1.0})(*bad)


def test_function_reward_keeps_gradient_of_a_list(images):
    def listed(images, prompts):
        return [x.mean() for x in images]

    listed.differentiable = True
    x = images.clone().requires_grad_()
    rewards.evaluate(FunctionReward(listed), x, PROMPTS).sum().backward()
    assert torch.allclose(x.grad, torch.full_like(x, 1 / x[0].numel()))
    assert isinstance(FunctionReward(listed), Reward)
