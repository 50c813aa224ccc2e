"""A lower bound of the number of tokens of a text, without tokenizing it, to refuse far too long ones at once.

A token that stands for n characters accounts for n of them, so a text has at least as many tokens as the sum over its
characters of 1/(length of the longest token with that character). Characters are bytes where the tokenizer sees bytes.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

CHUNK = 1 << 16
"""Characters that are counted at a time, so that a text that is too long is not read to its end."""

SLACK_PER_CHUNK = 16
"""Tokens to subtract per chunk of a normalized text, since characters may be joined across the chunk's ends."""

CHUNKWISE = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend", "Replace"}
"""Normalizers that may run chunk by chunk: only a few characters at the ends of a chunk differ."""

NOTHING_DROPPED = {"ByteLevel", "Metaspace", "Split", "Digits", "Punctuation", "UnicodeScripts"}
"""Pre-tokenizers that drop no character, unless their behavior is to remove what they split at."""


class TokenBound:
    """A lower bound of the number of tokens of a text.

    Attributes:
        longest: characters of the tokenizer's longest token, None if there is no bound: where one token may stand for
            any number of characters (unknown words, stripped spaces), or where some characters have no token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = tokenizer.backend_tokenizer
        self._normalizer = backend.normalizer
        normalizers, pre_tokenizers = (_parts(part) for part in (backend.normalizer, backend.pre_tokenizer))
        self._sees_bytes = any(part["type"] == "ByteLevel" for part in pre_tokenizers)
        self._space = next((part["replacement"] for part in pre_tokenizers if part["type"] == "Metaspace"), " ")
        self._keeps_ascii = all(part["type"] == "NFC" for part in normalizers)
        self.longest: int | None = None
        added = list(backend.get_added_tokens_decoder().values())
        if (
            all(_is_chunkwise(part) for part in normalizers)
            and all(_drops_nothing(part) for part in pre_tokenizers)
            and not any(token.lstrip or token.rstrip for token in added)
        ):
            model_tokens = backend.get_vocab(with_added_tokens=False)
            if _has_a_token_for_everything(backend.model, model_tokens, self._sees_bytes):
                self._weigh(list(model_tokens), [token.content for token in added])

    def exceeds(self, text: str, num_tokens: int) -> bool:
        """Whether a text has more tokens than this; False if that is not known without tokenizing it."""
        if self.longest is None:
            return False
        try:
            return self._exceeds(text, num_tokens)
        except UnicodeEncodeError:
            return False  # a text that is not Unicode has no tokens at all

    def _exceeds(self, text: str, num_tokens: int) -> bool:
        fewest = 0.0
        for start in range(0, len(text), CHUNK):
            fewest += self._fewest(text[start : start + CHUNK])
            if fewest > num_tokens + 0.01:  # sums of fractions are not exact
                return True
        return False

    def _fewest(self, chunk: str) -> float:
        slack = 0
        if not (self._keeps_ascii and chunk.isascii()):
            chunk = self._normalized(chunk)
            slack = SLACK_PER_CHUNK
        chunk = chunk.replace(" ", self._space)
        return float(self._weights[_codes(chunk, as_bytes=self._sees_bytes)].sum()) - slack

    def _weigh(self, model_tokens: list[str], added_tokens: list[str]) -> None:
        # An added token stands for itself, or for what it is once normalized.
        added = sorted({*added_tokens, *map(self._normalized, added_tokens)}, key=len)
        model_tokens = sorted(model_tokens, key=len)
        codes = _codes("".join(model_tokens), as_bytes=False)
        if self._sees_bytes:
            codes = _byte_values()[np.minimum(codes, 0x200)]
        longest_with = np.ones(0x101 if self._sees_bytes else 0x110000)
        lengths = np.array([len(token) for token in model_tokens])
        longest_with[codes] = np.repeat(lengths, lengths)  # the last value of an index stays, which is the longest
        for token in added:
            codes = _codes(token, as_bytes=self._sees_bytes)
            longest_with[codes] = np.maximum(longest_with[codes], len(codes))
        self._weights = 1.0 / longest_with
        self.longest = int(longest_with.max())

    def _normalized(self, text: str) -> str:
        return text if self._normalizer is None else str(self._normalizer.normalize_str(text))


def _codes(text: str, *, as_bytes: bool) -> np.ndarray:
    if as_bytes:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


def _byte_values() -> np.ndarray:
    """[0x201] the byte that a character of a byte-level vocabulary stands for, 0x100 if none.

    Printable characters of Latin-1 stand for themselves, those from 0x100 on for the other bytes in their order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    values = np.full(0x201, 0x100)
    values[printable] = printable
    others = sorted(set(range(0x100)) - set(printable))
    values[0x100 : 0x100 + len(others)] = others
    return values


def _parts(component: Any) -> list[dict[str, Any]]:
    """The parts of a normalizer or pre-tokenizer, in order."""
    return [] if component is None else _flat(json.loads(component.__getstate__()))


def _flat(state: dict[str, Any]) -> list[dict[str, Any]]:
    if state["type"] != "Sequence":
        return [state]
    inner = state.get("normalizers") or state.get("pretokenizers") or []
    return [part for each in inner for part in _flat(each)]


def _is_chunkwise(normalizer: dict[str, Any]) -> bool:
    if normalizer["type"] == "Replace":
        pattern = normalizer["pattern"].get("String")
        return pattern is not None and len(pattern) == 1
    return normalizer["type"] in CHUNKWISE


def _drops_nothing(pre_tokenizer: dict[str, Any]) -> bool:
    return pre_tokenizer["type"] in NOTHING_DROPPED and pre_tokenizer.get("behavior") != "Removed"


def _has_a_token_for_everything(model: Any, tokens: dict[str, int], sees_bytes: bool) -> bool:
    """Whether every character has a token, and no token stands for more characters than it has."""
    if type(model).__name__ != "BPE":
        return False
    if sees_bytes:
        values = _byte_values()
        names = [chr(code) for code in range(0x200) if values[code] < 0x100]
    elif model.byte_fallback:
        names = [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        return model.unk_token in tokens and not model.fuse_unk
    return all(name in tokens for name in names)
