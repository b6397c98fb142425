"""ImageReward against golden numbers, a plain restatement of its maths, and its own gradient."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from rewards import RewardError, clip_pixels, evaluate
from rewards.imagereward import MEAN, STD, UNUSED, ImageReward, build, imagereward_name, load

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
PROMPTS = ["a red cat", "two blue dogs by the sea", "sun"]
VISION, TEXT = "blip.visual_encoder.", "blip.text_encoder."
WIDTH, HIDDEN, VISION_HEADS, TEXT_HEADS = 48, 32, 3, 4


def vocabulary():
    letters = "abcdefghijklmnopqrstuvwxyz"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return [*special, *letters, *(f"##{c}" for c in letters), "red", "cat", "dog", "sun", "sea"]


def tiny_state(seed=0, size=32, positions=40):
    """Random weights by ImageReward's names: 2 + 2 layers, [DEC] and [ENC] in the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    state = {TEXT + "embeddings.position_ids": torch.arange(positions)[None]}

    def add(name, *shape):
        state[name] = torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 0.1)

    def linear(name, inputs, outputs):
        add(name + ".weight", outputs, inputs)
        add(name + ".bias", outputs)

    def norm(name, width):
        linear(name, 1, width)
        state[name + ".weight"] = 1 + state[name + ".weight"][:, 0]

    add(VISION + "cls_token", 1, 1, WIDTH)
    add(VISION + "pos_embed", 1, 1 + (size // 16) ** 2, WIDTH)
    add(VISION + "patch_embed.proj.weight", WIDTH, 3, 16, 16)
    add(VISION + "patch_embed.proj.bias", WIDTH)
    for i in range(2):
        block = f"{VISION}blocks.{i}."
        norm(block + "norm1", WIDTH)
        norm(block + "norm2", WIDTH)
        linear(block + "attn.qkv", WIDTH, 3 * WIDTH)
        linear(block + "attn.proj", WIDTH, WIDTH)
        linear(block + "mlp.fc1", WIDTH, 4 * WIDTH)
        linear(block + "mlp.fc2", 4 * WIDTH, WIDTH)
    norm(VISION + "norm", WIDTH)
    add(TEXT + "embeddings.word_embeddings.weight", len(vocabulary()) + 2, HIDDEN)
    add(TEXT + "embeddings.position_embeddings.weight", positions, HIDDEN)
    norm(TEXT + "embeddings.LayerNorm", HIDDEN)
    for i in range(2):
        layer = f"{TEXT}encoder.layer.{i}."
        for kind, source in (("attention", HIDDEN), ("crossattention", WIDTH)):
            linear(f"{layer}{kind}.self.query", HIDDEN, HIDDEN)
            linear(f"{layer}{kind}.self.key", source, HIDDEN)
            linear(f"{layer}{kind}.self.value", source, HIDDEN)
            linear(f"{layer}{kind}.output.dense", HIDDEN, HIDDEN)
            norm(f"{layer}{kind}.output.LayerNorm", HIDDEN)
        linear(layer + "intermediate.dense", HIDDEN, 64)
        linear(layer + "output.dense", 64, HIDDEN)
        norm(layer + "output.LayerNorm", HIDDEN)
    linear("blip.vision_proj", WIDTH, 256)
    linear("blip.text_proj", HIDDEN, 256)
    sizes = [HIDDEN, 1024, 128, 64, 16, 1]
    for i, inputs, outputs in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
        linear(f"mlp.layers.{i}", inputs, outputs)
        state[f"mlp.layers.{i}.weight"] /= math.sqrt(inputs) * 0.3
    return state


def plain_score(state, pixels, ids, mask):
    """The score written out in float64, from the weights by name."""
    state = {k: v.double() for k, v in state.items()}

    def linear(name, x):
        return F.linear(x, state[name + ".weight"], state[name + ".bias"])

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"], eps)

    def attend(q, k, v, heads, bias: Any = 0.0):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.mT / math.sqrt(q.shape[-1]) + bias).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    patches = F.conv2d(
        pixels.double(),
        state[VISION + "patch_embed.proj.weight"],
        state[VISION + "patch_embed.proj.bias"],
        stride=16,
    )
    cls = state[VISION + "cls_token"].expand(len(pixels), -1, -1)
    x = torch.cat([cls, patches.flatten(2).mT], 1) + state[VISION + "pos_embed"]
    for i in range(2):
        block = f"{VISION}blocks.{i}."
        qkv = linear(block + "attn.qkv", norm(block + "norm1", x, 1e-6))
        x = x + linear(block + "attn.proj", attend(*qkv.chunk(3, -1), VISION_HEADS))
        hidden = F.gelu(linear(block + "mlp.fc1", norm(block + "norm2", x, 1e-6)))
        x = x + linear(block + "mlp.fc2", hidden)
    x = norm(VISION + "norm", x, 1e-6)

    words = state[TEXT + "embeddings.word_embeddings.weight"][ids]
    places = state[TEXT + "embeddings.position_embeddings.weight"][: ids.shape[1]]
    h = norm(TEXT + "embeddings.LayerNorm", words + places, 1e-12)
    hide = torch.where(mask.bool(), 0.0, -math.inf)[:, None, None].double()
    for i in range(2):
        layer = f"{TEXT}encoder.layer.{i}."
        for kind, source, bias in (("attention", None, hide), ("crossattention", x, 0.0)):
            name = f"{layer}{kind}.self."
            seen = h if source is None else source
            keys, values = linear(name + "key", seen), linear(name + "value", seen)
            out = attend(linear(name + "query", h), keys, values, TEXT_HEADS, bias)
            out = linear(f"{layer}{kind}.output.dense", out)
            h = norm(f"{layer}{kind}.output.LayerNorm", h + out, 1e-12)
        hidden = F.gelu(linear(layer + "intermediate.dense", h))
        h = norm(layer + "output.LayerNorm", h + linear(layer + "output.dense", hidden), 1e-12)
    value = h[:, 0]
    for i in (0, 2, 4, 6, 7):
        value = linear(f"mlp.layers.{i}", value)
    return (value[:, 0] - MEAN) / STD


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer, a med_config.json, and one state dict in both formats."""
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("imagereward")
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary())})
    assert len(tokenizer) == len(vocabulary())
    tokenizer.save_pretrained(folder / "tokenizer")
    config = {"num_attention_heads": TEXT_HEADS, "hidden_size": 768, "model_type": "bert"}
    (folder / "med_config.json").write_text(json.dumps(config))
    torch.save(tiny_state(), folder / "tiny.pt")
    save_file(tiny_state(), folder / "tiny.safetensors")
    return folder


def make(folder, **changes):
    return ImageReward(**options(folder, **changes))


def options(folder, **changes) -> dict[str, Any]:
    return {
        "checkpoint": str(folder / "tiny.safetensors"),
        "config": str(folder / "med_config.json"),
        "vision_heads": VISION_HEADS,
        "tokenizer": str(folder / "tokenizer"),
    } | changes


@pytest.fixture(scope="module")
def reward(folder):
    return make(folder)


@pytest.fixture
def images():
    return torch.rand(3, 3, 40, 48, generator=torch.Generator().manual_seed(0))


def test_golden(tmp_path, folder):
    path = GOLDEN / "imagereward_tiny.safetensors"
    if not path.exists():
        pytest.skip("golden numbers are not in this checkout")
    golden = load_file(path)
    state = {k.removeprefix("state."): v for k, v in golden.items() if k.startswith("state.")}
    save_file(state, tmp_path / "tiny.safetensors")
    network = load(
        str(tmp_path / "tiny.safetensors"), str(folder / "med_config.json"), VISION_HEADS
    ).eval()
    pixels = golden["image"].requires_grad_()
    ids, mask = golden["input_ids"], golden["attention_mask"]
    score = network(pixels, ids, mask)
    (gradient,) = torch.autograd.grad(score.sum(), pixels)
    # A layer norm's eps of 1e-5 in place of 1e-6 would move the score by 5e-6.
    assert (score - golden["score"]).abs().max() < 1e-6
    embeds = network.vision(pixels).last_hidden_state
    assert (embeds - golden["image_embeds"]).abs().max() < 1e-5
    assert (gradient - golden["image_grad"]).abs().max() < 1e-5 * golden["image_grad"].abs().max()
    assert (plain_score(state, pixels, ids, mask) - golden["score"]).abs().max() < 1e-6


def test_full_size_names_and_shapes():
    path = GOLDEN / "imagereward_keys.json"
    if not path.exists():
        pytest.skip("the full-size key list is not in this checkout")
    keys = {k: tuple(v) for k, v in json.loads(path.read_text()).items()}
    network = build({k: v for k, v in keys.items() if not re.fullmatch(UNUSED, k)})
    made = {imagereward_name(k): tuple(v.shape) for k, v in network.state_dict().items()}
    assert {k: v for k, v in keys.items() if k not in made} == {
        TEXT + "embeddings.position_ids": (1, 512),
        "blip.vision_proj.weight": (256, 1024),
        "blip.vision_proj.bias": (256,),
        "blip.text_proj.weight": (256, 768),
        "blip.text_proj.bias": (256,),
    }
    assert made == {k: v for k, v in keys.items() if k in made}
    vision, text = network.vision.config, network.text.config
    assert (vision.image_size, vision.num_attention_heads, vision.num_hidden_layers) == (
        224,
        16,
        24,
    )
    assert (text.num_attention_heads, text.num_hidden_layers, text.vocab_size) == (12, 12, 30524)


def test_score_is_the_formula(folder, reward, images):
    tokenizer = reward.tokenizer
    texts = [tokenizer.tokenize(p) for p in PROMPTS]
    words = [["[CLS]", *t, "[SEP]"] for t in texts]
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(w) + [0] * (35 - len(w)) for w in words])
    mask = torch.tensor([[1] * len(w) + [0] * (35 - len(w)) for w in words])
    expected = plain_score(tiny_state(), clip_pixels(images, 32), ids, mask)
    score = reward(images, PROMPTS)
    assert score.dtype == torch.float32
    assert score.shape == (3,)
    assert expected.std() > 0.05  # the prompts and images matter
    assert (score - expected).abs().max() < 1e-5
    assert torch.equal(evaluate(reward, images, PROMPTS), score)
    other = make(folder, checkpoint=str(folder / "tiny.pt"))
    assert (other(images, PROMPTS) - score).abs().max() < 1e-6


def test_hub_checkpoint(folder, images, reward, monkeypatch):
    asked = []

    def download(*arguments):
        asked.append(arguments)
        return str(folder / "tiny.pt")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    other = make(folder, checkpoint="THUDM/ImageReward:ImageReward.pt")
    assert asked == [("THUDM/ImageReward", "ImageReward.pt")]
    assert (other(images, PROMPTS) - reward(images, PROMPTS)).abs().max() < 1e-6


def test_gradient_by_finite_differences(folder, images):
    reward = make(folder, dtype="float64")
    images = images.double().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS).sum(), images)
    assert all(not p.requires_grad for p in reward.parameters())
    step = 1e-5
    for i, c, y, x in ((0, 0, 3, 20), (1, 1, 20, 24), (2, 2, 39, 30)):
        moved = torch.zeros_like(images)
        moved[i, c, y, x] = step
        with torch.no_grad():
            ahead, behind = reward(images + moved, PROMPTS), reward(images - moved, PROMPTS)
        numeric = (ahead - behind)[i] / (2 * step)
        assert abs(float(gradient[i, c, y, x] / numeric) - 1) < 1e-5


def test_batch_is_one_by_one(reward, images):
    alone = torch.cat([reward(images[i : i + 1], [PROMPTS[i]]) for i in range(3)])
    assert (reward(images, PROMPTS) - alone).abs().max() < 1e-5


def test_padding_is_ignored_and_long_prompts_are_cut(folder, reward, images):
    short = make(folder, max_length=20)
    assert (short(images, PROMPTS) - reward(images, PROMPTS)).abs().max() < 1e-5
    tokens = short.tokenizer(PROMPTS[:1], return_tensors="pt")  # no padding at all
    bare = reward.network(clip_pixels(images[:1], 32), tokens.input_ids, tokens.attention_mask)
    assert (bare - reward(images, PROMPTS)[:1]).abs().max() < 1e-5

    long, longer = "sun " * 33 + "cat", "sun " * 33 + "dog cat sea"
    once = images[:1]
    assert torch.equal(reward(once, [long]), reward(once, [longer]))
    assert torch.equal(reward(once, [long]), reward(once, ["sun " * 33]))  # 35 with both ends
    assert (reward(once, [long]) - reward(once, ["sun " * 32])).abs() > 1e-5
    wide = make(folder, max_length=40)
    assert (wide(once, [long]) - wide(once, [longer])).abs() > 1e-5


def test_bfloat16_towers(folder, reward, images):
    half = make(folder, dtype="bfloat16")
    score = half(images, PROMPTS)
    assert score.dtype == torch.float32
    assert half.network.head[0].weight.dtype == torch.float32
    assert {p.dtype for p in half.network.vision.parameters()} == {torch.bfloat16}
    error = (score - reward(images, PROMPTS)).abs().max()
    assert 0 < error < 0.1, error
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(half(images, PROMPTS).sum(), images)
    (exact,) = torch.autograd.grad(reward(images, PROMPTS).sum(), images)
    assert F.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0) > 0.99


def test_stays_in_eval_mode_and_off_meta(reward, images):
    before = reward(images, PROMPTS)
    reward.train()
    assert not any(m.training for m in reward.modules())
    assert torch.equal(reward(images, PROMPTS), before)
    assert not any(t.is_meta for t in [*reward.parameters(), *reward.buffers()])


def without(*keys):
    return lambda state: {k: v for k, v in state.items() if k not in keys}


QKV = VISION + "blocks.1.attn.qkv.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without(QKV), rf"'{QKV}' is missing and should be \(144, 48\)"),
        (without(VISION + "pos_embed"), rf"'{VISION}pos_embed' is missing"),
        (without("mlp.layers.7.bias"), r"'mlp.layers.7.bias' is missing and should be \(1,\)"),
        (lambda s: s | {QKV: s[QKV][:96]}, rf"'{QKV}' is \(96, 48\) and should be \(144, 48\)"),
        (lambda s: s | {"logit": torch.ones(2)}, r"'logit' is \(2,\) and should be absent"),
        (lambda s: {"model": s, "epoch": 3}, rf"'{VISION}patch_embed.proj.weight' is missing"),
        (lambda s: list(s.values()), rf"'{VISION}patch_embed.proj.weight' is missing"),
    ],
)
def test_other_checkpoints_are_refused(folder, tmp_path, damage, message):
    path = tmp_path / "other.pt"
    torch.save(damage(tiny_state()), path)
    with pytest.raises(ValueError, match=message) as caught:
        make(folder, checkpoint=str(path))
    assert str(path) in str(caught.value)
    assert "huggingface.co/THUDM/ImageReward" in str(caught.value)


def test_unused_weights_may_be_absent(folder, tmp_path, reward, images):
    state = {k: v for k, v in tiny_state().items() if not re.fullmatch(UNUSED, k)}
    assert len(state) == len(tiny_state()) - 5
    save_file(state, tmp_path / "used.safetensors")
    other = make(folder, checkpoint=str(tmp_path / "used.safetensors"))
    assert (other(images, PROMPTS) - reward(images, PROMPTS)).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["pointer.pt", "pointer.safetensors", "code.pt"])
def test_files_that_are_not_tensors_are_refused(folder, tmp_path, name):
    path = tmp_path / name
    if name == "code.pt":
        torch.save({"a": Path("runs code when unpickled")}, path)
    else:
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"no tensors can be read .* Give ImageReward.pt"):
        make(folder, checkpoint=str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8' is not one of float32"),
        ({"checkpoint": "missing/ImageReward.pt"}, "ORG/REPO:NAME"),
        ({"checkpoint": None}, "ORG/REPO:NAME"),
        ({"config": "missing.json"}, "config='missing.json' does not exist"),
        ({"tokenizer": "/missing/tokenizer"}, "tokenizer='/missing/tokenizer' does not exist"),
        ({"vision_heads": 0}, "vision_heads=0 is not a positive integer"),
        ({"vision_heads": 2.0}, "vision_heads=2.0 is not a positive integer"),
        ({"max_length": 2}, "max_length=2 is not an integer of at least 3"),
    ],
)
def test_options_are_checked_before_loading(folder, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ImageReward.check_options(**options(folder, **change))


def test_default_options_pass():
    ImageReward.check_options()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": 41}, "max_length=41 exceeds the 40 positions"),
        ({"vision_heads": None}, "48 does not divide into heads of 64; set vision_heads"),
        ({"vision_heads": 5}, "48 does not divide into 5 heads; set vision_heads"),
        (
            {"config": None},
            "32 does not divide into heads of 64; set num_attention_heads in config",
        ),
    ],
)
def test_options_that_the_checkpoint_refuses(folder, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(folder, **change)


def test_foreign_tokenizer_is_refused(folder, tmp_path):
    from transformers import BertTokenizer

    words = vocabulary()[:-1]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"has {len(words)} tokens, .* embeds {len(words) + 3}"):
        make(folder, tokenizer=str(tmp_path))


def test_failures_name_the_prompt(reward, images):
    images[1] = math.nan
    with pytest.raises(RewardError, match="two blue dogs"):
        evaluate(reward, images, PROMPTS)
