"""What ran where and when, as a Chrome trace: a row for each device, for copies, for lanes; a track for each request.

Is told of work that has ended; knows nothing of devices and their clocks. No torch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
from collections import abc
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from nanovllm.engine.scheduling.step import Step
from nanovllm.engine.scheduling.timeline import Span
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import ConfigError, short_repr

logger = logging.getLogger(__name__)

MAX_EVENTS = 1_000_000
"""Events that a trace holds; later ones are left out. Each takes up to 700 bytes until the trace is written."""
MAX_REQUEST_IDS = 32
"""Requests that a span names."""

Moments = tuple[float, float]
"""Begin and end in seconds of `time.perf_counter()`."""


class _RowSpan(NamedTuple):
    row: str
    name: str
    start_s: float
    end_s: float
    args: dict[str, Any]


class _Track(NamedTuple):
    """The track of a request; the last phase is its end."""

    request_id: int
    arrival_s: float
    phases: list[Span]
    args: dict[str, Any]


class Tracer:
    """Collects spans and writes them to a file that ui.perfetto.dev and chrome://tracing open.

    Args:
        path: the file; one that is there is replaced when the trace is written.

    Raises:
        ConfigError: no file can be written there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = _writable(path)
        self._began_s = time.perf_counter()
        self._spans: list[_RowSpan] = []
        self._tracks: list[_Track] = []
        self._num_events = 0
        self._is_full = False

    def add(self, row: str, name: str, start_s: float, end_s: float, **args: Any) -> None:
        """Adds a span to a row, which exists from its first span on.

        Spans of a row do not overlap. Where they do by the few microseconds to which clocks are read, the later one is
        written from the end of the earlier one on.

        Args:
            row: such as `attention lane`.
            name: `args` may stand in it in braces, and are put there when the trace is written.
            start_s, end_s: seconds of `time.perf_counter()`.
            **args: shown with the span; numbers, texts, or tuples of them.
        """
        if self._has_room(1):
            self._spans.append(_RowSpan(row, name, start_s, end_s, args))

    def add_step(self, row: str, step: Step, moments: Moments, *, waited_s: float = 0.0) -> None:
        """Adds a step that has run, and how long it has waited for layers that another card computed."""
        name, args = f"{step.kind} {{requests}} requests", {"requests": step.num_requests}
        if step.chunks:
            name += ", {tokens} tokens"
            args["tokens"] = step.num_prefill_tokens
        if step.decode:
            name += ", mean context {context}"
            args["context"] = round(int(step.decode.positions.sum()) / len(step.decode)) + 1
        if waited_s:
            args["waited_us"] = round(waited_s * 1e6)
        self.add(row, name, *moments, **args, request_ids=_ids(step.seqs))

    def add_handoff(
        self, row: str, seqs: abc.Sequence[Sequence], num_blocks: int, num_bytes: int, moments: Moments
    ) -> None:
        """Adds copies of the KV of one request, or of several whose copies cannot be told apart."""
        whose = f"request {seqs[0].request_id}" if len(seqs) == 1 else f"{len(seqs)} requests"
        name = f"handoff of {whose}, {{blocks}} blocks"
        self.add(row, name, *moments, blocks=num_blocks, bytes=num_bytes, request_ids=_ids(seqs))

    def add_request(self, seq: Sequence) -> None:
        """Adds the track of a request that has ended: its phases since its arrival."""
        phases = list(seq.timeline.spans())
        if self._has_room(len(phases)):
            args = {
                "prompt_tokens": seq.num_prompt_tokens,
                "output_tokens": seq.num_output_tokens,
                "finish_reason": seq.finish_reason,
            }
            self._tracks.append(_Track(seq.request_id, seq.arrival_s, phases, args))

    def write(self) -> None:
        """Writes the file, whole or not at all. Errors are logged, not raised: the caller has more to close."""
        draft = _draft_of(self._path)
        try:
            with draft.open("w") as file:
                self._write_to(file)
            draft.replace(self._path)
            logger.info("trace of %d events in %s: ui.perfetto.dev opens it", self._num_events, self._path)
        except Exception as error:  # noqa: BLE001 - a full disk, say, must not keep an engine from closing
            logger.error("the trace could not be written to %s: %s", self._path, error)
        finally:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)

    def _has_room(self, num_events: int) -> bool:
        """Whether there is room for `num_events` more events, which then count as added. A full trace stays full."""
        if self._is_full:
            return False
        if self._num_events + num_events > MAX_EVENTS:
            self._is_full = True
            logger.warning("the trace is full (%d events): what happens from now on is not in it", MAX_EVENTS)
            return False
        self._num_events += num_events
        return True

    def _write_to(self, file: TextIO) -> None:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        separator = ""
        for event in self._as_json():
            file.write(separator + json.dumps({"pid": 1, **event}))
            separator = ",\n"
        file.write("\n]}\n")

    def _as_json(self) -> abc.Iterator[dict[str, Any]]:
        yield {"ph": "M", "name": "process_name", "tid": 0, "args": {"name": "nanovllm"}}
        rows = {row: number for number, row in enumerate(dict.fromkeys(span.row for span in self._spans), start=1)}
        for row, number in rows.items():
            yield {"ph": "M", "name": "thread_name", "tid": number, "args": {"name": row}}
            yield {"ph": "M", "name": "thread_sort_index", "tid": number, "args": {"sort_index": number}}
        ended_ns = dict.fromkeys(rows, 0)
        for span in sorted(self._spans, key=lambda span: span.start_s):
            start_ns = max(self._ns(span.start_s), ended_ns[span.row])
            ended_ns[span.row] = end_ns = max(self._ns(span.end_s), start_ns)
            yield {
                "ph": "X",
                "name": _one_as_singular(span.name.format_map(span.args)),
                "tid": rows[span.row],
                "ts": start_ns / 1e3,
                "dur": (end_ns - start_ns) / 1e3,
                "args": span.args,
            }
        for track in self._tracks:
            ends_s = track.phases[-1].start_s
            yield self._on_track(track, "b", f"request {track.request_id}", 0.0) | {"args": track.args}
            for phase in track.phases[:-1]:
                yield self._on_track(track, "b", phase.what, phase.start_s)
                yield self._on_track(track, "e", phase.what, ends_s if phase.end_s is None else phase.end_s)
            yield self._on_track(track, "e", f"request {track.request_id}", ends_s)

    def _on_track(self, track: _Track, kind: str, name: str, moment_s: float) -> dict[str, Any]:
        """A begin or end event, `moment_s` seconds after the request's arrival."""
        ts = self._ns(track.arrival_s + moment_s) / 1e3
        return {"ph": kind, "cat": "request", "id": track.request_id, "name": name, "tid": 0, "ts": ts}

    def _ns(self, moment_s: float) -> int:
        """Nanoseconds since the trace began."""
        return round((moment_s - self._began_s) * 1e9)


