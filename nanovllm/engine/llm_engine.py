"""The engine as its users see it: requests go in from any thread, and one call at a time runs the loop for all.

`loop.py` has what a turn of the loop does; `output_processor.py`, what becomes of tokens.
"""

from __future__ import annotations

import functools
import itertools
import operator
import os
import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from nanovllm.config import EngineConfig
from nanovllm.engine.builder import build_engine
from nanovllm.engine.callers import Call, Inbox, Turns
from nanovllm.engine.card_watch import CardWatch
from nanovllm.engine.execution.kv_transfer import KVTransfer
from nanovllm.engine.handoffs import Handoffs
from nanovllm.engine.in_flight import StepsInFlight
from nanovllm.engine.launch_times import LaunchTimes
from nanovllm.engine.loop import Loop
from nanovllm.engine.mailbox import Abort, Mailbox, NewRequest
from nanovllm.engine.observer import MAX_TIMELINES
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.output_rows import OutputRows, single_outputs
from nanovllm.engine.recovery import Recovery
from nanovllm.engine.requests import Prompt
from nanovllm.engine.scheduling.timeline import Timeline
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_listeners import StepListener, StepListeners
from nanovllm.errors import ConfigError, EngineClosedError, UnknownRequestError, short_repr
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.process import call_at_exit

if TYPE_CHECKING:
    from typing_extensions import Self

