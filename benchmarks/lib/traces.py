"""Traces of what a service was asked: files of JSON lines, whose requests are made anew with tokens of our own.

Each line has `timestamp` (ms), `input_length` and `output_length` (tokens), and in some traces `hash_ids`, one for each
512 tokens of the prompt, the last of which may be fewer. Equal ids stand for equal tokens.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lib.loads import Request, full_length, random_prompt

TOKENS_PER_HASH_ID = 512
NUMBERS = ("timestamp", "input_length", "output_length")


@dataclass(frozen=True)
class TraceRow:
    """A request of a trace: when it is due, in seconds since the first one, and its lengths in tokens."""

    due_s: float
    num_input: int
    num_output: int
    hash_ids: tuple[int, ...]
    """Empty if nothing is known of the prompt."""


@dataclass(frozen=True)
class Trace:
    """A part of a trace that an engine can serve, by the time the requests are due."""

    rows: list[TraceRow]
    num_left_out: int
    """Requests of that part whose prompt leaves no room for a token."""
    num_cut: int
    """Requests in `rows` that are asked for fewer tokens than in the trace, for want of room."""

    @property
    def has_hash_ids(self) -> bool:
        """Whether prompts share their beginnings, so that a prefix cache has something to find."""
        return any(row.hash_ids for row in self.rows)

    def requests(self, vocab_size: int, seed: int) -> list[Request]:
        """Prompts of the tokens of their hash ids, in any run the same; of random ones where there are none."""
        rng, known = random.Random(seed), dict[int, list[int]]()
        requests = []
        for row in self.rows:
            for hash_id in row.hash_ids:
                if hash_id not in known:
                    known[hash_id] = tokens_of_hash_id(hash_id, vocab_size)
            prompt = [token for hash_id in row.hash_ids for token in known[hash_id]][: row.num_input]
            prompt = prompt or random_prompt(rng, vocab_size, row.num_input)
            requests.append(Request(row.due_s, prompt, full_length(row.num_output)))
        return requests


def tokens_of_hash_id(hash_id: int, vocab_size: int) -> list[int]:
    """The TOKENS_PER_HASH_ID tokens that a hash id stands for."""
    return random.Random(f"hash id {hash_id}").choices(range(vocab_size), k=TOKENS_PER_HASH_ID)


def read_trace(path: str, longest: int, duration_s: float = math.inf, speed: float = 1.0) -> Trace:
    """Reads the requests of which `longest` tokens have room, as many as are due within `duration_s`.

    They come `speed` times as fast as they once did. Answers are cut to what their prompts leave of `longest`.

    Raises:
        ValueError: a line is not a request; nothing is left to serve.
    """
    rows = [row for row in _rows_of(path, speed) if row.due_s < duration_s]
    fitting = [row for row in rows if row.num_input < longest]
    if not fitting:
        raise ValueError(f"{path}: of {len(rows)} requests in {duration_s:g} s none leaves room in {longest} tokens")
    served = [replace(row, num_output=min(row.num_output, longest - row.num_input)) for row in fitting]
    num_cut = sum(cut != row for cut, row in zip(served, fitting, strict=True))
    return Trace(served, num_left_out=len(rows) - len(fitting), num_cut=num_cut)


def _rows_of(path: str, speed: float) -> list[TraceRow]:
    """All of a file, in the order in which they are due."""
    lines = enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1)
    found = [_checked(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    first_ms = min((line["timestamp"] for line in found), default=0)
    rows = [
        TraceRow(
            (line["timestamp"] - first_ms) / 1e3 / speed,
            line["input_length"],
            line["output_length"],
            tuple(line.get("hash_ids") or ()),
        )
        for line in found
    ]
    return sorted(rows, key=lambda row: row.due_s)


def _checked(text: str, where: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    numbers = [line.get(name) for name in NUMBERS] if isinstance(line, dict) else []
    if not numbers or not all(isinstance(number, (int, float)) for number in numbers):
        raise ValueError(f"{where}: not an object with the numbers {', '.join(NUMBERS)}")
    if min(line["input_length"], line["output_length"]) < 1:
        raise ValueError(f"{where}: input_length and output_length must be at least 1")
    needed, num_ids = -(-line["input_length"] // TOKENS_PER_HASH_ID), len(line.get("hash_ids") or ())
    if num_ids not in (0, needed):
        raise ValueError(f"{where}: {num_ids} hash_ids, but {line['input_length']} tokens take {needed}")
    return line
