"""The loop: takes requests, launches what the scheduler decides, collects what has ended."""

from __future__ import annotations

import atexit
import itertools
import logging
import operator
import os
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from nanovllm.config import EngineConfig
from nanovllm.engine.builder import build_engine
from nanovllm.engine.callers import Call, Inbox, Turns
from nanovllm.engine.execution.kv_transfer import KVTransfer
from nanovllm.engine.execution.step_handle import SampledOnHost
from nanovllm.engine.handoffs import Handoffs
from nanovllm.engine.in_flight import InFlight, StepsInFlight
from nanovllm.engine.mailbox import Abort, Mailbox, NewRequest
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.observer import MOST_TIMELINES
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.recovery import Recovery
from nanovllm.engine.requests import Prompt
from nanovllm.engine.scheduler import PrefillStep, Step
from nanovllm.engine.scheduling.decode_batch import DecodeStep
from nanovllm.engine.scheduling.timeline import Timeline
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_listeners import StepListener, StepListeners
from nanovllm.errors import DeviceError, EngineClosedError, UnknownRequestError, short_repr
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

DECODE_STEPS_AHEAD = 2
"""Decode steps in flight: one that runs and one queued behind it, launched before the first one's tokens are seen."""

PREFILL_STEPS_AHEAD = 2
"""Prefill steps in flight on a device of their own, for the same reason. Where decode steps wait for them it is one."""

MOST_ARRIVALS_PER_TURN = 256
"""New requests that a turn takes in: those that come faster wait in the mailbox, and decode steps go on."""

TURNS_PER_SWEEP = 64
"""After so many turns of the loop the engine looks for requests whose callers are gone without a word."""


