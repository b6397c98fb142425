"""Train EmojiWorld's text-to-image pipelines of three families on the same latents.

    python -m diffalign.emoji_world.train_base sd OUT --vae VAE --clip CLIP
    python -m diffalign.emoji_world.train_base sd3 OUT --vae VAE --clip CLIP --teacher SD  # flux

- sd: StableDiffusionPipeline; v-prediction with zero terminal SNR (arXiv 2305.08891).
- sd3: StableDiffusion3Pipeline; rectified flow, logit-normal times (2403.03206).
- flux: FluxPipeline. As FLUX.1-dev it takes the guidance scale as an input:
  the last quarter of the steps distils the model's own classifier-free guidance (2210.03142).

With a teacher, a trained emoji-sd, the flows learn its prediction in place of the noise that was
drawn: the same mean with far less variance. A VP model knows the flow as well: at equal alpha/sigma
their latents differ by a factor alone.

VAE and CLIP text tower are frozen; SD3's encoders and FLUX's T5 are trained with the denoiser.
Captions are dropped one time in ten for classifier-free guidance. For three fifths of the run
nearly all scenes show a single object, and only they are learnt from the teacher; then four in five
show several.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from ..grids import image_grid
from . import pipelines
from .scenes import BACKGROUNDS, KINDS, OBJECTS, article, caption, sample_scene
from .training import fit, pixels, plain_attention, unit

SCENES = 90_000
SHARE = {"single": 0.45, "pair": 0.15, "count": 0.18, "relation": 0.22}  # of the scenes made
EARLY = {"single": 0.94, "pair": 0.02, "count": 0.02, "relation": 0.02}  # and of those drawn
LATE = {"single": 0.2, "pair": 0.25, "count": 0.25, "relation": 0.3}
FIRST = 0.6  # share of the steps that draw as EARLY


def dataset(vae: Any, cache: Path) -> tuple[dict[str, Tensor], list[str], Tensor]:
    """Rows of each scene kind, captions, and latents (n, 8, 16, 16) float16, cached on disk."""
    rng = random.Random(2)
    scenes = [sample_scene(rng, kind) for kind in KINDS for _ in range(round(SHARE[kind] * SCENES))]
    if not cache.exists():
        parts = []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for i in range(0, len(scenes), 100):
                x = unit(pixels(scenes[i : i + 100]))
                parts.append(vae.encode(x).latent_dist.mode().half())
        torch.save(torch.cat(parts), cache)
    kinds = [s.kind for s in scenes]
    rows = {k: torch.tensor([i for i, own in enumerate(kinds) if own == k]) for k in KINDS}
    return rows, [caption(s) for s in scenes], torch.load(cache, weights_only=True)


def sampler(rows: dict[str, Tensor], steps: int) -> Callable[[int, int], Tensor]:
    """draw(step, n): rows of scenes, as EARLY for the FIRST part of the run, then as LATE."""

    def draw(step: int, n: int) -> Tensor:
        share = EARLY if step < FIRST * steps else LATE
        chances = torch.tensor([share[k] for k in KINDS])
        kinds = torch.multinomial(chances, n, replacement=True).tolist()
        picked = [rows[KINDS[k]] for k in kinds]
        return torch.stack([r[torch.randint(len(r), ())] for r in picked])

    return draw


def flow_times(n: int) -> Tensor:
    """Logit-normal times in (0, 1), (n,); one in five is uniform, so that both ends are learnt."""
    return torch.where(torch.rand(n) < 0.2, torch.rand(n), torch.randn(n).sigmoid())


def teacher_flow(teacher: Any, x: Tensor, t: Tensor, prompts: list[str]) -> Tensor:
    """noise - x0 as emoji-sd predicts them at x = (1 - t) x0 + t noise, (n, 8, 16, 16)."""
    norm = torch.hypot(1 - t, t)
    alpha, sigma = (1 - t) / norm, t / norm
    abar = teacher.scheduler.alphas_cumprod  # falling
    step = len(abar) - 1 - torch.searchsorted(abar.flip(0), alpha.square()).clamp_max(len(abar) - 1)
    alpha, sigma, norm = (v.view(-1, 1, 1, 1) for v in (alpha, sigma, norm))
    x = x / norm
    with torch.no_grad():
        v = teacher.unet(x, step, pipelines.embed_sd(teacher, prompts)).sample.float()
    return (alpha * v + sigma * x) - (alpha * x - sigma * v)


def sd_loss(pipe: Any, x0: Tensor, prompts: list[str], step: int) -> Tensor:
    t = torch.randint(1000, (len(x0),))
    noise = torch.randn_like(x0)
    x, v = pipe.scheduler.add_noise(x0, noise, t), pipe.scheduler.get_velocity(x0, noise, t)
    return F.mse_loss(pipe.unet(x, t, pipelines.embed_sd(pipe, prompts)).sample.float(), v)


def sd3_loss(pipe: Any, x0: Tensor, prompts: list[str], step: int, teacher: Any = None) -> Tensor:
    # A plain call of the pipeline pads T5's prompt to 256 tokens, ours to 20: the model sees both,
    # the long ones with half the batch because they cost three times as much.
    length = 256 if step % 8 == 7 else pipelines.WORDS
    if length == 256:
        x0, prompts = x0[::2], prompts[::2]
    t = flow_times(len(x0))
    noise = torch.randn_like(x0)
    x = torch.lerp(x0, noise, t.view(-1, 1, 1, 1))
    u = pipelines.call_sd3(pipe, x, t, pipelines.embed_sd3(pipe, prompts, length))
    target = noise - x0 if teacher is None else teacher_flow(teacher, x, t, prompts)
    return F.mse_loss(u.float(), target)


def flux_loss(
    pipe: Any, x0: Tensor, prompts: list[str], step: int, teacher: Any = None, guide: Any = None
) -> Tensor:
    # a plain call of the pipeline pads to 512 tokens
    length = 512 if step % 16 == 15 else pipelines.WORDS
    if length == 512:
        x0, prompts = x0[::4], prompts[::4]
    t = flow_times(len(x0))
    noise = torch.randn_like(x0)
    x, target = torch.lerp(x0, noise, t.view(-1, 1, 1, 1)), noise - x0
    guidance = torch.ones(len(x0))
    if teacher is not None and guide is None:
        target = teacher_flow(teacher, x, t, prompts)
    if guide is not None:
        guidance = 1 + 4 * torch.rand(len(x0))
        with torch.no_grad():
            both = pipelines.embed_flux(guide, ["" for _ in prompts] + prompts, length)
            one = torch.ones(2 * len(x0))
            out = pipelines.call_flux(guide, torch.cat([x, x]), torch.cat([t, t]), both, one)
            plain, conditional = out.float().chunk(2)
            target = plain + guidance.view(-1, 1, 1, 1) * (conditional - plain)
    text = pipelines.embed_flux(pipe, prompts, length)
    return F.mse_loss(pipelines.call_flux(pipe, x, t, text, guidance).float(), target)


LOSSES: dict[str, Callable[..., Tensor]] = {"sd": sd_loss, "sd3": sd3_loss, "flux": flux_loss}
STEPS = {"sd": 18000, "sd3": 14000, "flux": 14000}
BATCH = {"sd": 32, "sd3": 48, "flux": 48}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=LOSSES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--clip", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, help="a trained emoji-sd, for sd3 and flux")
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    steps = args.steps or STEPS[args.family]
    batch = BATCH[args.family]

    vae: Any = AutoencoderKL.from_pretrained(args.vae).requires_grad_(False)
    torch.manual_seed(0)
    pipe, trained = pipelines.BUILDERS[args.family](vae, args.clip)
    pipe.set_progress_bar_config(disable=True)
    teacher: dict[str, Any] = {}
    if args.teacher is not None:
        teacher["teacher"] = StableDiffusionPipeline.from_pretrained(args.teacher)
        teacher["teacher"].unet.to(memory_format=torch.channels_last).requires_grad_(False)
    args.out.mkdir(parents=True, exist_ok=True)
    rows, captions, latents = dataset(vae, args.vae.parent / "latents.pt")
    draw = sampler(rows, steps)

    def loss_of(family: str, start: int = 0, **options: Any) -> Callable[[int], Tensor]:
        def loss(step: int) -> Tensor:
            pick = draw(start + step, batch)
            dropped = torch.rand(batch) < (0.0 if "guide" in options else 0.1)
            prompts = [
                "" if d else captions[i] for i, d in zip(pick.tolist(), dropped, strict=True)
            ]
            if "teacher" in options and step >= FIRST * steps:
                del options["teacher"]
            return LOSSES[family](pipe, latents[pick].float(), prompts, step, **options)

        return loss

    def report(step: int) -> dict:
        """A grid of 4×8 prompts, to look at while the training goes on."""
        names, grounds = list(OBJECTS), list(BACKGROUNDS)
        prompts = [f"{article(n)} on {article(grounds[i % 9])} background"
                   for i, n in enumerate(names[:96:6])]  # fmt: skip
        prompts += captions[-8:] + [captions[int(i)] for i in rows["count"][:4]]
        prompts += [captions[int(i)] for i in rows["pair"][:4]]
        for module in trained.values():
            module.eval()
        images = pipelines.draw(pipe, prompts, seeds=range(len(prompts)), steps=20, guidance=3.0)
        image_grid(images, columns=8).save(args.out / f"grid_{step:06d}.png")
        for module in trained.values():
            module.train()
        return {}

    def run(name: str, steps: int, loss: Callable[[int], Tensor], lr: float) -> None:
        modules: dict[str, nn.Module] = trained
        file = args.out / f"{name}.pt"
        print({name: fit(modules, loss, steps, lr, file, report=report, report_every=500)})

    with plain_attention():
        if args.family == "flux":
            first = round(steps * 0.75)
            run("training", first, loss_of("flux", **teacher), 1e-3)
            guide = copy.copy(pipe)
            for name, module in trained.items():
                setattr(guide, name, copy.deepcopy(module).eval().requires_grad_(False))
            run("guidance", steps - first, loss_of("flux", first, guide=guide), 5e-4)
        else:
            run("training", steps, loss_of(args.family, **teacher), 1e-3)
    for module in trained.values():
        module.eval().to(memory_format=torch.contiguous_format)
    pipe.save_pretrained(args.out)


if __name__ == "__main__":
    main()
