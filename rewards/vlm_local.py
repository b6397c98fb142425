"""A vision-language model on this machine, of which the first token's probabilities are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .loading import LoadingError, pretrained
from .qwen import IMAGE, image_positions, qwen_patches, refuse_special_tokens

KINDS = ("qwen2_vl", "qwen2_5_vl")  # whose image processing has a differentiable twin
BATCH = 8  # images that the model sees at once


class LocalVLM(nn.Module):
    """A Qwen2-VL or Qwen2.5-VL of transformers, a folder or hub id, in ``dtype``, frozen.

    Its image processor's sizes and normalisation and its chat template are kept. Images are not
    rounded to 8 bits, see ``qwen_patches``. Raises LoadingError for another kind of model.
    """

    def __init__(self, name: str, dtype: str):
        super().__init__()
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

        option = f"model={name!r}"
        kind = pretrained(AutoConfig.from_pretrained, option, name).model_type
        if kind not in KINDS:
            raise LoadingError(
                f"{option} is a {kind}; url: local takes one of {', '.join(KINDS)}, others need a "
                "server"
            )
        self.processor: Any = pretrained(AutoProcessor.from_pretrained, option, name)
        self.model: Any = pretrained(
            AutoModelForImageTextToText.from_pretrained, option, name, dtype=getattr(torch, dtype)
        )
        self.eval().requires_grad_(False)

    def shares(
        self, images: Tensor, texts: Sequence[str], start: str, words: Sequence[str]
    ) -> Tensor:
        """How the probability of the next token is shared among words: (n, W), each row sums to 1.

        The model reads image i (3, H, W), text i and ``start``, the beginning of its own answer. A
        word counts in small letters, capitals or both, with or without a space before it, as far as
        that is a single token. Raises ValueError if a word has no such token, or if a text holds a
        special one.
        """
        refuse_special_tokens(texts)
        tokens = [self._tokens(word) for word in words]
        rows = range(0, len(images), BATCH)
        parts = [self._next(images[i : i + BATCH], texts[i : i + BATCH], start) for i in rows]
        logits = torch.cat(parts).float()
        return torch.stack([logits[:, ids].logsumexp(1) for ids in tokens], 1).softmax(1)

    def _tokens(self, word: str) -> list[int]:
        forms = [space + form for space in ("", " ") for form in (word.lower(), word.title())]
        forms += [word.upper(), " " + word.upper()]
        found = [self.processor.tokenizer(f, add_special_tokens=False)["input_ids"] for f in forms]
        if not (single := sorted({ids[0] for ids in found if len(ids) == 1})):
            raise ValueError(
                f"{word!r} is no single token of {self.model.name_or_path}, so that its "
                "probability cannot be read; use another model or mode"
            )
        return single

    def _next(self, images: Tensor, texts: Sequence[str], start: str) -> Tensor:
        """The logits of the next token, (n, V)."""
        how = self.processor.image_processor
        least, most = (dict(how.size)[side] for side in ("shortest_edge", "longest_edge"))
        pixels, grid = qwen_patches(
            images, least, most, how.patch_size, how.merge_size, how.temporal_patch_size,
            how.image_mean, how.image_std,
        )  # fmt: skip
        rows, columns = (int(side) // how.merge_size for side in grid[0, 1:])
        ids = [self._ids(text, start, rows * columns) for text in texts]
        padded = pad_sequence(ids, batch_first=True)  # what follows a token does not change it
        before = int((ids[0] == self.model.config.image_token_id).int().argmax())
        positions = image_positions(before, rows, columns, padded.shape[1])
        states = self.model.model(
            input_ids=padded.to(images.device),
            position_ids=positions[:, None].expand(-1, len(ids), -1).to(images.device),
            pixel_values=pixels,
            image_grid_thw=grid.to(images.device),
            use_cache=False,
        ).last_hidden_state
        ends = torch.tensor([len(row) - 1 for row in ids]).to(images.device)
        return self.model.lm_head(states[torch.arange(len(ids)).to(images.device), ends])

    def _ids(self, text: str, start: str, image_tokens: int) -> Tensor:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        chat = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        whole = chat.replace(IMAGE, IMAGE * image_tokens) + start
        return torch.tensor(self.processor.tokenizer(whole)["input_ids"])
