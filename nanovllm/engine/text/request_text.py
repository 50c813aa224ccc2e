"""The text of a request as its tokens come, and where it stops. Knows nothing of requests or devices."""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from nanovllm.engine.text.stops import MAX_MARKS, StopFinder, first_characters, has_marks, mark
from nanovllm.errors import RequestError

NUM_CONTEXT = 4
"""Tokens kept as context: the text of a token may depend on those before it."""

MAX_KEPT = 12
"""When more tokens than this are kept, all but the last NUM_CONTEXT are dropped, unless a run of bytes is open."""

LONGEST_LOOK_AHEAD = 64
"""Tokens of an open run of bytes that are searched for stop strings before it has ended."""

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""Stands at the end of a decoded text for the bytes of a character that is not complete."""


class TokenTexts(dict[int, str | None]):
    """The text of each token by itself; None where it takes other tokens to tell. Made at first use."""

    def __init__(self, vocabulary: Vocabulary, *, skip_special_tokens: bool = True) -> None:
        self._vocabulary = vocabulary
        self._left_out = vocabulary.special if skip_special_tokens else {}

    def __missing__(self, token_id: int) -> str | None:
        text: str | None = ""
        if token_id not in self._left_out:
            decoded: str = self._vocabulary.backend.decode([token_id], skip_special_tokens=False)
            text = None if decoded.endswith(UNFINISHED) else decoded
        self[token_id] = text
        return text


class NoTexts(TokenTexts):
    """Token texts of requests of which no text is wanted."""

    def __init__(self) -> None:
        pass

    def __missing__(self, token_id: int) -> str:
        return ""


class RequestText(Protocol):
    """The text of one request. `add` takes its next tokens and gives the text that is new."""

    stopped: bool
    """Whether a stop string was found; the text ends before it."""
    token_texts: TokenTexts | None
    """The text of each token, if that is all that comes of it while no text is open; None if a token may stop more."""

    @property
    def has_open_text(self) -> bool:
        """Whether text of earlier tokens waits for later ones."""

    def add(self, token_ids: list[int], *, may_stop: bool) -> str: ...

    def add_stop_token(self, token_id: int) -> str:
        """Takes the token that ends the request: no part of the text, but perhaps of a stop string."""

    def finish(self, token_ids: list[int]) -> str:
        """The rest of the text, when no more tokens come; `token_ids` are all of them."""


class NoText:
    """The text of a request without a tokenizer: always empty."""

    stopped = False
    token_texts: TokenTexts | None = NoTexts()
    has_open_text = False

    def add(self, token_ids: list[int], *, may_stop: bool) -> str:
        return ""

    def add_stop_token(self, token_id: int) -> str:
        return ""

    def finish(self, token_ids: list[int]) -> str:
        return ""


class WholeText:
    """Decodes once, at the end: for requests that are not streamed."""

    stopped = False
    token_texts: TokenTexts | None = NoTexts()
    has_open_text = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skips_special = skip_special_tokens

    def add(self, token_ids: list[int], *, may_stop: bool) -> str:
        return ""

    def add_stop_token(self, token_id: int) -> str:
        return ""

    def finish(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=self._skips_special))


class Vocabulary:
    """What the text of every request needs of the tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.backend = tokenizer.backend_tokenizer
        self.special = {
            token_id: token.content
            for token_id, token in self.backend.get_added_tokens_decoder().items()
            if token.special and token.content
        }
        """Tokens that the text leaves out."""
        decoder = self.backend.decoder
        state = None if decoder is None else json.loads(decoder.__getstate__())
        self.is_free_of_context = state is not None and state["type"] == "ByteLevel"
        """Whether every token stands for the same bytes wherever it is."""
        self.token_texts = TokenTexts(self) if self.is_free_of_context else None
        self.all_token_texts = TokenTexts(self, skip_special_tokens=False) if self.is_free_of_context else None
        """The same with special tokens as text."""
        has_fallback = state is not None and _has_part(state, "ByteFallback")
        names = (f"<0x{byte:02X}>" for byte in range(256)) if has_fallback else ()
        self.fallback_ids = frozenset(
            token_id for name in names if (token_id := self.backend.token_to_id(name)) is not None
        )
        """Byte tokens. The text of a run of them is known only at its end: one invalid byte makes all invalid."""

    @cached_property
    def special_pattern(self) -> re.Pattern[str] | None:
        """Matches special tokens in a text, the longest where several begin."""
        names = sorted(set(self.special.values()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names))) if names else None

    def special_names(self, stop: tuple[str, ...]) -> list[str]:
        """The special tokens that these stop strings name.

        Raises:
            RequestError: they are too many to tell apart.
        """
        pattern = self.special_pattern
        names = sorted({name for text in stop for name in pattern.findall(text)}) if pattern else []
        if len(names) >= MAX_MARKS:
            raise RequestError(
                f"stop names {len(names)} different special tokens; at most {MAX_MARKS - 1} are told apart; "
                "use stop_token_ids"
            )
        return names


