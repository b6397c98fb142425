"""The updates of an epoch: what is learned from its samples, for each of the three needs.

How an epoch flows, by what the algorithm needs:

    TRAJECTORY  sample, score, compare → `Transitions`, one row a (sample, step) → loss → gradient
    FINAL       sample, score, compare → `Matches`, one row a (sample, time), noised again → loss
    GRADIENT    sample anew for every update → decode, score with gradient → sweep back through it

The samples of an epoch, those of all processes, are shuffled and divided into
`train.updates_per_epoch` updates, and that `train.inner_epochs` times (`Learner._updates`). An
update adds up the gradients of its micro-batches, over all processes, and takes one optimizer step;
every row counts alike, so that results depend neither on the micro-batch nor on the processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from rewards import WeightedSum
from rewards.gradients import merge

from ..algorithms.base import (
    Algorithm,
    Batch,
    GradientAlgorithm,
    Matcher,
    Matches,
    Needs,
    Transitions,
)
from ..config import TrainConfig
from ..config.prompts import Prompt, for_rewards
from ..dynamics import Prediction, noised
from ..policies import Cond, Policy
from ..record.metrics import Meter
from ..sampling.adjoint import Surrogate, adjoint_sweep, renoise_last, reward_input
from ..sampling.rollout import Noise, Sampling, Trajectories, rollout, sample_seed
from .noise_scale import Parts
from .optimizer import Optimizer
from .scorer import Scores
from .stopping import blame


@dataclass(frozen=True)
class Samples:
    """This process's n samples of an epoch, all that a GRADIENT algorithm needs of them.

    keys: (epoch, prompt, number in its group) of each, what its noise depends on beside the run's
    seed.
    """

    prompts: Sequence[Prompt]
    keys: Sequence[tuple[int, ...]]
    cond: Cond


@dataclass(frozen=True)
class Rollout(Samples):
    """Samples that were drawn and scored, for the other two needs."""

    paths: Trajectories
    scores: Scores


@dataclass(frozen=True)
class Credit:
    """What n samples are worth, (n,) each: their advantages, and their rewards less the epoch's
    mean over its standard deviation."""

    advantage: Tensor
    reward: Tensor


@dataclass(frozen=True)
class Update:
    """The samples of an optimizer step: `mine` (k,), positions among this process's samples; how
    many there are with all processes (everyone), and with the one that has most of them (most)."""

    mine: Tensor
    everyone: int
    most: int


@dataclass(frozen=True, kw_only=True)
class Learner:
    """The updates of an epoch. shares: which of its samples are with each process, in the order of
    their ranks; rank: of this one."""

    config: TrainConfig
    algorithm: Algorithm
    policy: Policy
    sampling: Sampling
    reward: WeightedSum
    optimizer: Optimizer
    shares: Sequence[range]
    rank: int

    def from_advantages(self, epoch: int, data: Rollout, credit: Credit) -> Meter:
        """TRAJECTORY: loss over (sample, step) rows. FINAL: over (sample, time) rows."""
        meter, first = Meter(), self.optimizer.updates
        for update in self._updates(epoch):
            on_policy = self.optimizer.updates == first
            split = self.accumulate(data, credit, update, on_policy, meter)
            meter.add(self._step(split, update))
        return meter

    def accumulate(
        self,
        data: Rollout,
        credit: Credit,
        update: Update,
        on_policy: bool,
        meter: Meter,
        step: int | None = None,
    ) -> Parts:
        """Add to the weights' `grad` that of an update's samples. step: only that of one of the
        stored steps of TRAJECTORY."""
        if self.algorithm.needs is Needs.TRAJECTORY:
            per_sample = data.paths.log_prob.shape[1]
            steps = torch.arange(per_sample) if step is None else torch.tensor([step])
            own = len(steps)

            def batches(mine: Tensor) -> Iterator[Batch]:
                return self._transitions(data, credit, mine, on_policy, steps)

        else:
            own = per_sample = cast(Matcher, self.algorithm).times

            def batches(mine: Tensor) -> Iterator[Batch]:
                return self._matches(data, credit, mine, on_policy)

        split, done, size = self._parts(data, update.mine), 0, self._whole(own)
        for batch in batches(update.mine):
            loss, figures = self.algorithm.loss(self.policy, batch)
            rows = len(batch.x)
            # each row counts alike whatever the micro-batches and processes
            self.optimizer.backward(loss * rows / (update.everyone * per_sample))
            meter.add({"loss": loss, **figures}, rows)
            done += rows
            split.learnt(done / own)
        if self.policy.sharding is not None:  # all processes must call the denoiser as often
            most, calls = (math.ceil(n * own / size) for n in (update.most, len(update.mine)))
            for _ in range(most - calls):
                batch = next(batches(torch.zeros(1, dtype=torch.long)))
                self.optimizer.backward(self.algorithm.loss(self.policy, batch)[0] * 0)
        return split

    def _whole(self, own: int) -> int:
        """Rows of a micro-batch, of samples with `own` rows each."""
        size = self.config.train.micro_batch
        whole = self.algorithm.needs is Needs.FINAL  # the rows of a sample stay together
        return max(1, size // own) * own if whole else size

    def _transitions(
        self, data: Rollout, credit: Credit, mine: Tensor, on_policy: bool, steps: Tensor
    ) -> Iterator[Batch]:
        paths, device = data.paths, self.policy.device
        start = paths.start.to(device)
        # once an update: a copy to the device in every micro-batch would wait for it
        pairs = torch.meshgrid(mine, steps, indexing="ij")
        samples, index = (m.flatten().to(device) for m in pairs)
        for pick in chunks(len(samples), self.config.train.micro_batch):
            i, k = samples[pick], index[pick]
            step = start[i] + k
            yield Transitions(
                sampling=self.sampling,
                cond=data.cond[i],
                x=paths.states[i, k],
                level=self.sampling.levels[step],
                advantage=credit.advantage[i],
                reward=credit.reward[i],
                on_policy=on_policy,
                step=step,
                x_next=paths.states[i, k + 1],
                log_prob_old=paths.log_prob[i, k],
                mean_old=paths.means[i, k] if paths.means is not None else None,
            )

    def _matches(
        self, data: Rollout, credit: Credit, mine: Tensor, on_policy: bool
    ) -> Iterator[Batch]:
        matcher, shape = cast(Matcher, self.algorithm), self.policy.latent_shape
        times = matcher.times
        for pick in chunks(len(mine), self._whole(times) // times):
            i = mine[pick]
            seeds = [
                sample_seed(self.config.train.seed, *data.keys[j], "match") for j in i.tolist()
            ]
            offsets = torch.tensor([s / 2**63 for s in seeds])
            level = matcher.levels(self.policy, self.sampling, offsets)
            noise = Noise(seeds, (times, *shape), self.policy.device).draw().flatten(0, 1)
            i = i.to(self.policy.device).repeat_interleave(times)
            x0 = data.paths.final[i]
            yield Matches(
                sampling=self.sampling,
                cond=data.cond[i],
                x=noised(x0, noise, level),
                level=level,
                advantage=credit.advantage[i],
                reward=credit.reward[i],
                on_policy=on_policy,
                x0=x0,
                noise=noise,
                times=times,
            )

    def surrogates(self, epoch: int) -> list[Surrogate]:
        """GRADIENT: what each update of an epoch learns from, alike on all processes."""
        generator = torch.Generator()
        generator.manual_seed(sample_seed(self.config.train.seed, epoch, "surrogate"))
        c, algorithm = self.config.train, cast(GradientAlgorithm, self.algorithm)
        updates = c.inner_epochs * c.updates_per_epoch
        return [algorithm.surrogate(self.sampling.steps, generator) for _ in range(updates)]

    def from_gradients(
        self, epoch: int, data: Samples, plans: Sequence[Surrogate]
    ) -> tuple[Meter, dict[str, Tensor], list[tuple[Tensor, Prompt]]]:
        """GRADIENT: reward gradient at the clean latents, then the adjoint sweep.

        Every update draws its own samples with the weights that it then moves, since the gradient
        is that of the chain it is taken along. Returns the total reward "" and its parts as well,
        (rows,) each, and the pictures for rewards that learn.
        """
        meter, rewards, pictures = Meter(), {}, []
        for update, plan in zip(self._updates(epoch), plans, strict=True):
            split = self.sweep(data, update, plan, meter, rewards, pictures)
            meter.add(self._step(split, update))
        return meter, {name: torch.cat(values) for name, values in rewards.items()}, pictures

    def sweep(
        self,
        data: Samples,
        update: Update,
        plan: Surrogate,
        meter: Meter,
        rewards: dict[str, list[Tensor]],
        pictures: list[tuple[Tensor, Prompt]],
    ) -> Parts:
        """Draw an update's samples, and add their gradient to the weights' `grad`; their rewards
        and pictures are added to the last two."""
        c, policy, mine, n = self.config.train, self.policy, update.mine, len(update.mine)
        share, split = 1 / (update.everyone * (1 + plan.renoised)), self._parts(data, mine)
        if policy.sharding is not None:  # all processes must call the denoiser as often
            mine = torch.cat([mine, mine.new_zeros(update.most - n)])
        # of an update all samples may be with other processes
        drawn = self._draw(data, mine, plan) if len(mine) else torch.empty(0)
        for pick in chunks(len(mine), c.micro_batch):
            rows, real = mine[pick], max(0, min(pick.stop, n) - pick.start)
            cond, states = data.cond[rows], drawn[pick]
            batch = [data.prompts[j] for j in rows[:real].tolist()]
            seeds = [sample_seed(c.seed, *data.keys[j], "renoise") for j in rows.tolist()]
            noise, paths = Noise(seeds, policy.latent_shape, policy.device), [states]
            for _ in range(plan.renoised):
                renoised = renoise_last(policy, cond, self.sampling, states, noise.draw())
                paths.append(renoised)
            for states in paths:
                x0 = reward_input(policy, cond, self.sampling, states, plan).detach()
                grad = torch.zeros_like(x0)
                if real:
                    seen = meter, rewards, pictures
                    grad[:real] = self._latent_gradient(x0[:real], batch, share, *seen)
                penalty = self._penalty(cond, share / len(plan.active), real, meter)
                adjoint_sweep(policy, cond, self.sampling, states, grad, plan, penalty)
            split.learnt(min(pick.stop, n))
        return split

    def _latent_gradient(
        self,
        x0: Tensor,
        batch: Sequence[Prompt],
        share: float,
        meter: Meter,
        rewards: dict[str, list[Tensor]],
        pictures: list[tuple[Tensor, Prompt]],
    ) -> Tensor:
        """share · ∂(Σ loss)/∂x0 at the clean latents x0 (n, *latent), scaled as gradients are in
        float16; what is seen on the way is added to the last three."""
        x0 = x0.requires_grad_()
        images = self.policy.decode(x0, differentiable=True, tiny=True)
        if self.reward.learns:
            pictures += zip(images.detach().cpu(), batch, strict=True)
        pixels, total, parts = self._pixel_gradient(images, batch)
        finite = pixels.isfinite().flatten(1).all(1)
        names = [name for name, weight in self.reward.weights.items() if weight != 0]
        self.optimizer.suspects.append(partial(blame, finite, names, batch))
        saturated = ((images <= 0) | (images >= 1)).float().flatten(1).mean(1)
        meter.add({"saturated_pixels": saturated}, len(batch))
        for name, values in {"": total, **parts}.items():
            rewards.setdefault(name, []).append(values.detach())
        (grad,) = torch.autograd.grad(images, x0, pixels * share)
        return self.optimizer.scaler.scale(grad)  # the sweep is linear in it

    def _parts(self, data: Samples, mine: Tensor) -> Parts:
        """For an update's samples here, whose gradient can be told apart prompt by prompt."""
        prompts = [data.keys[i][:-1] for i in mine.tolist()]
        # further gradients of a whole denoiser would not fit; parts must be independent, and so no
        # prompt may be with two processes
        whole = all(share.start % self.config.data.group_size == 0 for share in self.shares)
        looked_at = self.optimizer.trained if self.policy.is_lora and whole else []
        return Parts(looked_at, prompts, self.optimizer.scaler.get_scale())

    def _step(self, split: Parts, update: Update) -> dict[str, Tensor]:
        norm = self.optimizer.step()
        found = split.figures(norm, update.everyone, self.optimizer.accelerator)
        return {"grad_norm": norm, **found}

    def _draw(self, data: Samples, rows: Tensor, plan: Surrogate) -> Tensor:
        """The states (len(rows), steps + 1, *latent) of samples, as far as `plan` looks."""
        s, seed = self.config.sampler, self.config.train.seed
        keys = [data.keys[j] for j in rows.tolist()]
        start = [sample_seed(seed, *key[:-1], "start") for key in keys] if s.same_noise else None
        paths = rollout(
            self.policy,
            data.cond[rows],
            self.sampling,
            [sample_seed(seed, *key) for key in keys],
            batch=s.batch,
            initial=start,
            until=plan.at,
        )
        return paths.states

    def _pixel_gradient(
        self, images: Tensor, batch: Sequence[Prompt]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """∂(Σ loss)/∂images (n, 3, H, W), the total reward and its parts (n,)."""
        algorithm = cast(GradientAlgorithm, self.algorithm)
        pixels = images.detach().requires_grad_()
        total, parts = self.reward.score(pixels, *for_rewards(batch))
        how, weights = self.config.train.gradients, self.reward.weights
        if how == "sum" or len(weights) == 1:
            loss = algorithm.reward_loss(total).sum()
            return torch.autograd.grad(loss, pixels)[0], total, parts
        # the loss is a function of the total: its slope times an ascent direction of the rewards
        value = total.detach().requires_grad_()
        (slope,) = torch.autograd.grad(algorithm.reward_loss(value).sum(), value)
        each = [
            torch.autograd.grad(parts[k].nansum(), pixels)[0]
            if parts[k].requires_grad  # else missing for all of them
            else torch.zeros_like(pixels)
            for k in weights
        ]
        merged = merge(torch.stack(each, 1), total.new_tensor(list(weights.values())), how)
        return merged * slope.view(-1, 1, 1, 1), total, parts

    def _penalty(
        self, cond: Cond, share: float, real: int, meter: Meter
    ) -> Callable[[Tensor, Prediction, int], Tensor] | None:
        """kl_weight times the mean square between the outputs of policy and base (DRaFT+), both at
        the state that the policy saw: where that depends on the weights, through earlier steps, the
        base's output does too. share: what each of the first `real` rows counts; others do not."""
        if not self.algorithm.kl_weight:
            return None
        weight = self.algorithm.kl_weight * share

        def penalty(x: Tensor, seen: Prediction, i: int) -> Tensor:
            moves = x.requires_grad
            state = x.detach().requires_grad_(moves)

            def scaled(distance: Tensor) -> Tensor:
                return self.optimizer.scaler.scale(weight * distance[:real].sum())

            with torch.set_grad_enabled(moves), self.policy.reference():
                base = self.sampling.predict(self.policy, state, i, cond).native
                pull = None
                if moves:  # here, since checkpointing calls the network again to differentiate it
                    apart = (base - seen.native.detach()).square().flatten(1).mean(1)
                    (pull,) = torch.autograd.grad(scaled(apart), state)
            distance = (seen.native - base.detach()).square().flatten(1).mean(1)
            meter.add({"kl": distance.detach()[:real]}, real)
            total = scaled(distance)
            return total if pull is None else total + (pull * (x - state.detach())).sum()

        return penalty

    def _updates(self, epoch: int) -> Iterator[Update]:
        """The optimizer steps of an epoch.

        The shuffle is over the samples of all processes, so it does not depend on their number.
        """
        c, n, own = self.config.train, self.shares[-1].stop, self.shares[self.rank]
        ends = torch.tensor([share.stop for share in self.shares])
        for inner in range(c.inner_epochs):
            generator = torch.Generator().manual_seed(sample_seed(c.seed, epoch, "order", inner))
            for part in torch.randperm(n, generator=generator).chunk(c.updates_per_epoch):
                ranks = torch.bucketize(part, ends, right=True)
                mine = part[ranks == self.rank] - own.start
                yield Update(mine.sort().values, len(part), int(ranks.bincount().max()))


def chunks(n: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, n, size))
