"""The contract between a diffusers pipeline and everything above it.

A family file (`unet.py`, ...) says how its network is called and what its output means; the rest is
here: classifier-free guidance and decoding; the prompt cache is in `texts`, trained weights and
their copies in `weights`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..dynamics import PREDICTIONS, Levels, Prediction, native_target
from .acceleration import accelerate
from .cond import Cond, joined
from .configs import Size, pixels_per_latent, read_config
from .guidance import Guidance
from .sharding import Team
from .texts import Texts
from .weights import LAYOUT, TrainedWeights


class Policy(TrainedWeights, Texts, ABC):
    """A text-to-image pipeline as a policy: what algorithms may ask of a model.

    Latents are float32 (n, *latent_shape); pictures are (n, 3, H, W) in [0, 1]. Frozen weights run
    in `dtype` under autocast; trained weights stay float32.

    resolution: of the pictures in pixels, None = the model's own.
    """

    repeated: ClassVar[tuple[str, ...]] = ()  # classes of the blocks to compile; () = the whole
    vaes: ClassVar[tuple[str, ...]] = ("AutoencoderKL", "AutoencoderTiny")
    recompute_decoding = False  # in the backward pass, where the VAE cannot do so block by block
    predicts: str  # what the network outputs: epsilon | v_prediction | flow

    def __init__(
        self,
        pipe: Any,
        device: torch.device | str,
        dtype: torch.dtype,
        resolution: Size | None = None,
    ):
        self.pipe = pipe
        self.device = torch.device(device)
        self.dtype = dtype
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        self.network = getattr(pipe, self.denoiser)  # with the adapters on it
        self.vae: Any = pipe.vae
        self.tiny_vae: Any = None
        scheduler = pipe.scheduler
        config = {**scheduler.config, "_class_name": type(scheduler).__name__}
        index = {**pipe.config, "_class_name": type(pipe).__name__}
        self.schedule_config = self.scheduler_config(index, config)
        self.uses_cfg = self.guided_by(index, self.network.config) == "cfg"
        self.latent_shape = self.shape(self.network.config, self.vae.config, resolution)
        self.made_for = self.resolution = resolution
        self.decode_batch = 16
        self.calls = 0  # samples through the denoiser so far, both branches of CFG counted
        self._prompts = {}
        self.read_base = self._read_base
        self.sharding = None
        self.accelerated = lambda network: None
        self._copies = {}
        self.setup()

    def setup(self) -> None:
        """Set what else a family needs; called once, at the end of `__init__`."""

    def resize(self, resolution: Size | None) -> None:
        """Draw pictures of another size from now on, None = that which the policy was made for.
        Raises ValueError for one that the model cannot draw."""
        resolution = resolution or self.made_for
        self.latent_shape = self.shape(self.network.config, self.vae.config, resolution)
        self.resolution = resolution

    @contextmanager
    def resized(self, resolution: Size | None) -> Iterator[None]:
        """Draw pictures of another size inside, see `resize`."""
        before = self.resolution
        self.resize(resolution)
        try:
            yield
        finally:
            self.resize(before)

    def place(self, team: Team | None = None, denoiser: bool = True) -> None:
        """Move the denoiser, or all else, to the device. Of a `team` one process has read the
        weights, and the denoiser is divided where the team divides it."""
        for name, part in self.pipe.components.items():
            if not isinstance(part, nn.Module) or (name == self.denoiser) != denoiser:
                continue
            if denoiser and team is not None and team.divides:
                self.sharding = team
                team.divide(part)
                continue
            if team is None:
                part.to(self.device)
            else:
                team.spread(part, self.device)
            if name in (self.denoiser, "vae") and all(p.ndim < 5 for p in part.parameters()):
                part.to(memory_format=LAYOUT)

    @classmethod
    def check(
        cls, index: Mapping[str, Any], network: Mapping[str, Any], vae: Mapping[str, Any]
    ) -> None:
        """Refuse a model that this family cannot run, by the configs of its pipeline, denoiser and
        VAE. No weights are read."""
        kind = index["vae"][1]
        if kind not in cls.vaes:
            raise ValueError(f"the VAE is a {kind}; use a pipeline with a plain {cls.vaes[0]}")
        taken, given = network["in_channels"], cls.gives(network)
        decoded, latent = cls.channels(vae), cls.shape(network, vae, None)[0]
        if given not in (None, taken) or latent != decoded:
            raise ValueError(
                f"the denoiser takes {taken} channels and gives {given or taken}, and the VAE has "
                f"{decoded}: it is no plain text-to-image model (inpainting and editing models "
                "take a picture besides); use one that is"
            )

    @classmethod
    @abstractmethod
    def shape(
        cls, network: Mapping[str, Any], vae: Mapping[str, Any], resolution: Size | None
    ) -> tuple[int, ...]:
        """Shape of a latent, from the configs of denoiser and VAE. Raises ValueError if the model
        or the resolution cannot be run."""

    @classmethod
    def gives(cls, network: Mapping[str, Any]) -> int | None:
        """Channels that the denoiser gives, counted as its `in_channels`; None = as many."""
        return network.get("out_channels")

    @classmethod
    def channels(cls, vae: Mapping[str, Any]) -> int:
        """Channels of a latent, from the config of a VAE."""
        return vae["latent_channels"]

    @classmethod
    def pixels_per_latent(cls, vae: Mapping[str, Any]) -> int:
        """The factor between the sides of picture and latents, from the config of a VAE."""
        return pixels_per_latent(vae)

    @classmethod
    def guided_by(
        cls, index: Mapping[str, Any], network: Mapping[str, Any]
    ) -> Literal["cfg", "input"] | None:
        """How a guidance scale acts, by the configs of pipeline and denoiser: by a second call for
        the negative prompt, as an input of the denoiser, or not at all."""
        return "cfg"

    @classmethod
    def weighed(cls, guidance: float | Guidance) -> Guidance:
        """Guidance whose scale is the w of u + w (c - u), from a scale as the model's own pipeline
        counts it."""
        return Guidance.of(guidance)

    @classmethod
    def guided(cls, guidance: float, n: int) -> dict[str, Any]:
        """Arguments that guide the model's own pipeline as a scale guides the policy, for n
        prompts."""
        return {"guidance_scale": guidance}

    @classmethod
    def as_pipeline(cls, x: Tensor) -> Tensor:
        """Latents (n, *latent) as the model's own pipeline takes them."""
        return x

    def renormed(self, guided: Tensor, c: Tensor) -> Tensor:
        """What the pipeline makes of the guided output (n, *latent), given that for the prompt."""
        return guided

    @classmethod
    def scheduler_config(cls, index: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
        """The scheduler's config in the form that `schedule` takes.

        index: config of the pipeline. `_class_name` is the class, here as there.
        """
        return config

    @classmethod
    @abstractmethod
    def schedule(cls, config: dict[str, Any], steps: int, shape: tuple[int, ...]) -> Levels:
        """The (steps + 1,) levels of a run, from noise to data. config: from `scheduler_config`.
        shape: of a latent."""

    @abstractmethod
    def call(self, x: Tensor, t: Tensor, text: dict[str, Tensor], guidance: float) -> Tensor:
        """Raw network output for `x` (n, *latent), `t` (n,) and embeddings (n, ...).

        guidance is for networks that take it as an input (`uses_cfg = False`); others ignore it.
        """

    @classmethod
    def peek(
        cls, name: str, steps: int, resolution: Size | None = None
    ) -> tuple[Levels, tuple[int, ...]]:
        """Levels of a sampling run and shape of a latent, from the pipeline's configs alone."""
        index = read_config(name, "model_index.json")
        network = read_config(name, f"{cls.denoiser}/config.json")
        vae = read_config(name, "vae/config.json")
        scheduler = read_config(name, "scheduler/scheduler_config.json")
        try:
            cls.check(index, network, vae)
            shape = cls.shape(network, vae, resolution)
            config = {"_class_name": index["scheduler"][1], **scheduler}
            config = cls.scheduler_config(index, config)
            return cls.schedule(config, steps, shape), shape
        except KeyError as error:
            raise ValueError(
                f"model.name={name!r} is incomplete: its configs do not say {error}"
            ) from error

    def levels(self, steps: int) -> Levels:
        """The (steps + 1,) levels of a sampling run, from noise to data."""
        return self.schedule(self.schedule_config, steps, self.latent_shape).to(self.device)

    @abstractmethod
    def at(self, time: Tensor) -> Levels:
        """Levels (n,) at any `time` (n,) in (0, 1), where 0 is data and 1 is noise.

        A flow's time is sigma; that of a DDPM schedule is the timestep over the number of training
        timesteps.
        """

    def predict(
        self, x: Tensor, level: Levels, cond: Cond, guidance: float | Guidance = 1.0
    ) -> Prediction:
        """The network's prediction for `x` (n, *latent) at `level` (one level, or one per sample).

        guidance: a scale w > 1 is classifier-free guidance `u + w (c - u)` (arXiv 2207.12598) on
        the raw output, both branches in one call; w <= 1 turns it off, as in diffusers. Families
        whose pipelines count or bound it in another way say so (`weighed`, `renormed`). A
        `Guidance` acts at some levels, or in another form. If `uses_cfg` is False the network gets
        w instead. The result is float32 and carries gradient where grad is enabled.
        """
        how = self.weighed(guidance)
        rows = how.rows(level, len(x)) if self.uses_cfg else None
        if rows is None:
            output = self.output(x, level, cond, how.scale)
        else:
            u, output = self.branches(x, level, cond, rows)
            guided = self.renormed(how.combine(u, output[rows]), output[rows])
            output = guided if isinstance(rows, slice) else output.index_copy(0, rows, guided)
        return self.parametrize(x, output, level)

    def output(self, x: Tensor, level: Levels, cond: Cond, guidance: float = 1.0) -> Tensor:
        """The network's raw output (n, *latent) for the prompts, float32."""
        t = level.t.to(self.device).expand(len(x))
        self.calls += len(x)
        with self.autocast():
            return self.call(x, t, cond.positive, guidance).float()

    def branches(
        self, x: Tensor, level: Levels, cond: Cond, rows: slice | Tensor
    ) -> tuple[Tensor, Tensor]:
        """The raw outputs for the negative prompts of some `rows` (m, *latent) and for the prompts
        of all (n, *latent), float32, in one call."""
        t = level.t.to(self.device).expand(len(x))
        text = joined([{k: v[rows] for k, v in cond.negative.items()}, cond.positive])
        x, n = torch.cat([x[rows], x]), len(x)
        self.calls += len(x)
        with self.autocast():
            out = self.call(x, torch.cat([t[rows], t]), text, 1.0).float()
        return out[:-n], out[-n:]

    def parametrize(self, x: Tensor, native: Tensor, level: Levels) -> Prediction:
        """The x0 and noise that the network's output `native` at x (n, *latent) implies; linear in
        x and `native`."""
        return PREDICTIONS[self.predicts](x, native, level)

    def target(self, x0: Tensor, noise: Tensor, level: Levels) -> Tensor:
        """The output of a perfect network at `noised(x0, noise, level)`, (n, *latent)."""
        return native_target(self.predicts, x0, noise, level)

    def autocast(self):
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def decode(self, x0: Tensor, differentiable: bool = False, tiny: bool = False) -> Tensor:
        """Pictures (n, 3, H, W) in [0, 1] of clean latents (n, *latent).

        Decodes `decode_batch` at a time to bound the memory. differentiable: keep the graph to
        `x0`. tiny: use the tiny VAE, if one was added.
        """
        vae = self.tiny_vae if tiny and self.tiny_vae is not None else self.vae
        decode = self._decode
        if differentiable and self.recompute_decoding:
            decode = partial(checkpoint, decode, use_reentrant=False)
        with torch.set_grad_enabled(differentiable):
            return torch.cat([decode(chunk, vae) for chunk in x0.split(self.decode_batch)])

    def _decode(self, x0: Tensor, vae: Any) -> Tensor:
        image = vae.decode(self.unscaled(x0, vae.config).to(vae.dtype)).sample.float()
        return (image / 2 + 0.5).clamp(0, 1)

    def unscaled(self, x0: Tensor, vae: Mapping[str, Any]) -> Tensor:
        """The denoiser's latents (n, *latent), scaled as the VAE with this config takes them.

        A tiny VAE takes the denoiser's latents unchanged: the scale in its config is 1.
        """
        return x0 / vae["scaling_factor"] + (vae.get("shift_factor") or 0.0)

    def add_tiny_vae(self, name: str) -> None:
        """Have `decode(tiny=True)` use the AutoencoderTiny of a local folder or hub id."""
        from .loading import tiny_vae

        vae = tiny_vae(name)
        vae = vae.to(self.device, memory_format=LAYOUT)
        self.tiny_vae = vae.requires_grad_(False).eval()

    def accelerate(self, attention: str, compile: bool) -> None:
        """Make the calls of the denoiser cheap, see `acceleration.accelerate`; for its copies
        too."""
        device = self.device.type
        self.accelerated = partial(
            accelerate, attention, compile, self.repeated, device=device, dtype=self.dtype
        )
        self.accelerated(self.network)
