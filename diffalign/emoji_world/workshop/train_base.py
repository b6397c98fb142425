"""Train EmojiWorld's text-to-image pipelines of three families on the same latents.

    python -m diffalign.emoji_world.workshop.train_base sd OUT --vae VAE --clip CLIP
    python -m diffalign.emoji_world.workshop.train_base sd3 OUT --teacher SD  # or flux
    python -m diffalign.emoji_world.workshop.train_base sd3 OUT --teacher SD --start SD3

- sd: StableDiffusionPipeline; v-prediction with zero terminal SNR (arXiv 2305.08891).
- sd3: StableDiffusion3Pipeline; rectified flow, logit-normal times (2403.03206).
- flux: FluxPipeline. As FLUX.1-dev it takes the guidance scale as an input: with g drawn from
  [1, 5] it learns its teacher's prediction under classifier-free guidance g (2210.03142).

The flows learn what a teacher, a trained emoji-sd, predicts, in place of the noise that was drawn:
the same mean with far less variance. The teacher is variance preserving and yet can teach a flow:
at equal alpha/sigma the latents of the two differ by a factor alone.

VAE and CLIP text tower are frozen; with a teacher, they are the teacher's. SD3's encoders and
FLUX's T5 are trained with the denoiser. Captions are dropped one time in ten for classifier-free
guidance, except for flux, which needs none. For three fifths of the run nearly all scenes show a
single object; then four in five show several, and in a run that starts from trained weights from
its beginning.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor
from torch.nn import functional as F

from rewards.device import choose_device, default_device

from ...drawing.grids import image_grid
from ...policies import FAMILIES
from ...policies.acceleration import accelerate
from ..scenes import BACKGROUNDS, KINDS, OBJECTS, article, caption, sample_scene
from ..tensors import pixels
from . import pipelines
from .training import fit, save, unit

SCENES = 90_000
SHARE = {"single": 0.45, "pair": 0.15, "count": 0.18, "relation": 0.22}  # of the scenes made
EARLY = {"single": 0.94, "pair": 0.02, "count": 0.02, "relation": 0.02}  # and of those drawn
LATE = {"single": 0.2, "pair": 0.25, "count": 0.25, "relation": 0.3}
FIRST = 0.6  # share of the steps that draw as EARLY


def dataset(vae: AutoencoderKL, cache: Path) -> tuple[dict[str, Tensor], list[str], Tensor]:
    """Rows of each scene kind, captions, and latents (n, 8, 16, 16) float16, cached on disk."""
    rng = random.Random(2)
    scenes = [sample_scene(rng, kind) for kind in KINDS for _ in range(round(SHARE[kind] * SCENES))]
    if not cache.exists():
        parts = []
        with (
            ProcessPoolExecutor(mp_context=get_context("spawn")) as pool,  # CUDA does not fork
            torch.no_grad(),
            torch.autocast(vae.device.type, torch.bfloat16),
        ):
            for images in pool.map(pixels, [scenes[i : i + 100] for i in range(0, SCENES, 100)]):
                latents: Any = vae.encode(unit(images).to(vae.device))
                parts.append(latents.latent_dist.mode().half())
        save(torch.cat(parts).cpu(), cache)
    kinds = [s.kind for s in scenes]
    rows = {k: torch.tensor([i for i, own in enumerate(kinds) if own == k]) for k in KINDS}
    return rows, [caption(s) for s in scenes], torch.load(cache, weights_only=True)


def sampler(rows: dict[str, Tensor], early: float) -> Callable[[int, int], Tensor]:
    """draw(step, n): rows of scenes, as EARLY before the step `early`, then as LATE."""

    def draw(step: int, n: int) -> Tensor:
        share = EARLY if step < early else LATE
        chances = torch.tensor([share[k] for k in KINDS])
        kinds = torch.multinomial(chances, n, replacement=True).tolist()
        picked = [rows[KINDS[k]] for k in kinds]
        return torch.stack([r[torch.randint(len(r), ())] for r in picked])

    return draw


def flow_times(x: Tensor) -> Tensor:
    """Logit-normal times in (0, 1), one for each row of x, (n,); one in five is uniform, so that
    both ends are learnt."""
    chance, uniform = torch.rand(2, len(x), device=x.device)
    return torch.where(chance < 0.2, uniform, torch.randn(len(x), device=x.device).sigmoid())


def teacher_flow(
    teacher: Any, x: Tensor, t: Tensor, prompts: list[str], guidance: Tensor | None = None
) -> Tensor:
    """noise - x0 as emoji-sd predicts them at x = (1 - t) x0 + t noise, (n, 8, 16, 16); under
    classifier-free guidance (n,) where given."""
    norm = torch.hypot(1 - t, t)
    alpha, sigma = (1 - t) / norm, t / norm
    abar = teacher.scheduler.alphas_cumprod.to(x)  # falling
    step = len(abar) - 1 - torch.searchsorted(abar.flip(0), alpha.square()).clamp_max(len(abar) - 1)
    alpha, sigma, norm = (v.view(-1, 1, 1, 1) for v in (alpha, sigma, norm))
    x = x / norm
    with torch.no_grad():
        if guidance is None:
            v = teacher.unet(x, step, pipelines.embed_sd(teacher, prompts)).sample.float()
        else:
            text = pipelines.embed_sd(teacher, ["" for _ in prompts] + prompts)
            both = teacher.unet(torch.cat([x, x]), torch.cat([step, step]), text).sample.float()
            plain, conditional = both.chunk(2)
            v = plain + guidance.view(-1, 1, 1, 1) * (conditional - plain)
    return (alpha * v + sigma * x) - (alpha * x - sigma * v)


def sd_loss(pipe: Any, x0: Tensor, prompts: list[str], step: int) -> Tensor:
    t = torch.randint(1000, (len(x0),), device=x0.device)
    noise = torch.randn_like(x0)
    x, v = pipe.scheduler.add_noise(x0, noise, t), pipe.scheduler.get_velocity(x0, noise, t)
    return F.mse_loss(pipe.unet(x, t, pipelines.embed_sd(pipe, prompts)).sample.float(), v)


def sd3_loss(pipe: Any, x0: Tensor, prompts: list[str], step: int, teacher: Any) -> Tensor:
    # A plain call of the pipeline pads T5's prompt to 256 tokens, ours to 20: the model sees both,
    # the long ones with half the batch because they cost three times as much.
    length = 256 if step % 8 == 7 else pipelines.WORDS
    if length == 256:
        x0, prompts = x0[::2], prompts[::2]
    t = flow_times(x0)
    x = torch.lerp(x0, torch.randn_like(x0), t.view(-1, 1, 1, 1))
    u = pipelines.call_sd3(pipe, x, t, pipelines.embed_sd3(pipe, prompts, length))
    return F.mse_loss(u.float(), teacher_flow(teacher, x, t, prompts))


def flux_loss(pipe: Any, x0: Tensor, prompts: list[str], step: int, teacher: Any) -> Tensor:
    # a plain call of the pipeline pads to 512 tokens
    length = 512 if step % 16 == 15 else pipelines.WORDS
    if length == 512:
        x0, prompts = x0[::4], prompts[::4]
    t, guidance = flow_times(x0), 1 + 4 * torch.rand(len(x0), device=x0.device)
    x = torch.lerp(x0, torch.randn_like(x0), t.view(-1, 1, 1, 1))
    text = pipelines.embed_flux(pipe, prompts, length)
    u = pipelines.call_flux(pipe, x, t, text, guidance)
    return F.mse_loss(u.float(), teacher_flow(teacher, x, t, prompts, guidance))


LOSSES: dict[str, Callable[..., Tensor]] = {"sd": sd_loss, "sd3": sd3_loss, "flux": flux_loss}
STEPS = {"sd": 20000, "sd3": 16000, "flux": 12000}
DROPPED = {"sd": 0.1, "sd3": 0.1, "flux": 0.0}
BATCH = {"sd": 32, "sd3": 48, "flux": 48}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=LOSSES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--vae", type=Path, help="for sd")
    parser.add_argument("--clip", type=Path, help="for sd: a CLIPModel, whose text tower it takes")
    parser.add_argument("--teacher", type=Path, help="for sd3 and flux: a trained emoji-sd")
    parser.add_argument("--start", type=Path, help="a trained pipeline of the family to go on from")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--minutes", type=float, default=math.inf, help="at most")
    parser.add_argument("--batch", type=int, help="pictures a step")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--compile", action="store_true", help="nearly twice as fast, with g++")
    args = parser.parse_args()
    wanted = ("vae", "clip") if args.family == "sd" else ("teacher",)
    for name in ("vae", "clip", "teacher"):
        if (getattr(args, name) is not None) != (name in wanted):
            parser.error(f"{args.family} is made with --{' and --'.join(wanted)} alone")
    steps, batch = args.steps or STEPS[args.family], args.batch or BATCH[args.family]
    choose_device(args.device)
    device = default_device()

    extra: dict[str, Any] = {}
    if args.family == "sd":
        vae: Any = AutoencoderKL.from_pretrained(args.vae)
        text = pipelines.text_tower(args.clip)
    else:
        teacher: Any = StableDiffusionPipeline.from_pretrained(args.teacher).to(device)
        teacher.unet.to(memory_format=torch.channels_last).requires_grad_(False)
        vae, text = teacher.vae, (teacher.text_encoder.requires_grad_(False), teacher.tokenizer)
        extra["teacher"] = teacher
    vae.requires_grad_(False)
    torch.manual_seed(0)
    pipe, trained = pipelines.BUILDERS[args.family](vae, *text)
    pipe.to(device)
    if args.start:
        begun: Any = type(pipe).from_pretrained(args.start)
        for name, module in trained.items():
            module.load_state_dict(getattr(begun, name).state_dict())
    policy = FAMILIES[type(pipe).__name__]
    for network, blocks in (
        (getattr(pipe, policy.denoiser), policy.repeated),
        *([(extra["teacher"].unet, ())] if extra else []),
    ):
        accelerate("auto", args.compile, blocks, network, device, torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    args.out.mkdir(parents=True, exist_ok=True)
    rows, captions, latents = dataset(vae, args.out.parent / "latents.pt")
    latents = latents.to(device)
    draw = sampler(rows, 0 if args.start else FIRST * steps)

    def loss(step: int) -> Tensor:
        pick = draw(step, batch).tolist()
        dropped = torch.rand(batch) < DROPPED[args.family]
        prompts = ["" if d else captions[i] for i, d in zip(pick, dropped, strict=True)]
        return LOSSES[args.family](pipe, latents[pick].float(), prompts, step, **extra)

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

    file = args.out / "training.pt"
    figures = fit(
        trained, loss, steps, 1e-3, file, report=report, report_every=max(500, steps // 10),
        minutes=args.minutes,
    )  # fmt: skip
    print({args.family: figures})
    for module in trained.values():
        module.eval().to(memory_format=torch.contiguous_format)
    pipe.save_pretrained(args.out)


if __name__ == "__main__":
    main()
