"""Text in, text out: the checkpoint's tokenizer and the text of a request as its tokens come."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Protocol

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nanovllm.errors import ModelLoadError, RequestError, shown
from nanovllm.utils.checkpoint import TOKENIZER_FILES, find_file, read_json

logger = logging.getLogger(__name__)

VOCABULARY_FILES = ("tokenizer.json", "vocab.json")
NEUTRAL_SETTINGS: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "bad_words_ids": [],
    "sequence_bias": {},
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "stop_strings": [],
}
"""What transformers' `generate` follows in a generation_config.json and this engine does not: values without effect."""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint, None if it has no tokenizer files.

    Raises:
        ModelLoadError: the files cannot be read.
    """
    there = {name for name in TOKENIZER_FILES if find_file(folder, name) is not None}
    if not there.intersection(VOCABULARY_FILES):
        return None
    try:
        tokenizer = _tokenizer_class(folder).from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many types, all of which mean the same here
        raise ModelLoadError(f"the tokenizer of {folder} cannot be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise ModelLoadError(f"{folder} has no tokenizer.json; save its tokenizer with transformers' save_pretrained")
    return tokenizer


def _tokenizer_class(folder: Path) -> Any:
    if (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast
    # It knows how to make one of older files, but importing it takes as long as importing torch.
    from transformers import AutoTokenizer

    return AutoTokenizer


def end_of_sequence_ids(
    folder: Path, config: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> frozenset[int]:
    """Tokens that end a text: generation_config.json's, without that file config.json's, and the tokenizer's own.

    Ids that the model cannot sample are left out.

    Raises:
        ModelLoadError: an entry is not a token id or a list of them.
    """
    generation = read_json(folder, "generation_config.json")
    listed = (config if generation is None else generation).get("eos_token_id")
    ids = [] if listed is None else listed if isinstance(listed, list) else [listed]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise ModelLoadError(f"eos_token_id={shown(listed)} in {folder} is not a token id or a list of them")
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    return frozenset(token for token in ids if token < vocab_size)


def warn_of_generation_settings(folder: Path) -> None:
    """Logs what generation_config.json asks for in vain: `SamplingParams` alone say how tokens are chosen."""
    asked = read_json(folder, "generation_config.json") or {}
    unfollowed = [
        f"{name}={shown(asked[name])}"
        for name, neutral in NEUTRAL_SETTINGS.items()
        if name in asked and asked[name] is not None and asked[name] != neutral
    ]
    if unfollowed:
        logger.warning("%s: generation_config.json asks for what is not followed: %s", folder, ", ".join(unfollowed))


def encode(tokenizer: PreTrainedTokenizerBase | None, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text prompt.

    Raises:
        RequestError: the checkpoint has no tokenizer, or the text is not valid Unicode.
    """
    if tokenizer is None:
        raise RequestError("this checkpoint has no tokenizer files; pass the prompt as a list of token ids")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not valid Unicode ({error}); remove the lone surrogate") from error
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)


def render_chat(tokenizer: PreTrainedTokenizerBase | None, messages: Any) -> str:
    """A conversation as the prompt of the assistant's next message.

    Raises:
        RequestError: the checkpoint has no chat template, or the messages do not fit it.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise RequestError("this checkpoint has no chat template; use generate() with a prompt of your own")
    well_formed = isinstance(messages, (list, tuple)) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
        for message in messages
    )
    if not well_formed or not messages:
        raise RequestError(f"messages={shown(messages)} is not a non-empty list of dicts with 'role' and 'content'")
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
    except Exception as error:  # whatever the template raises, the conversation does not fit it
        raise RequestError(f"the chat template refuses these messages: {error}") from error


class RequestText(Protocol):
    """The text of one request. `add` takes its next tokens and gives the next piece of text."""

    stopped: bool
    """Whether a stop string was found; the text ends before it."""

    def add(self, token_ids: list[int], *, may_stop: bool) -> str: ...

    def finish(self, token_ids: list[int]) -> str:
        """What is left to show when no more tokens come, `token_ids` being all there were."""


class NoText:
    """For checkpoints without a tokenizer."""

    stopped = False

    def add(self, token_ids: list[int], *, may_stop: bool) -> str:
        return ""

    def finish(self, token_ids: list[int]) -> str:
        return ""


class WholeText:
    """Decodes once, at the end: for requests that nobody watches."""

    stopped = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def add(self, token_ids: list[int], *, may_stop: bool) -> str:
        return ""

    def finish(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))


class StreamedText:
    """Decodes as tokens come; holds back what ends inside a character or may be the beginning of a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._longest_stop = max(map(len, stop), default=0)
        self._stream = DecodeStream(skip_special_tokens=True)
        self._text = ""
        self._num_shown = 0
        self._search_from = 0

    def add(self, token_ids: list[int], *, may_stop: bool) -> str:
        for token_id in token_ids:
            piece = self._stream.step(self._tokenizer.backend_tokenizer, token_id)
            if piece:
                self._append(piece, may_stop)
        return self._show(len(self._text) if self.stopped else len(self._text) - self._held_back())

    def finish(self, token_ids: list[int]) -> str:
        if not self.stopped:
            whole = str(self._tokenizer.decode(token_ids, skip_special_tokens=True))
            # A character that was never completed shows as a replacement character at the end.
            if whole.startswith(self._text):
                self._text = whole
        return self._show(len(self._text))

    def _append(self, piece: str, may_stop: bool) -> None:
        start = max(self._search_from, len(self._text) - self._longest_stop + 1)
        self._text += piece
        if not may_stop:
            self._search_from = len(self._text)
            return
        found = [place for stop in self._stop if (place := self._text.find(stop, start)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.stopped = True

    def _held_back(self) -> int:
        """Length of the longest end of the text that is the beginning of a stop string."""
        for length in range(min(self._longest_stop - 1, len(self._text) - self._num_shown), 0, -1):
            if any(stop.startswith(self._text[-length:]) for stop in self._stop):
                return length
        return 0

    def _show(self, end: int) -> str:
        shown = self._text[self._num_shown : end]
        self._num_shown = max(self._num_shown, end)
        return shown
