"""Train `emoji-sd`: a StableDiffusionPipeline that draws EmojiWorld's single centred objects.

    python -m diffalign.emoji_world.train_base OUT --vae VAE --clip CLIP

As in Stable Diffusion the text encoder is a frozen CLIP text tower and the VAE is frozen; the UNet
is trained on precomputed latents. v-prediction with zero terminal SNR (arXiv 2305.08891), so
sampling starts where training does. One caption in ten is dropped for classifier-free guidance.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from .scenes import BACKGROUNDS, OBJECTS, article, caption, sample_scene
from .training import fit, pixels, unit


def build_unet(channels: int, width: int) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(64, 128, 160),
        layers_per_block=1,
        # attention at 8×8 and 4×4 only: at 16×16 it costs 1.6 times the step on a CPU
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> Any:
    # the cosine schedule: 16×16 latents lose their content at lower noise than 64×64 ones
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,  # unused by trailing spacing; diffusers warns about 0
        clip_sample=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--clip", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--scenes", type=int, default=30000)
    parser.add_argument("--sizes", type=float, nargs=2, default=(0, 64), help="objects to train on")
    args = parser.parse_args()

    vae: Any = AutoencoderKL.from_pretrained(args.vae).requires_grad_(False)
    text_encoder = CLIPTextModel.from_pretrained(args.clip).requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(args.clip)
    scheduler = build_scheduler()
    unet: Any = build_unet(vae.config.latent_channels, text_encoder.config.hidden_size)
    unet.to(memory_format=torch.channels_last)

    rng = random.Random(2)
    scenes = [sample_scene(rng) for _ in range(args.scenes)]
    captions = [caption(s) for s in scenes]
    distinct = ["", *dict.fromkeys(captions)]
    row = {c: i for i, c in enumerate(distinct)}
    cache = args.out / "latents.pt"
    if cache.exists():
        latents = torch.load(cache, weights_only=True)
    else:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            images = (unit(pixels(scenes[i : i + 100])) for i in range(0, len(scenes), 100))
            latents = torch.cat([vae.encode(x).latent_dist.mode().float() for x in images])
        latents = latents.half()
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(latents, cache)
    with torch.no_grad():
        ids = tokenizer(distinct, padding="max_length", truncation=True, return_tensors="pt")
        chunks = ids.input_ids.split(256)
        embeddings = torch.cat([text_encoder(c).last_hidden_state.half() for c in chunks])
    rows = torch.tensor([row[c] for c in captions])
    low, high = args.sizes
    kept = torch.tensor([i for i, s in enumerate(scenes) if low <= s.items[0].size <= high])

    def loss(step: int) -> Tensor:
        pick = kept[torch.randint(len(kept), (args.batch,))]
        x0 = latents[pick].float()
        shown = torch.where(torch.rand(args.batch) < 0.1, 0, rows[pick])
        t = torch.randint(1000, (args.batch,))
        noise = torch.randn_like(x0)
        x = scheduler.add_noise(x0, noise, t)
        v = scheduler.get_velocity(x0, noise, t)
        return F.mse_loss(unet(x, t, embeddings[shown].float()).sample.float(), v)

    pipe: Any = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        image_encoder=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)

    def report(step: int) -> dict:
        """A grid of 4×8 objects, to look at while the training goes on."""
        from ..grids import image_grid

        names = list(OBJECTS)[:32]
        backgrounds = list(BACKGROUNDS)
        prompts = [
            f"{article(n)} on {article(backgrounds[i % 9])} background" for i, n in enumerate(names)
        ]
        generator = torch.Generator().manual_seed(0)
        unet.eval()
        images = pipe(prompts, num_inference_steps=20, guidance_scale=3.0, generator=generator)
        image_grid(images.images, columns=8).save(args.out / f"grid_{step:06d}.png")
        unet.train()
        return {}

    figures = fit(
        {"unet": unet},
        loss,
        args.steps,
        1e-3,
        args.out / "training.pt",
        report=report,
        report_every=500,
    )
    print({"figures": figures})
    unet.to(memory_format=torch.contiguous_format)
    pipe.save_pretrained(args.out)


if __name__ == "__main__":
    main()
