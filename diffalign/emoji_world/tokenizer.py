"""A real CLIPTokenizer with EmojiWorld's words as tokens; any other text falls back to bytes."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from .scenes import BACKGROUNDS, COLOURS, NUMBERS, OBJECTS, RELATIONS, STYLES, plural

LENGTH = 32  # tokens a prompt, padding included


def build_tokenizer() -> CLIPTokenizer:
    """Byte-pair merges learnt until every word of the world is one token (about 1,500 tokens)."""
    words = [*OBJECTS, *map(plural, OBJECTS), *COLOURS, *BACKGROUNDS, *NUMBERS, *RELATIONS, *STYLES]
    words += ["a", "an", "on", "of", "background", "with", "and", "the", "bunch"]
    words += ["small", "big", "photo", "picture", "emoji"]
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+"), "removed", invert=True)
    trained.train_from_iterator(
        sorted(words),
        trainers.BpeTrainer(end_of_word_suffix="</w>", vocab_size=4000, show_progress=False),
    )
    merges: Any = [tuple(m) for m in json.loads(trained.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(m) for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    # transformers 5 takes the vocabulary itself: file names silently give a vocabulary of two
    vocab = {t: i for i, t in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)
    assert len(tokenizer) == len(vocab), (len(tokenizer), len(vocab))
    return tokenizer
