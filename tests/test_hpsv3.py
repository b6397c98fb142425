"""HPSv3 on tiny checkpoints of the released format, against a restatement of its own pipeline."""

import hashlib
import json
import re

import pytest
import torch
from helpers_qwen import tiny_qwen
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import AutoProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from rewards import build, check, evaluate
from rewards.hpsv3 import AREA, HPSv3
from rewards.hpsv3_text import ABOUT, REWARD
from rewards.qwen import qwen_patches

PROMPTS = ["a red cat", "two {text_prompt} dogs by the sea, {image}"]
AFTER = "\n\nEND\n"  # what HPSv3's own text has after the token


def old_names(name):
    """A name as transformers below 4.52 saved it, and as HPSv3.safetensors has it."""
    name = re.sub(r"^model\.visual\.", "visual.", name)
    return re.sub(r"^model\.language_model\.", "model.", name)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a base, its model and the scoring head, and the checkpoint of both."""
    base = tmp_path_factory.mktemp("base")
    model = tiny_qwen(base)
    settings = json.loads((base / "config.json").read_text())
    text = settings.pop("text_config")  # on the hub Qwen2-VL's config is flat
    (base / "config.json").write_text(json.dumps({**text, **settings}))
    (base / "model.safetensors").unlink()  # the checkpoint has all weights
    processor = AutoProcessor.from_pretrained(base)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": [REWARD]})
    torch.manual_seed(1)
    model.resize_token_embeddings(len(processor.tokenizer))
    head = nn.Sequential(
        nn.Linear(32, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(),
        nn.Linear(16, 2),
    ).eval()  # fmt: skip
    state = {old_names(k): v.clone() for k, v in model.state_dict().items()}
    state |= {f"rm_head.{k}": v for k, v in head.state_dict().items()}
    assert {"visual.patch_embed.proj.weight", "model.embed_tokens.weight", "lm_head.weight"} < {
        *state
    }
    save_file(state, base / "HPSv3.safetensors")
    return base, model, processor, head, state


@pytest.fixture(scope="module")
def reward(made):
    return HPSv3(str(made[0] / "HPSv3.safetensors"), str(made[0]), dtype="float32")


def pictures(*shape, seed=0):
    """Smooth random images of 8 bits."""
    small = torch.rand(*shape[:-2], 9, 7, generator=torch.Generator().manual_seed(seed))
    large = nn.functional.interpolate(small, shape[-2:], mode="bilinear")
    return (large * 255).round() / 255


def pil(images):
    return [Image.fromarray((i * 255).byte().permute(1, 2, 0).numpy()) for i in images]


@torch.no_grad()
def restated(made, images, prompts):
    """HPSv3's own steps, in transformers' classes: (n, 2)."""
    _, model, processor, head, _ = made
    texts = [ABOUT.replace("{text_prompt}", prompt) + AFTER for prompt in prompts]
    messages = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        for text in texts
    ]
    processor.tokenizer.padding_side = "right"
    inputs = processor(
        text=processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
        images=pil(images), padding=True, return_tensors="pt",
    )  # fmt: skip
    inner = model.model
    states = inner.get_input_embeddings()(inputs.input_ids)
    seen = inner.visual(inputs.pixel_values, grid_thw=inputs.image_grid_thw).pooler_output
    states = states.masked_scatter(
        (inputs.input_ids == model.config.image_token_id)[..., None], seen
    )
    states = inner.language_model(inputs_embeds=states, attention_mask=inputs.attention_mask)
    at = inputs.input_ids == processor.tokenizer.convert_tokens_to_ids(REWARD)
    assert at.sum() == len(prompts)
    return head(states.last_hidden_state)[at]


def test_scores_are_those_of_hpsv3s_own_steps(made, reward):
    images = pictures(2, 3, 448, 448)  # needs no resizing, so that the pixels are the same
    expected = restated(made, images, PROMPTS)
    values = evaluate(reward, images, PROMPTS)
    assert torch.allclose(values, expected[:, 0], atol=1e-4)
    assert expected[0, 0] != pytest.approx(expected[1, 0].item(), abs=0.01)
    mean, doubt = reward.distribution(images, PROMPTS)
    assert torch.allclose(doubt, expected[:, 1].exp(), rtol=1e-4)
    reward.caution = 0.5
    assert torch.equal(reward(images, PROMPTS), mean - 0.5 * doubt)
    reward.caution = 0.0
    for other in (images.flip(0), images.flip(-1)):
        assert (reward(other, PROMPTS) - values).abs().min() > 1e-3


def test_other_sizes_and_companions(made, reward):
    images = pictures(2, 3, 300, 517)
    expected = restated(
        made, nn.functional.interpolate(images, (364, 616), mode="bicubic"), PROMPTS
    )
    assert qwen_patches(images, AREA, AREA)[1].tolist() == [[1, 26, 44]] * 2  # 364 x 616
    values = reward(images, PROMPTS)
    assert torch.allclose(values, expected[:, 0], atol=0.3)  # another bicubic filter
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)])
    assert torch.allclose(values, alone, atol=1e-4)


def test_patches_are_those_of_transformers_image_processors():
    for least, most in ((AREA, AREA), (56 * 56, 28 * 28 * 1280)):
        for size in ((64, 64), (300, 517), (512, 512), (1024, 768)):
            images = pictures(2, 3, *size)
            for kind in (Qwen2VLImageProcessor, Qwen2VLImageProcessorPil):
                theirs = kind(min_pixels=least, max_pixels=most)(pil(images), return_tensors="pt")
                exact, grid = qwen_patches(images, least, most, quantize=True)
                smooth, _ = qwen_patches(images, least, most)
                assert torch.equal(grid, theirs["image_grid_thw"])
                off = (exact - theirs["pixel_values"]).abs()
                assert off.max() < 2.1 / 255 / 0.26  # two levels, in few pixels
                assert off.mean() < 5e-4
                assert (smooth - theirs["pixel_values"]).abs().mean() < 6e-3  # rounding


def test_gradient_reaches_every_pixel_and_is_right(made):
    reward = HPSv3(str(made[0] / "HPSv3.safetensors"), str(made[0]), dtype="float64")
    images = pictures(1, 3, 60, 60).double().requires_grad_()
    gradient = torch.autograd.grad(reward(images, PROMPTS[:1]).sum(), images)[0]
    assert (gradient != 0).all()
    with torch.no_grad():
        way = torch.randn(images.shape, generator=torch.Generator().manual_seed(2)).double()
        ends = [reward(images + step * way, PROMPTS[:1]).item() for step in (1e-4, -1e-4)]
    # RMSNorm is float32 whatever the dtype, and the head's ReLUs have kinks
    assert (ends[0] - ends[1]) / 2e-4 == pytest.approx((gradient * way).sum().item(), rel=0.02)


def test_todays_names_a_pickle_and_bfloat16(made, reward, tmp_path):
    base, model, _, _, state = made
    today = {k: v for k, v in state.items() if k.startswith("rm_head.")} | model.state_dict()
    torch.save({"model": today}, tmp_path / "hpsv3.pth")
    images = pictures(1, 3, 64, 64)
    again = HPSv3(str(tmp_path / "hpsv3.pth"), str(base), dtype="float32")
    assert torch.equal(again(images, PROMPTS[:1]), reward(images, PROMPTS[:1]))
    spec = {"hpsv3": {"checkpoint": str(base / "HPSv3.safetensors"), "base": str(base)}}
    half = build(spec)
    assert half(images, PROMPTS[:1]) == pytest.approx(again(images, PROMPTS[:1]).item(), abs=0.5)
    dtypes = {name: p.dtype for name, p in half.named_parameters() if "head" in name}
    assert set(dtypes.values()) == {torch.float32}
    assert sum(p.dtype == torch.bfloat16 for p in half.parameters()) == 57


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rm_head.5.weight": torch.zeros(4, 16)}, r"rm_head\.5\.weight is missing, unknown or of"),
        ({"rm_head.3.bias": None}, r"rm_head\.3\.bias is missing"),
        ({"rm_head.6.bias": torch.zeros(2)}, r"rm_head\.6\.bias is missing, unknown"),
        ({"film.weight": torch.zeros(2)}, r"film\.weight is missing, unknown"),
        ({"model.norm.weight": None}, "has no weights for language_model.norm.weight"),
        ({"model.norm.weight": torch.ones(31)}, "has weights that do not fit its config"),
        ({"model.embed_tokens.weight": torch.zeros(260, 32)}, r"has 264 tokens .* embeds 260"),
        ({"rm_head.0.weight": None}, "no weights of Qwen2-VL and rm_head; give HPSv3.safetensors"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(made, tmp_path, change, message):
    state = {k: v for k, v in (made[4] | change).items() if v is not None}
    save_file(state, tmp_path / "other.safetensors")
    spec = {"hpsv3": {"checkpoint": str(tmp_path / "other.safetensors"), "base": str(made[0])}}
    with pytest.raises(ValueError, match=message):
        build(spec)


def test_bad_options_and_prompts_are_refused_before_loading(tmp_path):
    for options, message in (
        ({"checkpoint": "none.pt"}, r"checkpoint='none\.pt' does not exist"),
        ({"caution": -1}, "caution=-1 is not a number of 0 or more"),
        ({"dtype": "int8"}, "dtype='int8' is not one of bfloat16"),
    ):
        with pytest.raises(ValueError, match=rf"rewards\.hpsv3: {message}"):
            check({"hpsv3": options})
    with pytest.raises(ValueError, match=r"holds <\|Reward\|>, a special token .* remove it"):
        check({"hpsv3": 1.0}, ["a cat <|Reward|>"])
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "x.pt").touch()
    with pytest.raises(ValueError, match="base="):
        HPSv3(str(tmp_path / "x.pt"), str(tmp_path))


def test_the_text_is_that_of_training():
    # of INSTRUCTION + prompt_with_special_token, in hpsv3-1.0.0-py3-none-any.whl
    assert (
        hashlib.sha256((ABOUT + AFTER).encode()).hexdigest()
        == "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"
    )
    assert ABOUT.count("{text_prompt}") == 1
    assert ABOUT.endswith(REWARD)
