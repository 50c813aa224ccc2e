"""What `step()` and `generate_stream()` return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]
"""Why a request ended; `RequestOutput` says what each reason means, `metrics()["requests_ended"]` counts them."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities (natural log) at one position of prompt or output."""

    token_id: int
    logprob: float
    top: dict[int, float]
    """The most probable tokens, as many as `SamplingParams` asks for, best first."""

    def first(self, count: int) -> TokenLogprobs:
        """The same with the `count` best of `top`."""
        if len(self.top) <= count:
            return self
        return TokenLogprobs(self.token_id, self.logprob, dict(list(self.top.items())[:count]))


@dataclass(slots=True)
class RequestOutput:
    """What one request gained since the last `step()`.

    Attributes:
        request_id: the id that `add_request` returned.
        new_token_ids: tokens sampled since the last output of this request.
        text: the new text. It lags the tokens where they end inside a character, or where the text
            so far may be the beginning of a stop string.
        finished: whether this is the request's last output.
        finish_reason: `stop` (end-of-sequence, stop token or stop string), `length` (`max_tokens` or `max_model_len`),
            `abort`, `error`, or None while the request runs.
        error: the exception of a failed request, else None.
        new_logprobs: one entry for each of `new_token_ids` if the request asked for log-probabilities, else None.
        ttft_s: seconds from arrival to the first token, None before it.
        latency_s: seconds from arrival to the end, None before it.
        prompt_logprobs: in the output with the first token, if the request asked for them, one entry for each prompt
            token, the first of which is None; else None.
    """

    request_id: int
    new_token_ids: list[int]
    text: str
    finished: bool = False
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    new_logprobs: list[TokenLogprobs] | None = None
    ttft_s: float | None = None
    latency_s: float | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
