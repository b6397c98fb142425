"""The held-out evaluation of a run: fixed prompts and noise, scores, the before/after grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from rewards import WeightedSum

from ..config import TrainConfig
from ..config.prompts import Prompt, for_judges, for_rewards
from ..drawing import grids
from ..policies import Cond, Policy, read_text_encoders
from ..record.pictures import fitted
from ..record.pictures import save as save_pictures
from ..sampling.rollout import Sampling, rollout, sample_seed
from ..verdict import VERDICTS, WARNINGS
from .guard import Guard, diversity, thumbnails
from .sizes import evaluation_sampling, looked_at


class Evaluation:
    """Draws `prompts` with the deterministic sampler, scores the pictures, compares with the base.

    The noise of a picture depends on the seed, the prompt and its number alone, so that every
    evaluation of a run draws the same. Pictures are divided among the processes; all of them get
    the same results.
    """

    def __init__(
        self,
        config: TrainConfig,
        prompts: Sequence[Prompt],
        policy: Policy,
        reward: WeightedSum,
        judge: WeightedSum | None,
        accelerator: Accelerator,
    ):
        e = config.eval
        self.config, self.prompts, self.policy = config, prompts, policy
        self.reward, self.judge = reward, judge
        self.main = accelerator.is_main_process
        pictures = [(i, j) for j in range(e.images_per_prompt) for i in range(len(prompts))]
        world = accelerator.num_processes
        # all processes must call a divided denoiser as often: the last pictures are drawn twice
        again = pictures[-1:] * (-len(pictures) % world) if policy.sharding is not None else []
        self.mine = [*pictures, *again][accelerator.process_index :: world]
        self.guard = Guard(e.guard_drop, e.guard_diversity, list(e.rewards))
        self.scores: dict[str, list[float]] = {}  # of every picture of the last evaluation
        self.drawn: list[str] = []  # and its prompt
        self.spread: float | None = None
        self.grid: Image.Image | None = None  # on the main process, from the second evaluation on
        self.first: list[tuple[Tensor, dict[str, float]]] = []
        self.pictures: list[Image.Image] = []  # one a prompt, of the last evaluation

    def guarded(self, run_dir: Path, epoch: int) -> tuple[dict[str, float], bool]:
        """What the guard says of the last evaluation, as metrics, and whether the run must stop.

        What is wrong is printed. The best weights by the judges are kept in best/.
        """
        if not self.prompts or self.config.eval.guard == "off":
            return {}, False
        wrong, best = self._wrong(), run_dir / "best"
        if self.guard.is_best:
            self.policy.save(best, self.config.train.saved, main=self.main)
        stop = bool(wrong) and self.config.eval.guard == "stop"
        if wrong and self.main:
            kept = (
                f"the best weights by the judges are in {best}"
                if best.exists()
                else "no epoch was better by the judges than the base model"
                if self.config.eval.rewards
                else "eval.rewards names no judge to choose the best weights by"
            )
            verdict, what = WARNINGS[self.guard.verdict], "stopped" if stop else "going on"
            tqdm.write(f"epoch {epoch}: {verdict}, {'; '.join(wrong)}; {what}, {kept}")
        return {name: float(name == self.guard.verdict) for name in VERDICTS}, stop

    def _wrong(self) -> list[str]:
        return self.guard.see(self.scores, self.spread, self.drawn)

    @torch.no_grad()
    def run(self, label: str) -> dict[str, float]:
        """Means over the pictures. `label` heads their column of the grid; "base" says that they
        are the base model's."""
        c, rows, images = self.config, [], {}
        kept: dict[int, Image.Image] = {}
        for size, chunk in self._chunks():
            batch = [self.prompts[i] for i, _ in chunk]
            seeds = [sample_seed(c.train.seed, "eval", i, j) for i, j in chunk]
            with self.policy.resized(size):
                pictures, kl = self._drawn(batch, seeds, far=label != "base")
            total, parts = self.reward.score(pictures, *for_rewards(batch), held_out=True)
            if self.judge is not None:
                parts = parts | self.judge.score(pictures, *for_judges(batch))[1]
            parts = parts if kl is None else parts | {"kl": kl.to(total)}
            small = thumbnails(pictures)
            values = {k: v.tolist() for k, v in {"reward": total, **parts}.items()}
            for row, (i, j) in enumerate(chunk):
                scores = {k: v[row] for k, v in values.items()}
                rows.append((i, j, scores, small[row]))
                if j == 0:
                    kept[i] = fitted(pictures[row], len(self.prompts))
                if j == 0 and i < c.eval.grid_prompts:
                    known = {k: v for k, v in scores.items() if v == v}
                    images[i] = (pictures[row].cpu(), known)
        drawn = {row[:2]: row for row in gather_object(rows)}  # a few perhaps twice
        rows = [drawn[place] for place in sorted(drawn)]
        images = {k: v for part in gather_object([images]) for k, v in part.items()}
        kept = {k: v for part in gather_object([kept]) for k, v in part.items()}
        self.pictures = [kept[i] for i in sorted(kept)]
        if images and self.main:
            self._draw_grid(label, [images[i] for i in sorted(images)])
        if not rows:
            return {}
        self.scores = {k: [row[2][k] for row in rows] for k in rows[0][2]}
        self.drawn = [self.prompts[row[0]].text for row in rows]
        scored = {k: [x for x in v if x == x] for k, v in self.scores.items()}  # NaN: not scored
        means = {f"eval/{k}": sum(v) / len(v) for k, v in scored.items() if v}
        self.spread = diversity(torch.stack([row[3] for row in rows]), [row[0] for row in rows])
        if not self.guard.base:
            self._wrong()
        return means | ({} if self.spread is None else {"eval/diversity": self.spread})

    def _chunks(self) -> Iterator[tuple[tuple[int, int] | None, list[tuple[int, int]]]]:
        """This process's pictures, (prompt, number), as many of one size as are drawn at a time."""
        sized: dict[Any, list[tuple[int, int]]] = {}
        for i, j in self.mine:
            sized.setdefault(looked_at(self.config, self.prompts[i]), []).append((i, j))
        n = self.config.sampler.batch
        for size, own in sized.items():
            for start in range(0, len(own), n):
                yield size, own[start : start + n]

    def _drawn(
        self, batch: Sequence[Prompt], seeds: Sequence[int], far: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Pictures (n, 3, H, W), and of a LoRA how `far` it is from the base model half way (n,), 0
        unless asked."""
        policy, c = self.policy, self.config
        how = evaluation_sampling(c, policy.levels(c.eval_steps))
        cond = policy.encode([p.text for p in batch])
        paths = rollout(policy, cond, how, seeds, batch=c.sampler.batch)
        pictures = policy.decode(paths.final)
        if not policy.is_lora:
            return pictures, None
        half = how.steps // 2
        x = paths.states[:, half]
        return pictures, self._distance(how, x, half, cond) if far else torch.zeros(len(x))

    @torch.no_grad()
    def draw(
        self,
        texts: Sequence[str],
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
    ) -> list[Image.Image]:
        """A picture of every text from the initial noise of every seed, all of a text's together:
        the noise that diffusers draws with `torch.Generator().manual_seed(seed)`. Text encoders
        that were freed are read again where a text is new."""
        c, policy, size = self.config, self.policy, self.config.sampler.batch
        read = not (policy.has_text_encoders or policy.knows(texts))
        if read:
            read_text_encoders(policy, self.config.model)
        rows, drawn = [(text, seed) for text in texts for seed in seeds], []
        with policy.resized(c.eval.resolution):
            how = evaluation_sampling(c, policy.levels(c.eval_steps if steps is None else steps))
            how = how if guidance is None else replace(how, guidance=guidance)
            for start in range(0, len(rows), size):
                chunk = rows[start : start + size]
                cond = policy.encode([text for text, _ in chunk])
                own = [seed for _, seed in chunk]
                paths = rollout(policy, cond, how, own, batch=size, store=False)
                drawn += [grids.to_pil(picture) for picture in policy.decode(paths.final)]
        if read:
            policy.free_text_encoders()
        return drawn

    def write(self, run_dir: Path, epoch: int) -> None:
        """Keep what the last evaluation drew, as that of `epoch`, and the grid beside the first."""
        if self.main and self.pictures:
            texts = [p.text for p in self.prompts]
            save_pictures(run_dir, epoch, texts, self.pictures, self.scores)
        if self.grid is not None:
            grids.save_png(self.grid, run_dir / "grid.png", self.config.to_dict())

    def _distance(self, how: Sampling, x: Tensor, step: int, cond: Cond) -> Tensor:
        """mean_D (f_θ - f_ref)² of the network's outputs at x (n, *latent), (n,)."""
        seen = how.predict(self.policy, x, step, cond).native
        with self.policy.reference():
            base = how.predict(self.policy, x, step, cond).native
        return (seen - base).square().flatten(1).mean(1)

    def _draw_grid(self, label: str, images: list[tuple[Tensor, dict[str, float]]]) -> None:
        if not self.first:
            self.first = images
            return
        columns = {"before": self.first, label: images}
        self.grid = grids.comparison_grid(
            {name: [picture for picture, _ in column] for name, column in columns.items()},
            [p.text for p in self.prompts[: len(images)]],
            {name: [score for _, score in column] for name, column in columns.items()},
        )
