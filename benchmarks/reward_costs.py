"""Milliseconds an image of the rewards whose weights need no download: jpeg, its surrogate, ocr.

Eight pictures of 512 x 512 at once: smooth colors with a line of text, so that ocr has something
to read. The median of `--repeats` calls after one to warm up, without gradients; for the surrogate
also with the gradient to the pixels.

    OMP_NUM_THREADS=2 python benchmarks/reward_costs.py           # a minute
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import rewards

IMAGES, SIDE = 8, 512
TEXT = "open until nine"
SPECS: dict[str, dict] = {
    "jpeg": {},
    "jpeg surrogate": {"type": "jpeg", "surrogate": True},
    "ocr": {},
}


def pictures() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(IMAGES, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(small, (SIDE, SIDE), mode="bicubic").clamp(0, 1)
    drawn = []
    for image in smooth:
        picture = Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy())
        font = ImageFont.load_default(48)
        ImageDraw.Draw(picture).text((SIDE / 2, SIDE / 2), TEXT, "black", font, anchor="mm")
        drawn.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
    return torch.stack(drawn)


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times[1:]) * 1000 / IMAGES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    images, prompts = pictures(), [f'a sign that says "{TEXT}"'] * IMAGES
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, options in SPECS.items():
        reward = rewards.build({name: options})
        with torch.no_grad():
            print(f"{name}: {milliseconds(lambda r=reward: r(images, prompts), repeats):.1f} ms")
        if rewards.gradients_of({name: options})[name]:
            own = images.clone().requires_grad_()
            steep = milliseconds(
                lambda r=reward, x=own: torch.autograd.grad(r(x, prompts).sum(), x), repeats
            )
            print(f"{name} with gradient: {steep:.1f} ms")


if __name__ == "__main__":
    main()
