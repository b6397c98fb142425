"""The training loop, one for every algorithm, readable top to bottom."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

import rewards as reward_library
from rewards import RewardError

from . import checkpoint, grids, pictures, policies, report
from .advantages import PromptTracker, combined_advantages, zero_variance_share
from .algorithms import Needs
from .config import TrainConfig
from .decoding import ConfigError
from .diagnostics import diversity
from .evaluation import Evaluation
from .learning import Learner, Rollout
from .optimisation import Optimisation
from .plan import Plan
from .prompts import Given, Prompt, PromptSampler, for_rewards
from .rollout import Sampling, Surrogate, rollout, sample_seed
from .scoring import Scorer
from .tracking import Meter, Tracker
from .windows import window

# |ratio - 1| of a stored log-probability before any update; above it, rollout and training disagree
MISMATCH_WARNING = 1e-3


class TrainingStopped(RuntimeError):
    """A reward failed. The run was saved; the message says where, and where the picture is."""


class Trainer:
    """Fine-tunes a text-to-image pipeline on rewards: a LoRA, or with lora_rank 0 all its denoiser.

    config: a TrainConfig. rewards: {name or callable: weight or options}, in place of
    `config.rewards`; a bare weight keeps the options that the config has for that name. prompts:
    texts or prompt files, in place of `config.data.prompts` (`prompts.collect`). resume: go on from
    the checkpoint in the run folder.

    Raises ConfigError or ValueError for anything wrong before a model is loaded; `train` raises
    TrainingStopped when a reward fails.
    """

    def __init__(
        self,
        config: TrainConfig,
        rewards: Mapping[Any, Any] | None = None,
        prompts: Given | Sequence[Given] | None = None,
        resume: bool = False,
    ):
        self.dir = Path(config.log.dir or "runs/run")
        begun = (self.dir / "config.yaml").exists()
        # killed before its first checkpoint: resuming is starting anew
        fresh = begun and not (self.dir / checkpoint.NAME).exists()
        state = checkpoint.load(self.dir) if resume and not fresh else None
        if begun and not resume:
            raise ConfigError(
                f"log.dir={str(self.dir)!r} already holds a run; go on with --resume, or choose "
                "another --log.dir"
            )
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
        self.plan = Plan.make(config, rewards, prompts, self.world)
        self.config, self.algorithm = config, self.plan.algorithm
        device = self.accelerator.device

        # rewards first: a reward without gradient is refused before the large model is read
        self.reward = reward_library.build(self.plan.rewards).to(device)
        if self.algorithm.needs is Needs.GRADIENT:
            self.reward.require_differentiable()
        judges = config.eval.rewards
        judge = reward_library.build(judges).to(device) if judges else None
        m = config.model
        self.policy = policies.load(
            m.name, device, m.dtype, m.resolution, not m.lora_rank, m.merge_lora
        )
        if m.lora_rank:
            self.policy.add_lora(m.lora_rank, m.lora_alpha, m.lora_targets, config.train.seed)
        if m.tiny_vae is not None:
            self.policy.add_tiny_vae(m.tiny_vae)
        self.policy.decode_batch = m.decode_batch
        self.policy.max_sequence_length = m.max_sequence_length
        if m.gradient_checkpointing:
            for part in (self.policy.network, self.policy.vae, self.policy.tiny_vae):
                if part is not None:
                    part.enable_gradient_checkpointing()

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
        self.optimisation = Optimisation(
            self.policy, self.algorithm.parameters(), t, self.accelerator, m.dtype,
            t.epochs * t.updates_per_epoch * t.inner_epochs,
        )  # fmt: skip
        self.learner = Learner(
            config, self.algorithm, self.policy, self.sampling, self.reward, self.optimisation,
            self.plan.samples, self.rank, self.world,
        )  # fmt: skip
        self.evaluation = Evaluation(
            config, self.plan.eval_prompts, self.policy, self.reward, judge, self.accelerator
        )
        self.epoch, self.calls = 0, 0.0  # epochs done, and what they took of the denoiser
        if state is not None:
            self._restore(state)
        self.complete = self._state()  # as of the last epoch that was finished
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
            resolved.rewards = _named(self.plan.rewards)
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

        Ctrl-C saves what was trained and re-raises KeyboardInterrupt; a failing reward saves it and
        the picture, and raises TrainingStopped. An epoch that was cut short is run again on resume.
        """
        c = self.config
        bar = tqdm(
            total=c.train.epochs, initial=self.epoch, desc="training", unit="epoch",
            disable=not self.main,
        )  # fmt: skip
        try:
            if c.model.free_text_encoders:
                self._encode_all()
                self.policy.free_text_encoders()
            # at the start the network is the base, and a reference may cost a second one
            with self.policy.reference() if self.optimisation.updates else nullcontext():
                before = after = self.evaluate("base")
            self.policy.forget("base")
            if self.epoch == 0 and not self.tracker.rows:
                self.tracker.log(0, before)
                self._report()
            if self.finished:  # resumed when there is nothing left to do
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
                        metrics["over_optimised"] = float(bool(wrong))
                self.tracker.log(self.epoch, metrics)
                self.complete = self._state()
                done = done or bool(wrong and c.eval.guard == "stop")
                every = c.train.checkpoint_every
                if self.main and (done or (every and self.epoch % every == 0)):
                    self.save()
                if due:
                    self._report()
                bar.update()
                bar.set_postfix(reward=f"{metrics['reward_mean']:.4g}")
                if done:
                    break
        except RewardError as error:
            raise TrainingStopped(self._stopped(error)) from error
        except KeyboardInterrupt:
            self._restore(self.complete)
            if self.main:
                self.save()
            raise
        finally:
            bar.close()
            self.tracker.close()
        return {"before": before, "after": after}

    def _encode_all(self) -> None:
        """Encode every text that this process will ask for, of training and evaluation."""
        data = self.plan.train_prompts
        ids: set[int] = set()
        for epoch in range(self.epoch, self.config.train.epochs):
            ids |= set(self._prompt_ids(epoch))
            if len(ids) == len(data):
                break
        texts = {data[i].text for i in ids} | set(self.evaluation.texts())
        if texts:
            self.policy.encode(sorted(texts))

    def _prompt_ids(self, epoch: int) -> list[int]:
        """The prompts of this process in an epoch, one a group."""
        ids = self.sampler.epoch(epoch)
        share = len(ids) // self.world
        return ids[self.rank * share : (self.rank + 1) * share]

    def run_epoch(self, epoch: int) -> dict[str, float]:
        """Sample, score, update. Returns the metrics of the epoch, the same on every process."""
        start, calls = time.time(), self.policy.calls
        scored, scoring = self.reward.images, self.reward.seconds
        plans = self.learner.surrogates(epoch)
        data = self._sample(epoch, plans)
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
        metrics |= self._teach(pictures) | self._constrain(metrics)
        metrics |= self._reduce(meter)
        self._warn_of_mismatch(epoch, metrics)
        metrics |= self.algorithm.end_epoch(metrics)
        for name, decay in self.copies.items():
            self.optimisation.follow(name, decay(self.optimisation.updates))
        return metrics | {
            "lr": self.optimisation.lr,
            "denoiser_calls": float(self.policy.calls - calls) * self.world,
            "reward_calls": float(self.reward.images - scored) * self.world,
            "reward_seconds": self.reward.seconds - scoring,
            "seconds": time.time() - start,
        }

    def _sample(self, epoch: int, plans: Sequence[Surrogate]) -> Rollout:
        """This process's trajectories of an epoch, as far as `plans` ask for them."""
        c, needs, seed = self.config, self.algorithm.needs, self.config.train.seed
        keys = [(epoch, i, j) for i in self._prompt_ids(epoch) for j in range(c.data.group_size)]
        batch = [self.plan.train_prompts[i] for _, i, _ in keys]
        options: dict[str, Any] = {"means": self.algorithm.stores_means}
        if needs is Needs.TRAJECTORY:
            images = [j for *_, j in keys]
            options["window"] = window(c.sampler, self.sampling.stochastic, epoch, seed, images)
        options["store"] = needs is not Needs.FINAL
        if c.sampler.same_noise:
            options["initial"] = [sample_seed(seed, epoch, i, "start") for _, i, _ in keys]
        ends = [p.at for p in plans if p.at is not None]
        if ends and len(ends) == len(plans):  # no update looks beyond
            options["until"] = max(ends)
        cond = self.policy.encode([p.text for p in batch])
        seeds = [sample_seed(seed, *key) for key in keys]
        drawn_by = self.algorithm.sampled_by
        how = self.policy, cond, self.sampling, seeds, c.sampler.batch
        if needs is Needs.GRADIENT:
            return Rollout(batch, keys, cond, rollout(*how, **options))
        with (
            Scorer(self.policy, self.reward, batch, c.data.group_size) as scorer,
            self.policy.adapter(drawn_by) if drawn_by else nullcontext(),
        ):
            paths = rollout(*how, each=scorer.add, **options)
            return Rollout(batch, keys, cond, paths, scorer.finish())

    def _warn_of_mismatch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        if metrics.get("mismatch_max", 0) > MISMATCH_WARNING and self.main:
            tqdm.write(
                f"epoch {epoch}: the stored log-probabilities differ from those of training by a "
                f"ratio of {metrics['mismatch_max']:.2g}; is the dtype or the batch to blame?"
            )

    def _teach(self, pictures: Sequence[tuple[Tensor, Prompt]]) -> dict[str, float]:
        """Rewards that learn do so from the pictures of all processes, and so remain alike."""
        if not self.reward.learns:
            return {}
        images = self._gather(torch.stack([image for image, _ in pictures]))
        everyone = [p for part in gather_object([[p for _, p in pictures]]) for p in part]
        learned = self.reward.learn(images, *for_rewards(everyone))
        return {f"reward/{name}/{k}": v for name, part in learned.items() for k, v in part.items()}

    def _constrain(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Move the multipliers of rewards with a bound by their means over the epoch."""
        names = [k for k in self.reward.floors if f"reward/{k}_mean" in metrics]
        self.reward.adapt({k: metrics[f"reward/{k}_mean"] for k in names})
        return {f"multiplier/{k}": self.reward.weights[k] for k in self.reward.floors}

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

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones, where there are any."""
        with self.policy.adapter("ema") if self.config.train.ema else nullcontext():
            yield

    def evaluate(self, label: str) -> dict[str, float]:
        """Means over the held-out prompts (`Evaluation`); writes the grid beside the first one."""
        means = self.evaluation.run(label)
        if self.main and self.evaluation.pictures:
            epoch, texts = 0 if label == "base" else self.epoch, self.evaluation.prompts
            drawn = self.evaluation.pictures, self.evaluation.scores
            pictures.save(self.dir, epoch, [p.text for p in texts], *drawn)
        if self.evaluation.grid is not None:
            path = self.dir / "grid.png"
            grids.save_png(self.evaluation.grid, path, self.config.to_dict())
            self.tracker.log_images(self.epoch, "eval", self.evaluation.grid)
        return means

    def _report(self) -> None:
        """Write report.html. Whatever goes wrong in it, the run goes on."""
        if self.main:
            try:
                report.write([self.dir])
            except Exception as error:
                tqdm.write(f"epoch {self.epoch}: no {report.NAME}, {error!r}")

    def _guarded(self) -> list[str]:
        """What the last evaluation shows to be over-optimised; keeps the best weights by the
        judges in best/."""
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
            tqdm.write(f"epoch {self.epoch}: over-optimised, {'; '.join(wrong)}; {what}, {kept}")
        return wrong

    def _parts(self) -> dict[str, Any]:
        """What keeps a state of its own between epochs."""
        return {
            "optimisation": self.optimisation,
            "history": self.history,
            "algorithm": self.algorithm,
            "guard": self.evaluation.guard,
            "reward": self.reward,
        }

    def _state(self) -> dict[str, Any]:
        names = [*self.copies, *(["ema"] if self.config.train.ema else [])]
        return copy.deepcopy({name: part.state_dict() for name, part in self._parts().items()}) | {
            "epoch": self.epoch,
            "calls": self.calls,
            "adapter": self.policy.state_dict(),
            "copies": {name: self.policy.state_dict(name) for name in names},
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.calls = state["epoch"], state.get("calls", 0.0)
        self.policy.load_state_dict(state["adapter"])
        for name, values in state["copies"].items():
            self.policy.load_state_dict(values, name)
        for name, part in self._parts().items():
            part.load_state_dict(copy.deepcopy(state[name]))

    def save(self) -> None:
        """Checkpoint, weights and curve of the epochs done, from the process that calls."""
        checkpoint.save(self.dir, self._state())
        self._save_weights(self.dir)
        self.tracker.curve(self.dir / "curve.png")

    def _save_weights(self, folder: Path) -> None:
        self.policy.save(folder, "ema" if self.config.train.ema else "default")

    def _stopped(self, error: RewardError) -> str:
        """Save what there is, and say where.

        The reward may have failed on any process, and the launcher ends the others as soon as this
        one exits; the finished epochs are the same on all, so this one writes them.
        """
        message = f"{error}\n"
        if error.image is not None:
            path = self.dir / "failed_reward.png"
            grids.save_png(grids.to_pil(error.image), path, {"prompt": error.prompt})
            message += f"picture: {path}\n"
        self._restore(self.complete)
        self.save()
        return message + f"epochs done: {self.epoch}, saved in {self.dir}; mend it and use --resume"

    def _reward_metrics(self, total: Tensor, parts: Mapping[str, Tensor]) -> dict[str, float]:
        """Mean, std, best and worst of the reward and of its raw parts, over all processes."""
        metrics = {}
        for name, values in {"": total, **parts}.items():
            values = self._gather(values.detach().float())
            values = values[~values.isnan()]  # of prompts that this reward does not score
            if not len(values):
                continue
            prefix = f"reward/{name}" if name else "reward"
            metrics[f"{prefix}_mean"] = values.mean().item()
            metrics[f"{prefix}_std"] = values.std(correction=0).item()
            metrics[f"{prefix}_best"] = values.max().item()
            metrics[f"{prefix}_worst"] = values.min().item()
        return metrics

    def _gather(self, values: Tensor) -> Tensor:
        """Rows of all processes in the order of their ranks, on the CPU."""
        return self.accelerator.gather(values.to(self.accelerator.device)).cpu()  # type: ignore[union-attr]

    def _reduce(self, meter: Meter) -> dict[str, float]:
        return Meter.combined(gather_object([meter])).means()


def _named(spec: Any) -> Any:
    """A spec of rewards as a config has it: module:function for what was passed in Python."""
    if isinstance(spec, Mapping):
        return {_named(k): _named(v) for k, v in spec.items()}
    if callable(spec):
        spec = spec if hasattr(spec, "__qualname__") else type(spec)
        return f"{spec.__module__}:{spec.__qualname__}"
    return spec
