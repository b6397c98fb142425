"""Human Preference Score v3: a Qwen2-VL that reads the picture and the prompt."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .base import Reward
from .files import check_file, fetch, read_tensors
from .hpsv3_text import ABOUT, CHAT, REWARD
from .loading import LoadingError, pretrained, reading
from .qwen import IMAGE, qwen_patches, refuse_special_tokens

AREA = 256 * 28 * 28  # pixels that every image is resized to, as in training: 448 x 448
BATCH = 8  # images that the model sees at once
EMBEDDING = "language_model.embed_tokens.weight"
REMEDY = "give HPSv3.safetensors of huggingface.co/MizzenAI/HPSv3"
DTYPES = ("bfloat16", "float16", "float32", "float64")


class HPSv3(Reward):
    """Human Preference Score v3: how much people would prefer the image for the prompt.

        (m, s) = MLP(h),    R(u, c) = m - caution * exp(s)

    h is the last hidden state of a Qwen2-VL at the token <|Reward|>, which follows the image and an
    instruction that quotes the prompt; the MLP is Linear(1024), ReLU, Linear(16), ReLU, Linear(2)
    in float32. Training took the preference to be N(m, exp(s)^2), so exp(s) is the model's own
    doubt. ``caution`` 0 is the published score m; above 0, doubtful images count for less (ours).
    Unbounded; its authors' means of models reach from -0.24 (SD 2) to 10.55 (Kolors).

    ``checkpoint`` is HPSv3.safetensors, local or as ORG/REPO:NAME on the hub, or a .pth of the same
    weights; ``base`` a folder or hub id that has the config and the tokenizer of the Qwen2-VL, of
    which no weights are read. ``dtype`` is that of the Qwen2-VL; its weights are 14.4 GiB in 16
    bits. Images of any size are resized to about 256 squares of 28 pixels, 448 x 448 if they are
    square. The gradient reaches the pixels, and needs memory for the activations of all layers.

    Read in HPSv3's own code (package 1.0.0 and git d232ff8) and kept here: the instruction in
    Qwen2-VL's chat template, the area, the head, that m is the score, and that positions simply
    count all tokens, because its forward pass leaves out Qwen2-VL's rotary grid for images. What
    follows <|Reward|> is left out, as a causal model does not see it, and so is the language head.
    Deviations: the image is not rounded to 8 bits after resizing (see ``qwen_patches``), and a
    prompt that holds a special token such as <|Reward|> is refused. Not verified, for want of the
    16 GB file: the released weights' scores. That its names are those of old transformers (visual.,
    model.layers., rm_head.0, .3, .5) is what several loaders of the file say; today's names work
    too. Source: Ma et al. 2025 (arXiv 2508.03789), https://github.com/MizzenAI/HPSv3. Its code is
    MIT; the weights, and Qwen2-VL-7B-Instruct's, are said to be Apache-2.0.

    Raises ValueError for a bad option, a prompt with a special token, and a checkpoint or base that
    is not HPSv3's, naming the first weight that differs.
    """

    name = "hpsv3"
    differentiable = True

    def __init__(
        self,
        checkpoint: str = "MizzenAI/HPSv3:HPSv3.safetensors",
        base: str = "Qwen/Qwen2-VL-7B-Instruct",
        caution: float = 0.0,
        dtype: str = "bfloat16",
    ):
        self.check_options(checkpoint, base, caution, dtype)
        super().__init__()
        from transformers import AutoTokenizer

        option = f"base={base!r}"
        self.tokenizer: Any = pretrained(AutoTokenizer.from_pretrained, option, base)
        self.tokenizer.add_tokens([REWARD], special_tokens=True)
        self.model, self.head = load(checkpoint, base, getattr(torch, dtype))
        rows = self.model.get_input_embeddings().weight.shape[0]
        if len(self.tokenizer) != rows:
            raise ValueError(
                f"{option} has {len(self.tokenizer)} tokens with {REWARD}, but {checkpoint} embeds "
                f"{rows}; they are of different models, HPSv3's is Qwen/Qwen2-VL-7B-Instruct"
            )
        self.caution = caution
        self.freeze()

    @classmethod
    def check_options(
        cls,
        checkpoint="MizzenAI/HPSv3:HPSv3.safetensors",
        base="",
        caution=0.0,
        dtype="bfloat16",
        **options,
    ):
        check_file("checkpoint", checkpoint)
        if isinstance(caution, bool) or not isinstance(caution, (int, float)) or not caution >= 0:
            raise ValueError(f"caution={caution!r} is not a number of 0 or more")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")

    @classmethod
    def check_prompts(cls, prompts, metadata):
        refuse_special_tokens(prompts)

    def forward(self, images, prompts, metadata=None):
        mean, doubt = self.distribution(images, prompts)
        return mean - self.caution * doubt

    def distribution(self, images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """The mean and the standard deviation of the score of each image, (n,) float32 each."""
        refuse_special_tokens(prompts)
        rows = range(0, len(images), BATCH)
        parts = [self._some(images[i : i + BATCH], prompts[i : i + BATCH]) for i in rows]
        mean, log = torch.cat(parts).unbind(-1)
        return mean, log.exp()

    def _some(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The head's two numbers for each image, (n, 2)."""
        vision = self.model.config.vision_config
        merge, patch = vision.spatial_merge_size, vision.patch_size
        pixels, grid = qwen_patches(images, AREA, AREA, patch, merge, vision.temporal_patch_size)
        squares = int(grid[0].prod()) // merge**2
        texts = [ABOUT.replace("{text_prompt}", prompt) for prompt in prompts]
        texts = [CHAT.format(image=IMAGE * squares, about=text) for text in texts]
        rows = [torch.tensor(self.tokenizer(text)["input_ids"]) for text in texts]
        ids = pad_sequence(rows, batch_first=True)  # what follows a token does not change it
        ends = torch.tensor([len(row) - 1 for row in rows])
        states = self.model(
            input_ids=ids.to(images.device),
            position_ids=torch.arange(ids.shape[1], device=images.device).expand(3, *ids.shape),
            pixel_values=pixels,
            image_grid_thw=grid.to(images.device),
            use_cache=False,
        ).last_hidden_state
        at_reward = states[torch.arange(len(rows)), ends.to(states.device)]
        return self.head(at_reward.to(self.head[0].weight.dtype))


