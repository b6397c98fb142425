"""What all methods share: task, budget, result, the loop that keeps the best, and drawing."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import inf

import torch
from torch import Tensor
from tqdm import tqdm

from rewards import WeightedSum

from ..decoding import Bounds, Count, Positive, Share, Weight  # noqa: F401  (for the methods)
from ..policies import Cond, Policy
from ..prompts import Prompt, for_rewards
from ..rollout import Noise, Sampling, sample_seed


@dataclass(frozen=True)
class Task:
    """Pictures to find for n prompts: the model, what is wanted of them, and how they are drawn.

    A picture is a function of its noise z (1 + S, *latent): the initial one, then one for each of
    the S stochastic steps of `sampling`. seeds: one a prompt. The plain sample of a prompt is drawn
    from the noise of its seed alone, so it is the picture that `sampling` gives without any search.
    batch: pictures per call of denoiser and reward.

    Raises ValueError for what no method can work with.
    """

    policy: Policy
    reward: WeightedSum
    prompts: Sequence[Prompt]
    sampling: Sampling
    seeds: Sequence[int]
    batch: int = 16

    def __post_init__(self) -> None:
        if not self.prompts or len(self.seeds) != len(self.prompts):
            raise ValueError(
                f"{len(self.seeds)} seeds for {len(self.prompts)} prompts; give one each, and at "
                "least one"
            )
        if self.batch < 1:
            raise ValueError(f"batch={self.batch} draws no picture; use 1 or more")
        groups = [name for name, part in self.reward.parts.items() if part.per_group]
        if groups:
            raise ValueError(
                f"rewards.{groups[0]} compares the pictures of a call with each other, so its "
                "values at two steps of a search do not compare; leave it out"
            )
        if self.reward.floors:
            raise ValueError(
                f"rewards.{next(iter(self.reward.floors))}.at_least is a constraint, whose "
                "multiplier only training adapts; give it a weight instead"
            )

    def __len__(self) -> int:
        return len(self.prompts)

    def cond(self, rows: Sequence[int]) -> Cond:
        """Conditioning of the prompts `rows`."""
        return self.policy.encode([self.prompts[i].text for i in rows])

    def noise(self, rows: Sequence[int], draws: int | Sequence[int] = 0) -> Tensor:
        """Noise (m, 1 + S, *latent) of the prompts `rows`: that of the plain sample for draw 0, and
        fresh for every other number. draws: one for all, or one a row."""
        draws = [draws] * len(rows) if isinstance(draws, int) else draws
        seeds = [
            sample_seed(self.seeds[i], "draw", k) if k else self.seeds[i]
            for i, k in zip(rows, draws, strict=True)
        ]
        noise = Noise(seeds, self.policy.latent_shape, self.policy.device)
        return torch.stack([noise.draw() for _ in range(1 + sum(self.sampling.stochastic))], 1)

    def score(self, images: Tensor, rows: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Total reward (m,) and its parts."""
        return self.reward.score(images, *for_rewards([self.prompts[i] for i in rows]))

    def slope(
        self, images: Tensor, rows: Sequence[int]
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Total reward (m,), its parts, and its gradient with respect to images (m, 3, H, W)."""
        return self.reward.gradient(images, *for_rewards([self.prompts[i] for i in rows]))

    def batches(self, m: int) -> list[slice]:
        """The rows of each call, for m pictures."""
        return [slice(i, i + self.batch) for i in range(0, m, self.batch)]


@dataclass(frozen=True)
class Step:
    """m finished pictures (m, 3, H, W) in [0, 1] of the prompts `rows`, with their rewards (m,).

    noise: (m, 1 + S, *latent), what `draw` makes them of; what it started from, for a method that
    leaves the sampler on the way. texts: what they were drawn of, where it is not their prompts.
    """

    rows: Sequence[int]
    images: Tensor
    noise: Tensor
    total: Tensor
    parts: dict[str, Tensor]
    texts: Sequence[str] | None = None


Steps = Iterator[Step | None]
"""What a method yields: first the plain samples, `draw(task, rows, task.noise(rows))` of all rows;
then whatever it finds. None is for work that has finished no picture, so that a long way to the
next one can be interrupted."""


@dataclass(frozen=True)
class Budget:
    """What a search may take, a prompt of its task on average; it ends with the step that uses any
    of them up.

    denoiser_calls: samples through the denoiser, with or without gradient, both branches of CFG
    counted. reward_calls: pictures scored. A backward pass is no call; it takes about as long as
    one. Raises ValueError for what is not 0 or more.
    """

    denoiser_calls: float = inf
    reward_calls: float = inf
    seconds: float = inf

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise ValueError(f"budget.{name}={value} is no budget; use 0 or more")


@dataclass
class Result:
    """The best picture of a prompt (3, H, W), its noise (1 + S, *latent), its rewards; on the CPU.

    text: what it was drawn of; `critique` rewrites the prompt. trace: after every step with
    pictures what the search had taken (`Budget`'s names, per prompt), the reward of that step's
    best picture as "reward" and of the best so far as "best". stopped: by Ctrl-C.
    """

    prompt: str
    text: str
    image: Tensor
    noise: Tensor
    reward: float
    parts: dict[str, float]
    trace: list[dict[str, float]] = field(default_factory=list)
    stopped: bool = False


def search(
    task: Task,
    steps: Steps,
    budget: Budget,
    progress: str = "",
    each: Callable[[Sequence[Result]], None] | None = None,
) -> list[Result]:
    """The best pictures of `steps`, a method's generator, one result a prompt.

    Every method's first step is the plain sample, and it is always taken: a budget of 0 returns it
    exactly. One that ends on the way to the next pictures loses them, with a warning. each: called
    with the results so far after every step with pictures. Ctrl-C ends the search and keeps the
    best so far. Raises what the reward raises, and ValueError for a method whose steps leave a
    prompt without a picture.
    """
    policy, reward, n = task.policy, task.reward, len(task)
    calls, scored, start = policy.calls, reward.images, time.perf_counter()
    best: list[Result | None] = [None] * n
    stopped = False
    bar = tqdm(desc=progress, unit="step", disable=not progress)
    try:
        for step in steps:
            taken = {
                "denoiser_calls": (policy.calls - calls) / n,
                "reward_calls": (reward.images - scored) / n,
                "seconds": (time.perf_counter() - start) / n,
            }
            if step is not None:
                _keep(task, step, best, taken)
                if each is not None:
                    each([r for r in best if r is not None])
            bar.update()
            bar.set_postfix(best=sum(r.reward for r in best if r) / n)
            if any(taken[name] >= getattr(budget, name) for name in taken):
                if step is None:
                    warnings.warn(
                        "the budget ended on the way to pictures, which are lost; raise it, or "
                        "make the search smaller",
                        stacklevel=2,
                    )
                break
    except KeyboardInterrupt:
        if None in best:
            raise
        stopped = True
    finally:
        bar.close()
    if None in best:
        raise ValueError(f"no picture of {task.prompts[best.index(None)].text!r} was made")
    return [replace(r, stopped=stopped) for r in best if r is not None]


def _keep(task: Task, step: Step, best: list[Result | None], taken: dict[str, float]) -> None:
    totals = step.total.detach().cpu()
    for row in dict.fromkeys(step.rows):
        mine = [j for j, r in enumerate(step.rows) if r == row]
        j = max(mine, key=lambda k: totals[k].item())
        old = best[row]
        if old is None or totals[j] > old.reward:
            parts = {k: v[j].item() for k, v in step.parts.items()}
            prompt = task.prompts[row].text
            best[row] = Result(
                prompt,
                step.texts[j] if step.texts is not None else prompt,
                step.images[j].detach().cpu(),
                step.noise[j].detach().cpu(),
                totals[j].item(),
                parts,
                old.trace if old else [],
            )
        new = best[row]
        assert new is not None
        new.trace.append({**taken, "reward": totals[j].item(), "best": new.reward})


def chain(task: Task, rows: Sequence[int], noise: Tensor) -> Iterator[Tensor]:
    """The sampler's states x_0 … x_K, (m, *latent) each, of noise (m, 1 + S, *latent); with
    gradient where it is enabled. They are those of `rollout` bit for bit."""
    cond, sampling = task.cond(rows), task.sampling
    x, *drawn = noise.unbind(1)
    yield x
    for i, stochastic in enumerate(sampling.stochastic):
        step = sampling.transition(task.policy, x, i, cond)
        x = step.sample(drawn.pop(0)) if stochastic else step.mean
        yield x


@torch.no_grad()
def draw(task: Task, rows: Sequence[int], noise: Tensor) -> Step:
    """The pictures that the sampler makes of `noise` (m, 1 + S, *latent), scored."""
    return finish(task, rows, noise, finals(task, rows, noise))


@torch.no_grad()
def finals(task: Task, rows: Sequence[int], noise: Tensor) -> Tensor:
    """The clean latents (m, *latent) that the sampler makes of `noise` (m, 1 + S, *latent)."""
    found = []
    for part in task.batches(len(rows)):
        for x in chain(task, rows[part], noise[part]):
            final = x
        found.append(final)
    return torch.cat(found)


@torch.no_grad()
def finish(task: Task, rows: Sequence[int], noise: Tensor, x0: Tensor) -> Step:
    """Clean latents x0 (m, *latent) decoded and scored."""
    steps = []
    for part in task.batches(len(rows)):
        images = task.policy.decode(x0[part])
        steps.append(Step(rows[part], images, noise[part], *task.score(images, rows[part])))
    return joined(steps)


def joined(steps: Sequence[Step]) -> Step:
    """Several steps as one."""
    return Step(
        [row for step in steps for row in step.rows],
        torch.cat([step.images for step in steps]),
        torch.cat([step.noise for step in steps]),
        torch.cat([step.total for step in steps]),
        {k: torch.cat([step.parts[k] for step in steps]) for k in steps[0].parts},
    )
