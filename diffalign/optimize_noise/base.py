"""What all methods share: task, budget, result, the loop that keeps the best, and drawing."""

from __future__ import annotations

import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

import torch
from torch import Tensor
from tqdm import tqdm

from rewards import WeightedSum

from ..config.decoding import Bounds, Count, Positive, Share, Weight  # noqa: F401  (for the methods)
from ..config.prompts import Prompt, for_rewards
from ..policies import Cond, Policy
from ..sampling.rollout import Noise, Sampling, sample_seed
from .options import Budget


class Account:
    """How much each of n prompts has used of its own budget: `taken`, under `Budget`'s names."""

    def __init__(self, n: int):
        self.n = n
        self.start(Budget())

    def start(self, budget: Budget) -> None:
        self.limits = vars(budget)
        self.taken = [dict.fromkeys(self.limits, 0.0) for _ in range(self.n)]

    def pay(self, rows: Sequence[int], spent: Mapping[str, float]) -> None:
        """Charge `spent` to the prompts `rows`, one entry per picture; every picture costs the
        same."""
        for row, pictures in Counter(rows).items():
            for name, value in spent.items():
                self.taken[row][name] += value * pictures / len(rows)

    def left(self, row: int) -> dict[str, float]:
        return {name: most - self.taken[row][name] for name, most in self.limits.items()}

    def open(self) -> list[int]:
        """The prompts whose budget is not used up."""
        return [row for row in range(self.n) if min(self.left(row).values()) > 0]


@dataclass(frozen=True)
class Task:
    """A search for pictures of n prompts: the model, the reward, and how pictures are drawn.

    A picture is a function of its noise z (1 + S, *latent): the initial noise, then that of each of
    the S stochastic steps of `sampling`. seeds: one per prompt. The plain sample of a prompt is
    drawn from the noise of its seed alone, so it is the picture that `sampling` gives without any
    search. batch: pictures per call of denoiser and reward. account: what a search has used so far.

    Raises ValueError for a task that no method can work on.
    """

    policy: Policy
    reward: WeightedSum
    prompts: Sequence[Prompt]
    sampling: Sampling
    seeds: Sequence[int]
    batch: int = 16
    account: Account = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "account", Account(len(self.prompts)))
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

    def affordable(self, rows: Sequence[int], most: int) -> int:
        """The number of plain samples per prompt, 1 to `most`, that the budgets of all `rows`
        allow."""
        each = self.sampling.steps + self.policy.uses_cfg * sum(
            self.sampling.guided(type(self.policy))
        )
        left = [self.account.left(row) for row in rows]
        allowed = [min(x["denoiser_calls"] / each, x["reward_calls"]) for x in left]
        return max(1, ceil(min(most, *allowed)))

    def cond(self, rows: Sequence[int]) -> Cond:
        """Conditioning of the prompts `rows`."""
        return self.policy.encode([self.prompts[i].text for i in rows])

    def noise(self, rows: Sequence[int], draws: int | Sequence[int] = 0) -> Tensor:
        """Noise (m, 1 + S, *latent) of the prompts `rows`. draws: a number for all rows, or one per
        row; 0 is the plain sample's noise, and every other number gives fresh noise."""
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
        """Slices of m pictures, one per call of denoiser and reward."""
        return [slice(i, i + self.batch) for i in range(0, m, self.batch)]


@dataclass(frozen=True)
class Step:
    """m finished pictures (m, 3, H, W) in [0, 1] of the prompts `rows`, with their rewards (m,).

    noise: (m, 1 + S, *latent), from which `draw` makes them. redraws: False for a method that
    leaves the sampler on the way, and `noise` is then what it started from. texts: the texts that
    were drawn, if they are not the prompts.
    """

    rows: Sequence[int]
    images: Tensor
    noise: Tensor
    total: Tensor
    parts: dict[str, Tensor]
    texts: Sequence[str] | None = None
    redraws: bool = True


Steps = Iterator[Step | None]
"""What a method yields: first the plain samples, `draw(task, rows, task.noise(rows))` of all rows;
then whatever it finds. None marks work that has finished no picture yet, so that the search can
stop on a long way to the next one."""


