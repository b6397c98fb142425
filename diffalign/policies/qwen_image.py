"""Qwen-Image and Qwen-Image-2.1: rectified-flow transformers with Qwen vision-language encoders."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..dynamics import Levels
from .configs import Size, latent_sides
from .flow import JOINT_ATTENTION, PATCH, FlowPolicy, flow_levels, packed, unpacked


class QwenPolicy(FlowPolicy):
    """What Qwen-Image and 2.1 share: texts of their own length, and a VAE of pictures with a frame
    axis and statistics for each channel.

    The negative prompt is " " unless one is given, as these models are used.
    """

    negative = " "

    @classmethod
    def channels(cls, vae: Mapping[str, Any]) -> int:
        return vae["z_dim"]

    @classmethod
    def pixels_per_latent(cls, vae: Mapping[str, Any]) -> int:
        return 2 ** len(vae["temperal_downsample"])

    @classmethod
    def guided(cls, guidance: float, n: int) -> dict[str, Any]:
        return {"true_cfg_scale": guidance, "negative_prompt": [cls.negative] * n}

    @abstractmethod
    def encoded(self, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
        """Padded embeddings (n, L, D) and a mask (n, L), None where nothing is padded."""

    def embed(self, prompts: list[str]) -> Mapping[str, Tensor | list[Tensor]]:
        embeds, mask = self.encoded(prompts)
        length = embeds.new_full((len(embeds),), embeds.shape[1]) if mask is None else mask.sum(1)
        length = length.long()
        rows = [e[:n] for e, n in zip(embeds, length.tolist(), strict=True)]
        return {"prompt": rows, "length": length}

    def _decode(self, x0: Tensor, vae: Any) -> Tensor:
        image = vae.decode(self.unscaled(x0, vae.config).to(vae.dtype)[:, :, None]).sample[:, :, 0]
        return (image.float() / 2 + 0.5).clamp(0, 1)

    def unscaled(self, x0: Tensor, vae: Mapping[str, Any]) -> Tensor:
        # filled on the device: torch.tensor would copy them there and wait for it
        mean, std = (
            torch.stack([x0.new_full((1, 1), v) for v in vae[name]])
            for name in ("latents_mean", "latents_std")
        )
        return x0 * std + mean


class QwenImagePolicy(QwenPolicy):
    """`QwenImagePipeline` (arXiv 2508.02324) as a policy: u = noise - data, with CFG.

    The guided output g = u + w (c - u) of every 2×2 token is scaled to the norm of c, as in the
    pipeline, whose `true_cfg_scale` w is; both branches carry gradient through that. The embedded
    guidance scale of a future distilled model is not supported.

    The LoRA targets are attention and MLP of both streams.
    """

    vaes = ("AutoencoderKLQwenImage",)
    repeated = ("QwenImageTransformerBlock",)
    lora_targets = (
        *JOINT_ATTENTION,
        "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
    )  # fmt: skip

    @classmethod
    def check(
        cls, index: Mapping[str, Any], network: Mapping[str, Any], vae: Mapping[str, Any]
    ) -> None:
        super().check(index, network, vae)
        odd = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
        if found := [name for name in odd if network.get(name)]:
            raise ValueError(
                f"{found[0]}=true of this transformer is of an editing, layered or distilled "
                "Qwen-Image, which is not supported; use a plain one"
            )

    @classmethod
    def gives(cls, network: Mapping[str, Any]) -> int | None:
        return PATCH**2 * network["out_channels"]

    @classmethod
    def shape(
        cls, network: Mapping[str, Any], vae: Mapping[str, Any], resolution: Size | None
    ) -> tuple[int, ...]:
        latents = latent_sides(resolution or 1024, cls.pixels_per_latent(vae), PATCH)
        return network["in_channels"] // PATCH**2, *latents

    @classmethod
    def schedule(cls, config: dict[str, Any], steps: int, shape: tuple[int, ...]) -> Levels:
        return flow_levels(config, steps, shape, linspace=True)

    def encoded(self, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
        return self.pipe.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.text_length
        )

    def text_shapes(self, tokens: Callable[[str, int], int]) -> dict[str, tuple[int, ...]]:
        length = self.max_sequence_length or tokens("tokenizer", 512)
        return {"prompt": (length, self.network.config.joint_attention_dim), "length": ()}

    def call(self, x: Tensor, t: Tensor, text: dict[str, Tensor], guidance: float) -> Tensor:
        n, _, height, width = x.shape
        places = torch.arange(text["prompt"].shape[1], device=x.device)
        out = self.network(
            packed(x).to(self.dtype),
            timestep=t / 1000,
            encoder_hidden_states=text["prompt"].to(self.dtype),
            encoder_hidden_states_mask=places < text["length"][:, None],
            img_shapes=[[(1, height // PATCH, width // PATCH)]] * n,
        ).sample
        return unpacked(out, height, width)

    @classmethod
    def as_pipeline(cls, x: Tensor) -> Tensor:
        return packed(x)

    def renormed(self, guided: Tensor, c: Tensor) -> Tensor:
        was, wanted = packed(guided), packed(c).norm(dim=-1, keepdim=True)
        return unpacked(was * (wanted / was.norm(dim=-1, keepdim=True)), *c.shape[2:])


class QwenImage21Policy(QwenPolicy):
    """`QwenImage21Pipeline` as a policy: u = noise - data; it needs no guidance, and has plain CFG.

    Text and picture are one sequence, in which the padded length of the text moves the picture:
    beside a longer prompt the pipeline draws another one. Here every row is called with texts of
    its own length alone, so that a picture does not depend on its batch. The cache of keys and
    values is not used: it rounds in another way than the calls that train. A step count other than
    that of the pipeline's own `sample_sigmas` takes evenly spaced ones. Pictures are RGBA, shown
    on white. Condition pictures (editing) are not supported.

    The LoRA targets are attention and MLP.
    """

    vaes = ("AutoencoderKLQwenImage21",)
    repeated = ("QwenImage21TransformerBlock",)
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "img_mlp.proj", "img_mlp.out", "img_mlp.gate_layer",
    )  # fmt: skip
    SLOT = 2  # side in latents of what the vision-language encoder counts as one token

    @classmethod
    def shape(
        cls, network: Mapping[str, Any], vae: Mapping[str, Any], resolution: Size | None
    ) -> tuple[int, ...]:
        latents = latent_sides(resolution or 1024, cls.pixels_per_latent(vae), cls.SLOT)
        return network["in_channels"], *latents

    @classmethod
    def scheduler_config(cls, index: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
        return {"sample_sigmas": index.get("sample_sigmas"), **config}

    @classmethod
    def schedule(cls, config: dict[str, Any], steps: int, shape: tuple[int, ...]) -> Levels:
        own = config["sample_sigmas"]
        sigmas = own if own is not None and len(own) == steps else True
        return flow_levels(config, steps, shape, sigmas, patch=1)

    def encoded(self, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
        embeds, mask, _ = self.pipe.encode_prompt(prompts, device=self.device)
        most = self.max_sequence_length
        return embeds[:, :most], mask if mask is None else mask[:, :most]

    def text_shapes(self, tokens: Callable[[str, int], int]) -> dict[str, tuple[int, ...]]:
        # the pipeline sets no limit
        length = self.max_sequence_length or 512
        return {"prompt": (length, self.network.config.context_in_dim), "length": ()}

    def call(self, x: Tensor, t: Tensor, text: dict[str, Tensor], guidance: float) -> Tensor:
        lengths = text["length"].tolist()
        out = torch.empty_like(x)
        for length in sorted(set(lengths)):
            rows = torch.tensor([i for i, n in enumerate(lengths) if n == length], device=x.device)
            made = self._call(x[rows], t[rows], text["prompt"][rows, :length])
            out = out.index_copy(0, rows, made.to(out.dtype))
        return out

    @classmethod
    def as_pipeline(cls, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)

    def _call(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        """Of rows whose texts are equally long."""
        n, _, height, width = x.shape
        tokens = height * width
        # the encoder's places: text, and a picture of which each place stands for 2x2 latents
        places = torch.arange(prompt.shape[1] + tokens // self.SLOT**2, device=x.device)
        out = self.network(
            self.as_pipeline(x).to(self.dtype),
            encoder_hidden_states=prompt.to(self.dtype),
            timestep=t / 1000,
            img_shapes=[[(1, height, width)]] * n,
            img_mask=(places >= prompt.shape[1]).expand(n, -1),
        ).sample[:, -tokens:]
        return out.transpose(1, 2).reshape(x.shape)

    def _decode(self, x0: Tensor, vae: Any) -> Tensor:
        image = super()._decode(x0, vae)
        if image.shape[1] == 4:
            color, alpha = image[:, :3], image[:, 3:]
            image = color * alpha + (1 - alpha)
        return image
