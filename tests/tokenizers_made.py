"""Tokenizers of every usual kind, made here: each with words, special tokens and what never makes a character."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
PLAIN_ADDED = ["<think>", "<tool>"]
WORDS = ["a", "b", "ab", "aa", "the", "cat", "sat", ".", ",", "é", "日本", "�", "n't"]


def finished(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in PLAIN_ADDED])
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


def numbered(tokens: list[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def byte_level(
    merges: tuple[str, ...] = ("t h", "h e", "Ġ t", "Ġ the", "Ġ Ġ", "ĠĠ ĠĠ", "ã ģ", "Ã ©"),
) -> PreTrainedTokenizerFast:
    """Like Qwen's and GPT-2's: every byte a token, or part of one."""
    pairs = [tuple(merge.split()) for merge in merges]
    vocab = numbered([*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", *("".join(pair) for pair in pairs)])
    pairs = [(left, right) for left, right in pairs if left in vocab and right in vocab]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return finished(backend)


def byte_level_in_a_sequence() -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    return tokenizer


def byte_fallback(*, strips: bool = True) -> PreTrainedTokenizerFast:
    """Like Llama's (or Gemma's, which strips nothing): words with their space, bytes where there is none."""
    words = ["<unk>", "▁", "▁▁", *WORDS, *(f"▁{word}" for word in WORDS), *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE(vocab=numbered(words), merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strips else parts)
    return finished(backend)


def word_piece() -> PreTrainedTokenizerFast:
    words = ["[UNK]", *WORDS, *(f"##{word}" for word in WORDS)]
    backend = Tokenizer(models.WordPiece(vocab=numbered(words), unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return finished(backend)


def metaspace() -> PreTrainedTokenizerFast:
    words = ["<unk>", "▁", *WORDS, *(f"▁{word}" for word in WORDS)]
    backend = Tokenizer(models.Unigram([(word, -1.0) for word in dict.fromkeys(words)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return finished(backend)


def word_ends() -> PreTrainedTokenizerFast:
    words = ["<unk>", *WORDS, *(f"{word}</w>" for word in WORDS)]
    backend = Tokenizer(models.BPE(vocab=numbered(words), merges=[], unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.decoder = decoders.BPEDecoder("</w>")
    return finished(backend)


def repeats_once() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(vocab=numbered(["<pad>", "|", *WORDS]), unk_token="<pad>"))
    backend.decoder = decoders.CTC(pad_token="<pad>", word_delimiter_token="|", cleanup=False)
    return finished(backend)


def words_apart() -> PreTrainedTokenizerFast:
    """Without a decoder: tokens with spaces between them."""
    return finished(Tokenizer(models.WordLevel(vocab=numbered(["<unk>", *WORDS]), unk_token="<unk>")))


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte_level": byte_level,
    "byte_level_in_a_sequence": byte_level_in_a_sequence,
    "byte_fallback": byte_fallback,
    "byte_fallback_unstripped": lambda: byte_fallback(strips=False),
    "word_piece": word_piece,
    "metaspace": metaspace,
    "word_ends": word_ends,
    "repeats_once": repeats_once,
    "words_apart": words_apart,
}
