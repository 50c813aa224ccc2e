"""The loop: takes requests, launches what the scheduler decides, collects what has ended, gives out tokens."""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from nanovllm.config import EngineConfig
from nanovllm.engine.builder import build_engine
from nanovllm.engine.callers import Call, Inbox, Turns
from nanovllm.engine.in_flight import Handoff, InFlight
from nanovllm.engine.model_runner import ModelRunner, SampledOnHost, StepHandle
from nanovllm.engine.observability.observer import MOST_TIMELINES, Observer
from nanovllm.engine.observability.step_report import StepListener, StepListeners
from nanovllm.engine.observability.trace import Tracer
from nanovllm.engine.requests import Prompt
from nanovllm.engine.scheduler import PrefillStep, Step
from nanovllm.engine.scheduling.decode_batch import DecodeStep
from nanovllm.engine.scheduling.timeline import Timeline
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.engine.text.request_text import NoText, RequestText
from nanovllm.errors import (
    DeviceError,
    EngineClosedError,
    HandoffError,
    HandoffTimeout,
    NonFiniteLogitsError,
    UnknownRequestError,
    WorkerError,
    shown,
)
from nanovllm.outputs import FinishReason, RequestOutput, TokenLogprobs
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.device import never_free

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

DECODE_STEPS_AHEAD = 2
"""Decode steps in flight: one that runs and one queued behind it, launched before the first one's tokens are seen."""

PREFILL_STEPS_AHEAD = 2
"""Prefill steps in flight on a device of their own, for the same reason. Where decode steps wait for them it is one."""


TURNS_PER_SWEEP = 64
"""After so many turns of the loop the engine looks for requests whose callers are gone without a word."""


@dataclass(frozen=True)
class NewRequest:
    """A request that the loop has not taken in yet."""

    seq: Sequence
    text: RequestText
    inbox: Inbox


@dataclass(frozen=True)
class Abort:
    """A request to end where it is; nobody is told of its end if nobody knows of it."""

    seq: Sequence
    is_known: bool


