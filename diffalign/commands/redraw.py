"""`sample.py --noise`: pictures drawn again from their stored noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from .. import policies
from ..config.decoding import decode
from ..config.prompts import collect
from ..drawing import grids
from ..optimize_noise.base import chain, last
from ..sampling import drawn
from ..sampling.drawn import Drawn, Stored
from ..sampling.pipeline import (
    BATCH,
    Sampler,
    Settings,
    check_drawing,
    check_loras,
    check_plain,
    family_of,
    pictures,
)
from ..sampling.rollout import Sampling
from .search import loaded


@dataclass
class How(Settings):
    """Settings of a picture, as in `Drawn.how`; the last three belong to its noise."""

    lora: str | None = None
    lora_scale: float = 1.0
    kernel: str | None = None
    eta: float = 0.0
    family: str = ""


OF_NOISE = ("kernel", "eta", "family")


def redraw(
    noise: str,
    prompts: Sequence[str] | None = None,
    grid: str = "grid.png",
    out: str | None = None,
    **given: Any,
) -> Path:
    """Write a grid of the pictures of a noise.safetensors; returns its path.

    With the file's model and settings the pixels are the same, as far as the network's output does
    not depend on the batch. given: fields of `How`; those that are not None replace the file's.
    prompts: one for all pictures, or one each. out: as for `pipeline.draw`. Raises ValueError for
    noise that does not fit, before a model is loaded.
    """
    stored = _fitting(noise, prompts, {k: v for k, v in given.items() if v is not None}, grid)
    if out is not None:
        drawn.check_out(out, grid, [one.name for one in stored])
    found: list[Drawn] = []
    load = lru_cache(1)(Sampler)  # successive pictures mostly share a model
    for _, several in groupby(stored, key=_drawn_alike):
        group = list(several)
        found += _plain(group, load) if group[0].how["kernel"] is None else _searched(group)
    grids.save_png(drawn.grid_of(drawn.rows_of(found)), grid, {"noise": noise, **found[0].how})
    if out is not None:
        drawn.write(out, dict(zip([one.name for one in stored], found, strict=True)))
    return Path(grid)


def _drawn_alike(one: Stored) -> tuple[str, str]:
    """A key that pictures share if one call may draw them."""
    plain = one.how["kernel"] is None
    return repr(one.how), repr((one.prompt, one.text)) if plain else ""


def _fitting(
    path: str, prompts: Sequence[str] | None, given: Mapping[str, Any], grid: str
) -> list[Stored]:
    """The pictures of the file with the settings to draw them with, each checked."""
    found = drawn.read(path)
    texts = collect(prompts, "--prompts") if prompts else []
    if len(texts) not in (0, 1, len(found)):
        raise ValueError(
            f"{len(texts)} prompts for the pictures of {path}, which are {len(found)}; give one, "
            "or one each"
        )
    given = {k: v for k, v in given.items() if k in vars(How()) and k not in OF_NOISE}
    for i, one in enumerate(found):
        missing = [k for k in vars(How()) if k not in one.how]
        if missing:
            raise ValueError(f"--noise {path!r} does not say the {missing[0]} of {one.name}")
        decode(How, {k: one.how[k] for k in vars(How())}, source=f" of {one.name} in {path}")
        if not one.redraws:
            raise ValueError(
                f"--noise {path!r}: {one.name} is not made of its noise alone, as "
                f"{one.how.get('method')} leaves the sampler on the way; search again instead"
            )
        new = {"prompt": texts[i % len(texts)], "text": None} if texts else {}
        found[i] = replace(one, how={**one.how, **given}, **new)
    for how in {repr(one.how): one.how for one in found}.values():
        check_drawing(how["model"], how["steps"], how["guidance"], how["resolution"], grid)
        if how["kernel"] is None:
            check_plain(how["model"], how["resolution"])
        check_loras(how["model"], how["merge_lora"], how["lora"], how["lora_scale"])
    for one in found:
        _check_noise(path, one)
    return found


def _check_noise(path: str, one: Stored) -> None:
    how, family = one.how, family_of(one.how["model"])
    levels, shape = policies.peek(how["model"], how["steps"], how["resolution"])
    if family != how["family"] or tuple(one.noise.shape[1:]) != shape:
        raise ValueError(
            f"--noise {path!r} is noise {tuple(one.noise.shape[1:])} of a {how['family']} model, "
            f"and {how['model']!r} at this resolution is a {family} model of {shape}; give the "
            "model and the resolution that it is of, or leave both out"
        )
    draws, kernel = 1, how["kernel"]
    if kernel is not None:
        draws += sum(Sampling(levels, kernel, how["eta"], how["guidance"]).stochastic)
    if len(one.noise) != draws:
        raise ValueError(
            f"--noise {path!r} has {len(one.noise)} draws for {one.name}, and {how['steps']} steps "
            f"take {draws} with the kernel {kernel}; leave --steps out"
        )


def _plain(group: Sequence[Stored], load: Callable[..., Sampler]) -> list[Drawn]:
    """Pictures drawn by diffusers' own pipeline."""
    one, how = group[0], group[0].how
    sampler = load(how["model"], how["merge_lora"], how["dtype"])
    sampler.use({} if how["lora"] is None else {how["lora"]: how["lora_scale"]})
    noise = torch.cat([one.noise for one in group])
    return pictures(sampler, one.prompt, [one.seed for one in group], how, noise, one.text)


@torch.no_grad()
def _searched(group: Sequence[Stored]) -> list[Drawn]:
    """Pictures drawn by the sampler that the search used."""
    how = group[0].how
    policy, found = loaded(how), []
    levels = policy.levels(how["steps"])
    sampling = Sampling(levels, how["kernel"], how["eta"], how["guidance"])
    for start in range(0, len(group), BATCH):
        part = group[start : start + BATCH]
        noise = torch.stack([one.noise for one in part]).to(policy.device)
        cond = policy.encode([one.text or one.prompt.text for one in part])
        images = policy.decode(last(chain(policy, cond, sampling, noise)))
        for one, image in zip(part, images, strict=True):
            again = Drawn(grids.to_pil(image), one.prompt, one.seed, one.noise, how, one.text)
            found.append(again)
    return found