def load(checkpoint: str, base: str, dtype: torch.dtype) -> tuple[Any, nn.Sequential]:
    """The Qwen2-VL, without its language head, and the head that scores, with a checkpoint's
    weights. Raises LoadingError if a weight is missing, unknown or of another shape."""
    from transformers import AutoConfig, Qwen2VLModel

    config: Any = pretrained(AutoConfig.from_pretrained, f"base={base!r}", base)
    if config.model_type != "qwen2_vl":
        raise LoadingError(f"base={base!r} is a {config.model_type}; HPSv3's is a qwen2_vl")
    option = f"checkpoint={checkpoint!r}"
    found = read_tensors(fetch(checkpoint), option)
    found = found.get("model", found) if isinstance(found, dict) else {}
    state = {_today(k): v for k, v in found.items() if k != "lm_head.weight"}
    scoring = {k: state.pop(k) for k in list(state) if k.startswith("rm_head.")}
    if EMBEDDING not in state or "rm_head.0.weight" not in scoring:
        raise LoadingError(f"{option} has no weights of Qwen2-VL and rm_head; {REMEDY}")
    text = config.text_config
    text.vocab_size = state[EMBEDDING].shape[0]  # the released file dropped Qwen's spare rows
    with reading(option, checkpoint):
        model = Qwen2VLModel.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    unknown = sorted(state.keys() - model.state_dict().keys())
    head = nn.Sequential(
        nn.Linear(text.hidden_size, 1024),
        nn.ReLU(),
        nn.Identity(),  # in place of training's dropout, which counts in the names
        nn.Linear(1024, 16),
        nn.ReLU(),
        nn.Linear(16, 2),
    )
    shapes = {f"rm_head.{k}": v.shape for k, v in head.state_dict().items()}
    for name in [*shapes, *sorted(scoring.keys() - shapes.keys())]:
        if name not in scoring or scoring[name].shape != shapes.get(name):
            unknown.append(name)
    if unknown:
        raise LoadingError(
            f"{option}: {unknown[0]} is missing, unknown or of another shape than in HPSv3 on "
            f"base={base!r}; {REMEDY}"
        )
    head.load_state_dict({k.removeprefix("rm_head."): v for k, v in scoring.items()})
    return model, head.to(torch.promote_types(dtype, torch.float32))


def _today(name: str) -> str:
    """A weight's name in Qwen2VLModel: transformers below 4.52, by which the released file was
    saved, had the same modules elsewhere, and today's file has one more prefix."""
    if name.startswith(("visual.", "model.visual.")):
        return name.removeprefix("model.")
    return re.sub(r"^model\.(language_model\.)?", "language_model.", name)