class LLMEngine:
    """Serves requests one `step()` at a time.

    Every public method may be called from any thread. One call at a time runs the loop, for the requests of all of
    them; the others wait for their outputs. Those that do not wait (`add_request`, `abort`, `close`) may be called from
    a signal handler, too. An exception that a signal handler raises, such as KeyboardInterrupt, ends the call that it
    strikes and the requests of that call; others go on, except that a streamed request which was just being given a
    token may end with `finish_reason="abort"`.

    Args:
        model: folder of a Hugging Face checkpoint, or its name on the hub.
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
        parts = build_engine(self.config)
        self.tokenizer = parts.tokenizer
        self.prefill_runner = parts.prefill_runner
        self.decode_runner = parts.decode_runner
        self.scheduler = parts.scheduler
        self.counters = parts.observer.counters
        self._observer = parts.observer
        self._step_listeners = StepListeners()
        self._intake = parts.intake
        self._request_ids = itertools.count()
        self._turns = Turns()
        self._mailbox = Mailbox()
        self._inbox = Inbox()
        """Outputs of requests of `add_request`, for `step`."""
        self._requests = OutputProcessor(self.scheduler, self._observer)
        self._steps = StepsInFlight()
        self._handoffs = Handoffs(
            parts.kv_transfer,
            self.scheduler,
            self._observer,
            self._steps,
            self.config.handoff_timeout_s,
            fail=self._fail,
            raise_if_lost=lambda error: self._recovery.raise_if_lost(error),
        )
        self._recovery = Recovery(
            self.prefill_runner,
            self.decode_runner,
            self.scheduler,
            self._steps,
            self._handoffs,
            self._requests,
            self._mailbox,
            self._observer,
        )
        self._turns_until_sweep = TURNS_PER_SWEEP
        self._last_progress_s = time.perf_counter()
        self._gap: tuple[Step, float] | None = None
        """The decode step that was queued right behind the last one when that ended, and when that was."""
        self._is_torn_down = False
        self._closed = False
        if self.config.tensor_parallel_size > 1:
            atexit.register(_close, weakref.ref(self))  # while graphs and collectives can still be given back in order

    @property
    def kv_transfer(self) -> KVTransfer:
        """What carries KV between the pools; another one may be set while no handoff is under way."""
        return self._handoffs.transfer

    @kv_transfer.setter
    def kv_transfer(self, transfer: KVTransfer) -> None:
        self._handoffs.transfer = transfer

    def __del__(self) -> None:
        # Nobody has closed it, and other ranks would be left behind; or a close was broken off.
        if not self._is_torn_down and (self._closed or self.config.tensor_parallel_size > 1):
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
        if seq is None or seq.is_finished or seq in self._mailbox.aborting:
            raise UnknownRequestError(
                f"request {short_repr(request_id)} is not known or has ended; abort takes a running one"
            )
        self._mailbox.aborting.add(seq)
        self._mailbox.aborts.append(Abort(seq, is_known=True))
        self._read_mail()

    def is_finished(self) -> bool:
        """Whether no request is left to serve and no output to give out."""
        if self._is_torn_down:
            return True
        self._turns_until_sweep = 0
        self._read_mail()
        return not (self._inbox or self._mailbox.arrived or self._requests.sequences)

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
                self._turns.wake_all()  # nobody may have the turn now
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
        number = _as_integer(request_id)
        if timeline is None and number is not None:
            timeline = self._observer.timeline(number)
        if timeline is None:
            raise UnknownRequestError(
                f"request {short_repr(request_id)} is not known, or ended before the last {MOST_TIMELINES} that did"
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

        Calls that other threads are in end with EngineClosedError, at once. A signal handler may call this, too: if it
        broke into a call of this engine that runs the loop, that call ends with EngineClosedError and does the rest.
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
                self._turns.end(call)

    def _tear_down(self) -> None:
        """Closes what the engine is made of; after an interrupt, once more."""
        if self._is_torn_down:
            return
        unfinished = list(self._requests.sequences.values())
        try:
            self._close_parts()
        finally:
            self._observer.close(unfinished)
        self._is_torn_down = True

    def _close_parts(self) -> None:
        try:
            if self._recovery.device_error is None:
                self._settle()
        finally:
            self.decode_runner.close_workers()
        self._observer.dropped(self._steps.drop(), self._handoffs.drop())
        self.scheduler.start_over(self._requests.unfinished(), ())  # whatever state an interrupt left
        for seq in self._requests.unfinished():
            self.scheduler.finish(seq, "abort")
        self._mailbox.clear()
        self._requests.clear()
        self._inbox = Inbox()
        # On a lost GPU every call fails, or waits for ever: what it holds goes with the process.
        for runner in {self.prefill_runner, self.decode_runner} if self._recovery.device_error is None else ():
            runner.close()

    def _settle(self) -> None:
        """Waits for the devices, and gives up those that are lost."""
        try:
            for runner in {self.prefill_runner, self.decode_runner}:
                runner.synchronize()
            self.decode_runner.take_lane_times()
        except Exception as error:
            lost = self._recovery.lost_device(error)
            if lost is None:
                raise
            logger.error("%s", lost)
            self._recovery.give_up_devices(lost)

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
        number = _as_integer(request_id)
        if number is None:
            return None
        # In this order: the loop lists a request before it takes it out of the mailbox.
        return self._mailbox.find(number) or self._requests.sequences.get(number)

    def _submit(self, token_ids: list[int], params: SamplingParams, inbox: Inbox, *, streamed: bool) -> int:
        """Queues a checked request and has the loop take it in, if nobody runs it."""
        new = self._new_request(token_ids, params, inbox, streamed=streamed)
        try:
            self._mailbox.arrived.append(new)
            self._read_mail()
            self._check_open()
            return new.seq.request_id
        except BaseException:
            self._mailbox.aborts.append(Abort(new.seq, is_known=False))  # its id is lost
            raise

    def _new_request(self, token_ids: list[int], params: SamplingParams, inbox: Inbox, *, streamed: bool) -> NewRequest:
        self._check_open()
        device_error = self._recovery.device_error
        if device_error is not None:
            raise type(device_error)(f"{device_error}; start a new process") from device_error
        seq, text = self._intake.make(next(self._request_ids), token_ids, params, streamed=streamed)
        return NewRequest(seq, text, inbox)

    def _abandon(self, inbox: Inbox) -> None:
        """Ends what is still running of the inbox's requests: nobody waits for their outputs any more."""
        inbox.is_closed = True
        self._mailbox.closed_inboxes.append(inbox)
        inbox.ring()
        self._read_mail()

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
        if not self._took_turn(call, self._run_turn, self._step_listeners.tell):
            self._turns.wait(call, inbox)
        self._check_open()

    def _read_mail(self) -> None:
        """Takes in what calls have posted, unless another call has the turn, or waits and may have it: then that will.

        So calls that post never stand in the way of those that run the loop.
        """
        if not self._turns.is_awaited:
            call = Call()
            with call.on_stack:
                self._took_turn(call, self._take_in_mail)
        if self._turns.is_awaited:
            self._turns.wake_all()

    def _took_turn(self, call: Call, work: Callable[[], None], then: Callable[[], None] | None = None) -> bool:
        """Does `work`, and `then` once the state is whole, if nobody else has the turn; whether it did."""
        if not self._turns.take(call):
            return False
        try:
            if not self._closed:
                self._recovery.guard(work)
                if then is not None:
                    then()
        finally:
            self._turns.end(call)
            if self._closed:
                self.close()  # a signal handler that broke into this turn could not end it
        return True

    # The loop

    def _run_turn(self) -> None:
        """One turn: launch what can be launched, else wait; then collect what has ended."""
        self._take_in_mail()
        if self._launch_steps():
            self._progressed()
        else:
            self._step_listeners.time_wait(self._wait)
        self._collect_steps()
        if self._handoffs.collect():
            self._progressed()
        self._check_steps_end()
        self._observer.log_prefill_health()
        for seq in self.scheduler.get_failed_sequences():
            self._requests.emit(seq)

    def _take_in_mail(self) -> None:
        """New requests, aborts, and requests that nobody waits for any more."""
        mail = self._mailbox
        for _ in range(min(len(mail.arrived), MOST_ARRIVALS_PER_TURN)):
            self._take_in(mail.arrived[0])
            mail.arrived.popleft()
        for _ in range(len(mail.aborts)):
            self._take_in_abort(mail.aborts[0])
            mail.aborts.popleft()
        for _ in range(len(mail.closed_inboxes)):
            self._requests.abort_all_of(mail.closed_inboxes[0])
            mail.closed_inboxes.popleft()
        self._turns_until_sweep -= 1
        if self._turns_until_sweep <= 0:
            self._turns_until_sweep = TURNS_PER_SWEEP
            self._requests.abort_abandoned()

    def _take_in(self, new: NewRequest) -> None:
        self._requests.add(new)
        self.scheduler.add(new.seq)
        early_abort = self._mailbox.early_aborts.get(new.seq.request_id)
        if early_abort is not None:
            self._take_in_abort(early_abort)
            self._mailbox.early_aborts.pop(new.seq.request_id)
        elif new.inbox.is_abandoned:
            self._requests.finish(new.seq, "abort")

    def _take_in_abort(self, abort: Abort) -> None:
        seq = abort.seq
        if seq.request_id not in self._requests.sequences and not seq.is_finished:
            self._mailbox.early_aborts[seq.request_id] = abort  # it has not been taken in
            return
        if not seq.is_finished:
            if abort.is_known:
                self._requests.finish(seq, "abort")
            else:
                self._requests.abort_unknown(seq)
        self._mailbox.aborting.discard(seq)

    def _check_steps_end(self) -> None:
        """Raises DeviceError if the first step on a device has had its time, WorkerError if a rank is gone."""
        self.decode_runner.check_workers()
        timeout_s = self.config.step_timeout_s
        late = self._steps.late(timeout_s)
        if late is not None:
            error = DeviceError(
                f"{late.runner.device} is lost: a {late.kind} step of {len(late.step.rows)} requests has not ended "
                f"within step_timeout_s={timeout_s}"
            )
            raise late.runner.diagnose(error)

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
        if self._steps.count(runner, PrefillStep) >= (1 if decodes else PREFILL_STEPS_AHEAD):
            return False
        step = self.scheduler.schedule_prefill(self.scheduler.decode_pool if decodes else self.scheduler.prefill_pool)
        return step is not None and self._launch(runner, step)

    def _launch_decode(self) -> bool:
        if self._steps.count(self.decode_runner, DecodeStep) >= DECODE_STEPS_AHEAD:
            return False
        step = self.scheduler.schedule_decode()
        return step is not None and self._launch(self.decode_runner, step)

    def _launch(self, runner: ModelRunner, step: Step) -> bool:
        """Launches a step. If that fails, its halves, until the request that makes it fail stands alone."""
        error = None
        try:
            handle = runner.launch(step)
        except Exception as raised:  # noqa: BLE001 - whatever a forward pass raises ends one request, not the engine
            # The frames hold the failed step's tensors, which would stay alive with the error.
            traceback.clear_frames(raised.__traceback__)
            self._recovery.raise_if_lost(raised)
            error = raised
        if error is None:
            self._steps.add(runner, step, handle)
            if isinstance(step, PrefillStep):
                self._observer.step_launched(runner, step)
                self._handoffs.send(step, handle.event)
            return True
        # What the step had launched before it failed may still be writing to its blocks, and to the decode rows: they
        # are sent anew, once the host has the tokens of the steps before.
        runner.synchronize(copies=not self._handoffs.is_stuck)
        if isinstance(step, DecodeStep):
            for work in self._steps.of(runner):
                self._collect(work)
            runner.forget_device_batch()
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
        self._observer.log_prefill_health()
        self._progressed()

    def _progressed(self) -> None:
        self._last_progress_s = time.perf_counter()

    def _wait(self) -> None:
        """Until a step or a handoff has ended, or a handoff's time is up."""
        handoffs = self._handoffs.awaited()
        if not self._steps and not handoffs:
            self._give_up_on_stuck_blocks()
            return
        while not (
            self._mailbox.arrived
            or self._steps.is_any_done()
            or any(handoff.handle.is_done() or time.perf_counter() > handoff.deadline_s for handoff in handoffs)
        ):
            self._check_open()
            self._check_steps_end()
            time.sleep(0)

    def _give_up_on_stuck_blocks(self) -> None:
        """Nothing runs: if nothing has for `handoff_timeout_s`, the oldest request waits for blocks of a stuck copy."""
        time.sleep(1e-3)
        waiting = self.scheduler.unfinished()
        if waiting and time.perf_counter() - self._last_progress_s >= self.config.handoff_timeout_s:
            self._handoffs.fail_waiting(waiting[0])
            self._progressed()

    def _collect_steps(self) -> None:
        for work in self._steps.ended():
            self._collect(work)

    def _collect(self, work: InFlight) -> None:
        sampled = work.handle.collect()
        work.runner.check_workers()  # a step that waited for a rank that is gone was ended, with anything in it
        self._steps.remove(work)
        self._observer.step_ended(work)
        self._step_listeners.step_ended(work)
        self._progressed()
        if isinstance(work.step, PrefillStep):
            self._prefill_ended(work.step, sampled)
        else:
            self._decode_ended(work.step, sampled)

    def _prefill_ended(self, step: PrefillStep, sampled: SampledOnHost) -> None:
        self.counters.prefill_steps += 1
        self.counters.prefill_tokens += step.num_tokens
        counting = [(chunk, self.scheduler.prefill_done(chunk)) for chunk in step.rows]
        last = [(chunk.seq, counts) for chunk, counts in counting if chunk.is_last]
        assert len(last) == len(sampled.token_ids), "a token for each request whose prompt is complete"
        for place, (seq, counts) in enumerate(last):
            if counts:
                self._observer.times.got_token(seq)
                self._requests.append(seq, int(sampled.token_ids[place]), sampled.logprobs_of(place))
        self._handoffs.step_ended(step)

    def _decode_ended(self, step: DecodeStep, sampled: SampledOnHost) -> None:
        self.counters.decode_steps += 1
        self.counters.decode_tokens += len(step.batch) - len(step.ended_leases)
        self.scheduler.decode_done(step)
        if self.config.itl_target_ms is not None:
            self._observe_gap(step)
        batch, token_ids = step.batch, sampled.token_ids.tolist()
        needs_check = step.needs_host_check(sampled.token_ids, self.scheduler.decode_pool.block_size)
        counts = np.ones(len(batch), dtype=bool)
        if step.ended_leases:
            counts[:] = [seq.lease is lease for seq, lease in zip(batch.seqs, batch.leases, strict=True)]
        self._observer.times.got_tokens(batch.token_time_places[counts])
        # For every token of every request: no Python.
        is_plain = (counts & ~needs_check).tolist()
        appended = map(
            list.append, itertools.compress(batch.token_lists, is_plain), itertools.compress(token_ids, is_plain)
        )
        deque(appended, maxlen=0)
        for place in (counts & needs_check).nonzero()[0].tolist():
            self._requests.append(batch.seqs[place], token_ids[place], sampled.logprobs_of(place))

    def _observe_gap(self, step: DecodeStep) -> None:
        """Tells the admission policy what a step took, if the device did nothing else since the step before."""
        now = time.perf_counter()
        if self._gap is not None and self._gap[0] is step:
            self.scheduler.admission.observe(len(step.batch), step.num_tokens, now - self._gap[1])
        following = next((work.step for work in self._steps.of(self.decode_runner)), None)
        self._gap = (following, now) if isinstance(following, DecodeStep) else None


def _close(reference: weakref.ref[LLMEngine]) -> None:
    engine = reference()
    if engine is not None:
        engine.close()


def _as_integer(given: object) -> int | None:
    """A request id of any integer type; None for what is none, bools among it."""
    try:
        return None if isinstance(given, bool) else operator.index(given)  # type: ignore[arg-type] # that is the question
    except TypeError:
        return None
