"""Finds stop strings in a text that comes bit by bit. Knows nothing of tokens: special tokens come as marks."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import NamedTuple

FIRST_MARK = 0xD800
MAX_MARKS = 0x800
"""Lone surrogates, which no text that is valid Unicode has, so they can stand for what is not text."""

MARKS = re.compile(f"[{chr(FIRST_MARK)}-{chr(FIRST_MARK + MAX_MARKS - 1)}]")


def mark(number: int) -> str:
    """A character that no text has, `number` being below MAX_MARKS. It takes no place in the text."""
    return chr(FIRST_MARK + number)


def has_marks(text: str) -> bool:
    return MARKS.search(text) is not None


def first_characters(stops: Iterable[str]) -> re.Pattern[str]:
    """Matches the characters with which these begin; there is at least one, and none is empty."""
    return re.compile("[" + "".join(re.escape(char) for char in {stop[0] for stop in stops}) + "]")


class _State:
    """A state of the automaton: the prefix of `length` characters that the sorted stop strings [low, high) share."""

    __slots__ = ("children", "failure", "found", "high", "length", "low", "width")

    def __init__(self, low: int, high: int, length: int, width: int) -> None:
        self.low, self.high, self.length = low, high, length
        self.width = width
        """Characters of the prefix, marks not counted."""
        self.children: dict[str, _State | None] = {}
        """Prefixes that are one character longer, None where there is none, as far as they have been looked up."""
        self.failure: _State | None = None
        """The failure link: the longest shorter prefix that is a suffix of this one; None for the empty one."""
        self.found: int | None = None
        """Width of the longest stop string that is a suffix of this prefix, None if there is none."""


class Found(NamedTuple):
    """Where a stop string is: how many characters came since it began, and since it ended."""

    since_begin: int
    since_end: int


class StopFinder:
    """Looks for stop strings in a growing text; the work per character depends neither on their number nor length.

    It is the automaton of Aho and Corasick ("Efficient string matching", 1975); a state is made when the text first
    reaches it.

    Attributes:
        num_held: characters at the end of the text that may be the prefix of a stop string.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = sorted(set(stops))
        self._root = self._state = _State(0, len(self._stops), 0, 0)
        self._first = first_characters(self._stops)

    @property
    def num_held(self) -> int:
        return self._state.width

    @property
    def is_at_rest(self) -> bool:
        """Whether the text so far does not end with the beginning of a stop string."""
        return self._state is self._root

    def reset(self) -> None:
        """Forgets the text so far: no stop string may begin in it."""
        self._state = self._root

    def add(self, text: str) -> Found | None:
        """Takes the next delta. If stop strings end in it: the one that began first, of several the shortest."""
        state = self._state
        if state is self._root and not self._first.search(text):
            return None
        width, first, end = 0, None, 0
        for char in text:
            state = state.children.get(char) or self._after(state, char)
            width += not FIRST_MARK <= ord(char) < FIRST_MARK + MAX_MARKS
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

    def _after(self, state: _State, char: str) -> _State:
        """The state after one more character: the longest prefix that the text then ends with."""
        made: list[_State] = []
        while True:
            if char not in state.children:
                state.children[char] = child = self._make_child(state, char)
                made += [] if child is None else [child]
            elif (known := state.children[char]) is not None:
                last = known
                break
            if state.failure is None:
                last = state
                break
            state = state.failure
        for child in reversed(made):
            child.failure = last
            if child.found is None:
                child.found = last.found
            last = child
        return last

    def _make_child(self, state: _State, char: str) -> _State | None:
        length = state.length
        low = bisect_left(self._stops, char, state.low, state.high, key=lambda stop: stop[length : length + 1])
        high = bisect_right(self._stops, char, low, state.high, key=lambda stop: stop[length : length + 1])
        if low == high:
            return None
        child = _State(low, high, length + 1, state.width + (not has_marks(char)))
        if len(self._stops[low]) == child.length:
            child.found = child.width
        return child
