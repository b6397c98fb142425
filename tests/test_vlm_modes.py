"""UnifiedReward's marks, levels of quality, and the model that is loaded here instead of asked."""

import hashlib
import math

import pytest
import torch
from helpers_http import stub
from helpers_qwen import tiny_qwen
from PIL import Image
from test_vlm import gray, judged_by
from transformers import AutoProcessor

from rewards import build, check, check_gradient, evaluate, gradients_of
from rewards.vlm import VLM
from rewards.vlm_questions import TEMPLATES

pytest.importorskip("httpx")

PROMPTS = ["a red cat", "two blue dogs by the sea, at night"]
LEVELS = ("excellent", "good", "fair", "poor", "bad")


def test_unified_reads_the_final_score():
    def opinion(question, value):
        assert "[a [cat]]" in question
        return f"cat (animal): 1\nred (attribute): 0\n**Final Score:** [{1 + 4 * value:g}]"

    with judged_by(opinion, mode="unified") as (vlm, _):
        assert vlm(gray(0.0, 0.5, 1.0), ["a [cat]"] * 3).tolist() == [0.0, 0.5, 1.0]
    for answer in ("cat (animal): 1", "Final Score: 7", "Final Score: high"):
        with (
            judged_by(lambda q, v, answer=answer: answer, mode="unified") as (vlm, _),
            pytest.raises(RuntimeError, match="no readable answer in 2 replies"),
        ):
            vlm(gray(0.5), ["a"])


def test_unified_axes_is_the_mean_of_the_three():
    text = (
        "Alignment Score (1-5): 2.694700002670288\nCoherence Score (1-5): 2.371500015258789\n"
        "Style Score (1-5): 2.802500009536743"
    )  # the example of UnifiedReward's script
    with judged_by(lambda q, v: text, mode="unified_axes") as (vlm, _):
        mean = (2.6947 + 2.3715 + 2.8025) / 3
        assert vlm(gray(0.5), ["a"]).tolist() == pytest.approx([(mean - 1) / 4], abs=1e-6)
    without = text.replace("Style", "Grace")
    with (
        judged_by(lambda q, v: without, mode="unified_axes") as (vlm, _),
        pytest.raises(RuntimeError, match="no readable answer"),
    ):
        vlm(gray(0.5), ["a"])


def test_the_questions_are_those_of_unified_reward():
    seen = [hashlib.sha256(TEMPLATES[k].encode()).hexdigest() for k in ("unified", "unified_axes")]
    assert seen == [
        "f56f919ce3bc6aab3c173a5f836defe195e17e9614753e8b4c3dc2405bd4975b",
        "75d52d3ae771f89b682db3b74cdaca1c7bde373a39162bc1c9dabd63cdc9b851",
    ]  # of CodeGoat24/UnifiedReward ed52f98 and a759534


def test_levels_is_the_expectation_of_the_words():
    chance = {" Excellent": 0.2, "excellent": 0.1, "GOOD": 0.3, "poor": 0.1, "The": 0.3}
    with judged_by(lambda q, v: chance, mode="levels") as (vlm, judge):
        expected = (0.3 * 5 + 0.3 * 4 + 0.1 * 2) / 0.7  # on DeQA-Score's scale of 1 to 5
        assert vlm(gray(0.5), ["a"]).tolist() == pytest.approx([(expected - 1) / 4])
        assert "excellent, good, fair, poor or bad" in judge.questions[0][0]
        assert vlm.differentiable is False
    with (
        judged_by(lambda q, v: {"The": 0.9}, mode="levels") as (vlm, _),
        pytest.raises(RuntimeError, match="none of excellent, good, fair, poor, bad is among"),
    ):
        vlm(gray(0.5), ["a"])


def test_levels_after_the_start_of_an_answer():
    asked = []

    def reply(path, payload, headers):
        asked.append(payload)
        top = [{"token": " fair", "logprob": math.log(0.5)}]
        choice = {"message": {"content": " fair"}, "logprobs": {"content": [{"top_logprobs": top}]}}
        return 200, {"choices": [choice]}

    start = "The quality of the image is"
    with stub(reply) as address:
        question = "How would you rate the quality of this image?"
        vlm = VLM(address, "deqa", "levels", template=question, answer_start=start)
        assert vlm(gray(0.5), ["a"]).tolist() == [0.5]
    assert asked[0]["messages"][0]["content"][-1]["text"] == question
    assert asked[0]["messages"][1] == {"role": "assistant", "content": start}
    assert asked[0]["continue_final_message"] is True
    assert asked[0]["add_generation_prompt"] is False


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return str(folder), tiny_qwen(folder, request.param, (*LEVELS, "Yes", "No", "no"))