def _ids(seqs: abc.Sequence[Sequence]) -> tuple[int, ...]:
    # A tuple of ints, since the garbage collector does not track it as it would a list.
    return tuple([seq.request_id for seq in seqs[:MAX_REQUEST_IDS]])


def _one_as_singular(name: str) -> str:
    return re.sub(r"\b1 (request|token|block)s\b", r"1 \1", name)


def _draft_of(path: Path) -> Path:
    """The temporary file that is written first and then renamed."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _writable(path: str | os.PathLike[str]) -> Path:
    """The file that a path names, links followed. Checks that it can be written, and leaves nothing there.

    Raises:
        ConfigError: the file cannot be written, or the path is no file.
    """
    advice = "pass the path of a file in a folder that exists and may be written to"
    try:
        resolved = Path(path).resolve()
        if not resolved.parent.is_dir():
            raise ConfigError(
                f"trace={short_repr(str(path))}: there is no folder {resolved.parent}; make it, or {advice}"
            )
        if resolved.exists() and not resolved.is_file():
            raise ConfigError(f"trace={short_repr(str(path))} is there and is not a file; {advice}")
        if resolved.exists() and not os.access(resolved, os.W_OK):
            raise ConfigError(f"trace={short_repr(str(path))} is a file that may not be written to; {advice}")
        draft = _draft_of(resolved)
        draft.touch()
        draft.unlink()
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"trace={short_repr(str(path))} cannot be written ({error}); {advice}") from error
    return resolved
