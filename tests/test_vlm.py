"""The judge behind an OpenAI-compatible endpoint: its modes, its failures, both orders."""

import base64
import contextlib
import io
import itertools
import math
import random
import time

import numpy as np
import pytest
import torch
from helpers_http import stub
from PIL import Image

from rewards import build, evaluate, http
from rewards.vlm import VLM

pytest.importorskip("httpx")


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(http, "FIRST_WAIT", 0.02)


def gray(*values):
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 8, 8)


class Judge:
    """An OpenAI-compatible endpoint: opinion(question, brightnesses) -> text or top_logprobs."""

    def __init__(self, opinion):
        self.opinion, self.questions, self.headers = opinion, [], []

    def __call__(self, path, payload, headers):
        assert path == "/v1/chat/completions"
        assert (payload["model"], payload["temperature"]) == ("judge", 0)
        *shown, question = payload["messages"][0]["content"]
        values = []
        for part in shown:
            if part["type"] == "image_url":
                data = part["image_url"]["url"].removeprefix("data:image/png;base64,")
                with Image.open(io.BytesIO(base64.b64decode(data))) as image:
                    values.append(round(np.asarray(image).mean() / 255, 2))
        self.questions.append((question["text"], *values))
        self.headers.append(headers["authorization"])
        opinion = self.opinion(question["text"], *values)
        choice = {"message": {"role": "assistant", "content": opinion}}
        if isinstance(opinion, dict):
            assert payload["logprobs"] is True
            top = [{"token": t, "logprob": math.log(p)} for t, p in opinion.items()]
            choice = {
                "message": {"content": "Yes"},
                "logprobs": {"content": [{"top_logprobs": top}]},
            }
        return 200, {"choices": [choice]}


@contextlib.contextmanager
def judged_by(opinion, **options):
    judge = Judge(opinion)
    with stub(judge) as address:
        yield VLM(f"{address}/v1", "judge", **{"retries": 1, **options}), judge


def test_vlm_score(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "k3y")

    def opinion(question, value):
        time.sleep(random.random() * 0.03)  # the order of the replies is not that of the images
        form = "I answer as <score>NUMBER</score>, say <score>9</score>."
        return f"{form} <Score> {value * 10:g} </score>"

    with judged_by(opinion, api_key_env="JUDGE_KEY") as (vlm, judge):
        values = torch.linspace(0, 1, 21)
        prompts = ['a "{minimum}" {cat}'] * 21
        assert torch.allclose(evaluate(vlm, gray(*values.tolist()), prompts), values, atol=1e-2)
        assert not vlm.per_group
        assert judge.headers[0] == "Bearer k3y"
        question = judge.questions[0][0]
        assert 'a "{minimum}" {cat}' in question
        assert "from 0 (nothing fits) to 10" in question
    own = {"template": "{prompt}? {minimum}-{maximum}", "pattern": r"(\d+) of", "maximum": 5}
    with judged_by(lambda q, v: "4 of 5", minimum=1, **own) as (vlm, judge):
        assert vlm(gray(0.5), ["cat"]).tolist() == [0.75]
        assert judge.questions == [("cat? 1-5", 0.5)]


@pytest.mark.parametrize("text", ["no idea", "<score>11</score>", "<score>ten</score>", None])
def test_vlm_unreadable_score_is_an_error(text):
    with judged_by(lambda q, v: text if v > 0.5 else "<score>5</score>") as (vlm, judge):
        assert vlm(gray(0.1, 0.2), ["a", "b"]).tolist() == [0.5, 0.5]
        with pytest.raises(RuntimeError, match=r"no readable answer in 2 replies to .*a dog"):
            evaluate(vlm, gray(0.1, 0.9), ["a cat", "a dog"])
        assert sum(question[1] == 0.9 for question in judge.questions) == 2


def test_vlm_asks_again_for_an_unreadable_answer():
    replies = iter(["hm", "<score>7</score>"])
    with judged_by(lambda q, v: next(replies)) as (vlm, _):
        assert vlm(gray(0.5), ["a"]).tolist() == pytest.approx([0.7])


def test_vlm_yes():
    def opinion(question, value):
        rest = 0.2 - value / 10
        return {"Yes": value / 2, " yes": value / 10, "NO": rest, "Maybe": 1 - 0.6 * value - rest}

    with judged_by(opinion, mode="yes") as (vlm, _):
        got = vlm(gray(1.0, 0.5), ["a", "b"]).tolist()
        assert got == pytest.approx([0.6 / 0.7, 0.3 / 0.45], rel=1e-5)
    with (
        judged_by(lambda q, v: {"The": 0.9}, mode="yes") as (vlm, _),
        pytest.raises(RuntimeError, match=r"none of Yes, No is .*\['the'\]"),
    ):
        vlm(gray(1.0), ["a"])
    with (
        judged_by(lambda q, v: "Yes", mode="yes") as (vlm, _),
        pytest.raises(RuntimeError, match="returns no top_logprobs"),
    ):
        vlm(gray(1.0), ["a"])


