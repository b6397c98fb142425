"""Critique and refine: a judge rewrites the prompt, and the new picture is kept if better."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol, runtime_checkable

from torch import Tensor

from rewards.vlm import UnreadableAnswer

from .base import Count, Step, Steps, Task, draw, finals, finish


@runtime_checkable
class Judge(Protocol):
    """Criticizes a picture (3, H, W) and rewrites its prompt, as `rewards.vlm.VLM` does."""

    def critique(self, image: Tensor, prompt: str) -> str: ...

    def refine(self, image: Tensor, prompt: str, critique: str) -> str: ...


def critique(
    task: Task,
    rounds: Count = 3,
    *,
    judge: Judge | None = None,
) -> Steps:
    """After the plain sample, `rounds` pictures of each prompt from texts that a judge wrote.

        p_0 = p,   q = judge.refine(u, p_r, judge.critique(u, p)),   u the picture of p_r
        p_{r+1} = q if R(picture of q, p) > R(u, p), else p_r

    All pictures start from the same noise and are scored under the original prompt p. This is the
    test-time critique and refinement of RationalRewards (arXiv 2604.11626), whose code runs one
    round and does not check whether it helped. Left out: their threshold, below which a picture is
    refined at all. No text is drawn twice: a prompt's search ends with the first round that gives
    no new text, or, with a warning, an answer that cannot be read. Not reproduced: no judge that
    can see was at hand.

    judge: None = the first of the task's rewards that is a judge (a `vlm`). A result's `text` is
    the text that was drawn. Raises ValueError if there is no judge.
    """
    if judge is None:
        judges = [part for part in task.reward.parts.values() if isinstance(part, Judge)]
        if not judges:
            raise ValueError(
                f"none of the rewards {', '.join(task.reward.parts)} can criticise a picture; add "
                "a vlm (weight 0 if it is not to count), or pass judge= from Python"
            )
        judge = judges[0]
    return _refined(task, rounds, judge)


def _refined(task: Task, rounds: int, judge: Judge) -> Iterator[Step]:
    tried = list(range(len(task)))
    noise = task.noise(tried)
    best = draw(task, tried, noise)
    images, totals = list(best.images), best.total.tolist()
    prompts = [prompt.text for prompt in task.prompts]
    drawn = [{text} for text in prompts]
    yield best
    for _ in range(rounds):
        new: dict[int, str] = {}
        for i in [i for i in task.account.open() if i in tried]:
            try:
                said = judge.critique(images[i], task.prompts[i].text)
                new[i] = judge.refine(images[i], prompts[i], said)
            except UnreadableAnswer as error:
                warnings.warn(f"{task.prompts[i].text!r} is not refined: {error}", stacklevel=2)
        tried = [i for i in new if new[i] not in drawn[i]]
        if not tried:
            return
        for i in tried:
            drawn[i].add(new[i])
        written = [replace(p, text=new.get(i, p.text)) for i, p in enumerate(task.prompts)]
        x0 = finals(replace(task, prompts=written), tried, noise[tried])
        step = finish(task, tried, noise[tried], x0)
        for j, (i, total) in enumerate(zip(tried, step.total.tolist(), strict=True)):
            if total > totals[i]:
                images[i], totals[i], prompts[i] = step.images[j], total, new[i]
        yield replace(step, texts=[new[i] for i in tried])
