"""The training loop, one for every algorithm, readable top to bottom."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

import rewards as reward_library
from rewards import RewardError

from . import checkpoint, grids, policies
from .advantages import PromptTracker, group_advantages, zero_variance_share
from .algorithms import Batch, Needs
from .config import ConfigError, TrainConfig
from .plan import Plan
from .policies import Cond
from .prompts import Prompt, PromptSampler
from .rollout import Sampling, Trajectories, adjoint_sweep, rollout
from .tracking import Meter, Tracker

# |ratio - 1| of a stored log-probability before any update; above it, rollout and training disagree
MISMATCH_WARNING = 1e-3


class TrainingStopped(RuntimeError):
    """A reward failed. The run was saved; the message says where, and where the picture is."""


def sample_seed(*parts: int | str) -> int:
    """A seed below 2^63 from (run seed, epoch, prompt id, sample index), alike on any machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Trainer:
    """Fine-tunes a text-to-image pipeline on rewards: a LoRA, or with lora_rank 0 all its denoiser.

    config: a TrainConfig. rewards: {name or callable: weight or options}, in place of
    `config.rewards`; a bare weight keeps the options that the config has for that name. prompts:
    texts, in place of the file `config.data.prompts`. resume: go on from the checkpoint in the run
    folder.

    Raises ConfigError or ValueError for anything wrong before a model is loaded; `train` raises
    TrainingStopped when a reward fails.
    """

    def __init__(
        self,
        config: TrainConfig,
        rewards: Mapping[Any, Any] | None = None,
        prompts: Sequence[str] | None = None,
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
        self.plan = Plan.make(config, rewards, prompts, self.world)
        self.config, self.algorithm = config, self.plan.algorithm
        device = self.accelerator.device

        # rewards first: a reward without gradient is refused before the large model is read
        self.reward = reward_library.build(self.plan.rewards).to(device)
        if self.algorithm.needs is Needs.GRADIENT:
            self.reward.require_differentiable()
        judges = config.eval.rewards
        self.judge = reward_library.build(judges).to(device) if judges else None
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
        self.eval_sampling = Sampling(
            self.policy.levels(config.eval.steps), "ode", 0.0, config.eval.guidance
        )
        self.sampler = PromptSampler(
            len(self.plan.train_prompts), config.data.groups, config.train.seed
        )
        self.history = PromptTracker(config.advantage.buffer_size, config.advantage.min_count)
        self.parameters = self.policy.trainable_parameters()
        self.optimiser = torch.optim.AdamW(
            self.parameters, config.train.lr, weight_decay=config.train.weight_decay
        )
        # the smallest gradients vanish in float16 unless they are scaled up
        self.scaler = torch.amp.GradScaler(device.type, enabled=m.dtype == "float16")
        self.epoch, self.updates = 0, 0
        self.base_images: list[tuple[Tensor, dict[str, float]]] = []
        if state is not None:
            self._restore(state)
            for group in self.optimiser.param_groups:  # the config may have changed them
                group["lr"], group["weight_decay"] = config.train.lr, config.train.weight_decay
        self.complete = self._state()  # as of the last epoch that was finished
        self.tracker = Tracker(
            self.dir,
            config.log.trackers,
            config.to_dict(),
            self.accelerator,
            resume_step=self.epoch if resume else None,
        )
        if self.main:
            resolved = copy.deepcopy(config)
            resolved.rewards = {_label(k): v for k, v in self.plan.rewards.items()}
            resolved.save(self.dir / "config.yaml")

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

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
            with self.policy.reference() if self.updates else nullcontext():
                before = after = self.evaluate("base")
            self.policy.forget("base")
            if self.epoch == 0 and not self.tracker.rows:
                self.tracker.log(0, before)
            if self.epoch >= c.train.epochs:  # resumed when there is nothing left to do
                after = self.evaluate(f"epoch {self.epoch}")
            while self.epoch < c.train.epochs:
                metrics = self.run_epoch(self.epoch)
                self.epoch += 1
                done = self.epoch == c.train.epochs
                if done or (c.eval.every and self.epoch % c.eval.every == 0):
                    after = self.evaluate(f"epoch {self.epoch}")
                    metrics |= after
                self.tracker.log(self.epoch, metrics)
                self.complete = self._state()
                every = c.train.checkpoint_every
                if self.main and (done or (every and self.epoch % every == 0)):
                    self.save()
                bar.update()
                bar.set_postfix(reward=f"{metrics['reward_mean']:.4g}")
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
        data, held_out = self.plan.train_prompts, self.plan.eval_prompts
        ids: set[int] = set()
        for epoch in range(self.epoch, self.config.train.epochs):
            ids |= set(self._prompt_ids(epoch))
            if len(ids) == len(data):
                break
        texts = {data[i].text for i in ids} | {held_out[i].text for i, _ in self._evaluated()}
        if texts:
            self.policy.encode(sorted(texts))

    def _prompt_ids(self, epoch: int) -> list[int]:
        """The prompts of this process in an epoch, one a group."""
        ids = self.sampler.epoch(epoch)
        share = len(ids) // self.world
        return ids[self.rank * share : (self.rank + 1) * share]

    def _evaluated(self) -> list[tuple[int, int]]:
        """(prompt, picture) of the held-out pictures that this process draws."""
        n, pictures = len(self.plan.eval_prompts), self.config.eval.images_per_prompt
        return [(i, j) for j in range(pictures) for i in range(n)][self.rank :: self.world]

    def run_epoch(self, epoch: int) -> dict[str, float]:
        """Sample, score, update. Returns the metrics of the epoch, the same on every process."""
        c, mine = self.config, self._prompt_ids(epoch)
        prompt_ids = [i for i in mine for _ in range(c.data.group_size)]
        seeds = [
            sample_seed(c.train.seed, epoch, i, j) for i in mine for j in range(c.data.group_size)
        ]
        batch = [self.plan.train_prompts[i] for i in prompt_ids]
        cond = self.policy.encode([p.text for p in batch])
        calls = self.policy.calls
        paths = rollout(self.policy, cond, self.sampling, seeds, c.sampler.batch)
        if self.algorithm.needs is Needs.GRADIENT:
            metrics = self._learn_from_gradients(epoch, batch, cond, paths)
        else:
            total, parts = self.score(paths.final, batch)
            metrics = self._reward_metrics(total, parts)
            advantage, figures = self._advantages(total, torch.tensor(prompt_ids))
            metrics |= figures
            metrics |= self._learn_from_advantages(epoch, cond, paths, advantage.to(total.device))
        metrics["denoiser_calls"] = float(self.policy.calls - calls) * self.world
        return metrics

    @torch.no_grad()
    def score(self, latents: Tensor, batch: Sequence[Prompt]) -> tuple[Tensor, dict[str, Tensor]]:
        """Total reward (n,) and its raw parts, of clean latents (n, *latent)."""
        totals, all_parts = [], []
        for rows in _chunks(len(latents), self.config.sampler.batch):
            images = self.policy.decode(latents[rows], tiny=True)
            total, parts = self.reward.score(images, *_texts(batch[rows]))
            totals.append(total)
            all_parts.append(parts)
        merged = {k: torch.cat([p[k] for p in all_parts]) for k in all_parts[0]}
        return torch.cat(totals), merged

    def _advantages(self, reward: Tensor, prompt_ids: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Advantages of this process's samples, from the rewards of all processes."""
        c = self.config.advantage
        everyone = self._gather(reward.cpu())
        groups = self._gather(prompt_ids)
        if c.baseline == "tracker":
            advantage = self.history.update(groups, everyone, clip=c.clip)
        else:
            std: Any = c.std
            advantage = group_advantages(everyone, groups, std, clip=c.clip)
        figures = {"zero_variance_groups": zero_variance_share(everyone, groups)}
        own = slice(self.rank * len(reward), (self.rank + 1) * len(reward))
        return advantage[own], figures

    def _learn_from_advantages(
        self, epoch: int, cond: Cond, paths: Trajectories, advantage: Tensor
    ) -> dict[str, float]:
        """TRAJECTORY and FINAL: micro-batches of rows through the loss, one step per update."""
        trajectory = self.algorithm.needs is Needs.TRAJECTORY
        steps = torch.tensor(self.plan.trained_steps if trajectory else [0])
        meter, first = Meter(), self.updates
        for mine, everyone in self._updates(epoch):
            # a row is a (sample, step) pair; FINAL has one row a sample
            samples, index = (m.flatten() for m in torch.meshgrid(mine, steps, indexing="ij"))
            rows = everyone * len(steps)
            for pick in _chunks(len(samples), self.config.train.micro_batch):
                i, t = samples[pick], index[pick]
                transition = {
                    "step": t,
                    "x": paths.states[i, t],
                    "x_next": paths.states[i, t + 1],
                    "log_prob_old": paths.log_prob[i, t],
                }
                batch = Batch(
                    self.sampling,
                    cond[i],
                    advantage[i],
                    paths.final[i],
                    on_policy=self.updates == first,
                    **transition if trajectory else {},
                )
                loss, figures = self.algorithm.loss(self.policy, batch)
                # each row counts 1/rows whatever the micro-batches and processes
                self.scaler.scale(loss * len(i) / rows).backward()
                meter.add({"loss": loss, **figures}, len(i))
            meter.add({"grad_norm": self._step()})
        figures = self._reduce(meter)
        if figures.get("mismatch_max", 0) > MISMATCH_WARNING and self.main:
            tqdm.write(
                f"epoch {epoch}: the stored log-probabilities differ from those of training by a "
                f"ratio of {figures['mismatch_max']:.2g}; is the dtype or the batch to blame?"
            )
        return figures

    def _learn_from_gradients(
        self, epoch: int, batch: list[Prompt], cond: Cond, paths: Trajectories
    ) -> dict[str, float]:
        """GRADIENT: reward gradient at the clean latents, then the adjoint sweep."""
        first = self.algorithm.first_step(self.sampling.steps)
        meter, rewards = Meter(), {}
        for mine, everyone in self._updates(epoch):
            for pick in _chunks(len(mine), self.config.train.micro_batch):
                rows = mine[pick]
                x0 = paths.final[rows].detach().requires_grad_()
                images = self.policy.decode(x0, differentiable=True, tiny=True)
                total, parts = self.reward.score(images, *_texts([batch[i] for i in rows]))
                loss = self.algorithm.loss(total).sum() / everyone
                (grad,) = torch.autograd.grad(loss, x0)
                grad = self.scaler.scale(grad)  # the sweep is linear in it
                adjoint_sweep(
                    self.policy, cond[rows], self.sampling, paths.states[rows], grad, first
                )
                saturated = ((images <= 0) | (images >= 1)).float().flatten(1).mean(1)
                meter.add({"saturated_pixels": saturated}, len(rows))
                for name, values in {"": total, **parts}.items():
                    rewards.setdefault(name, []).append(values.detach())
            meter.add({"grad_norm": self._step()})
        merged = {name: torch.cat(values) for name, values in rewards.items()}
        return self._reward_metrics(merged.pop(""), merged) | self._reduce(meter)

    def _updates(self, epoch: int) -> Iterator[tuple[Tensor, int]]:
        """For each optimiser step of an epoch: this process's samples, and the number of all.

        The shuffle is over the samples of all processes, so it does not depend on their number.
        """
        c, n = self.config.train, self.plan.samples
        share = n // self.world
        for inner in range(c.inner_epochs):
            generator = torch.Generator().manual_seed(sample_seed(c.seed, epoch, "order", inner))
            for part in torch.randperm(n, generator=generator).chunk(c.updates_per_epoch):
                mine = part[part // share == self.rank] - self.rank * share
                yield mine.sort().values, len(part)

    def _step(self) -> float:
        """One optimiser step from the accumulated gradients; returns their norm before clipping.

        Gradients are summed over processes here rather than by wrapping the network: processes may
        run different numbers of backward passes, and the adjoint sweep runs several per sample.
        """
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.world > 1:
            flat = torch.cat([p.grad.flatten() for p in self.parameters])  # type: ignore[union-attr]
            flat: Any = self.accelerator.reduce(flat, "sum")
            for p, g in zip(
                self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True
            ):
                p.grad = g.view_as(p)
        self.scaler.unscale_(self.optimiser)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.train.max_grad_norm)
        self.scaler.step(self.optimiser)  # in float16 not if a gradient has overflown
        self.scaler.update()
        self.optimiser.zero_grad()
        self.updates += 1
        return norm.item()

    @torch.no_grad()
    def evaluate(self, label: str) -> dict[str, float]:
        """Means over held-out prompts from fixed noise, ODE sampler; writes the grid."""
        c, held_out, mine = self.config, self.plan.eval_prompts, self._evaluated()
        scores, images = [], {}
        for start in range(0, len(mine), c.sampler.batch):
            chunk = mine[start : start + c.sampler.batch]
            batch = [held_out[i] for i, _ in chunk]
            cond = self.policy.encode([p.text for p in batch])
            seeds = [sample_seed(c.train.seed, "eval", i, j) for i, j in chunk]
            paths = rollout(self.policy, cond, self.eval_sampling, seeds, c.sampler.batch)
            pictures = self.policy.decode(paths.final)
            total, parts = self.reward.score(pictures, *_texts(batch))
            if self.judge is not None:
                parts = parts | self.judge.score(pictures, *_texts(batch))[1]
            for row, (i, j) in enumerate(chunk):
                scores.append(
                    {"reward": total[row].item()} | {k: v[row].item() for k, v in parts.items()}
                )
                if j == 0 and i < c.eval.grid_prompts:
                    images[i] = (pictures[row].cpu(), scores[-1])
        scores = gather_object(scores)
        images = {k: v for part in gather_object([images]) for k, v in part.items()}
        if images and self.main:
            self._grid(label, [images[i] for i in sorted(images)])
        if not scores:
            return {}
        return {f"eval/{k}": sum(s[k] for s in scores) / len(scores) for k in scores[0]}

    def _grid(self, label: str, images: list[tuple[Tensor, dict[str, float]]]) -> None:
        if not self.base_images:
            self.base_images = images
            return
        columns, scores = {}, {}
        for name, column in (("before", self.base_images), (label, images)):
            columns[name] = [picture for picture, _ in column]
            scores[name] = [score for _, score in column]
        texts = [p.text for p in self.plan.eval_prompts[: len(images)]]
        grid = grids.comparison_grid(columns, texts, scores)
        grids.save_png(grid, self.dir / "grid.png", self.config.to_dict())
        self.tracker.log_images(self.epoch, "eval", grid)

    def _state(self) -> dict[str, Any]:
        kept = {"optimiser": self.optimiser, "history": self.history, "scaler": self.scaler}
        return copy.deepcopy({name: part.state_dict() for name, part in kept.items()}) | {
            "epoch": self.epoch,
            "updates": self.updates,
            "adapter": self.policy.state_dict(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.updates = state["epoch"], state["updates"]
        self.policy.load_state_dict(state["adapter"])
        self.optimiser.load_state_dict(copy.deepcopy(state["optimiser"]))
        self.history.load_state_dict(state["history"])
        if state.get("scaler"):  # nothing where the dtype needs none
            self.scaler.load_state_dict(state["scaler"])

    def save(self) -> None:
        """Checkpoint, weights and curve of the epochs done, from the process that calls."""
        checkpoint.save(self.dir, self._state())
        self.policy.save(self.dir)
        self.tracker.curve(self.dir / "curve.png")

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
        """Mean and std of the reward and of its raw parts, over all processes."""
        metrics = {}
        for name, values in {"": total, **parts}.items():
            values = self._gather(values.detach().float())
            prefix = f"reward/{name}" if name else "reward"
            metrics[f"{prefix}_mean"] = values.mean().item()
            metrics[f"{prefix}_std"] = values.std(correction=0).item()
        return metrics

    def _gather(self, values: Tensor) -> Tensor:
        """Rows of all processes in the order of their ranks, on the CPU."""
        return self.accelerator.gather(values.to(self.accelerator.device)).cpu()  # type: ignore[union-attr]

    def _reduce(self, meter: Meter) -> dict[str, float]:
        return Meter.combined(gather_object([meter])).means()


def _label(reward: Any) -> str:
    """A reward as a config names it: its name, or module:function of what was passed in Python."""
    if isinstance(reward, str):
        return reward
    named = reward if hasattr(reward, "__qualname__") else type(reward)
    return f"{named.__module__}:{named.__qualname__}"


def _texts(batch: Sequence[Prompt]) -> tuple[list[str], list[dict[str, Any]]]:
    return [p.text for p in batch], [p.metadata for p in batch]


def _chunks(n: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, n, size))
