"""Text in, text out: the checkpoint's tokenizer and the text of a request as its tokens come."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nanovllm.errors import ModelLoadError, RequestError, shown
from nanovllm.utils.loader import read_json

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint, None if it has no tokenizer files.

    Raises:
        ModelLoadError: the files cannot be read.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
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
    """Tokens that end a text: generation_config.json's (or else config.json's), and the tokenizer's own.

    Ids that the model cannot sample are left out.

    Raises:
        ModelLoadError: an entry is not a token id or a list of them.
    """
    generation = read_json(folder, "generation_config.json") or {}
    listed = generation.get("eos_token_id")
    if listed is None:
        listed = config.get("eos_token_id")
    ids = [] if listed is None else listed if isinstance(listed, list) else [listed]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise ModelLoadError(f"eos_token_id={shown(listed)} in {folder} is not a token id or a list of them")
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    return frozenset(token for token in ids if token < vocab_size)


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
