"""A vision-language model as the judge, behind an OpenAI-compatible endpoint."""

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

T = TypeVar("T")

TEMPLATES = {
    "score": (
        'The image was generated from the text "{prompt}". Rate how well it shows what the text '
        "asks for (objects, their number, colours, positions, any written words) and how well it "
        "is made, from {minimum} (nothing fits) to {maximum} (flawless). Reason briefly, then end "
        "with <score>NUMBER</score>."
    ),
    "yes": 'Does the image show exactly this: "{prompt}"? Answer with one word, Yes or No.',
    "pairwise": (
        'Both images were generated from the text "{prompt}". Which shows better what the text '
        "asks for (objects, their number, colours, positions, any written words) and is better "
        "made? Reason briefly, then end with <answer>1</answer>, <answer>2</answer> or, only if "
        "neither is better, <answer>tie</answer>."
    ),
}
PATTERNS = {
    "score": r"<score>\s*([-+]?\d+(?:\.\d+)?)\s*</score>",
    "pairwise": r"<answer>\s*(1|2|tie)\s*</answer>",
}
CRITIQUE = (
    'The image was generated from the text "{prompt}". List what in it does not match the text or '
    "is badly made, most important first, in a few short sentences. If nothing is wrong, say so."
)
REFINE = (
    'The image was generated from the text "{prompt}". A critic said of it: "{critique}" Rewrite '
    "the text so that a text-to-image model avoids these faults. Keep everything the text asks "
    "for, add nothing that changes its meaning. End with <prompt>NEW TEXT</prompt>."
)
WIN = {"1": 1.0, "2": 0.0, "tie": 0.5}


class VLM(Reward):
    """The opinion of a vision-language model, asked by POST ``url``/chat/completions.

    ``mode`` "score": R = (x - minimum) / (maximum - minimum) in [0, 1], where x is the number that
        the last match of ``pattern`` in the answer captures. An x outside the range is unreadable.
    ``mode`` "yes": R = P(Yes) / (P(Yes) + P(No)) of the first token, summed over the 20 most likely
        tokens, ignoring case and surrounding spaces. VQAScore (arXiv 2404.01291) is P(Yes) alone.
    ``mode`` "pairwise": rows with the same prompt in one call form a group (``per_group``). The
        model picks the better image of every pair in a group, and is asked in both orders to cancel
        position bias: R_i = mean over the pairs of i of its mean win (1, tie 1/2, 0) over the
        answered orders. A missing answer is left out and does not count as a tie. N images cost
        N (N - 1) questions. Source: Pref-GRPO (arXiv 2508.20751), which asks in one order only.

    ``template`` is the question, sent after the images. It must hold {prompt}, and may hold
    {minimum} and {maximum}. ``pattern`` has one group; in pairwise mode it captures 1, 2 or tie.
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
    gradient_hint = "it is a judge's opinion; choose an algorithm that needs no reward gradient"

    def __init__(
        self,
        url: str | Sequence[str],
        model: str,
        mode: str = "score",
        template: str | None = None,
        pattern: str | None = None,
        minimum: float = 0,
        maximum: float = 10,
        api_key_env: str | None = None,
        timeout: float = 120.0,
        retries: int = 3,
        workers: int = 8,
        max_failures: float = 0.1,
        max_tokens: int = 2048,
        patience: float = 600.0,
    ):
        options = {
            key: value for key, value in locals().items() if key not in ("self", "__class__")
        }
        self.check_options(**options)
        super().__init__()
        self.http = Http(url, token_from(api_key_env), timeout, patience)
        self.retries = retries
        self.model, self.mode, self.per_group = model, mode, mode == "pairwise"
        self.template = template or TEMPLATES[mode]
        self.pattern = re.compile(pattern or PATTERNS.get(mode, "()"), re.IGNORECASE)
        self.range = minimum, maximum
        self.workers, self.max_failures, self.max_tokens = workers, max_failures, max_tokens

    @classmethod
    def check_options(
        cls,
        url="",
        model="",
        mode="score",
        template=None,
        pattern=None,
        minimum=0,
        maximum=10,
        api_key_env=None,
        timeout=1.0,
        retries=0,
        workers=1,
        max_failures=0.0,
        max_tokens=1,
        patience=0.0,
        **options,
    ):
        check_http(url, timeout, patience, api_key_env)
        check_whole(0, retries=retries)
        check_whole(1, workers=workers, max_tokens=max_tokens)
        if mode not in TEMPLATES:
            raise ValueError(f"mode={mode!r} is not one of {', '.join(TEMPLATES)}")
        if template is not None and "{prompt}" not in str(template):
            raise ValueError(f"template={template!r} has no {{prompt}} in it")
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
        if self.mode == "yes":
            return self._probability(text, file)
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
        try:
            value = float(_last(self.pattern)(answer) or "nan")
        except ValueError:
            return None
        return (value - low) / (high - low) if low <= value <= high else None

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

    def _probability(self, text: str, file: str) -> float:
        choice = self._ask(text, [file], max_tokens=1, logprobs=True, top_logprobs=20)
        try:
            tokens = choice["logprobs"]["content"][0]["top_logprobs"]
            likely = [(t["token"].strip().lower(), math.exp(t["logprob"])) for t in tokens]
        except (KeyError, IndexError, TypeError) as error:
            raise RuntimeError(
                f"{self.model} at {self.http.url} returns no top_logprobs, which mode yes needs"
            ) from error
        yes, no = (sum(p for token, p in likely if token == word) for word in ("yes", "no"))
        if not yes + no > 0:
            raise UnreadableAnswer(
                f"{self.model} at {self.http.url}: neither Yes nor No is among its likeliest first "
                f"tokens {[token for token, _ in likely]} after {text!r}"
            )
        return yes / (yes + no)

    def _ask(self, text: str, files: list[str], **options: Any) -> dict:
        content: list[dict] = []
        for number, file in enumerate(files, 1):
            if len(files) > 1:
                content.append({"type": "text", "text": f"Image {number}:"})
            url = f"data:image/png;base64,{file}"
            content.append({"type": "image_url", "image_url": {"url": url}})
        content.append({"type": "text", "text": text})
        messages = [{"role": "user", "content": content}]
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


def _numbers(*values: Any) -> bool:
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)


def _last(pattern: re.Pattern[str]) -> Callable[[str], str | None]:
    """A reader of the last match's group: a model may quote the format before it answers."""
    return lambda answer: next((m[1] for m in reversed(list(pattern.finditer(answer)))), None)