def _has_part(state: dict[str, object], kind: str) -> bool:
    parts = state.get("decoders", [])
    assert isinstance(parts, list), "a sequence of decoders lists them"
    return state["type"] == kind or any(_has_part(part, kind) for part in parts)


class _Decoder:
    """Decodes incrementally: gives out text that no later token can change. In all, it equals decoding at once."""

    def __init__(self, vocabulary: Vocabulary, token_texts: TokenTexts | None) -> None:
        self._vocabulary = vocabulary
        self._token_texts = token_texts
        self._kept: list[int] = []
        self._num_shown = 0
        """Characters of the text of the kept tokens that were given out."""
        self.in_run = False
        """Whether the last token is of a run of bytes that may go on."""

    @property
    def is_open(self) -> bool:
        """Whether text waits for tokens to come."""
        return bool(self._kept)

    def add(self, token_id: int) -> str:
        """Takes a token that the text does not leave out."""
        if self._token_texts is not None and not self._kept:  # nearly always, so that it should be fast
            text_of_token = self._token_texts[token_id]
            if text_of_token is not None:
                return text_of_token
        if self._vocabulary.backend.id_to_token(token_id) is None:
            return ""  # the model has more ids than the tokenizer has tokens
        kept = self._kept
        kept.append(token_id)
        self.in_run = token_id in self._vocabulary.fallback_ids
        if self.in_run:
            return ""
        text = self._decoded(kept)
        end = len(text) - text.endswith(UNFINISHED)
        delta = text[self._num_shown : end]
        self._num_shown = max(self._num_shown, end)
        if self._vocabulary.is_free_of_context and end == len(text):
            self._kept, self._num_shown = [], 0
        elif len(kept) > MAX_KEPT:
            self._drop(len(text) - self._num_shown)
        return delta

    def rest(self) -> str:
        """The text left to show, if no more tokens come."""
        return self._decoded(self._kept)[self._num_shown :]

    def flush(self) -> str:
        """The rest, which is given out."""
        rest = self.rest()
        self._num_shown += len(rest)
        return rest

    def text_ahead(self) -> str:
        """The text of a run of bytes that has not ended, if it is short and no character is open."""
        if not self.in_run or len(self._kept) > LONGEST_LOOK_AHEAD:
            return ""
        rest = self.rest()
        return "" if rest.endswith(UNFINISHED) else rest

    def _drop(self, num_open: int) -> None:
        """Drops tokens that no longer matter to those to come, `num_open` characters being still to be shown."""
        kept = self._kept[-NUM_CONTEXT:]
        text = self._decoded(kept)
        if not text:
            # Keep tokens from the beginning, which decoding may strip, and the last one without text.
            kept = [*self._kept[:-NUM_CONTEXT][:MAX_KEPT], kept[-1]]
            text = self._decoded(kept)
        self._kept, self._num_shown = kept, len(text) - num_open

    def _decoded(self, token_ids: list[int]) -> str:
        text: str = self._vocabulary.backend.decode(token_ids, skip_special_tokens=False)
        return text


