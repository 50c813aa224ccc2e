"""What an engine's process and its client tell each other: columns and small records in msgpack, nothing pickled.

Knows nothing of sockets, engines or texts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from nanovllm import errors
from nanovllm.engine.output_rows import OutputRows
from nanovllm.errors import EngineProcessError
from nanovllm.outputs import FinishReason, RequestOutput, TokenLogprobs
from nanovllm.sampling_params import SamplingParams


class Failure(msgspec.Struct, array_like=True, frozen=True):
    """An exception, as it can be sent."""

    kind: str
    message: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        return cls(type(error).__name__, str(error))

    def as_error(self) -> Exception:
        """The same exception if it is one of this package's, else an EngineProcessError that names it."""
        return self.as_own_error() or EngineProcessError(f"{self.kind} in the engine's process: {self.message}")

    def as_own_error(self) -> Exception | None:
        """The same exception, None if it is none of this package's."""
        return getattr(errors, self.kind)(self.message) if self.kind in errors.__all__ else None


# From the client to the engine


class Start(msgspec.Struct, array_like=True, frozen=True, tag="start"):
    """The first message: which engine to make."""

    model: str
    options: dict[str, Any]
    log_level: int


class Add(msgspec.Struct, array_like=True, frozen=True, tag="add"):
    """A new request; `request_id` counts from 0, as the engine does itself."""

    request_id: int
    prompt_token_ids: list[int]
    params: SamplingParams


class Abort(msgspec.Struct, array_like=True, frozen=True, tag="abort"):
    """Ends a request where it is, if it has not ended."""

    request_id: int


class Ask(msgspec.Struct, array_like=True, frozen=True, tag="ask"):
    """A question, answered by an `Answer` of the same number; about all requests if `request_id` is None."""

    number: int
    request_id: int | None = None


Command = Start | Add | Abort | Ask


# From the engine to the client


class Ready(msgspec.Struct, array_like=True, frozen=True, tag="ready"):
    """The engine serves. What it accepts: see `RequestIntake`."""

    vocab_size: int
    max_model_len: int
    pool_tokens: int
    eos_ids: list[int]
    seed: int


class NotReady(msgspec.Struct, array_like=True, frozen=True, tag="not ready"):
    """The engine could not be made."""

    failure: Failure


class Ended(msgspec.Struct, array_like=True, frozen=True):
    """How a request has ended."""

    request_id: int
    reason: FinishReason
    failure: Failure | None = None


class Tokens(msgspec.Struct, array_like=True, frozen=True, tag="tokens"):
    """What all requests have gained since the last message.

    Attributes:
        request_ids, token_ids: two columns, in which a request has a line for each of its new tokens, in order.
        ended: the requests that have ended, after these tokens.
        logprobs: of the requests that asked for them, one entry for each of their lines.
        prompt_logprobs: of the requests that asked for them and have their first token here, one entry for each prompt
            token.
    """

    request_ids: list[int]
    token_ids: list[int]
    ended: list[Ended] = []
    logprobs: dict[int, list[TokenLogprobs]] = {}
    prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}


class Answer(msgspec.Struct, array_like=True, frozen=True, tag="answer"):
    """What was asked for: metrics, or the spans of a timeline as (what, start_s)."""

    number: int
    found: Any = None
    failure: Failure | None = None


Report = Ready | NotReady | Tokens | Answer

_encode = msgspec.msgpack.Encoder().encode
_decode_command = msgspec.msgpack.Decoder(Command).decode
_decode_report = msgspec.msgpack.Decoder(Report).decode


def encode(message: Command | Report) -> bytes:
    return _encode(message)


def decode_command(data: bytes) -> Command:
    return _decode_command(data)


def decode_report(data: bytes) -> Report:
    return _decode_report(data)


def tokens_of(outputs: Iterable[RequestOutput | OutputRows]) -> Tokens:
    """What a step gave out, as columns. Its texts are left out."""
    message = Tokens([], [], [], {}, {})
    for output in outputs:
        if isinstance(output, OutputRows):
            message.request_ids.extend(output.request_ids)
            message.token_ids.extend(output.token_ids)
            continue
        message.request_ids.extend([output.request_id] * len(output.new_token_ids))
        message.token_ids.extend(output.new_token_ids)
        if output.new_logprobs:
            message.logprobs.setdefault(output.request_id, []).extend(output.new_logprobs)
        if output.prompt_logprobs is not None:
            message.prompt_logprobs[output.request_id] = output.prompt_logprobs
        if output.finished:
            assert output.finish_reason is not None, "a request that has ended knows how"
            failure = None if output.error is None else Failure.of(output.error)
            message.ended.append(Ended(output.request_id, output.finish_reason, failure))
    return message
