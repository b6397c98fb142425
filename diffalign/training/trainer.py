"""The training loop, one for every algorithm, readable top to bottom."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import rewards as reward_library

from .. import policies, report
from ..algorithms import Algorithm, Needs
from ..config import TrainConfig
from ..config.prompts import Given, Prompt, PromptSampler, collect
from ..record import checkpoint, folder, pictures
from ..record.metrics import Meter, Tracker, worries
from ..sampling.rollout import Sampling, rollout, sample_seed
from ..sampling.windows import window
from ..verdict import VERDICTS, WARNINGS
from . import identity, saving
from .advantages import PromptTracker, combined_advantages, zero_variance_share
from .evaluation import Evaluation
from .guard import diversity
from .learning import Learner, Rollout
from .optimizer import Optimizer
from .plan import Plan
from .scorer import Scorer, constrain, summary, teach
from .stopping import TrainingStopped

__all__ = ["Trainer", "TrainingStopped"]


class Trainer:
    """Fine-tunes a text-to-image pipeline on rewards: a LoRA, or with lora_rank 0 all its denoiser.

    config: a TrainConfig. rewards: {name or callable: weight or options}, in place of
    `config.rewards`; a bare weight keeps the options that the config has for that name. prompts:
    texts, prompt files or `Prompt`s, in place of `config.data.prompts` (`prompts.collect`).
    algorithm: in place of `config.algorithm`: an `Algorithm`, or its name, or a mapping of `type`
    and options.

    resume: go on from the checkpoint in the run folder; settings that must stay (all but
    `identity.MAY_CHANGE`) are refused where they differ, unless `force`. overwrite: start anew in a
    folder that holds a run, and remove what that wrote.

    on_epoch_end: called with (trainer, epochs done, metrics of the epoch) on every process after
    each epoch and its evaluation; the run is saved and ends where it returns True on any of them.

    Raises ConfigError or ValueError for anything wrong before a model is loaded; `train` raises
    TrainingStopped when it cannot go on.
    """

    def __init__(
        self,
        config: TrainConfig,
        rewards: Mapping[Any, Any] | None = None,
        prompts: Given | Sequence[Given] | None = None,
        resume: bool = False,
        *,
        algorithm: Algorithm | Mapping[str, Any] | str | None = None,
        on_epoch_end: Callable[[Trainer, int, dict[str, float]], bool | None] | None = None,
        overwrite: bool = False,
        force: bool = False,
    ):
        self.dir = Path(os.path.expanduser(config.log.dir or "runs/run"))
        self.accelerator = Accelerator(
            log_with=[*config.log.trackers] or None, project_dir=str(self.dir)
        )
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        launched = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
        if launched > self.world:  # as torchrun does on CPUs: each would train alone, in one folder
            raise ValueError(
                f"{launched} processes were launched, and accelerate sees {self.world}; on CPUs "
                "set ACCELERATE_USE_CPU=true"
            )
        self.plan = Plan.make(config, rewards, prompts, self.world, algorithm)
        self.config = config = self.plan.config
        self.settings = identity.settings(self.plan)  # now: an algorithm may adapt its options
        self.algorithm, self.on_epoch_end = self.plan.algorithm, on_epoch_end
        state, changed = saving.open_run(self, resume, overwrite, force)
        device = self.accelerator.device

        # rewards first: a reward without gradient is refused before the large model is read
        self.reward = reward_library.build(self.plan.rewards).to(device)
        if self.algorithm.needs is Needs.GRADIENT:
            self.reward.require_differentiable()
        judges = config.eval.rewards
        judge = reward_library.build(judges).to(device) if judges else None
        self.policy = policies.prepared(config.model, config.train.seed, device)
        s = config.sampler
        self.sampling = Sampling(self.policy.levels(s.steps), s.kernel, s.eta, s.guidance)
        self.sampler = PromptSampler(
            len(self.plan.train_prompts), config.data.groups, config.train.seed
        )
        self.history = PromptTracker(config.advantage.buffer_size, config.advantage.min_count)
        self.algorithm.setup(self.policy)
        self.copies = self.algorithm.copies()
        for name in self.copies:
            self.policy.add_copy(name)
        t = config.train
        self.optimizer = Optimizer(
            self.policy, self.algorithm.parameters(), t, self.accelerator, config.model.dtype,
            t.epochs * t.updates_per_epoch * t.inner_epochs,
        )  # fmt: skip
        self.learner = Learner(
            config, self.algorithm, self.policy, self.sampling, self.reward, self.optimizer,
            self.plan.samples, self.rank, self.world,
        )  # fmt: skip
        self.evaluation = Evaluation(
            config, self.plan.eval_prompts, self.policy, self.reward, judge, self.accelerator
        )
        self.epoch, self.calls = 0, 0.0  # epochs done, and what they took of the denoiser
        if state is not None:
            for note in saving.restore(self, state, changed, force):
                self.say(note)
        self.complete = self._state()  # as of the last epoch that was finished
        with folder.writing(self.dir):
            if overwrite and self.main:
                folder.clear(self.dir)
            self.tracker = Tracker(
                self.dir,
                config.log.trackers,
                config.to_dict(),
                self.accelerator,
                resume_step=self.epoch if resume else None,
            )
            if self.main:
                pictures.drop(self.dir, after=self.epoch)
                resolved = copy.deepcopy(config)
                resolved.rewards = identity.named(self.plan.rewards)
                resolved.save(self.dir / "config.yaml")

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
            if c.model.free_text_encoders:
                self._encode_all()
                self.policy.free_text_encoders()
            # at the start the network is the base, and a reference may cost a second one
            with self.policy.reference() if self.epoch else nullcontext():
                before = after = self.evaluate("base")
            self.policy.forget("base")
            if self.epoch == 0 and not self.tracker.rows:
                self.tracker.log(0, before)
                self._report()
            if self.finished:  # resumed when there is nothing left to do
                self.say(f"nothing left to train: epoch {self.epoch} is the last by this config")
                with self._averaged():
                    after = self.evaluate(f"epoch {self.epoch}")
            while not self.finished:
                metrics = self.run_epoch(self.epoch)
                self.epoch += 1
                self.calls += metrics["denoiser_calls"]
                done, wrong = self.finished, []
                due = done or (c.eval.every and self.epoch % c.eval.every == 0)
                if due:
                    with self._averaged():
                        after = self.evaluate(f"epoch {self.epoch}")
                    metrics |= after
                    if self.plan.eval_prompts and c.eval.guard != "off":
                        wrong = self._guarded()
                        verdict = self.evaluation.guard.verdict
                        metrics |= {name: float(name == verdict) for name in VERDICTS}
                with signals.held():  # the row and the state that it is of, or neither
                    self.tracker.log(self.epoch, metrics)
                    self.complete = self._state()
                done = done or bool(wrong and c.eval.guard == "stop")
                if self.on_epoch_end is not None:
                    told = self.on_epoch_end(self, self.epoch, dict(metrics))
                    done = done or True in gather_object([told])
                every = c.train.checkpoint_every
                if self.main and (done or (every and self.epoch % every == 0)):
                    self.save()
                if due:
                    self._report()
                bar.update()
                bar.set_postfix(reward=f"{metrics['reward_mean']:.4g}")
                if done:
                    break
            self.optimizer.check_made()
        return {"before": before, "after": after}

    def say(self, text: str) -> None:
        """Print beside the progress bar, once for all processes."""
        if self.main:
            tqdm.write(text)

    def _encode_all(self) -> None:
        """Encode every text that this process will ask for, of training and evaluation."""
        epochs = range(self.epoch, self.config.train.epochs)
        ids = self.sampler.seen(epochs, self.rank, self.world)
        texts = {self.plan.train_prompts[i].text for i in ids} | set(self.evaluation.texts())
        if texts:
            self.policy.encode(sorted(texts))

    def run_epoch(self, epoch: int) -> dict[str, float]:
        """Sample, score, update. Returns the metrics of the epoch, the same on every process."""
        start, calls = time.time(), self.policy.calls
        scored, scoring = self.reward.images, self.reward.seconds
        skipped = self.optimizer.skipped
        plans = self.learner.surrogates(epoch)
        data = self._sample(epoch)
        if plans:
            meter, rewards, pictures = self.learner.from_gradients(epoch, data, plans)
            metrics = self._reward_metrics(rewards.pop(""), rewards)
        else:
            scores = data.scores
            metrics = self._reward_metrics(scores.total, scores.parts)
            prompt_ids = torch.tensor([i for _, i, _ in data.keys])
            spread = diversity(self._gather(scores.small), self._gather(prompt_ids))
            metrics |= {} if spread is None else {"diversity": spread}
            groups = prompt_ids
            if self.config.sampler.window_schedule == "branch":  # compared step by step
                groups = prompt_ids * self.sampling.steps + data.paths.start
            advantage, whitened, figures = self._advantages(scores.total, scores.parts, groups)
            metrics |= figures
            data = replace(data, advantage=advantage, reward=whitened)
            meter = self.learner.from_advantages(epoch, data)
            pictures = list(zip(scores.images, data.prompts, strict=False))
        metrics |= self._teach(pictures) | constrain(self.reward, metrics)
        metrics |= self._reduce(meter)
        metrics |= self.algorithm.end_epoch(metrics)
        for name, decay in self.copies.items():
            self.optimizer.follow(name, decay(self.optimizer.updates))
        metrics["skipped_steps"] = float(self.optimizer.skipped - skipped)
        for worry in worries(metrics):
            self.say(f"epoch {epoch + 1}: {worry}")
        return metrics | {
            "lr": self.optimizer.lr,
            "denoiser_calls": float(self.policy.calls - calls) * self.world,
            "reward_calls": float(self.reward.images - scored) * self.world,
            "reward_seconds": self.reward.seconds - scoring,
            "seconds": time.time() - start,
        }

    def _sample(self, epoch: int) -> Rollout:
        """This process's samples of an epoch; their trajectories too, but for GRADIENT."""
        c, needs, seed = self.config, self.algorithm.needs, self.config.train.seed
        ids = self.sampler.share(epoch, self.rank, self.world)
        keys = [(epoch, i, j) for i in ids for j in range(c.data.group_size)]
        batch = [self.plan.train_prompts[i] for _, i, _ in keys]
        cond = self.policy.encode([p.text for p in batch])
        if needs is Needs.GRADIENT:
            return Rollout(batch, keys, cond)
        options: dict[str, Any] = {"means": self.algorithm.stores_means}
        if needs is Needs.TRAJECTORY:
            images = [j for *_, j in keys]
            options["window"] = window(c.sampler, self.sampling.stochastic, epoch, seed, images)
        options["store"] = needs is not Needs.FINAL
        if c.sampler.same_noise:
            options["initial"] = [sample_seed(seed, epoch, i, "start") for _, i, _ in keys]
        seeds = [sample_seed(seed, *key) for key in keys]
        drawn_by = self.algorithm.sampled_by
        how = self.policy, cond, self.sampling, seeds, c.sampler.batch
        with (
            Scorer(self.policy, self.reward, batch, c.data.group_size) as scorer,
            self.policy.adapter(drawn_by) if drawn_by else nullcontext(),
        ):
            paths = rollout(*how, each=scorer.add, **options)
            return Rollout(batch, keys, cond, paths, scorer.finish())

    def _teach(self, pictures: Sequence[tuple[Tensor, Prompt]]) -> dict[str, float]:
        """Rewards that learn do so from the pictures of all processes, and so remain alike."""
        if not self.reward.learns:
            return {}
        images = self._gather(torch.stack([image for image, _ in pictures]))
        everyone = [p for part in gather_object([[p for _, p in pictures]]) for p in part]
        return teach(self.reward, images, everyone)

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
        own = slice(self.rank * len(reward), (self.rank + 1) * len(reward))
        figures = {"zero_variance_groups": zero_variance_share(everyone, groups)}
        return advantage[own].to(reward.device), whitened[own].to(reward.device), figures

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

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones, where there are any."""
        with self.policy.adapter("ema") if self.config.train.ema else nullcontext():
            yield

    def evaluate(self, label: str) -> dict[str, float]:
        """Means over the held-out prompts (`Evaluation`); writes the grid beside the first one."""
        means = self.evaluation.run(label)
        self.evaluation.write(self.dir, 0 if label == "base" else self.epoch)
        if self.evaluation.grid is not None:
            self.tracker.log_images(self.epoch, "eval", self.evaluation.grid)
        return means

    def _report(self) -> None:
        """Write report.html. Whatever goes wrong in it, the run goes on."""
        try:
            if self.main:
                report.write([self.dir])
        except Exception as error:
            self.say(f"epoch {self.epoch}: no {report.NAME}, {error!r}")

    def _guarded(self) -> list[str]:
        """What the guard finds wrong at the last evaluation; keeps the best weights by the judges
        in best/."""
        wrong = self.evaluation.wrong()
        if self.evaluation.guard.is_best and self.main:
            self._save_weights(self.dir / "best")
        if wrong and self.main:
            best = self.dir / "best"
            kept = (
                f"the best weights by the judges are in {best}"
                if best.exists()
                else (
                    "no epoch was better by the judges than the base model"
                    if self.config.eval.rewards
                    else "eval.rewards names no judge to choose the best weights by"
                )
            )
            what = "stopped" if self.config.eval.guard == "stop" else "going on"
            verdict = WARNINGS[self.evaluation.guard.verdict]
            tqdm.write(f"epoch {self.epoch}: {verdict}, {'; '.join(wrong)}; {what}, {kept}")
        return wrong

    def _state(self) -> dict[str, Any]:
        return saving.state(self)

    def save(self) -> None:
        """Checkpoint, weights and curve of the epochs done, from the process that calls."""
        checkpoint.save(self.dir, self._state())
        self._save_weights(self.dir)
        self.tracker.curve(self.dir / "curve.png")

    def _save_weights(self, folder: Path) -> None:
        self.policy.save(folder, "ema" if self.config.train.ema else "default")

    def _reward_metrics(self, total: Tensor, parts: Mapping[str, Tensor]) -> dict[str, float]:
        """Mean, std, best and worst of the reward and of its raw parts, over all processes."""
        values = {"": total, **parts}
        return summary({k: self._gather(v.detach().float()) for k, v in values.items()})

    def _gather(self, values: Tensor) -> Tensor:
        """Rows of all processes in the order of their ranks, on the CPU."""
        return self.accelerator.gather(values.to(self.accelerator.device)).cpu()  # type: ignore[union-attr]

    def _reduce(self, meter: Meter) -> dict[str, float]:
        return Meter.combined(gather_object([meter])).means()
