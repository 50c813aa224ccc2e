"""Finds stop strings in a text that comes bit by bit. Knows nothing of tokens: special tokens come as marks."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import NamedTuple

FIRST_MARK = 0xD800
MOST_MARKS = 0x800
"""Lone surrogates, which no text that is valid Unicode has, so they can stand for what is not text."""

MARKS = re.compile(f"[{chr(FIRST_MARK)}-{chr(FIRST_MARK + MOST_MARKS - 1)}]")


def mark(number: int) -> str:
    """A character that no text has, `number` being below MOST_MARKS. It takes no place in the text."""
    return chr(FIRST_MARK + number)


def has_marks(text: str) -> bool:
    return MARKS.search(text) is not None


class _Beginning:
    """The first `length` characters of the stop strings `low` to `high` (sorted), which have these in common."""

    __slots__ = ("found", "high", "length", "longer", "low", "shorter", "width")

    def __init__(self, low: int, high: int, length: int, width: int) -> None:
        self.low, self.high, self.length = low, high, length
        self.width = width
        """Its characters without marks."""
        self.longer: dict[str, _Beginning | None] = {}
        """Beginnings that are one character longer, as far as they have been looked up."""
        self.shorter: _Beginning | None = None
        """The longest of the other beginnings that this one ends with; None of the empty one."""
        self.found: int | None = None
        """Width of the longest stop string that this one ends with, if it does."""


class Found(NamedTuple):
    """Where a stop string is: how many characters came since it began, and since it ended."""

    since_begin: int
    since_end: int


class StopFinder:
    """Looks for stop strings in a growing text; the work per character depends neither on their number nor length.

    It is the automaton of Aho and Corasick ("Efficient string matching", 1975), of which only those states are made
    that the text comes through.

    Attributes:
        num_held: how many characters at the end of the text may be the beginning of a stop string.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = sorted(set(stops))
        self._empty = self._state = _Beginning(0, len(self._stops), 0, 0)
        self._first = re.compile("[" + "".join(re.escape(char) for char in {stop[0] for stop in self._stops}) + "]")

    @property
    def num_held(self) -> int:
        return self._state.width

    def reset(self) -> None:
        """What came so far can be no part of a stop string."""
        self._state = self._empty

    def add(self, text: str) -> Found | None:
        """Takes the next delta; if stop strings end in it, the one that began first, of several the shortest."""
        state = self._state
        if state is self._empty and not self._first.search(text):
            return None
        width, first, end = 0, None, 0
        for char in text:
            state = state.longer.get(char) or self._after(state, char)
            width += not FIRST_MARK <= ord(char) < FIRST_MARK + MOST_MARKS
            if state.found is not None and (first is None or width - state.found < first):
                first, end = width - state.found, width
        self._state = state
        return None if first is None else Found(width - first, width - end)

    def would_find(self, text: str) -> bool:
        """Whether a stop string would end in this delta, if it came next."""
        state = self._state
        found = self.add(text)
        self._state = state
        return found is not None

    def _after(self, state: _Beginning, char: str) -> _Beginning:
        """The longest beginning that the text ends with after one more character."""
        made: list[_Beginning] = []
        while True:
            if char not in state.longer:
                state.longer[char] = longer = self._lengthened(state, char)
                made += [] if longer is None else [longer]
            elif (known := state.longer[char]) is not None:
                last = known
                break
            if state.shorter is None:
                last = state
                break
            state = state.shorter
        for longer in reversed(made):
            longer.shorter = last
            if longer.found is None:
                longer.found = last.found
            last = longer
        return last

    def _lengthened(self, state: _Beginning, char: str) -> _Beginning | None:
        length = state.length
        low = bisect_left(self._stops, char, state.low, state.high, key=lambda stop: stop[length : length + 1])
        high = bisect_right(self._stops, char, low, state.high, key=lambda stop: stop[length : length + 1])
        if low == high:
            return None
        longer = _Beginning(low, high, length + 1, state.width + (not has_marks(char)))
        if len(self._stops[low]) == longer.length:
            longer.found = longer.width
        return longer
