"""A T5 tokenizer of whole words, for pipelines whose T5 is as small as their world."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def build_t5_tokenizer(words: Iterable[str], model_max_length: int) -> PreTrainedTokenizerFast:
    """Word-level tokens over lower-cased text: "<pad>" 0, "</s>" 1, "<unk>" 2, then the words.

    T5's special ids; "</s>" ends every text. Words it does not know become "<unk>". Punctuation is
    split off and is a word of its own: give "," or "hot-air" among `words` for "," or "-" to be
    known. The hub's T5 has SentencePiece pieces instead; FluxPipeline asks no more of a tokenizer
    than this.
    """
    lower, split = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    # split as prompts will be: a word kept whole here that is split there could never be met
    known = {w for text in words for w, _ in split.pre_tokenize_str(lower.normalize_str(text))}
    vocab = {t: i for i, t in enumerate(["<pad>", "</s>", "<unk>", *sorted(known)])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.normalizer = lower
    core.pre_tokenizer = split
    core.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=model_max_length,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    assert len(tokenizer) == len(vocab), (len(tokenizer), len(vocab))
    return tokenizer
