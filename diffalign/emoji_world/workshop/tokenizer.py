"""A real CLIPTokenizer with EmojiWorld's words as tokens; any other text falls back to bytes."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import Any

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from ..scenes import BACKGROUNDS, COLORS, NUMBERS, OBJECTS, RELATIONS, STYLES, plural

LENGTH = 32  # tokens a prompt, padding included


def byte_pairs(words: list[str]) -> list[tuple[str, str]]:
    """Merges, the most frequent pair first and of equals the first by name, until every word is one
    token. The `tokenizers` library breaks ties at random."""
    pieces = {w: [*w[:-1], w[-1] + "</w>"] for w in words}
    counts, merges = Counter(words), []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in pieces.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            return merges
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        for parts in pieces.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == merges[-1]:
                    parts[i : i + 2] = ["".join(merges[-1])]
                i += 1


def build_tokenizer() -> CLIPTokenizer:
    """Byte-pair merges learnt until every word of the world is one token (about 1,100 tokens)."""
    words = [*OBJECTS, *map(plural, OBJECTS), *COLORS, *BACKGROUNDS, *NUMBERS, *RELATIONS, *STYLES]
    words += ["a", "an", "on", "of", "background", "with", "and", "the", "bunch"]
    words += ["small", "big", "photo", "picture", "emoji"]
    merges: Any = byte_pairs(re.findall(r"\w+", " ".join(words)))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(m) for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    # transformers 5 takes the vocabulary itself: file names silently give a vocabulary of two
    vocab = {t: i for i, t in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)
    assert len(tokenizer) == len(vocab), (len(tokenizer), len(vocab))
    return tokenizer