def pictures(*shape, seed=0):
    small = torch.rand(*shape[:-2], 4, 5, generator=torch.Generator().manual_seed(seed))
    large = torch.nn.functional.interpolate(small, shape[-2:], mode="bilinear")
    return (large * 255).round() / 255


@torch.no_grad()
def restated(made, image, question, start, words):
    """The probabilities of words, by the processor and the whole model of transformers."""
    folder, model = made
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    inputs = processor(
        text=[text + start],
        images=[Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy())],
        return_tensors="pt",
    )
    p = model(**inputs).logits[0, -1].softmax(0)
    ids = processor.tokenizer.convert_tokens_to_ids
    return [sum(p[ids(form)].item() for form in forms) for forms in words]


def test_a_local_model_reads_as_transformers_does(made):
    images = pictures(2, 3, 84, 56)  # needs no resizing, so that the pixels are the same
    start = "The quality of the image is"
    levels = VLM("local", made[0], "levels", answer_start=start, dtype="float32")
    values = evaluate(levels, images, PROMPTS)
    for image, value in zip(images, values.tolist(), strict=True):
        p = restated(made, image, TEMPLATES["levels"], start, [[word] for word in LEVELS])
        score = sum(q * weight for q, weight in zip(p, (5, 4, 3, 2, 1), strict=True)) / sum(p)
        assert value == pytest.approx((score - 1) / 4, abs=1e-5)
    assert values[0] != pytest.approx(values[1].item(), abs=1e-3)
    yes = VLM("local", made[0], "yes", dtype="float32")
    values = evaluate(yes, images, PROMPTS)  # of different length
    for image, prompt, value in zip(images, PROMPTS, values.tolist(), strict=True):
        question = TEMPLATES["yes"].replace("{prompt}", prompt)
        yes_, no = restated(made, image, question, "", [["Yes"], ["No", "no"]])
        assert value == pytest.approx(yes_ / (yes_ + no), abs=1e-5)
    ragged = torch.cat([yes(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)])
    assert torch.allclose(values, ragged, atol=1e-5)


def test_the_gradient_of_a_local_model(made):
    reward = VLM("local", made[0], "levels", dtype="float64")
    images = pictures(1, 3, 60, 60).double().requires_grad_()
    gradient = torch.autograd.grad(evaluate(reward, images, PROMPTS[:1]).sum(), images)[0]
    assert (gradient != 0).all()
    with torch.no_grad():
        way = torch.randn(images.shape, generator=torch.Generator().manual_seed(2)).double()
        ends = [reward(images + step * way, PROMPTS[:1]).item() for step in (1e-3, -1e-3)]
    assert (ends[0] - ends[1]) / 2e-3 == pytest.approx((gradient * way).sum().item(), rel=0.02)
    with pytest.raises(RuntimeError, match="url=local is only read and writes no text"):
        reward.critique(images[0].detach(), "a cat")


def test_a_local_model_that_cannot_be_read_is_refused(tmp_path, made):
    spec = {"type": "vlm", "url": "local", "model": made[0], "mode": "yes"}
    assert gradients_of({"judge": spec}) == {"judge": True}
    check_gradient({"judge": spec})
    with pytest.raises(ValueError, match=r"rewards\.judge\.url=local with mode yes or levels"):
        check_gradient({"judge": {**spec, "url": "http://localhost:1"}})
    for options, message in (
        ({"mode": "score"}, "mode='score' writes a text; url=local only reads, modes yes, levels"),
        ({"dtype": "int8"}, "dtype='int8' is not one of"),
        (
            {"mode": "pairwise", "url": "http://localhost:1", "answer_start": "It"},
            "is only for the",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            check({"judge": {**spec, **options}})
    check({"judge": {**spec, "mode": "levels", "template": "How good is it?"}})
    reward = build({"judge": spec}).get_submodule("rewards.0")
    with pytest.raises(ValueError, match=r"holds <\|image_pad\|>, a special token"):
        reward(pictures(1, 3, 56, 56), ["a <|image_pad|>"])
    bare = tmp_path / "bare"
    tiny_qwen(bare, words=("Yes", "excellent"))
    for mode, word in (("yes", "No"), ("levels", "good")):
        spec = {"type": "vlm", "url": "local", "model": str(bare), "mode": mode}
        with pytest.raises(ValueError, match=f"'{word}' is no single token of .*bare"):
            build({"judge": spec}).get_submodule("rewards.0")(pictures(1, 3, 56, 56), ["a"])
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="is a gpt2; url: local takes one of qwen2_vl, qwen2_5_vl"):
        build({"judge": {**spec, "model": str(tmp_path)}})