class StreamedText:
    """Decodes as tokens come; holds back what ends inside a character or may be the prefix of a stop string.

    Stop strings are looked for in the text, which has no special tokens, and those that name special tokens also in
    what the model wrote, special tokens included.

    Args:
        vocabulary: of all requests.
        stop: the stop strings.
        skip_special_tokens: whether the text leaves special tokens out.
        include_stop: whether the text has the stop string, or the stop token, that ends it.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        stop: tuple[str, ...] = (),
        *,
        skip_special_tokens: bool = True,
        include_stop: bool = False,
    ) -> None:
        self.stopped = False
        self._includes_stop = include_stop
        self._special = vocabulary.special if skip_special_tokens else {}
        token_texts = vocabulary.token_texts if skip_special_tokens else vocabulary.all_token_texts
        self._decoder = _Decoder(vocabulary, token_texts)
        stop = tuple(text for text in stop if not has_marks(text))  # no text is ever invalid Unicode
        names = vocabulary.special_names(stop) if skip_special_tokens else []
        marks = {name: mark(1 + number) for number, name in enumerate(names)}
        self._marks: dict[int, str] = {}
        self._in_text = StopFinder(stop) if stop else None
        self._in_written: StopFinder | None = None
        if marks and vocabulary.special_pattern is not None:
            self._marks = {token_id: marks.get(name, mark(0)) for token_id, name in vocabulary.special.items()}
            written = [vocabulary.special_pattern.sub(lambda found: marks[found[0]], text) for text in stop]
            self._in_written = StopFinder(text for text in written if has_marks(text))
        self._finders = [finder for finder in (self._in_text, self._in_written) if finder is not None]
        self._unshown: list[str] = []
        self._num_unshown = 0
        self._may_stop = True
        self._num_exempt = 0
        """Characters to come whose tokens were below `min_tokens`."""
        self.token_texts = None if self._finders else token_texts
        self._each_text = token_texts
        self._first_of_stop = first_characters(stop) if stop else None
        self._is_settled = token_texts is not None
        """Whether a token's text depends on no earlier token, and none of these may be the beginning of a stop."""

    @property
    def has_open_text(self) -> bool:
        return self._decoder.is_open

    def add(self, token_ids: list[int], *, may_stop: bool) -> str:
        if self._is_settled and self._each_text is not None and len(token_ids) == 1:  # nearly always
            text = self._each_text[token_ids[0]]
            if text and (self._first_of_stop is None or self._first_of_stop.search(text) is None):
                return text
        text = self._add(token_ids, may_stop)
        if self._each_text is not None:
            self._is_settled = not self._decoder.is_open and all(finder.is_at_rest for finder in self._finders)
        return text

    def _add(self, token_ids: list[int], may_stop: bool) -> str:
        if not self._finders:
            return "".join(self._decoder.add(token) for token in token_ids if token not in self._special)
        self._may_stop = may_stop
        for token_id in token_ids:
            if self.stopped:
                break
            if token_id in self._special:
                self._add_special(token_id)
            else:
                self._add_text(self._decoder.add(token_id))
            if self._decoder.in_run and not self.stopped:
                self._look_ahead()
        return self._show()

    def add_stop_token(self, token_id: int) -> str:
        if self._includes_stop:
            return self.add([token_id], may_stop=True)
        self._may_stop = True
        if token_id in self._special:
            self._add_special(token_id)
        return self._show()

    def finish(self, token_ids: list[int]) -> str:
        if not self.stopped:
            self._add_text(self._decoder.flush())
        for finder in self._finders:
            finder.reset()
        return self._show()

    def _add_text(self, delta: str) -> None:
        if not delta:
            return
        self._unshown.append(delta)
        self._num_unshown += len(delta)
        num_exempt, self._num_exempt = self._num_exempt, 0
        self._look_at(delta[num_exempt:], self._finders)

    def _add_special(self, token_id: int) -> None:
        if self._in_written is None:
            return
        ahead = self._decoder.text_ahead()
        if ahead and self._may_stop and self._in_written.would_find(ahead[self._num_exempt :] + self._marks[token_id]):
            self._add_text(self._decoder.flush())
        self._look_at(self._marks[token_id], [self._in_written])

    def _look_at(self, delta: str, finders: list[StopFinder]) -> None:
        """Looks for stop strings that end in this delta, and cuts the text at the one that began first."""
        if not self._may_stop:
            for finder in finders:
                finder.reset()
            return
        found = [stop for finder in finders if (stop := finder.add(delta)) is not None]
        if found and not self.stopped:
            self.stopped = True
            first = max(found)
            self._num_unshown -= first.since_end if self._includes_stop else first.since_begin

    def _look_ahead(self) -> None:
        """Stops within a run of bytes that has not ended, if its text as it is has a stop string."""
        ahead = self._decoder.text_ahead()
        if not self._may_stop:
            self._num_exempt = len(ahead)
        elif any(finder.would_find(ahead[self._num_exempt :]) for finder in self._finders):
            self._add_text(self._decoder.flush())

    def _show(self) -> str:
        """Gives out what can no longer be part of a stop string."""
        num_held = 0 if self.stopped else max((finder.num_held for finder in self._finders), default=0)
        num_shown = self._num_unshown - num_held
        if num_shown <= 0:
            return ""
        text = "".join(self._unshown)
        self._unshown = [text[num_shown:]]
        self._num_unshown = num_held
        return text[:num_shown]