def brighter(question, first, second):
    time.sleep(random.random() * 0.02)
    if abs(first - second) < 0.01:
        return "Equal. <answer>tie</answer>"
    return f"<answer>{1 if first > second else 2}</answer>"


def test_vlm_pairwise_win_rates_in_both_orders():
    values, prompts = (0.1, 0.9, 0.5, 0.2, 0.5, 0.8), ["a", "b", "a", "b", "a", "b"]
    with judged_by(brighter, mode="pairwise") as (vlm, judge):
        assert vlm.per_group
        rates = evaluate(vlm, gray(*values), prompts)
        assert rates.tolist() == [0.0, 1.0, 0.75, 0.0, 0.75, 0.5]
        groups = ((0.1, 0.5, 0.5), (0.9, 0.2, 0.8))
        every = [pair for group in groups for pair in itertools.permutations(group, 2)]
        assert sorted(question[1:] for question in judge.questions) == sorted(every)
    with judged_by(brighter, mode="pairwise", workers=1) as (vlm, _):
        assert torch.equal(evaluate(vlm, gray(*values), prompts), rates)


def test_vlm_pairwise_cancels_position_bias():
    with judged_by(lambda *_: "<answer>1</answer>", mode="pairwise") as (vlm, _):
        assert vlm(gray(0.1, 0.5, 0.9), ["a"] * 3).tolist() == [0.5] * 3


def test_vlm_pairwise_missing_is_no_tie():
    def opinion(question, first, second):
        if {first, second} == {0.2, 0.4} or (first, second) == (0.8, 0.2):
            return "I cannot say."
        return brighter(question, first, second)

    images, prompts = gray(0.2, 0.4, 0.8), ["a"] * 3
    with judged_by(opinion, mode="pairwise", max_failures=0.5) as (vlm, _):
        assert vlm(images, prompts).tolist() == [0.0, 0.0, 1.0]  # ties would make it ¼, ¼, ...
    with (
        judged_by(opinion, mode="pairwise") as (vlm, _),
        pytest.raises(RuntimeError, match="3 of 6 comparisons have no readable answer"),
    ):
        vlm(images, prompts)
    lenient = {"mode": "pairwise", "max_failures": 1}
    with (
        judged_by(lambda q, *v: "?" if 0.2 in v else brighter(q, *v), **lenient) as (vlm, _),
        pytest.raises(RuntimeError, match="image 0 has no judged pair: 3 images of 'a'"),
    ):
        vlm(images, prompts)
    with (
        judged_by(brighter, mode="pairwise") as (vlm, _),
        pytest.raises(RuntimeError, match="image 1 has no judged pair: 1 images of 'b'"),
    ):
        vlm(images, ["a", "b", "a"])


def test_vlm_critique_and_refine():
    def opinion(question, value):
        if "Rewrite" in question:
            assert 'A critic said of it: "{prompt} it is {critique} too dark"' in question
            return "Sure: <prompt>\na bright {critique}\n</prompt>"
        return " {prompt} it is {critique} too dark\n"

    with judged_by(opinion) as (vlm, _):
        image = gray(0.1)[0]
        critique = vlm.critique(image, "a {critique}")
        assert critique == "{prompt} it is {critique} too dark"
        assert vlm.refine(image, "a {critique}", critique) == "a bright {critique}"
    with (
        judged_by(lambda q, v: "a bright cat") as (vlm, _),
        pytest.raises(RuntimeError, match="no readable answer"),
    ):
        vlm.refine(image, "a", "too dark")


def test_vlm_reports_the_endpoint():
    with stub(lambda *_: (404, {"error": {"message": "no model judge"}})) as address:
        vlm = VLM(f"{address}/v1", "judge")
        with pytest.raises(
            RuntimeError, match=r"completions: status 404.*no model judge.*attempts: 1, "
        ):
            vlm(gray(0.5, 0.6), ["a", "b"])
    with (
        stub(lambda *_: (200, {"error": "x"})) as address,
        pytest.raises(RuntimeError, match="unexpected reply"),
    ):
        VLM(f"{address}/v1", "judge")(gray(0.5), ["a"])


def test_vlm_options_are_checked():
    required = {"url": "http://localhost:1", "model": "judge", "type": "rewards.vlm:VLM"}
    for options, message in (
        ({"mode": "rank"}, "not one of score, yes, levels, unified, unified_axes, pairwise"),
        ({"template": "How good?"}, r"no \{prompt\}"),
        ({"pattern": "("}, "pattern"),
        ({"pattern": r"\d"}, "has 0 groups"),
        ({"minimum": 10}, "not a number below"),
        ({"max_failures": 2}, "max_failures=2"),
        ({"workers": 0}, "workers=0"),
        ({"url": "judge"}, "not an address"),
        ({"temperature": 1}, "unknown option 'temperature'"),
    ):
        with pytest.raises(ValueError, match=message):
            build({"judge": {**required, **options}})
