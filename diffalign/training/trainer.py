"""The training loop, one for every algorithm, readable top to bottom."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import rewards as reward_library

from .. import policies
from ..algorithms.base import Algorithm, Needs
from ..config import TrainConfig
from ..config.prompts import Buckets, Given, Prompt, collect
from ..policies.sharding import Team
from ..record import checkpoint
from ..record.metrics import Meter, worries
from ..sampling.rollout import rollout, sample_seed
from ..sampling.windows import window
from . import engine, identity, saving, sizes
from .advantages import PromptTracker, combined_advantages, zero_variance_share
from .evaluation import Evaluation
from .guard import diversity
from .learning import Credit, Learner, Rollout, Samples
from .noise_scale import NoiseScale
from .optimizer import Optimizer
from .plan import Named, Plan
from .scorer import Scorer, constrain, summary, teach
from .stopping import TrainingStopped

__all__ = ["Trainer", "TrainingStopped"]

Learned = tuple[dict[str, float], Meter, list[tuple[Tensor, Prompt]]]
"""What an epoch's updates leave: metrics of the rewards, diagnostics of the updates, and pictures
for rewards that learn."""


class Trainer:
    """Fine-tunes a text-to-image pipeline on rewards: a LoRA, or with lora_rank 0 all its denoiser.

    config: a TrainConfig. rewards: {name or callable: weight or options}, in place of
    `config.rewards`; a bare weight keeps the options that the config has for that name. prompts:
    texts, prompt files or `Prompt`s, in place of `config.data.prompts` (`prompts.collect`).
    algorithm: in place of `config.algorithm`: an `Algorithm`, or its name, or a mapping of `type`
    and options.

    resume: go on from the newest whole checkpoint in the run folder: True, which must find a run
    there; "latest", which starts anew where there is none; or the path of one of its checkpoints,
    and what came later is removed. Settings that must stay (all but `identity.MAY_CHANGE`) are
    refused where they differ, unless `force`. overwrite: start anew in a folder that holds a run,
    and remove what that wrote.

    on_epoch_end: called with (trainer, epochs done, metrics of the epoch) on every process after
    each epoch and its evaluation; the run is saved and ends where it returns True on any of them.

    Raises ConfigError or ValueError for anything wrong before a model is loaded; `train` raises
    TrainingStopped when it cannot go on.
    """

    def __init__(
        self,
        config: TrainConfig,
        rewards: reward_library.Spec | None = None,
        prompts: Given | Sequence[Given] | None = None,
        resume: bool | str | os.PathLike[str] = False,
        *,
        algorithm: Algorithm | Named | None = None,
        on_epoch_end: Callable[[Trainer, int, dict[str, float]], bool | None] | None = None,
        overwrite: bool = False,
        force: bool = False,
    ):
        self.dir = Path(os.path.expanduser(config.log.dir or "runs/run"))
        self.accelerator = engine.make_accelerator(config.log, self.dir)
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.plan = Plan.make(config, rewards, prompts, self.world, algorithm)
        self.config = self.plan.config
        self.settings = identity.settings(self.plan)  # now: an algorithm may adapt its options
        self.algorithm, self.on_epoch_end = self.plan.algorithm, on_epoch_end
        state, changed = saving.open_run(self, resume, overwrite, force)
        # tells the files of this session's processes from those of earlier ones
        (self.token,) = broadcast_object_list([secrets.token_hex(4)])
        self._build(state["epoch"] if state else 0)
        self.written: int | None = None  # the epoch whose divided state was written last
        self.epoch, self.calls = 0, 0.0  # epochs done, and what they took of the denoiser
        if state is not None:
            for note in saving.restore(self, state, changed, force):
                self.say(note)
        self.complete = saving.kept_state(self)  # as of the last epoch that was finished
        checkpoint.check(self.complete)
        self.tracker = saving.open_record(self, bool(resume), overwrite)

    def _build(self, epoch: int) -> None:
        """Rewards and model are loaded, and everything that trains and looks is made of them.
        epoch: from which it goes on."""
        c, device = self.config, self.accelerator.device
        # rewards first: a reward without gradient is refused before the large model is read
        self.reward = reward_library.build(self.plan.rewards).to(device)
        if self.algorithm.needs is Needs.GRADIENT:
            self.reward.require_differentiable()
        judge = reward_library.build(c.eval.rewards).to(device) if c.eval.rewards else None
        self.shares = engine.shares(c.data, self.world, self.reward.per_group)
        self.sampler = Buckets(self.plan.train_prompts, c.data.groups, c.train.seed)
        team = Team(self.accelerator, engine.divides(self.accelerator))
        texts = self._texts(epoch, team.peers) if c.model.free_text_encoders else None
        self.policy = policies.prepared(c.model, c.train.seed, device, team, texts)
        self.sampling = sizes.training_sampling(c, self.policy.levels(c.sampler.steps))
        self.history = PromptTracker(c.advantage.buffer_size, c.advantage.min_count)
        self.algorithm.setup(self.policy)
        self.copies = self.algorithm.copies()
        for name in self.copies:
            self.policy.add_copy(name)
        self.optimizer = Optimizer(
            policy=self.policy,
            extra=self.algorithm.parameters(),
            config=c.train,
            accelerator=self.accelerator,
            dtype=c.model.dtype,
            steps=c.train.epochs * c.train.updates_per_epoch * c.train.inner_epochs,
        )
        self.noise_scale = NoiseScale(self.plan.samples // c.train.updates_per_epoch)
        self.learner = Learner(
            config=c,
            algorithm=self.algorithm,
            policy=self.policy,
            sampling=self.sampling,
            reward=self.reward,
            optimizer=self.optimizer,
            shares=self.shares,
            rank=self.rank,
        )
        self.evaluation = Evaluation(
            config=c,
            prompts=self.plan.eval_prompts,
            policy=self.policy,
            reward=self.reward,
            judge=judge,
            accelerator=self.accelerator,
        )

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def finished(self) -> bool:
        """Whether the epochs, or the denoiser calls that they may take, are used up."""
        t = self.config.train
        most = t.max_denoiser_calls
        return self.epoch >= t.epochs or (most is not None and self.calls >= most)

    def train(self) -> dict[str, dict[str, float]]:
        """Run to the last epoch. Returns {"before": ..., "after": ...}, the held-out evaluations.

        Whatever ends it early, the epochs done are saved, and one that was cut short is run again
        on resume. Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt (`stopping.Signals`). What can
        be said in words raises TrainingStopped: a reward that failed, gradients or weights that are
        not finite, a folder that cannot be written.
        """
        c = self.config
        bar = tqdm(
            total=c.train.epochs, initial=self.epoch, desc="training", unit="epoch",
            disable=not self.main,
        )  # fmt: skip
        with saving.kept(self) as signals, bar:
            before, after = self._begin()
            while not self.finished:
                metrics = self.run_epoch(self.epoch)
                self.epoch += 1
                self.calls += metrics["denoiser_calls"]
                done = self.finished
                due = done or (c.eval.every and self.epoch % c.eval.every == 0)
                if due:
                    with self._averaged():
                        after = self.evaluate(f"epoch {self.epoch}")
                    verdict, stop = self.evaluation.guarded(self.dir, self.epoch)
                    metrics |= after | verdict
                    done = done or stop
                with signals.held():  # the row and the state that it is of, or neither
                    self.tracker.log(self.epoch, metrics)
                    self.complete = saving.kept_state(self)
                if self.on_epoch_end is not None:
                    told = self.on_epoch_end(self, self.epoch, dict(metrics))
                    done = done or True in gather_object([told])
                every = c.train.checkpoint_every
                if done or (every and self.epoch % every == 0):
                    self.save()
                if due:
                    saving.report_on(self)
                bar.update()
                bar.set_postfix(reward=f"{metrics['reward_mean']:.4g}")
                if done:
                    break
            self.optimizer.check_made()
        return {"before": before, "after": after}

    def _begin(self) -> tuple[dict[str, float], dict[str, float]]:
        """Evaluate the base model; of a run that has nothing left to do, what it trained too.
        Returns the evaluations before and after."""
        # at the start the network is the base, and a reference may cost a second one
        with self.policy.reference() if self.epoch else nullcontext():
            before = after = self.evaluate("base")
        self.policy.forget("base")
        if self.epoch == 0 and not self.tracker.rows:
            self.tracker.log(0, before)
            saving.report_on(self)
        if self.finished:
            self.say(f"nothing left to train: epoch {self.epoch} is the last by this config")
            with self._averaged():
                after = self.evaluate(f"epoch {self.epoch}")
        return before, after

    def _texts(self, epoch: int, ranks: Iterable[int]) -> list[str]:
        """Every text that these processes ask for from `epoch` on, in training and evaluation."""
        size, shares = self.config.data.group_size, [self.shares[rank] for rank in ranks]
        places = slice(shares[0].start // size, -(-shares[-1].stop // size))
        ids = self.sampler.seen(range(epoch, self.config.train.epochs), places)
        asked = [self.plan.train_prompts[i] for i in ids] + self.plan.eval_prompts
        return sorted({p.text for p in asked})

    def run_epoch(self, epoch: int) -> dict[str, float]:
        """Sample, score, update. Returns the metrics of the epoch, the same on every process."""
        start, calls = time.monotonic(), self.policy.calls
        scored, scoring = self.reward.images, self.reward.seconds
        skipped = self.optimizer.skipped
        self.sampling = sizes.fitted(self, self.sampler.size(epoch))
        self.learner = replace(self.learner, sampling=self.sampling)
        data = self._sample(epoch)
        if isinstance(data, Rollout):
            metrics, meter, pictures = self._from_advantages(epoch, data)
        else:
            metrics, meter, pictures = self._from_gradients(epoch, data)
        metrics |= self._teach(pictures) | constrain(self.reward, metrics)
        done = self.policy.calls - calls, self.reward.images - scored
        everyone = gather_object([(meter.totals(), *done)])
        metrics |= Meter.means([totals for totals, *_ in everyone])
        metrics |= self.algorithm.end_epoch(metrics)
        for name, decay in self.copies.items():
            self.optimizer.follow(name, decay(self.optimizer.updates))
        metrics["skipped_steps"] = float(self.optimizer.skipped - skipped)
        metrics |= self.noise_scale.add(metrics)
        for worry in [*worries(metrics), *self.noise_scale.worries(metrics)]:
            self.say(f"epoch {epoch + 1}: {worry}")
        return metrics | {
            "lr": self.optimizer.lr,
            "denoiser_calls": float(sum(made for _, made, _ in everyone)),
            "reward_calls": float(sum(scored for *_, scored in everyone)),
            "reward_seconds": self.reward.seconds - scoring,
            "seconds": time.monotonic() - start,
        }

    def _sample(self, epoch: int) -> Samples:
        """This process's samples of an epoch: a `Rollout`, but for GRADIENT, whose updates draw
        their own."""
        c, needs, seed = self.config, self.algorithm.needs, self.config.train.seed
        ids, size = self.sampler.epoch(epoch), c.data.group_size
        keys = [(epoch, ids[k // size], k % size) for k in self.shares[self.rank]]
        batch = [self.plan.train_prompts[i] for _, i, _ in keys]
        cond = self.policy.encode([p.text for p in batch])
        if needs is Needs.GRADIENT:
            return Samples(batch, keys, cond)
        steps = None
        if needs is Needs.TRAJECTORY:
            images = [j for *_, j in keys]
            steps = window(c.sampler, self.sampling.stochastic, epoch, seed, images)
        start = [sample_seed(seed, epoch, i, "start") for _, i, _ in keys]
        drawn_by, divided = self.algorithm.sampled_by, self.policy.sharding is not None
        with (
            Scorer(self.policy, self.reward, batch, c.data.group_size) as scorer,
            self.policy.adapter(drawn_by) if drawn_by else nullcontext(),
        ):
            paths = rollout(
                self.policy,
                cond,
                self.sampling,
                [sample_seed(seed, *key) for key in keys],
                batch=c.sampler.batch,
                window=steps,
                initial=start if c.sampler.same_noise else None,
                means=self.algorithm.stores_means,
                store=needs is Needs.TRAJECTORY,
                each=scorer.add,
                chunks=-(-max(map(len, self.shares)) // c.sampler.batch) if divided else 0,
            )
            return Rollout(batch, keys, cond, paths, scorer.finish())

    def _from_advantages(self, epoch: int, data: Rollout) -> Learned:
        """Compare the samples with each other, and learn from how they compare."""
        scores = data.scores
        metrics = self._reward_metrics(scores.total, scores.parts)
        prompt_ids = torch.tensor([i for _, i, _ in data.keys])
        spread = diversity(self._gather(scores.small), self._gather(prompt_ids))
        metrics |= {} if spread is None else {"diversity": spread}
        credit, figures = self.credit(data)
        meter = self.learner.from_advantages(epoch, data, credit)
        return metrics | figures, meter, list(zip(scores.images, data.prompts, strict=False))

    def credit(self, data: Rollout) -> tuple[Credit, dict[str, float]]:
        """What this process's samples are worth beside those of all, and metrics of that."""
        groups = torch.tensor([i for _, i, _ in data.keys])
        if self.config.sampler.window_schedule == "branch":  # compared step by step
            groups = groups * self.sampling.steps + data.paths.start
        scores = data.scores
        advantage, whitened, figures = self._advantages(scores.total, scores.parts, groups)
        return Credit(advantage, whitened), figures

    def _from_gradients(self, epoch: int, data: Samples) -> Learned:
        """Learn from the gradient of the rewards."""
        plans = self.learner.surrogates(epoch)
        meter, parts, pictures = self.learner.from_gradients(epoch, data, plans)
        return self._reward_metrics(parts.pop(""), parts), meter, pictures

    def _advantages(
        self, reward: Tensor, parts: Mapping[str, Tensor], groups: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Advantages and whitened rewards of this process's samples, from the rewards of all."""
        c = self.config.advantage
        everyone, groups = self._gather(reward), self._gather(groups)
        if c.baseline == "tracker":
            advantage = self.history.update(groups, everyone, clip=c.clip)
        else:
            weights = self.reward.weights
            values = {k: self._gather(parts[k]) for k in weights}
            advantage = combined_advantages(everyone, values, weights, groups, c)
        whitened = (everyone - everyone.mean()) / (everyone.std(correction=0) + 1e-8)
        own = slice(self.shares[self.rank].start, self.shares[self.rank].stop)
        figures = {"zero_variance_groups": zero_variance_share(everyone, groups)}
        return advantage[own].to(reward.device), whitened[own].to(reward.device), figures

    def _teach(self, pictures: Sequence[tuple[Tensor, Prompt]]) -> dict[str, float]:
        """Rewards that learn do so from the pictures of all processes, and so remain alike."""
        if not self.reward.learns:
            return {}
        images = self._gather(torch.stack([image for image, _ in pictures]))
        everyone = [p for part in gather_object([[p for _, p in pictures]]) for p in part]
        return teach(self.reward, images, everyone)

    def _reward_metrics(self, total: Tensor, parts: Mapping[str, Tensor]) -> dict[str, float]:
        """Mean, std, best and worst of the reward and of its raw parts, over all processes."""
        values = {"": total, **parts}
        return summary({k: self._gather(v.detach().float()) for k, v in values.items()})

    def _gather(self, values: Tensor) -> Tensor:
        """Rows of all processes in the order of their ranks, on the CPU."""
        if self.world == 1:
            return values.cpu()
        values = values.to(self.accelerator.device)
        counts: Any = self.accelerator.gather(values.new_tensor([len(values)], dtype=torch.long))
        most = int(counts.max())
        rows = torch.cat([values, values.new_zeros(most - len(values), *values.shape[1:])])
        found: Any = self.accelerator.gather(rows)
        parts = zip(found.split(most), counts.tolist(), strict=True)
        return torch.cat([part[:n] for part, n in parts]).cpu()

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int] = (0,),
        steps: int | None = None,
        guidance: float | None = None,
    ) -> list[Image.Image]:
        """Pictures by the weights as they are now (with train.ema their average): every prompt from
        the noise of every seed, all seeds of a prompt together, drawn as the evaluations are but
        for `steps` and `guidance`. Each process that calls this draws all of them."""
        texts = [p.text for p in collect(prompts)]
        with self._averaged():
            return self.evaluation.draw(texts, seeds, steps, guidance)

    def evaluate(self, label: str) -> dict[str, float]:
        """Means over the held-out prompts of the weights as they are (`Evaluation`). `label` heads
        their column of the grid; "base" says that they are the base model's."""
        means = self.evaluation.run(label)
        self.evaluation.write(self.dir, 0 if label == "base" else self.epoch)
        if self.evaluation.grid is not None:
            self.tracker.log_images(self.epoch, "eval", self.evaluation.grid)
        return means

    def _averaged(self) -> AbstractContextManager[None]:
        """The averaged weights in place of the trained ones, where there are any."""
        return self.policy.adapter("ema") if self.config.train.ema else nullcontext()

    def save(self) -> None:
        """Checkpoint, weights and curve, as of the last epoch that was finished. All processes call
        this; where the denoiser is divided each writes its rows, and else the main one alone."""
        saving.save(self)

    def say(self, text: str) -> None:
        """Print beside the progress bar, once for all processes."""
        if self.main:
            tqdm.write(text)
