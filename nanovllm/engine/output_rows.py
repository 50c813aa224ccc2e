"""Outputs of many requests at once, as columns. Knows nothing of requests."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nanovllm.outputs import RequestOutput


@dataclass(frozen=True, slots=True)
class OutputRows:
    """One new token of each of several requests that go on: what their outputs would say, without an object for each.

    Attributes:
        request_ids: which they are.
        token_ids: the token of each.
        texts: the new text of each; None if nobody has any.
        ttfts_s: seconds from the arrival of each to its first token.
    """

    request_ids: Sequence[int]
    token_ids: Sequence[int]
    texts: Sequence[str] | None
    ttfts_s: Sequence[float | None]

    def outputs(self) -> Iterable[RequestOutput]:
        """An output for each."""
        never, texts = itertools.repeat(None), itertools.repeat("") if self.texts is None else self.texts
        token_ids, are_last = ([token_id] for token_id in self.token_ids), itertools.repeat(False)
        return map(RequestOutput, self.request_ids, token_ids, texts, are_last, never, never, never, self.ttfts_s)


def single_outputs(outputs: Iterable[RequestOutput | OutputRows]) -> list[RequestOutput]:
    """The same outputs, each by itself."""
    each: list[RequestOutput] = []
    for output in outputs:
        if isinstance(output, OutputRows):
            each.extend(output.outputs())
        else:
            each.append(output)
    return each