class LLMEngine:
    """Serves requests one `step()` at a time.

    Every public method may be called from any thread. One call at a time runs the loop, for the requests of all of
    them; the others wait for their outputs. Those that do not wait (`add_request`, `abort`, `close`) may be called from
    a signal handler, too. An exception that a signal handler raises, such as KeyboardInterrupt, ends the call that it
    strikes and the requests of that call; others go on, except that a streamed request which was just being given a
    token may end with `finish_reason="abort"`.

    Args:
        model: folder of a Hugging Face checkpoint.
        **options: see `EngineConfig`.

    Raises:
        ConfigError: an option is unknown, out of range or cannot be honoured.
        ModelLoadError: the checkpoint cannot be served.
        BackendUnavailableError: the attention backend that was asked for cannot serve.
        OutOfKVCacheError: the KV pool does not fit.
        WorkerError: one of several ranks did not start.
    """

    # Until it is made there is nothing to close.
    _closed = _is_torn_down = True

    def __init__(self, model: str | os.PathLike[str], **options: Any) -> None:
        path = os.fspath(model) if isinstance(model, os.PathLike) else model
        self.config = EngineConfig.from_options(path, options)
        tracer = None if self.config.trace is None else Tracer(self.config.trace)
        parts = build_engine(self.config)
        self.tokenizer = parts.tokenizer
        self.prefill_runner = parts.prefill_runner
        self.decode_runner = parts.decode_runner
        self.kv_transfer = parts.kv_transfer
        self.scheduler = parts.scheduler
        self._observer = Observer(parts, tracer, verifies_handoffs=self.config.verify_kv_handoff)
        self.counters = self._observer.counters
        self._step_listeners = StepListeners()
        self._intake = parts.intake
        self._request_ids = itertools.count()
        self._turns = Turns()
        # Posted by any call, at any moment; taken in by the loop.
        self._arrived: deque[NewRequest] = deque()
        self._to_abort: deque[Abort] = deque()
        self._closed_inboxes: deque[Inbox] = deque()
        # The loop's own.
        self._sequences: dict[int, Sequence] = {}
        self._texts: dict[int, RequestText] = {}
        self._inboxes: dict[int, Inbox] = {}
        self._in_flight: list[InFlight] = []
        self._handoffs: list[Handoff] = []
        self._handing_off: list[Sequence] = []
        self._is_whole = True
        """Whether the last turn of the loop ran to its end, or what broke it off has been mended."""
        self._turns_until_sweep = TURNS_PER_SWEEP
        self._inbox = Inbox()
        """Outputs of requests of `add_request`, for `step`."""
        self._last_progress_s = time.perf_counter()
        self._last_end_s: dict[ModelRunner, float] = {}
        """When a step of a runner was last seen to have ended."""
        self._device_error: DeviceError | WorkerError | None = None
        """Why nothing runs any more."""
        self._gap_start_s: float | None = None
        """When the last decode step ended, if another one was queued right behind it."""
        self._is_torn_down = False
        self._closed = False
        if self.config.tensor_parallel_size > 1:
            atexit.register(_close, weakref.ref(self))  # while graphs and collectives can still be given back in order

    def __del__(self) -> None:
        # The other ranks are not left behind by an engine that nobody has closed.
        if not self._is_torn_down and self.config.tensor_parallel_size > 1:
            self.close()

    # Requests

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> int:
        """Queues a prompt, text or token ids, and returns the id that `step()` will name it by.

        Raises:
            RequestError: the prompt or a parameter is refused; nothing was queued.
            DeviceError: a GPU was lost; a new process is needed.
            WorkerError: another rank was; the same.
            EngineClosedError: the engine was closed.
        """
        self._check_open()
        token_ids = self._intake.checked_prompt(prompt)
        return self._submit(token_ids, self._intake.checked_params(sampling_params), self._inbox, streamed=True)

    def abort(self, request_id: int) -> None:
        """Ends a request where it is; its last output, with `finish_reason="abort"`, comes from the next `step()`.

        Raises:
            UnknownRequestError: no unfinished request has this id.
            EngineClosedError: the engine was closed.
        """
        self._check_open()
        seq = self._find(request_id)
        if seq is None or seq.is_finished or any(abort.seq is seq for abort in list(self._to_abort)):
            raise UnknownRequestError(
                f"request {shown(request_id)} is not known or has ended; abort takes a running one"
            )
        self._to_abort.append(Abort(seq, is_known=True))
        self._read_posts()

    def is_finished(self) -> bool:
        """Whether no request is left to serve and no output to give out."""
        if self._is_torn_down:
            return True
        self._turns_until_sweep = 0
        self._read_posts()
        return not (self._inbox or self._arrived or self._sequences)

    def step(self) -> list[RequestOutput]:
        """Launches what can be launched and returns what has completed since the last call, perhaps nothing.

        Waits for a device only when there was nothing to launch. While another thread runs the loop, in `generate`
        say, waits a moment for what comes of it.

        Raises:
            EngineClosedError: the engine was closed.
            EngineBusyError: called from within another call on the same thread, such as from a signal handler.
        """
        self._check_open()
        call, outputs = Call(), list[RequestOutput]()
        try:
            with call.on_stack:
                self._run_or_wait(call, self._inbox)
                self._inbox.take_all(outputs)
            return outputs
        except BaseException:
            self._inbox.put_back(outputs)
            raise

    def explain(self, request_id: int) -> Timeline:
        """What a request waits or has waited for; `str` of it is a table. The last MOST_TIMELINES that ended are kept.

        Raises:
            UnknownRequestError: no request has this id, or it ended long ago.
        """
        seq = self._find(request_id)
        timeline = None if seq is None else seq.timeline
        if timeline is None and _is_request_id(request_id):
            timeline = self._observer.timeline(request_id)
        if timeline is None:
            raise UnknownRequestError(
                f"request {shown(request_id)} is not known, or ended before the last {MOST_TIMELINES} that did"
            )
        return timeline

    def metrics(self) -> dict[str, Any]:
        """What the engine is doing and has done since it was made; waits for nothing.

        Times are histograms (`count`, `sum`, `buckets` of (bound, values at or below it)) in seconds: `ttft_s` from
        arrival to the first token, `itl_s` of every gap between two tokens of a request, `tpot_s` of a request's mean
        gap, `latency_s` from arrival to the end, `handoff_s` from the end of a prefill step until its KV has
        arrived. `predicted_itl_s` is what a decode step will take with all requests that are under way, None without
        `itl_target_ms`, or if unknown. `stage_s` is how long attention and FFN kept their lanes busy in the last decode
        step on lanes that was timed, None if there was none, and `pipeline_split` the SMs of the current split, None of
        plain decode. `fallbacks` counts falls back to something slower by cause, `recoveries` returns from them.

        Raises:
            EngineClosedError: the engine was closed.
        """
        self._check_open()
        return self._observer.metrics()

    def add_step_listener(self, listener: StepListener) -> None:
        """Has `listener` called with a `StepReport` for every step from now on, soon after it has ended.

        That is in the thread of whichever call runs the loop, between two of its turns. An exception of the listener
        comes out of that call (`step`, `generate`, ...) and harms no other request. From within, `add_request`, `abort`
        and `close` may be called.

        Raises:
            ConfigError: it is not callable.
            EngineClosedError: the engine was closed.
        """
        self._check_open()
        self._step_listeners.add(listener)

    def remove_step_listener(self, listener: StepListener) -> None:
        """Undoes one `add_step_listener`.

        Raises:
            ConfigError: it is not a step listener of this engine.
        """
        self._step_listeners.remove(listener)

    def close(self) -> None:
        """Ends everything, waits for the devices, writes the trace, gives memory back. A second call does nothing.

        Calls that other threads are in end with EngineClosedError, at once. From a signal handler that broke into a
        call of the same engine it returns before that call has ended so, which does the rest.
        """
        self._closed = True
        if self._is_torn_down:
            return
        self._turns.wake_all()
        call = Call()
        with call.on_stack:
            while not self._turns.take(call):
                if self._turns.is_on_this_stack():
                    return
                time.sleep(1e-3)
            try:
                self._tear_down()
            finally:
                self._turns.end()

    def _tear_down(self) -> None:
        """Closes what the engine is made of; after an interrupt, once more."""
        if self._is_torn_down:
            return
        unfinished = list(self._sequences.values())
        try:
            self._close_parts()
        finally:
            self._observer.close(unfinished)
        self._is_torn_down = True

    def _close_parts(self) -> None:
        try:
            if self._device_error is None:
                self._settle()
        finally:
            self.decode_runner.close_followers()
        unfinished = [seq for seq in self._sequences.values() if not seq.is_finished]
        self.scheduler.start_over(unfinished, ())  # whatever state an interrupt left
        for seq in unfinished:
            self.scheduler.finish(seq, "abort")
        # On a lost GPU every call fails, or waits for ever: what it holds goes with the process.
        runners = {self.prefill_runner, self.decode_runner} if self._device_error is None else set()
        self._observer.dropped(self._in_flight, self._handoffs)
        for posted in (self._arrived, self._to_abort, self._closed_inboxes):
            posted.clear()
        for kept in (self._sequences, self._texts, self._inboxes, self._in_flight, self._handoffs, self._handing_off):
            kept.clear()
        self._inbox = Inbox()
        for runner in runners:
            runner.close()

    def _settle(self) -> None:
        """Waits for the devices, and gives up those that are lost."""
        try:
            for runner in {self.prefill_runner, self.decode_runner}:
                runner.synchronize()
            self.decode_runner.take_lane_times()
        except Exception as error:
            lost = self._lost_device(error)
            if lost is None:
                raise
            logger.error("%s", lost)
            self._give_up_devices(lost)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("this engine was closed; make a new one")

    def _find(self, request_id: int) -> Sequence | None:
        """The unfinished request of this id, None if there is none."""
        if not _is_request_id(request_id):
            return None
        # In this order: the loop lists a request before it takes it from those that have arrived.
        arrived = [new.seq for new in list(self._arrived) if new.seq.request_id == request_id]
        return arrived[0] if arrived else self._sequences.get(request_id)

    def _submit(self, token_ids: list[int], params: SamplingParams, inbox: Inbox, *, streamed: bool) -> int:
        """Queues a checked request and has the loop take it in, if nobody runs it."""
        new = self._new_request(token_ids, params, inbox, streamed=streamed)
        try:
            self._arrived.append(new)
            self._read_posts()
            return new.seq.request_id
        except BaseException:
            self._to_abort.append(Abort(new.seq, is_known=False))  # its id is lost
            raise

    def _new_request(self, token_ids: list[int], params: SamplingParams, inbox: Inbox, *, streamed: bool) -> NewRequest:
        self._check_open()
        if self._device_error is not None:
            raise type(self._device_error)(f"{self._device_error}; start a new process") from self._device_error
        seq, text = self._intake.make(next(self._request_ids), token_ids, params, streamed=streamed)
        return NewRequest(seq, text, inbox)

    def _abandon(self, inbox: Inbox) -> None:
        """Ends what is still running of the inbox's requests: nobody waits for their outputs any more."""
        inbox.is_closed = True
        self._closed_inboxes.append(inbox)
        inbox.ring()
        self._read_posts()

    # Whose turn it is

    def _await_output(self, call: Call, inbox: Inbox) -> None:
        """Runs the loop, or waits while another call does, until the inbox has an output or is closed."""
        self._check_open()
        try:
            while not (inbox or inbox.is_closed):
                self._run_or_wait(call, inbox)
        finally:
            self._turns.wake_all()

    def _run_or_wait(self, call: Call, inbox: Inbox) -> None:
        """Runs one turn of the loop; waits for something in the inbox if another call has the turn."""
        self._check_open()
        if not self._turns.take(call):
            self._turns.wait(inbox)
            self._check_open()
            return
        try:
            self._advance()
        finally:
            self._turns.end()
            if self._closed:
                self.close()  # from within this turn, by a signal handler, it could not be
        self._check_open()

    def _read_posts(self) -> None:
        """Takes in what calls have posted, unless somebody has the turn, who will."""
        call = Call()
        with call.on_stack:
            if not self._closed and self._turns.take(call):
                try:
                    self._make_whole_after(self._take_in_posts)
                finally:
                    self._turns.end()

    def _take_in_posts(self) -> None:
        """New requests, aborts, and requests that nobody waits for any more."""
        # Those that are there now: what they are about has arrived before.
        num_aborts, num_inboxes = len(self._to_abort), len(self._closed_inboxes)
        while self._arrived:
            self._list(self._arrived[0])
            self.scheduler.add(self._arrived[0].seq)
            self._arrived.popleft()
        for _ in range(num_aborts):
            self._take_in_abort(self._to_abort[0])
            self._to_abort.popleft()
        for _ in range(num_inboxes):
            self._give_up_requests_of(self._closed_inboxes[0])
            self._closed_inboxes.popleft()
        self._turns_until_sweep -= 1
        if self._turns_until_sweep <= 0:
            self._turns_until_sweep = TURNS_PER_SWEEP
            for inbox in set(self._inboxes.values()):
                if inbox.is_abandoned:
                    self._give_up_requests_of(inbox)

    def _list(self, new: NewRequest) -> None:
        """Makes a request one of the engine's. It is gone from those that have arrived only after that."""
        request_id = new.seq.request_id
        self._texts[request_id], self._inboxes[request_id] = new.text, new.inbox
        new.inbox.request_ids.add(request_id)
        self._sequences[request_id] = new.seq

    def _take_in_abort(self, abort: Abort) -> None:
        seq = abort.seq
        if seq.request_id not in self._sequences or seq.is_finished:
            return
        if not abort.is_known:
            self._inboxes[seq.request_id] = Inbox()
        self._finish(seq, "abort")

    def _give_up_requests_of(self, inbox: Inbox) -> None:
        for request_id in sorted(inbox.request_ids):
            seq = self._sequences.get(request_id)
            if seq is not None and not seq.is_finished:
                self._finish(seq, "abort")

    # The loop

    def _advance(self) -> None:
        """One turn: launch what can be launched, else wait; then collect what has ended, and tell of it."""
        self._make_whole_after(self._run_turn)
        self._step_listeners.tell()

    def _run_turn(self) -> None:
        self._take_in_posts()
        if self._launch_steps():
            self._progressed()
        else:
            self._step_listeners.time_wait(self._wait)
        self._collect_steps()
        self._collect_handoffs()
        self._check_steps_end()
        self._observer.look_at_outage()
        for seq in self.scheduler.get_failed_sequences():
            self._give_out(seq)

    def _make_whole_after(self, work: Callable[[], None]) -> None:
        """Does what changes the state of requests; if that is broken off, mends it, and all end if a device is lost."""
        try:
            self._make_whole()
            self._is_whole = False
            work()
            self._is_whole = True
        except EngineClosedError:
            raise  # `close` mends nothing
        except BaseException as error:
            lost = self._lost_device(error)
            if lost is not None:
                self._end_all(lost)
                return
            try:
                self._make_whole()
            except (DeviceError, WorkerError) as lost_meanwhile:
                self._end_all(lost_meanwhile)
            raise

    def _make_whole(self) -> None:
        """Mends what an interrupted call has left undone; if that is interrupted, too, the next turn does it."""
        if self._is_whole:
            return
        if self._device_error is None:
            self._recover()
        else:
            self._end_all(self._device_error)

    def _lost_device(self, error: BaseException) -> DeviceError | WorkerError | None:
        """What an error of work on the devices means if one of them will never run anything again."""
        if isinstance(error, (DeviceError, WorkerError)):
            return error
        if not isinstance(error, Exception):
            return None
        for runner in dict.fromkeys((self.prefill_runner, self.decode_runner)):
            reason = runner.device.lost_reason()
            if reason is not None:
                return DeviceError(f"{runner.device} is lost: {reason}")
        return None

    def _raise_if_lost(self, error: Exception) -> None:
        lost = self._lost_device(error)
        if lost is not None:
            raise lost from error

    def _end_all(self, error: DeviceError | WorkerError) -> None:
        """Nothing will run any more: every request ends with the error."""
        self._is_whole = False
        logger.error("%s; all requests end", error)
        self._give_up_devices(error)
        self._list_arrived()
        unfinished = [seq for seq in self._sequences.values() if not seq.is_finished]
        self.scheduler.start_over(unfinished, ())
        for seq in unfinished:
            self.scheduler.finish(seq, "error", error)
        for seq in list(self._sequences.values()):
            if not self._was_given_out(seq):
                self._give_out(seq)
        self._is_whole = True

    def _give_up_devices(self, error: DeviceError | WorkerError) -> None:
        self._device_error = error
        never_free(self.prefill_runner, self.decode_runner, self.kv_transfer, self._in_flight, self._handoffs)
        self._in_flight, self._handoffs, self._handing_off = [], [], []

    def _check_steps_end(self) -> None:
        """Raises DeviceError if the first step on a device has had its time, WorkerError if a rank is gone."""
        self.decode_runner.check_followers()
        now, first_of = time.perf_counter(), set()
        for work in self._in_flight:
            if work.runner in first_of:
                continue
            first_of.add(work.runner)
            began_s = max(work.launched_s, self._last_end_s.get(work.runner, 0.0))
            if now - began_s > self.config.step_timeout_s and not work.handle.is_done():
                late = DeviceError(
                    f"{work.runner.device} is lost: a {work.kind} step of {len(work.step.rows)} requests has not ended "
                    f"within step_timeout_s={self.config.step_timeout_s}"
                )
                raise work.runner.blame(late)

    def _recover(self) -> None:
        """After an interrupt, or an error that is nobody's: whatever was under way is recomputed.

        A request that was just being given a token may have it half shown; it is aborted.
        """
        # Copies behind one that does not end may still write to their blocks.
        is_stuck = any(handoff.timed_out for handoff in self._handoffs)
        for runner in {self.prefill_runner, self.decode_runner}:
            runner.synchronize(copies=not is_stuck)
            runner.forget_decode_rows()
        self._observer.dropped(self._in_flight, [] if is_stuck else self._handoffs)
        self._handoffs = self._handoffs if is_stuck else []
        for handoff in self._handoffs:
            handoff.timed_out = handoff.lease.stuck = True
        self._in_flight.clear()
        self._handing_off.clear()
        self._gap_start_s = None
        self._list_arrived()
        unfinished = [seq for seq in self._sequences.values() if not seq.is_finished]
        self.scheduler.start_over(unfinished, [handoff.lease for handoff in self._handoffs])
        for seq in list(self._sequences.values()):
            if self._was_given_out(seq):
                continue
            half_shown = seq.is_streamed and seq.num_shown_tokens != seq.num_tokens
            if not seq.is_finished and (half_shown or (seq.num_output_tokens and not seq.is_streamed)):
                # Its last token may be half taken in. Unless it is aborted, that is sampled again, and is the same.
                seq.token_ids.pop()
                del seq.logprobs[seq.num_output_tokens :]
            if seq.is_finished or half_shown:
                if seq.is_streamed:
                    # A piece of its text may be lost.
                    self._texts[seq.request_id] = NoText()
                if not seq.is_finished:
                    self.scheduler.finish(seq, "abort")
                elif seq.is_streamed and seq.error is None:
                    seq.finish_reason = "abort"
                self._give_out(seq)
        self._is_whole = True

    def _list_arrived(self) -> None:
        while self._arrived:
            self._list(self._arrived[0])
            self._arrived.popleft()

    def _was_given_out(self, seq: Sequence) -> bool:
        """Whether what was being given out of a request has reached its inbox; then that is noted."""
        output = seq.output
        if output is None or not self._inboxes[seq.request_id].has_got(output):
            return False
        self._given_out(seq)
        return True

    def _launch_steps(self) -> bool:
        launched = False
        # The decode device first, which prefills as well: what has failed once, or, with one device, everything.
        for runner in dict.fromkeys((self.decode_runner, self.prefill_runner)):
            launched = self._launch_prefill(runner) or launched
            if runner is self.decode_runner:
                launched = self._launch_decode() or launched
        return launched

    def _launch_prefill(self, runner: ModelRunner) -> bool:
        decodes = runner is self.decode_runner
        if self._num_in_flight(runner, PrefillStep) >= (1 if decodes else PREFILL_STEPS_AHEAD):
            return False
        step = self.scheduler.schedule_prefill(self.scheduler.decode_pool if decodes else self.scheduler.prefill_pool)
        return step is not None and self._launch(runner, step)

    def _launch_decode(self) -> bool:
        if self._num_in_flight(self.decode_runner, DecodeStep) >= DECODE_STEPS_AHEAD:
            return False
        step = self.scheduler.schedule_decode()
        return step is not None and self._launch(self.decode_runner, step)

    def _num_in_flight(self, runner: ModelRunner, kind: type) -> int:
        return sum(work.runner is runner and isinstance(work.step, kind) for work in self._in_flight)

    def _launch(self, runner: ModelRunner, step: Step) -> bool:
        """Launches a step. If that fails, its halves, until the request that makes it fail stands alone."""
        error = None
        try:
            handle = runner.launch(step)
        except Exception as raised:  # noqa: BLE001 - whatever a forward pass raises ends one request, not the engine
            # The frames hold the failed step's tensors, which would stay alive with the error.
            traceback.clear_frames(raised.__traceback__)
            self._raise_if_lost(raised)
            error = raised
        if error is None:
            self._in_flight.append(InFlight(runner, step, handle, time.perf_counter()))
            if isinstance(step, PrefillStep):
                self._observer.step_launched(runner, step)
                self._send(step, handle)
            return True
        # What the step had launched before it failed may still be writing to its blocks, and to the decode rows: they
        # are sent anew, once the host has the tokens of the steps before.
        runner.synchronize(copies=not any(handoff.timed_out for handoff in self._handoffs))
        if isinstance(step, DecodeStep):
            for work in [work for work in self._in_flight if work.runner is runner]:
                self._collect(work)
            runner.forget_decode_rows()
        halves = self.scheduler.split(step)
        if halves is not None:
            launched = [self._launch(runner, half) for half in halves]
            return any(launched)
        row = step.rows[0]
        self.scheduler.cancel(step)
        if row.seq.lease is row.lease:
            self._fail(row.seq, error)
        return False

    def _fail(self, seq: Sequence, error: Exception) -> None:
        retry = seq.failures == 0
        logger.warning("request %d failed (%s); %s", seq.request_id, error, "retrying" if retry else "giving up")
        self.scheduler.fail(seq, error)
        self._observer.look_at_outage()
        self._progressed()

    def _progressed(self) -> None:
        self._last_progress_s = time.perf_counter()

    def _wait(self) -> None:
        """Until a step or a handoff has ended, or a handoff's time is up."""
        handoffs = [handoff for handoff in self._handoffs if not handoff.timed_out]
        if not self._in_flight and not handoffs:
            self._give_up_on_stuck_blocks()
            return
        while not (
            self._arrived
            or any(work.handle.is_done() for work in self._in_flight)
            or any(handoff.handle.is_done() or time.perf_counter() > handoff.deadline_s for handoff in handoffs)
        ):
            self._check_open()
            self._check_steps_end()
            time.sleep(0)

    def _collect_steps(self) -> None:
        for work in self._ended_steps():
            self._collect(work)

    def _collect(self, work: InFlight) -> None:
        sampled = work.handle.collect()
        work.runner.check_followers()  # a step that waited for a rank that is gone was ended, with anything in it
        self._in_flight.remove(work)
        self._last_end_s[work.runner] = time.perf_counter()
        self._observer.step_ended(work)
        self._step_listeners.step_ended(work, self._last_end_s[work.runner])
        self._progressed()
        if isinstance(work.step, PrefillStep):
            self._prefill_ended(work.step, sampled)
        else:
            self._decode_ended(work.step, sampled)

    def _ended_steps(self) -> list[InFlight]:
        """Steps that have ended, in the order of their launch on each runner."""
        ended, running = [], set()
        for work in self._in_flight:
            if work.runner not in running and work.handle.is_done():
                ended.append(work)
            else:
                running.add(work.runner)
        return ended

    def _prefill_ended(self, step: PrefillStep, sampled: SampledOnHost) -> None:
        self.counters.prefill_steps += 1
        self.counters.prefill_tokens += step.num_tokens
        counting = [(chunk, self.scheduler.prefill_done(chunk)) for chunk in step.rows]
        last = [(chunk.seq, counts) for chunk, counts in counting if chunk.is_last]
        assert len(last) == len(sampled.token_ids), "a token for each request whose prompt is complete"
        for place, (seq, counts) in enumerate(last):
            if counts:
                self._observer.times.got_token(seq)
                self._append(seq, int(sampled.token_ids[place]), sampled.logprobs_of(place))
        self._handing_off += self.scheduler.get_prefilled_sequences()
        for handoff in self._handoffs:
            if handoff.step is step:
                handoff.computed_s = time.perf_counter()
                handoff.deadline_s = handoff.computed_s + self.config.handoff_timeout_s

    def _decode_ended(self, step: DecodeStep, sampled: SampledOnHost) -> None:
        self.counters.decode_steps += 1
        self.counters.decode_tokens += len(step.batch) - len(step.ended_leases)
        self.scheduler.decode_done(step)
        if self.config.itl_target_ms is not None:
            self._observe_gap(step)
        batch, token_ids = step.batch, sampled.token_ids.tolist()
        is_notable = step.notable(sampled.token_ids, self.scheduler.decode_pool.block_size)
        counts = np.ones(len(batch), dtype=bool)
        if step.ended_leases:
            counts[:] = [seq.lease is lease for seq, lease in zip(batch.seqs, batch.leases, strict=True)]
        self._observer.times.got_tokens(batch.token_time_places[counts])
        # For every token of every request: no Python.
        is_plain = (counts & ~is_notable).tolist()
        appended = map(
            list.append, itertools.compress(batch.token_lists, is_plain), itertools.compress(token_ids, is_plain)
        )
        deque(appended, maxlen=0)
        for place in (counts & is_notable).nonzero()[0].tolist():
            self._append(batch.seqs[place], token_ids[place], sampled.logprobs_of(place))

    def _observe_gap(self, step: DecodeStep) -> None:
        """Tells the admission policy what it took, if the decode device did nothing else since the step before."""
        now = time.perf_counter()
        if self._gap_start_s is not None:
            self.scheduler.admission.observe(len(step.batch), step.num_tokens, now - self._gap_start_s)
        following = next((work.step for work in self._in_flight if work.runner is self.decode_runner), None)
        self._gap_start_s = now if isinstance(following, DecodeStep) else None

    # Handoffs

    def _send(self, step: PrefillStep, handle: StepHandle) -> None:
        """Hands over the blocks that a prefill step completes; copies wait for the step on the device."""
        for chunk in step.rows:
            if not chunk.handoff:
                continue
            self.scheduler.hold(chunk.lease)
            try:
                transfer = self.kv_transfer.send(chunk.handoff, handle.event)
            except Exception as error:  # noqa: BLE001 - a copy that cannot be launched fails its request alone
                self._raise_if_lost(error)
                self.scheduler.release(chunk.lease)
                self._fail(chunk.seq, HandoffError(f"{self._observer.about_handoff(chunk.seq)}: {error}"))
                continue
            self._handoffs.append(Handoff(chunk.seq, chunk.lease, chunk.handoff, transfer, step))
            self._observer.handoff_sent(chunk.seq, chunk.handoff)

    def _collect_handoffs(self) -> None:
        for handoff in list(self._handoffs):
            if handoff.handle.is_done():
                self._handoffs.remove(handoff)
                self._handoff_ended(handoff)
                self._progressed()
            elif time.perf_counter() > handoff.deadline_s and not handoff.timed_out:
                handoff.timed_out = handoff.lease.stuck = True
                if handoff.seq.lease is handoff.lease:
                    self._fail(handoff.seq, HandoffTimeout(self._timeout_message(handoff)))
        arriving, self._handing_off = self._handing_off, []
        for seq in arriving:
            if seq.status is SequenceStatus.HANDING_OFF and seq.lease is not None:
                if seq.lease.in_flight:
                    self._handing_off.append(seq)
                else:
                    self.scheduler.handoff_done(seq)

    def _handoff_ended(self, handoff: Handoff) -> None:
        error = None
        try:
            handoff.handle.wait()
        except Exception as raised:  # noqa: BLE001 - whatever went wrong on the way fails this request alone
            self._raise_if_lost(raised)
            error = HandoffError(f"{self._observer.about_handoff(handoff.seq)}: {raised}")
        self._observer.handoff_ended(handoff, arrived=error is None)
        if error is None:
            self.scheduler.blocks_arrived(handoff.lease)
        else:
            self.scheduler.release(handoff.lease)
            if handoff.seq.lease is handoff.lease:
                self._fail(handoff.seq, error)

    def _timeout_message(self, handoff: Handoff) -> str:
        pools = (self.scheduler.prefill_pool, self.scheduler.decode_pool)
        prefill_state, decode_state = (f"{pool.num_held_blocks} of {pool.num_blocks} blocks held" for pool in pools)
        return (
            f"{self._observer.about_handoff(handoff.seq)}: {len(handoff.pairs)} blocks, from {handoff.pairs[0][0]} to "
            f"{handoff.pairs[0][1]} on, have not arrived within handoff_timeout_s={self.config.handoff_timeout_s}; "
            f"prefill pool: {prefill_state}; decode pool: {decode_state}; handoffs under way: {len(self._handoffs)}; "
            f"steps in flight: {len(self._in_flight)}. The blocks stay held until the copy ends"
        )

    def _give_up_on_stuck_blocks(self) -> None:
        """Nothing runs: if nothing has for `handoff_timeout_s`, the oldest request waits for blocks of a stuck copy."""
        time.sleep(1e-3)
        waiting = self.scheduler.unfinished()
        if not waiting or time.perf_counter() - self._last_progress_s < self.config.handoff_timeout_s:
            return
        assert self._handoffs, f"request {waiting[0].request_id} waits for nothing that will ever happen"
        message = f"request {waiting[0].request_id} waits for blocks that a handoff without end holds"
        self.scheduler.give_up(waiting[0], HandoffTimeout(f"{message}: {self._timeout_message(self._handoffs[0])}"))
        self._progressed()

    # Tokens

    def _append(self, seq: Sequence, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """Gives a request its next token and ends it if that was the last."""
        if token_id < 0:
            self._end_without_token(seq)
            return
        seq.token_ids.append(token_id)
        if logprobs is not None and seq.params.logprobs is not None:
            seq.logprobs.append(logprobs.first(seq.params.logprobs))
        self.scheduler.token_appended(seq)
        if seq.first_token_s is None:
            seq.first_token_s = time.perf_counter()
        is_stop_token = token_id in seq.stop_token_ids
        text = self._texts[seq.request_id]
        may_stop = seq.num_output_tokens >= seq.params.min_tokens
        try:
            piece = text.add_stop_token(token_id) if is_stop_token else text.add([token_id], may_stop=may_stop)
        except Exception as error:  # noqa: BLE001 - whatever a tokenizer raises ends one request, not the engine
            self._text_failed(seq, error)
            return
        if is_stop_token or text.stopped:
            self._finish(seq, "stop", piece)
        elif len(seq.token_ids) >= seq.max_num_tokens:
            self._finish(seq, "length", piece)
        elif seq.is_streamed:
            self._give_out(seq, piece)

    def _end_without_token(self, seq: Sequence) -> None:
        """Ends a request whose logits are not finite. It is not tried again: nobody else shares KV that may be bad."""
        error = NonFiniteLogitsError(
            f"request {seq.request_id}: the logits of output token {seq.num_output_tokens} are NaN or infinite; "
            "check the checkpoint, or try another dtype (float16 overflows where bfloat16 and float32 do not)"
        )
        logger.warning("%s", error)
        self.scheduler.forget_cached_blocks(seq)
        self.scheduler.finish(seq, "error", error)
        self._give_out(seq)

    def _finish(self, seq: Sequence, reason: FinishReason, piece: str = "") -> None:
        self.scheduler.finish(seq, reason)
        self._give_out(seq, piece)

    def _text_failed(self, seq: Sequence, error: Exception) -> None:
        logger.warning("the text of request %d failed (%s); giving up", seq.request_id, error)
        self._texts[seq.request_id] = NoText()
        self.scheduler.finish(seq, "error", error)
        self._give_out(seq)

    def _give_out(self, seq: Sequence, piece: str = "") -> None:
        """An output with the tokens that were not shown before; the last one with the rest of the text."""
        if seq.is_finished:
            is_first_time, seq.finished_s = seq.finished_s is None, time.perf_counter()
            try:
                piece += self._texts[seq.request_id].finish(seq.text_token_ids)
            except Exception as error:  # noqa: BLE001 - as above
                logger.warning("the text of request %d failed (%s); giving up", seq.request_id, error)
                seq.finish_reason, seq.error = "error", error
                seq.timeline.mark(f"ended: error, {error}")
            if is_first_time:
                self._observer.request_ended(seq)
        new_token_ids = seq.token_ids[seq.num_shown_tokens :]
        new_logprobs = None
        if new_token_ids and seq.params.logprobs is not None:
            new_logprobs = seq.logprobs[seq.num_shown_tokens - seq.num_prompt_tokens :]
        output = RequestOutput(
            request_id=seq.request_id,
            new_token_ids=new_token_ids,
            text=piece,
            finished=seq.is_finished,
            finish_reason=seq.finish_reason,
            error=seq.error,
            new_logprobs=new_logprobs,
            ttft_s=None if seq.first_token_s is None else seq.first_token_s - seq.arrival_s,
            latency_s=None if seq.finished_s is None else seq.finished_s - seq.arrival_s,
        )
        # In this order, so that `_recover` can tell what an interrupt left undone.
        seq.output = output
        self._inboxes[seq.request_id].put(output)
        self._given_out(seq)

    def _given_out(self, seq: Sequence) -> None:
        seq.num_shown_tokens = len(seq.token_ids)
        if seq.is_finished:
            self._texts.pop(seq.request_id, None)
            self._inboxes[seq.request_id].request_ids.discard(seq.request_id)
            self._sequences.pop(seq.request_id, None)
            self._inboxes.pop(seq.request_id, None)
        seq.output = None


def _close(reference: weakref.ref[LLMEngine]) -> None:
    engine = reference()
    if engine is not None:
        engine.close()


def _is_request_id(given: object) -> bool:
    return isinstance(given, int) and not isinstance(given, bool)
