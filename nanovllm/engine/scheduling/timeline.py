"""The phases of a request's life, for `llm.explain()` and the trace. No torch."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Span:
    """A phase of a request's life.

    Attributes:
        what: `waits for a lease (why)`, `prefill queue` or `prefill queue (why)`, `prefill of tokens a to b of n` (with
            `on cuda:0`, if two cards share the prompt), `handoff`, `decode queue`, `decodes`, or how it ended.
        start_s, end_s: seconds since its arrival; `end_s` is None for the current phase.
    """

    what: str
    start_s: float
    end_s: float | None

    def __str__(self) -> str:
        took = "" if self.end_s is None else f"  {(self.end_s - self.start_s) * 1e3:10.2f} ms"
        return f"{self.start_s * 1e3:10.2f} ms{took:>15}  {self.what}"


@dataclass
class Timeline:
    """The moments at which a request went from one phase to the next."""

    arrival_s: float
    _marks: list[tuple[float, str]] = field(default_factory=list)

    def mark(self, what: str) -> None:
        """Begins a phase now, unless the request is in it already."""
        if not self._marks or self._marks[-1][1] != what:
            self._marks.append((time.perf_counter(), what))

    def spans(self) -> Iterator[Span]:
        """Phases in the order in which they began."""
        marks = list(self._marks)  # a copy; empty before the loop has taken the request in
        for (moment, what), following in itertools.zip_longest(marks, marks[1:]):
            yield Span(what, moment - self.arrival_s, None if following is None else following[0] - self.arrival_s)

    def __str__(self) -> str:
        return "\n".join(map(str, self.spans()))
