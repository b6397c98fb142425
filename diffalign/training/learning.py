"""What is learnt from one rollout: the updates of an epoch, for each of the three needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewards.gradients import merge

from ..algorithms import Batch, Needs
from ..config import TrainConfig
from ..config.prompts import Prompt, for_rewards
from ..dynamics import Prediction, noised
from ..policies import Cond, Policy
from ..record.metrics import Meter
from ..sampling.rollout import (
    Noise,
    Sampling,
    Surrogate,
    adjoint_sweep,
    renoise_last,
    reward_input,
    rollout,
    sample_seed,
)
from .optimizer import Optimizer


@dataclass(frozen=True)
class Rollout:
    """This process's n samples of an epoch. keys: (epoch, prompt, number in its group) of each,
    what its noise depends on beside the run's seed. scores, advantage (n,) and reward (n,),
    whitened over the epoch: None for GRADIENT, and so are paths, since its updates draw their own.
    """

    prompts: Sequence[Prompt]
    keys: Sequence[tuple[int, ...]]
    cond: Cond
    paths: Any = None
    scores: Any = None
    advantage: Any = None
    reward: Any = None


@dataclass(frozen=True)
class Learner:
    """The updates of an epoch. samples: pictures of all processes."""

    config: TrainConfig
    algorithm: Any
    policy: Policy
    sampling: Sampling
    reward: Any
    optimizer: Optimizer
    samples: int
    rank: int
    world: int

    def from_advantages(self, epoch: int, data: Rollout) -> Meter:
        """TRAJECTORY: loss over (sample, step) rows. FINAL: over (sample, time) rows."""
        meter, first = Meter(), self.optimizer.updates
        trajectory = self.algorithm.needs is Needs.TRAJECTORY
        per_sample = data.paths.log_prob.shape[1] if trajectory else self.algorithm.times
        for mine, everyone in self._updates(epoch):
            on_policy = self.optimizer.updates == first
            batches = self._transitions if trajectory else self._matches
            for batch in batches(data, mine, on_policy):
                loss, figures = self.algorithm.loss(self.policy, batch)
                rows = len(batch.x)
                # each row counts alike whatever the micro-batches and processes
                self.optimizer.backward(loss * rows / (everyone * per_sample))
                meter.add({"loss": loss, **figures}, rows)
            meter.add({"grad_norm": self.optimizer.step()})
        return meter

    def _transitions(self, data: Rollout, mine: Tensor, on_policy: bool) -> Iterator[Batch]:
        paths, device = data.paths, self.policy.device
        steps = torch.arange(paths.log_prob.shape[1])
        samples, index = (m.flatten() for m in torch.meshgrid(mine, steps, indexing="ij"))
        for pick in chunks(len(samples), self.config.train.micro_batch):
            i, k = samples[pick], index[pick]
            step = (paths.start[i] + k).to(device)
            yield Batch(
                self.sampling,
                data.cond[i],
                paths.states[i, k],
                self.sampling.levels[step],
                data.advantage[i],
                data.reward[i],
                on_policy,
                step=step,
                x_next=paths.states[i, k + 1],
                log_prob_old=paths.log_prob[i, k],
                mean_old=paths.means[i, k] if paths.means is not None else None,
            )

    def _matches(self, data: Rollout, mine: Tensor, on_policy: bool) -> Iterator[Batch]:
        times, shape = self.algorithm.times, self.policy.latent_shape
        for pick in chunks(len(mine), max(1, self.config.train.micro_batch // times)):
            i = mine[pick]
            seeds = [
                sample_seed(self.config.train.seed, *data.keys[j], "match") for j in i.tolist()
            ]
            offsets = torch.tensor([s / 2**63 for s in seeds])
            level = self.algorithm.levels(self.policy, self.sampling, offsets)
            noise = Noise(seeds, (times, *shape), self.policy.device).draw().flatten(0, 1)
            i = i.repeat_interleave(times)
            x0 = data.paths.final[i]
            yield Batch(
                self.sampling,
                data.cond[i],
                noised(x0, noise, level),
                level,
                data.advantage[i],
                data.reward[i],
                on_policy,
                x0=x0,
                noise=noise,
                times=times,
            )

    def surrogates(self, epoch: int) -> list[Surrogate]:
        """What each update of an epoch learns from, alike on all processes; none but for GRADIENT
        algorithms."""
        if self.algorithm.needs is not Needs.GRADIENT:
            return []
        generator = torch.Generator()
        generator.manual_seed(sample_seed(self.config.train.seed, epoch, "surrogate"))
        c = self.config.train
        steps = self.sampling.steps
        updates = c.inner_epochs * c.updates_per_epoch
        return [self.algorithm.surrogate(steps, generator) for _ in range(updates)]

    def from_gradients(
        self, epoch: int, data: Rollout, plans: Sequence[Surrogate]
    ) -> tuple[Meter, dict[str, Tensor], list[tuple[Tensor, Prompt]]]:
        """GRADIENT: reward gradient at the clean latents, then the adjoint sweep.

        Every update draws its own samples with the weights that it then moves, since the gradient
        is that of the chain it is taken along. Returns the total reward "" and its parts as well,
        (rows,) each, and the pictures for rewards that learn.
        """
        meter, rewards, pictures = Meter(), {}, []
        c, policy = self.config.train, self.policy
        for (mine, everyone), plan in zip(self._updates(epoch), plans, strict=True):
            share = 1 / (everyone * (1 + plan.renoised))
            drawn = self._draw(data, mine, plan)
            for pick in chunks(len(mine), c.micro_batch):
                rows = mine[pick]
                cond, states = data.cond[rows], drawn[pick]
                seeds = [sample_seed(c.seed, *data.keys[j], "renoise") for j in rows.tolist()]
                noise, paths = Noise(seeds, policy.latent_shape, policy.device), [states]
                for _ in range(plan.renoised):
                    renoised = renoise_last(policy, cond, self.sampling, states, noise.draw())
                    paths.append(renoised)
                for states in paths:
                    x0 = reward_input(policy, cond, self.sampling, states, plan)
                    x0 = x0.detach().requires_grad_()
                    images = policy.decode(x0, differentiable=True, tiny=True)
                    batch = [data.prompts[j] for j in rows.tolist()]
                    if self.reward.learns:
                        pictures += zip(images.detach().cpu(), batch, strict=True)
                    pixels, total, parts = self._pixel_gradient(images, batch)
                    self._look_for_blame(pixels, batch)
                    (grad,) = torch.autograd.grad(images, x0, pixels * share)
                    grad = self.optimizer.scaler.scale(grad)  # the sweep is linear in it
                    penalty = self._penalty(cond, share / len(plan.active), meter)
                    adjoint_sweep(policy, cond, self.sampling, states, grad, plan, penalty)
                    saturated = ((images <= 0) | (images >= 1)).float().flatten(1).mean(1)
                    meter.add({"saturated_pixels": saturated}, len(rows))
                    for name, values in {"": total, **parts}.items():
                        rewards.setdefault(name, []).append(values.detach())
            meter.add({"grad_norm": self.optimizer.step()})
        return meter, {name: torch.cat(values) for name, values in rewards.items()}, pictures

    def _draw(self, data: Rollout, rows: Tensor, plan: Surrogate) -> Any:
        """The states (len(rows), steps + 1, *latent) of samples, as far as `plan` looks."""
        if not len(rows):  # all of an update's are with other processes
            return None
        s, seed = self.config.sampler, self.config.train.seed
        keys = [data.keys[j] for j in rows.tolist()]
        seeds = [sample_seed(seed, *key) for key in keys]
        start = [sample_seed(seed, *key[:-1], "start") for key in keys] if s.same_noise else None
        how = self.policy, data.cond[rows], self.sampling, seeds, s.batch
        return rollout(*how, initial=start, until=plan.at).states

    def _pixel_gradient(
        self, images: Tensor, batch: Sequence[Prompt]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """∂(Σ loss)/∂images (n, 3, H, W), the total reward and its parts (n,)."""
        pixels = images.detach().requires_grad_()
        total, parts = self.reward.score(pixels, *for_rewards(batch))
        how, weights = self.config.train.gradients, self.reward.weights
        if how == "sum" or len(weights) == 1:
            loss = self.algorithm.reward_loss(total).sum()
            return torch.autograd.grad(loss, pixels)[0], total, parts
        # the loss is a function of the total: its slope times an ascent direction of the rewards
        value = total.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.algorithm.reward_loss(value).sum(), value)
        each = [
            torch.autograd.grad(parts[k].nansum(), pixels)[0]
            if parts[k].requires_grad  # else missing for all of them
            else torch.zeros_like(pixels)
            for k in weights
        ]
        merged = merge(torch.stack(each, 1), total.new_tensor(list(weights.values())), how)
        return merged * slope.view(-1, 1, 1, 1), total, parts

    def _look_for_blame(self, pixels: Tensor, batch: Sequence[Prompt]) -> None:
        """Note a reward's gradient (n, 3, H, W) that is not finite, for the message of the step
        that it spoils."""
        bad = (~pixels.isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist()
        if bad:
            names = " or ".join(repr(k) for k, w in self.reward.weights.items() if w != 0)
            self.optimizer.blame = (
                f"the gradient of the reward {names} to the pixels is NaN or infinite for the "
                f"prompt {batch[bad[0]].text!r}"
            )

    def _penalty(self, cond: Cond, share: float, meter: Meter) -> Any:
        """kl_weight times the mean square between the outputs of policy and base (DRaFT+), both at
        the state that the policy saw: where that depends on the weights, through earlier steps, the
        base's output does too."""
        if not self.algorithm.kl_weight:
            return None
        weight = self.algorithm.kl_weight * share

        def penalty(x: Tensor, seen: Prediction, i: int) -> Tensor:
            level, moves = self.sampling.levels[i], x.requires_grad
            state = x.detach().requires_grad_(moves)

            def scaled(distance: Tensor) -> Tensor:
                return self.optimizer.scaler.scale(weight * distance.sum())

            with torch.set_grad_enabled(moves), self.policy.reference():
                base = self.policy.predict(state, level, cond, self.sampling.guidance).native
                pull = None
                if moves:  # here, since checkpointing calls the network again to differentiate it
                    apart = (base - seen.native.detach()).square().flatten(1).mean(1)
                    (pull,) = torch.autograd.grad(scaled(apart), state)
            distance = (seen.native - base.detach()).square().flatten(1).mean(1)
            meter.add({"kl": distance.detach()}, len(x))
            total = scaled(distance)
            return total if pull is None else total + (pull * (x - state.detach())).sum()

        return penalty

    def _updates(self, epoch: int) -> Iterator[tuple[Tensor, int]]:
        """For each optimiser step of an epoch: this process's samples, and the number of all.

        The shuffle is over the samples of all processes, so it does not depend on their number.
        """
        c, n = self.config.train, self.samples
        share = n // self.world
        for inner in range(c.inner_epochs):
            generator = torch.Generator().manual_seed(sample_seed(c.seed, epoch, "order", inner))
            for part in torch.randperm(n, generator=generator).chunk(c.updates_per_epoch):
                mine = part[part // share == self.rank] - self.rank * share
                yield mine.sort().values, len(part)


def chunks(n: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, n, size))
