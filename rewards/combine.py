"""Several rewards as one: weighted sums, constraints, conservative ensembles."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .base import Reward, evaluate, own_copies
from .threads import Worker


class Floor(NamedTuple):
    """The constraint mean R >= at_least; its multiplier moves by rate times the shortfall."""

    at_least: float
    rate: float = 1.0


class WeightedSum(nn.Module):
    """R(u, c) = sum_k w_k R_k(u, c); every R_k frozen and validated by ``evaluate``.

    ``parts`` maps labels to rewards, and ``weights`` labels to weights; weight 0 keeps a reward as
    a monitor. A part with a ``Floor`` is a constraint: its weight is the Lagrange multiplier
    λ >= 0 of

        maximise sum_{k not a constraint} E[R_k]  subject to  E[R_c] >= b_c,

    which ``adapt`` moves by dual ascent. (The constants -λ b are left out: they change no
    advantage and no gradient.)

    A prompt whose metadata has ``rewards``, a list of labels, is scored by those rewards alone. Its
    other values are NaN (*missing*) and count as 0 in the total.
    """

    def __init__(
        self,
        parts: Mapping[str, Reward],
        weights: Mapping[str, float],
        floors: Mapping[str, Floor] | None = None,
    ):
        super().__init__()
        if not parts:
            raise ValueError("no reward: give at least one, for instance {'jpeg': 1.0}")
        self.parts, self.weights, self.floors = dict(parts), dict(weights), dict(floors or {})
        self.images, self.seconds = 0, 0.0  # scored so far, and the time it took
        self.running: dict[str, float] = {}  # parts that are scoring, since when (monotonic)
        self.rewards = nn.ModuleList([reward.freeze() for reward in self.parts.values()])
        self._workers = [Worker() for _ in self.parts] if len(self.parts) > 1 else []

    def forward(
        self, images: Tensor, prompts: list[str], metadata: list[dict] | None = None
    ) -> Tensor:
        return self.score(images, prompts, metadata)[0]

    def score(
        self,
        images: Tensor,
        prompts: list[str],
        metadata: list[dict] | None = None,
        held_out: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total and unweighted parts, (n,) float32 each; raises as ``evaluate`` does.

        Without gradient the parts run in parallel, one thread each. ``held_out`` gives values that
        can be compared over a run: rewards that compare a prompt's images with each other are
        missing (the mean of their win rates is always a half), and so are rewards that learn. The
        total then leaves out the constraints, because their multipliers change.
        """
        start = time.perf_counter()
        gradient = torch.is_grad_enabled()  # threads do not inherit it

        def one(name: str) -> Tensor:
            with torch.set_grad_enabled(gradient):
                return self._one(name, images, prompts, metadata, held_out)

        if gradient or not self._workers:
            values = {name: one(name) for name in self.parts}
        else:
            pairs = zip(self._workers, self.parts, strict=True)
            futures = {name: worker.submit(one, name) for worker, name in pairs}
            values = {name: future.result() for name, future in futures.items()}
        total = self.total(values, constraints=not held_out)
        self.images += len(images)
        self.seconds += time.perf_counter() - start
        return total, values

    def gradient(
        self, images: Tensor, prompts: list[str], metadata: list[dict] | None = None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Total and parts as from ``score``, and ∂(sum of the totals)/∂images (n, 3, H, W).

        Builds one part's graph at a time, so the peak memory is that of the largest graph. A part
        of weight 0 builds none.
        """
        start, values = time.perf_counter(), {}
        slope = torch.zeros_like(images)
        for name in self.parts:
            weight = self.weights[name]
            with torch.set_grad_enabled(weight != 0):
                pixels = images.detach().requires_grad_(weight != 0)
                value = self._one(name, pixels, prompts, metadata, False)
                if value.requires_grad:  # else of weight 0 or missing for all
                    slope += weight * torch.autograd.grad(value.nansum(), pixels)[0]
            values[name] = value.detach()
        self.images += len(images)
        self.seconds += time.perf_counter() - start
        return self.total(values), values, slope

    def _one(
        self, name: str, images: Tensor, prompts: list[str], metadata: Any, held_out: bool
    ) -> Tensor:
        rows = [i for i in range(len(prompts)) if applies(name, metadata[i] if metadata else {})]
        reward = self.parts[name]
        if held_out and (reward.per_group or reward.learns):
            rows = []
        if len(rows) == len(prompts):
            return self._timed(name, images, prompts, metadata)
        missing = images.new_full((len(prompts),), torch.nan, dtype=torch.float32)
        if not rows:
            return missing
        where = torch.tensor(rows, device=images.device)
        texts = [prompts[i] for i in rows]
        found = self._timed(name, images[where], texts, [metadata[i] for i in rows])
        return missing.index_put((where,), found)

    def _timed(self, name: str, images: Tensor, prompts: list[str], metadata: Any) -> Tensor:
        self.running[name] = time.monotonic()
        try:
            return evaluate(self.parts[name], images, prompts, metadata, name)
        finally:
            self.running.pop(name, None)

    def learn(
        self, images: Tensor, prompts: list[str], metadata: list[dict] | None = None
    ) -> dict[str, dict[str, float]]:
        """Let each part that learns do so, from its own copies; {label: metrics to log}."""
        learners = {name: reward for name, reward in self.parts.items() if reward.learns}
        given = images, prompts, metadata
        return {name: reward.learn(*own_copies(*given)) for name, reward in learners.items()}

    def total(self, values: Mapping[str, Tensor], constraints: bool = True) -> Tensor:
        """The weighted sum (n,) of the parts (n,) without missing values; NaN if all are."""
        used = [k for k in self.weights if constraints or k not in self.floors]
        parts = torch.stack([self.weights[k] * values[k].nan_to_num(nan=0.0) for k in used])
        missing = torch.stack([values[k].isnan() for k in used]).all(0)
        return parts.sum(0).masked_fill(missing, torch.nan)

    def adapt(self, means: Mapping[str, float]) -> None:
        """Dual ascent after an epoch: λ <- max(0, λ + rate (b - mean)). ``means`` holds the means
        of the parts over the epoch; parts without a mean keep their multiplier."""
        for name, floor in self.floors.items():
            if name in means:
                step = floor.rate * (floor.at_least - means[name])
                self.weights[name] = max(0.0, self.weights[name] + step)

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """What training changes: multipliers, and the memory of rewards that learn; no weights."""
        learners = {k: r.memory() for k, r in self.parts.items() if r.learns}
        return {"multipliers": {k: self.weights[k] for k in self.floors}, "learners": learners}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # type: ignore[override]
        self.weights |= state["multipliers"]
        for name, memory in state["learners"].items():
            self.parts[name].recall(memory)

    @property
    def differentiable(self) -> bool:
        return all(reward.differentiable for reward in self.parts.values())

    @property
    def per_group(self) -> bool:
        return any(reward.per_group for reward in self.parts.values())

    @property
    def learns(self) -> bool:
        return any(reward.learns for reward in self.parts.values())

    def require_differentiable(self) -> None:
        """Raise ValueError naming the first reward without gradient and the remedy. A reward of
        weight 0 needs no gradient."""
        for name, reward in self.parts.items():
            if not reward.differentiable and self.weights[name] != 0:
                raise ValueError(no_gradient(name, reward))


def no_gradient(name: str, reward: Any) -> str:
    """The error message for a reward without gradient, or for its class."""
    hint = getattr(reward, "gradient_hint", Reward.gradient_hint).format(name=name)
    return (
        f"rewards.{name} is not differentiable, and reward backpropagation needs every reward to "
        f"be: {hint}"
    )


def applies(name: str, metadata: Mapping[str, Any]) -> bool:
    """Whether the reward ``name`` scores a prompt with this metadata."""
    return name in metadata.get("rewards", (name,))


class Ensemble(Reward):
    """One cautious value out of several rewards of the same kind.

        min:       R(u, c) = min_k v_k                      v_k = w_k R_k(u, c)
        mean_std:  R(u, c) = mean_k v_k - penalty std_k v_k       (population std)

    A picture that fools one model seldom fools all of them. ``of`` is a spec as ``rewards.build``
    takes it; its weights w_k bring the members to one scale. Differentiable where every member is;
    the gradient of min is that of the lowest member. Raises ValueError for fewer than two members.
    Source: Coste et al. (arXiv 2310.02743), who use both, but subtract the variance in mean_std.
    """

    name = "ensemble"

    def __init__(self, of: Mapping[Any, Any], how: str = "min", penalty: float = 1.0):
        self.check_options(of=of, how=how, penalty=penalty)
        super().__init__()
        from . import build

        self.members = build(of)
        self.how, self.penalty = how, penalty
        self.differentiable = self.members.differentiable
        self.per_group = self.members.per_group

    @classmethod
    def check_options(cls, of: Any = (), how: str = "min", penalty: float = 1.0, **options: Any):
        from . import check

        if not isinstance(of, Mapping) or len(of) < 2:
            raise ValueError(f"of={of!r} is not a mapping of two rewards or more; one needs none")
        check(of)
        if how not in ("min", "mean_std"):
            raise ValueError(f"how={how!r} is not one of min, mean_std")
        if not isinstance(penalty, (int, float)) or penalty < 0:
            raise ValueError(f"penalty={penalty!r} is not a number from 0 up")

    @classmethod
    def has_gradient(cls, of: Any = (), **options: Any) -> bool | None:
        from . import gradients_of

        known = list(gradients_of(of).values())
        return False if False in known else None if None in known else True

    def forward(self, images, prompts, metadata=None):
        members = self.members
        # a prompt's `rewards` are labels of the run's rewards, not of these members
        known = metadata and [{k: v for k, v in m.items() if k != "rewards"} for m in metadata]
        parts = members.score(images, prompts, known)[1]
        values = [members.weights[k] * v for k, v in parts.items()]
        return conservative(torch.stack(values), self.how, self.penalty)


def conservative(values: Tensor, how: str, penalty: float = 1.0) -> Tensor:
    """(k, n) values of k members to (n,), see ``Ensemble``."""
    if how == "min":
        return values.min(0).values
    centered = values - values.mean(0)
    # the root has no gradient at 0, where all members agree
    return values.mean(0) - penalty * (centered.square().mean(0) + 1e-12).sqrt()