@dataclass
class Result:
    """The best picture of a prompt (3, H, W), its noise (1 + S, *latent), its rewards; on the CPU.

    text: the text that was drawn; `critique` rewrites the prompt. redraws: whether `draw` makes the
    picture from its noise. trace: an entry after every step with pictures of the prompt: what it
    had used (`Budget`'s names), the reward of that step's best picture as "reward" and of the best
    so far as "best". stopped: whether Ctrl-C ended the search.
    """

    prompt: str
    text: str
    image: Tensor
    noise: Tensor
    reward: float
    parts: dict[str, float]
    redraws: bool = True
    trace: list[dict[str, float]] = field(default_factory=list)
    stopped: bool = False


def search(
    task: Task,
    steps: Steps,
    budget: Budget,
    progress: str = "",
    each: Callable[[Sequence[Result]], None] | None = None,
) -> list[Result]:
    """The best picture of each prompt that `steps`, a method's generator, finds.

    Each prompt has its own budget, so it gets the picture that it would get alone. Every method's
    first step is the plain sample, which is always drawn: a budget of 0 returns exactly that. If
    the budget ends on the way to the next pictures, they are lost, with a warning. each: called
    with the results so far after every step with pictures. Ctrl-C ends the search and keeps the
    best so far. Raises what the reward raises, and ValueError for a method whose steps leave a
    prompt without a picture.
    """
    n, account = len(task), task.account  # methods read from it what is left
    account.start(budget)
    best: list[Result | None] = [None] * n
    stopped, before = False, _meters(task)
    bar = tqdm(desc=progress, unit="step", disable=not progress)
    try:
        for step in steps:
            going, now = account.open(), _meters(task)
            spent = {k: v - before[k] for k, v in now.items()}
            account.pay(going or range(n) if step is None else step.rows, spent)
            before = now
            if step is not None:
                _keep(task, step, best, going)
                if each is not None:
                    each([r for r in best if r is not None])
            bar.update()
            bar.set_postfix(best=sum(r.reward for r in best if r) / n)
            if not account.open():
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


def _meters(task: Task) -> dict[str, float]:
    return {
        "denoiser_calls": task.policy.calls,
        "reward_calls": task.reward.images,
        "seconds": time.perf_counter(),
    }


def _keep(task: Task, step: Step, best: list[Result | None], going: Sequence[int]) -> None:
    """Update `best` for the prompts of a step that had some budget left, or have no picture yet."""
    totals = step.total.detach().cpu()
    for row in dict.fromkeys(step.rows):
        old = best[row]
        if old is not None and row not in going:
            continue
        mine = [j for j, r in enumerate(step.rows) if r == row]
        j = max(mine, key=lambda k: totals[k].item())
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
                step.redraws,
                old.trace if old else [],
            )
        new = best[row]
        assert new is not None
        taken = task.account.taken[row]
        new.trace.append({**taken, "reward": totals[j].item(), "best": new.reward})


def chain(policy: Policy, cond: Cond, sampling: Sampling, noise: Tensor) -> Iterator[Tensor]:
    """The sampler's states x_0 … x_K, each (m, *latent), from noise (m, 1 + S, *latent); with
    gradient where it is enabled. They equal those of `rollout` bit for bit."""
    x, *drawn = noise.unbind(1)
    yield x
    for i, stochastic in enumerate(sampling.stochastic):
        step = sampling.transition(policy, x, i, cond)
        x = step.sample(drawn.pop(0)) if stochastic else step.mean
        yield x


def last(states: Iterator[Tensor]) -> Tensor:
    """The last of `chain`'s states, the clean latents; the others are not kept."""
    return deque(states, maxlen=1)[0]


@torch.no_grad()
def draw(task: Task, rows: Sequence[int], noise: Tensor) -> Step:
    """The pictures that the sampler makes from `noise` (m, 1 + S, *latent), scored."""
    return finish(task, rows, noise, finals(task, rows, noise))


@torch.no_grad()
def finals(task: Task, rows: Sequence[int], noise: Tensor) -> Tensor:
    """The clean latents (m, *latent) that the sampler makes from `noise` (m, 1 + S, *latent)."""
    found = []
    for part in task.batches(len(rows)):
        cond = task.cond(rows[part])
        found.append(last(chain(task.policy, cond, task.sampling, noise[part])))
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