Outputs = TypeVar("Outputs")


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
        WorkerError: a tensor-parallel rank did not start.
        ClusterError: a card's process did not start.
    """

    # Until `__init__` has ended there is nothing to close.
    _closed = _is_torn_down = True

    def __init__(self, model: str | os.PathLike[str], **options: Any) -> None:
        path = os.fspath(model) if isinstance(model, os.PathLike) else model
        self.config = EngineConfig.from_options(path, options)
        parts = build_engine(self.config)
        self.tokenizer = parts.tokenizer
        self._runners = parts.runners
        self.scheduler = parts.scheduler
        self.prefill_runner = parts.runners[parts.scheduler.placement.prefill_card]
        self.decode_runner = parts.runners[parts.scheduler.placement.decode_card]
        self.counters = parts.observer.counters
        self._observer = parts.observer
        self._kept_step_times = parts.kept_step_times
        self._step_listeners = StepListeners()
        self._close_cluster = parts.close_cluster
        self._intake = parts.intake
        self._request_ids = itertools.count()
        self._turns = Turns()
        self._mailbox = Mailbox()
        self._inbox = Inbox()
        """Outputs of requests from `add_request`; `step` returns them."""
        self._outputs = OutputProcessor(self.scheduler, self._observer)
        self._steps = StepsInFlight()
        self._handoffs = Handoffs(
            parts.kv_transfers,
            self.scheduler,
            self._outputs,
            self._observer,
            self._runners,
            self._steps,
            self.config.handoff_timeout_s,
        )
        self._recovery = Recovery(
            self._runners, self.scheduler, self._steps, self._handoffs, self._outputs, self._mailbox, self._observer
        )
        self._loop = Loop(
            self._runners,
            self.scheduler,
            self._steps,
            self._handoffs,
            LaunchTimes(self._steps, self.counters, puts_off=not self._has_processes),
            self._outputs,
            self._mailbox,
            self._observer,
            self._step_listeners,
            CardWatch(parts.remote_runners, self.scheduler, self._steps, self._outputs, parts.agents_with_messages),
            handoff_timeout_s=self.config.handoff_timeout_s,
            step_timeout_s=self.config.step_timeout_s,
        )
        self._is_torn_down = False
        self._closed = False
        if self._has_processes:
            # While graphs and collectives can still be given back in order.
            call_at_exit(functools.partial(_close, weakref.ref(self)))

    @property
    def _has_processes(self) -> bool:
        """Whether ranks or cards run in processes of their own."""
        return self.config.tensor_parallel_size > 1 or self.config.cluster is not None

    @property
    def kv_transfer(self) -> KVTransfer:
        """Carries KV from the prefill pool to the other one. May be replaced while no handoff is under way.

        With `card_roles="elastic"` it tells of blocks that steps push themselves, and is not replaced.
        """
        placement = self.scheduler.placement
        return self._handoffs.transfers[placement.prefill_card, placement.decode_card]

    @kv_transfer.setter
    def kv_transfer(self, transfer: KVTransfer) -> None:
        if self.config.cluster is not None:
            raise ConfigError("kv_transfer cannot be replaced in a cluster: its processes push KV themselves")
        if self.config.card_roles == "elastic":
            raise ConfigError("kv_transfer cannot be replaced with card_roles='elastic': steps push KV themselves")
        placement = self.scheduler.placement
        self._handoffs.transfers[placement.prefill_card, placement.decode_card] = transfer

    def __del__(self) -> None:
        # It was never closed, and other processes would be left running; or an interrupt broke off `close`.
        if not self._is_torn_down and (self._closed or self._has_processes):
            self.close()

    # Requests

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> int:
        """Queues a prompt, text or token ids, and returns the id that `step()` will name it by.

        Raises:
            RequestError: the prompt or a parameter is refused; nothing was queued.
            DeviceError: a GPU was lost; a new process is needed.
            WorkerError: another rank was lost; a new process is needed.
            EngineClosedError: the engine was closed.
        """
        self._check_open()
        token_ids = self._intake.checked_prompt(prompt)
        return self._submit(
            token_ids, self._intake.checked_params(sampling_params, max_n=1), self._inbox, streamed=True
        )

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
        self._loop.sweep_next_turn()
        self._read_mail()
        return not (self._inbox or self._mailbox.arrived or self._outputs.sequences)

    def step(self) -> list[RequestOutput]:
        """Launches what can be launched and returns what has completed since the last call, perhaps nothing.

        Waits for a device when there was nothing to launch, or not yet. While another thread runs the loop, in
        `generate` for example, waits briefly for outputs of that.

        Raises:
            EngineClosedError: the engine was closed.
            EngineBusyError: called from within another call on the same thread, such as from a signal handler.
        """
        return self._step(single_outputs)

    def _step(self, convert: Callable[[list[RequestOutput | OutputRows]], Outputs]) -> Outputs:
        """`step`, whose outputs are converted by a function; they are given out once that is done."""
        self._check_open()
        call, outputs = Call(), list[RequestOutput | OutputRows]()
        try:
            with call.on_stack:
                self._run_or_wait(call, self._inbox)
                self._inbox.take_all(outputs)
                self._turns.wake_all()  # nobody may have the turn now
            return convert(outputs)
        except BaseException:
            self._inbox.put_back(outputs)
            raise

    def explain(self, request_id: int) -> Timeline:
        """What a request waits or has waited for; `str` makes a table. The last MAX_TIMELINES that ended are kept.

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
                f"request {short_repr(request_id)} is not known, or ended before the last {MAX_TIMELINES} that did"
            )
        return timeline

    def metrics(self) -> dict[str, Any]:
        """What the engine is doing and has done since it was made; waits for nothing.

        Times are histograms (`count`, `sum`, `buckets` of (bound, values at or below it)) in seconds: `ttft_s` from
        arrival to the first token, `itl_s` of every gap between two tokens of a request, `tpot_s` of a request's mean
        gap, `latency_s` from arrival to the end, `handoff_s` from the end of a prefill step until its KV has
        arrived. `predicted_itl_s` is what a decode step will take with all requests that are under way, None if there
        are none or it is unknown. `stage_s` is how long attention and FFN kept their lanes busy in the last decode
        step on lanes that was timed, None if there was none, and `pipeline_split` the SMs of the current split, None of
        plain decode. `busy_s` is how long each card has run steps of each kind, as the loop saw it: a step begins with
        its launch, or when the one before it ends. `prefill_chunks` counts chunks of prompts that two cards compute
        together, and others; `layer_wait_s` is how long the steps of the former have waited for layers of the other
        card, and `handoff_bytes_by_link` what has crossed each way. `fallbacks` counts falls back to something slower
        by cause, `recoveries` returns from them.

        Raises:
            EngineClosedError: the engine was closed.
        """
        self._check_open()
        return self._observer.metrics()

    def add_step_listener(self, listener: StepListener) -> None:
        """Has `listener` called with a `StepReport` for every step from now on, soon after it has ended.

        It is called in the thread of whichever call runs the loop, between two turns. An exception of the listener
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
        self._loop.stop()
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
        """Closes the engine's parts; after an interrupt, `close` runs this again."""
        if self._is_torn_down:
            return
        unfinished = list(self._outputs.sequences.values())
        try:
            self._close_parts()
        finally:
            self._observer.close(unfinished)
        self._is_torn_down = True

    def _close_parts(self) -> None:
        try:
            # What runs on cards in processes of their own ends with these.
            if self._recovery.device_error is None and self.config.cluster is None:
                self._recovery.settle()
        finally:
            self._close_cluster()  # all its cards at once
            for runner in self._runners:
                runner.close_workers()
        self._observer.dropped(self._steps.drop(), self._handoffs.drop())
        self.scheduler.start_over(self._outputs.unfinished(), ())  # whatever state an interrupt left
        for seq in self._outputs.unfinished():
            self.scheduler.finish(seq, "abort")
        self._mailbox.clear()
        self._outputs.clear()
        self._inbox = Inbox()
        self._kept_step_times.keep()
        if self._recovery.device_error is None:
            self._free_devices()
        # else: on a lost GPU every call fails, or waits for ever, so that what it holds goes with the process

    def _free_devices(self) -> None:
        for runner in self._runners:
            runner.close()

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
        return self._mailbox.find(number) or self._outputs.sequences.get(number)

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
        """Aborts the unfinished requests of an inbox: nobody waits for their outputs any more."""
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
        """Runs one turn of the loop, or waits for an output in the inbox if another call has the turn."""
        self._check_open()
        if not self._took_turn(call, self._loop.run_turn, self._step_listeners.tell):
            self._turns.wait(call, inbox)
        self._check_open()

    def _read_mail(self) -> None:
        """Takes in what calls have posted, unless another call has the turn or waits for it: then that one does.

        This keeps calls that only post from delaying those that run the loop.
        """
        if not self._turns.is_awaited:
            call = Call()
            with call.on_stack:
                self._took_turn(call, self._loop.take_in_mail)
        if self._turns.is_awaited:
            self._turns.wake_all()

    def _took_turn(self, call: Call, work: Callable[[], None], then: Callable[[], None] | None = None) -> bool:
        """Runs `work`, then `then`, if no other call has the turn. Returns whether it did.

        `then` runs when the state is consistent again.
        """
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


def _close(reference: weakref.ref[LLMEngine]) -> None:
    engine = reference()
    if engine is not None:
        engine.close()


def _as_integer(given: object) -> int | None:
    """A request id as an int, from any integer type; None for other types and bools."""
    try:
        return None if isinstance(given, bool) else operator.index(given)  # type: ignore[arg-type] # that is the question
    except TypeError:
        return None
