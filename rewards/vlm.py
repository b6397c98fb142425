"""A vision-language model as the judge, behind an OpenAI-compatible endpoint or loaded here."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .base import Reward
from .http import Http, check_http, check_whole, in_threads, png_base64, token_from
from .vlm_questions import AXES, CRITIQUE, PATTERNS, RANGES, REFINE, TEMPLATES, WIN, WORDS

T = TypeVar("T")
DTYPES = ("bfloat16", "float16", "float32", "float64")


class VLM(Reward):
    """The opinion of a vision-language model, asked by POST ``url``/chat/completions.

    ``mode`` "score": R = (x - minimum) / (maximum - minimum) in [0, 1], where x is the number that
        the last match of ``pattern`` in the answer captures. An x outside the range is unreadable.
    ``mode`` "unified": UnifiedReward (arXiv 2503.05236), which answers with "Final Score: x"; R =
        (x - 1) / 4. Its own question, so ``model`` should be one of its models.
    ``mode`` "unified_axes": UnifiedReward 2.0, which answers with three such marks, "Alignment
        Score (1-5): x", "Coherence ..." and "Style ..."; R is the mean of the three.
    ``mode`` "yes": R = P(Yes) / (P(Yes) + P(No)) of the first token, summed over the 20 most likely
        tokens, ignoring case and surrounding spaces. VQAScore (arXiv 2404.01291) is P(Yes) alone.
    ``mode`` "levels": the quality of the picture whatever its prompt. With the probabilities of the
        words read in the same way, R = sum_w v_w P(w) / sum_w P(w), v = 1, 3/4, 1/2, 1/4, 0 for
        excellent, good, fair, poor, bad. This is how DeQA-Score (arXiv 2501.11561) reads its model,
        as (score - 1) / 4; it sums over no other spellings. Its weights, an mPLUG-Owl2 whose code
        transformers does not have, are not loaded here: serve them, or take another model.
    ``mode`` "pairwise": rows with the same prompt in one call form a group (``per_group``). The
        model picks the better image of every pair in a group, and is asked in both orders to cancel
        position bias: R_i = mean over the pairs of i of its mean win (1, tie 1/2, 0) over the
        answered orders. A missing answer is left out and does not count as a tie. N images cost
        N (N - 1) questions. Source: Pref-GRPO (arXiv 2508.20751), which asks in one order only.

    ``url`` "local" loads ``model``, a folder or hub id of a Qwen2-VL or Qwen2.5-VL, in ``dtype``
    onto this machine, for the modes "yes" and "levels": the same values of all tokens, not of 20,
    with gradient to the pixels.

    ``template`` is the question, sent after the images. It must hold {prompt} but in mode "levels",
    and may hold {minimum} and {maximum}. ``pattern`` has one group; in pairwise mode it captures 1,
    2 or tie, and AXIS in it stands for each axis of "unified_axes". ``minimum`` and ``maximum``
    default to 0 and 10, in the modes of UnifiedReward to 1 and 5. ``answer_start`` begins the
    answer of which the next token is read, such as DeQA-Score's "The quality of the image is"; an
    endpoint must then know continue_final_message, as vLLM and SGLang do.

    The model answers at temperature 0 with at most ``max_tokens`` tokens. ``workers`` questions run
    at a time; the values keep the order of the images. ``api_key_env`` names the environment
    variable with the key. ``retries`` limits the repeats of a question whose answer is unreadable;
    ``timeout``, of a reply, and ``patience``, with a server that is away, are in seconds, as in
    ``Http.ask``. ``url`` may be a list of servers of the same model.

    Raises RuntimeError for an answer that stays unreadable. In pairwise mode it raises only if the
    share of such answers exceeds ``max_failures``, or if an image has no judged pair (for instance
    as the only image of its prompt).
    """

    name = "vlm"
    gradient_hint = (
        "it is a judge's opinion; choose an algorithm that needs no reward gradient, or "
        "rewards.{name}.url=local with mode yes or levels"
    )

    def __init__(
        self,
        url: str | Sequence[str],
        model: str,
        mode: str = "score",
        template: str | None = None,
        pattern: str | None = None,
        minimum: float | None = None,
        maximum: float | None = None,
        api_key_env: str | None = None,
        timeout: float = 120.0,
        retries: int = 3,
        workers: int = 8,
        max_failures: float = 0.1,
        max_tokens: int = 2048,
        patience: float = 600.0,
        answer_start: str = "",
        dtype: str = "bfloat16",
    ):
        options = {
            key: value for key, value in locals().items() if key not in ("self", "__class__")
        }
        self.check_options(**options)
        super().__init__()
        self.differentiable = url == "local"
        self.local: Any = None
        if self.differentiable:
            from .vlm_local import LocalVLM

            self.local = LocalVLM(model, dtype)
        else:
            self.http = Http(url, token_from(api_key_env), timeout, patience)
        self.retries = retries
        self.model, self.mode, self.per_group = model, mode, mode == "pairwise"
        self.template = template or TEMPLATES[mode]
        self.pattern = re.compile(pattern or PATTERNS.get(mode, "()"), re.IGNORECASE)
        self.range = _range(mode, minimum, maximum)
        self.answer_start = answer_start
        self.workers, self.max_failures, self.max_tokens = workers, max_failures, max_tokens

    @classmethod
    def has_gradient(cls, url="", **options):
        return url == "local"

    @classmethod
    def check_options(
        cls,
        url="",
        model="",
        mode="score",
        template=None,
        pattern=None,
        minimum=None,
        maximum=None,
        api_key_env=None,
        timeout=1.0,
        retries=0,
        workers=1,
        max_failures=0.0,
        max_tokens=1,
        patience=0.0,
        answer_start="",
        dtype="bfloat16",
        **options,
    ):
        if url != "local":
            check_http(url, timeout, patience, api_key_env)
        check_whole(0, retries=retries)
        check_whole(1, workers=workers, max_tokens=max_tokens)
        if mode not in TEMPLATES:
            raise ValueError(f"mode={mode!r} is not one of {', '.join(TEMPLATES)}")
        read = ", ".join(WORDS)
        if url == "local" and mode not in WORDS:
            raise ValueError(f"mode={mode!r} writes a text; url=local only reads, modes {read}")
        if answer_start and mode not in WORDS:
            raise ValueError(f"answer_start={answer_start!r} is only for the modes {read}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
        if template is not None and mode != "levels" and "{prompt}" not in str(template):
            raise ValueError(f"template={template!r} has no {{prompt}} in it")
        minimum, maximum = _range(mode, minimum, maximum)
        if not _numbers(minimum, maximum) or not -math.inf < minimum < maximum < math.inf:
            raise ValueError(f"minimum={minimum!r} is not a number below maximum={maximum!r}")
        if not _numbers(max_failures) or not 0 <= max_failures <= 1:
            raise ValueError(f"max_failures={max_failures!r} is not a share in [0, 1]")
        try:
            groups = re.compile(pattern or PATTERNS.get(mode, "()")).groups
        except re.error as error:
            raise ValueError(f"pattern={pattern!r}: {error}") from error
        if groups != 1:
            raise ValueError(f"pattern={pattern!r} has {groups} groups, it needs one")

    def forward(self, images, prompts, metadata=None):
        if self.local:
            texts = [self._question(prompt) for prompt in prompts]
            words = WORDS[self.mode]
            shares = self.local.shares(images, texts, self.answer_start, list(words))
            return sum(shares[:, k] * value for k, value in enumerate(words.values()))
        files = png_base64(images)
        if self.mode == "pairwise":
            values = self._win_rates(files, prompts)
        else:
            values = self._map(lambda row: self._value(*row), zip(files, prompts, strict=True))
        return torch.tensor(values, dtype=torch.float32, device=images.device)

    def critique(self, image: Tensor, prompt: str) -> str:
        """The model's criticism of an image (3, H, W) that was drawn for the prompt."""
        text = CRITIQUE.replace("{prompt}", prompt)
        return self._until_read(str.strip, text, png_base64(image[None]))

    def refine(self, image: Tensor, prompt: str, critique: str) -> str:
        """The prompt, rewritten by the model so that the next image avoids these faults."""
        read = _last(re.compile(r"<prompt>\s*(\S.*?)\s*</prompt>", re.DOTALL))
        before, _, after = REFINE.replace("{prompt}", prompt).rpartition("{critique}")
        return self._until_read(read, before + critique + after, png_base64(image[None]))

    def _value(self, file: str, prompt: str) -> float:
        text = self._question(prompt)
        if self.mode in WORDS:
            return self._expectation(text, file)
        return self._until_read(self._number, text, [file])

    def _win_rates(self, files: list[str], prompts: list[str]) -> list[float]:
        groups: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            groups.setdefault(prompt, []).append(row)
        ordered = [pair for rows in groups.values() for pair in itertools.permutations(rows, 2)]

        def first_wins(pair: tuple[int, int]) -> float | None:
            i, j = pair
            try:
                text = self._question(prompts[i])
                return self._until_read(self._winner, text, [files[i], files[j]])
            except UnreadableAnswer:
                return None

        won = dict(zip(ordered, self._map(first_wins, ordered), strict=True))
        missing = sum(value is None for value in won.values())
        if missing > self.max_failures * len(won):
            raise RuntimeError(
                f"{missing} of {len(won)} comparisons have no readable answer, more than "
                f"max_failures={self.max_failures}; see what {self.model} answers to the template"
            )
        rates = []
        for i, prompt in enumerate(prompts):
            wins = []
            for j in groups[prompt]:
                orders = [won.get((i, j)), None if (w := won.get((j, i))) is None else 1 - w]
                answers = [value for value in orders if value is not None]
                if answers:
                    wins.append(sum(answers) / len(answers))
            if not wins:
                raise RuntimeError(
                    f"image {i} has no judged pair: {len(groups[prompt])} images of {prompt!r} in "
                    "the call; pairwise mode compares at least two of a prompt"
                )
            rates.append(sum(wins) / len(wins))
        return rates

    def _question(self, prompt: str) -> str:
        low, high = self.range
        text = self.template.replace("{minimum}", f"{low:g}").replace("{maximum}", f"{high:g}")
        return text.replace("{prompt}", prompt)  # last, so that braces in the prompt stay

    def _number(self, answer: str) -> float | None:
        low, high = self.range
        axes = AXES if self.mode == "unified_axes" else ("",)
        patterns = [re.compile(self.pattern.pattern.replace("AXIS", a), re.I) for a in axes]
        try:
            values = [float(_last(pattern)(answer) or "nan") for pattern in patterns]
        except ValueError:
            return None
        if not all(low <= value <= high for value in values):
            return None
        return (sum(values) / len(values) - low) / (high - low)

    def _winner(self, answer: str) -> float | None:
        return WIN.get((_last(self.pattern)(answer) or "").strip().lower())

    def _until_read(self, read: Callable[[str], T | None], text: str, files: list[str]) -> T:
        answer = ""
        for _ in range(self.retries + 1):
            answer = self._ask(text, files, max_tokens=self.max_tokens)["message"]["content"] or ""
            value = read(answer)
            if value is not None and value != "":
                return value
        raise UnreadableAnswer(
            f"{self.model} at {self.http.url}: no readable answer in {self.retries + 1} "
            f"replies to {text!r}; the last ends with {answer[-300:]!r}"
        )

    def _expectation(self, text: str, file: str) -> float:
        options: dict[str, Any] = {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}
        choice = self._ask(text, [file], start=self.answer_start, **options)
        try:
            tokens = choice["logprobs"]["content"][0]["top_logprobs"]
            likely = [(t["token"].strip().lower(), math.exp(t["logprob"])) for t in tokens]
        except (KeyError, IndexError, TypeError) as error:
            raise RuntimeError(
                f"{self.model} at {self.http.url} returns no top_logprobs, which mode {self.mode} "
                "needs"
            ) from error
        words = WORDS[self.mode]
        shares = {word: sum(p for t, p in likely if t == word.lower()) for word in words}
        if not (total := sum(shares.values())) > 0:
            raise UnreadableAnswer(
                f"{self.model} at {self.http.url}: none of {', '.join(words)} is among its "
                f"likeliest first tokens {[token for token, _ in likely]} after {text!r}"
            )
        return sum(words[word] * share for word, share in shares.items()) / total

    def _ask(self, text: str, files: list[str], start: str = "", **options: Any) -> dict:
        if self.local:
            raise RuntimeError(
                f"{self.model} of url=local is only read and writes no text; give a server"
            )
        content: list[dict] = []
        for number, file in enumerate(files, 1):
            if len(files) > 1:
                content.append({"type": "text", "text": f"Image {number}:"})
            url = f"data:image/png;base64,{file}"
            content.append({"type": "image_url", "image_url": {"url": url}})
        content.append({"type": "text", "text": text})
        messages: list[dict] = [{"role": "user", "content": content}]
        if start:
            messages.append({"role": "assistant", "content": start})
            options |= {"continue_final_message": True, "add_generation_prompt": False}
        payload = {"model": self.model, "temperature": 0, "messages": messages, **options}
        reply = self.http.ask("/chat/completions", payload)
        try:
            choice = reply["choices"][0]
            choice["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise RuntimeError(
                f"{self.http.url}/chat/completions: unexpected reply {str(reply)[:500]}"
            ) from error
        return choice

    def _map(self, function: Callable[[Any], T], items: Iterable[Any]) -> list[T]:
        return in_threads(function, items, self.workers)


class UnreadableAnswer(RuntimeError):
    """The model replied, but not in the requested format."""


def _range(mode: str, minimum: float | None, maximum: float | None) -> tuple[float, float]:
    low, high = RANGES.get(mode, (0, 10))
    return low if minimum is None else minimum, high if maximum is None else maximum


def _numbers(*values: Any) -> bool:
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)


def _last(pattern: re.Pattern[str]) -> Callable[[str], str | None]:
    """A reader of the last match's group: a model may quote the format before it answers."""
    return lambda answer: next((m[1] for m in reversed(list(pattern.finditer(answer)))), None)
