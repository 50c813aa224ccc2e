"""A card in another process, behind the interface of a runner: `launch(step) -> handle`. The loop sees no difference.

Whether the card is there is asked of `state`: nothing here raises because it is gone. What was launched on it then
never ends, and whoever looks after lost cards takes it back.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import abc
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import numpy as np

from nanovllm.engine.distributed.card_client import CardClient, CardSockets
from nanovllm.engine.distributed.card_clock import CardClock, host_id
from nanovllm.engine.distributed.card_messages import (
    AddPeer,
    ArrivalFailed,
    Arrived,
    AskTransports,
    CancelExpected,
    CardFailed,
    Expect,
    Geometry,
    InvalidMessage,
    Launch,
    Ping,
    Pong,
    Push,
    Ready,
    RemovePeer,
    Report,
    SendFailed,
    Sent,
    Start,
    StepEnded,
    StepFailed,
    Transports,
)
from nanovllm.engine.distributed.card_starter import CardStarter
from nanovllm.engine.distributed.messages import Failure
from nanovllm.engine.execution.kv_transfer import TransferHandle
from nanovllm.engine.execution.prefill_layout import PrefillLayout
from nanovllm.engine.execution.row_table import DecodeRowTable
from nanovllm.engine.execution.runner_spec import RunnerSpec
from nanovllm.engine.execution.step_handle import StepFailedError, StepTokens
from nanovllm.engine.execution.task_packer import TaskPacker
from nanovllm.engine.scheduling.step import BlockPair, Step
from nanovllm.errors import ClusterError, DeviceError, HandoffError
from nanovllm.utils.device import Device
from nanovllm.utils.process import without_interrupts

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 600.0
"""Seconds for a card to load its weights and capture its graphs."""
MAX_FAILED_STARTS = 3
"""Times that a card's process may end before it is ready, without a minute of work between; then the card stays out."""
PROVEN_S = 60.0
"""Seconds of work after which what happened before no longer counts against a card."""
FIRST_PAUSE_S = 1.0
"""Seconds to the second new start of a card that is not proven, doubled each time. The first new start is at once."""
LONGEST_PAUSE_S = 60.0
CLOCK_REST_S = 200e-6


@dataclass(frozen=True)
class RemoteDevice(Device):
    """A device of another process, of which nothing is asked here.

    Attributes:
        index: of the card.
        name: of the card.
    """

    name: str

    def lost_reason(self) -> str | None:
        return None

    def __str__(self) -> str:
        return self.name


class CardState(Enum):
    STARTING = auto()
    """Its process loads the model."""
    UP = auto()
    LOST = auto()
    """Its process is gone, and the loop has not yet taken note."""
    OUT = auto()
    """It cannot be started, and is not started again."""


def blocks_of(geometry: Geometry) -> str:
    """What two cards must have in common for KV to cross, in words."""
    return f"blocks of {geometry.block_size} tokens in {geometry.block_bytes} bytes"


def error_of(failure: Failure, device: Device) -> Exception:
    """What was raised on a card: the same exception if it is one of this package's, else a ClusterError."""
    return failure.as_own_error() or ClusterError(f"{failure.kind} on {device}: {failure.message}")


class RemoteStep:
    """A launched step of a remote card; a `StepHandle` as the loop knows it.

    Attributes:
        failure: the exception that the step ended with, None if it ran or still runs.
    """

    ran_in_launch = False

    def __init__(self, runner: RemoteRunner, number: int) -> None:
        self.number = number
        self.stream: abc.Hashable = None
        self.failure: Exception | None = None
        self._runner = runner
        self._ended: StepEnded | None = None
        self._offset_s = 0.0

    @property
    def event(self) -> RemoteStep:
        """Done after the step."""
        return self

    def is_done(self) -> bool:
        """Whether the card has said so, as far as its messages were taken in."""
        return self._ended is not None or self.failure is not None

    query = is_done

    def wait(self) -> None:
        """Waits for the step, or for news that its card is lost."""
        while not self.is_done() and self._runner.state is CardState.UP:
            self._runner.poll()
            time.sleep(CLOCK_REST_S)

    synchronize = wait

    def collect(self) -> StepTokens:
        """What the step has sampled, once it is done.

        Raises:
            StepFailedError: it could not be run.
        """
        self.wait()
        if self.failure is not None:
            raise StepFailedError(self.failure)
        ended = self._ended
        if ended is None:
            raise DeviceError(f"{self._runner.device} is lost")
        return ended.tokens()

    def moments(self) -> tuple[float, float]:
        """When the step began and ended, by this host's clock. One that has not run took no time."""
        if self._ended is None:
            now_s = time.perf_counter()
            return now_s, now_s
        return self._ended.began_s - self._offset_s, self._ended.ended_s - self._offset_s

    def take(self, report: StepEnded | StepFailed) -> None:
        if isinstance(report, StepEnded):
            self._ended, self._offset_s = report, self._runner.clock.offset_s
        else:
            self.failure = error_of(report.failure, self._runner.device)


class RemotePush:
    """Blocks on their way from one remote card to another; a `TransferHandle`.

    It is done when neither of the two touches the blocks any more: each has said so, or its process is gone.
    """

    def __init__(self, number: int, source: RemoteRunner, target: RemoteRunner) -> None:
        self.number = number
        self.sent: Sent | SendFailed | None = None
        self.arrived: Arrived | ArrivalFailed | None = None
        self._source, self._target = source, target
        self._agents = source.agent, target.agent
        self._offset_s = 0.0

    @property
    def cards(self) -> tuple[RemoteRunner, RemoteRunner]:
        """The one that sends, and the one that receives."""
        return self._source, self._target

    def poll(self) -> None:
        """Takes in what the two cards have said."""
        for runner in self.cards:
            runner.poll()

    def is_done(self) -> bool:
        """Whether it is over on both sides, as far as their messages were taken in."""
        is_sent = self.sent is not None or not self._source.may_run(self._agents[0])
        has_arrived = self.arrived is not None or not self._target.may_run(self._agents[1])
        return is_sent and has_arrived

    def wait(self) -> None:
        """Nothing is left to be ordered: the card's later steps are launched after the news.

        Raises:
            HandoffError: the blocks did not arrive as they left.
        """
        if not isinstance(self.sent, Sent):
            raise HandoffError(self.sent.reason if self.sent else f"{self._source.device} is lost")
        if not isinstance(self.arrived, Arrived):
            raise HandoffError(self.arrived.reason if self.arrived else f"{self._target.device} is lost")
        there, here = self.arrived.checksums, self.sent.checksums
        if here is not None and there is not None and not np.array_equal(here, there):
            place, layer = np.argwhere(here != there)[0].tolist()
            raise HandoffError(
                f"the {place + 1}th of the blocks that were sent differs in layer {layer} from what arrived"
            )

    def moments(self) -> tuple[float, float] | None:
        if not isinstance(self.sent, Sent):
            return None
        return self.sent.began_s - self._offset_s, self.sent.ended_s - self._offset_s

    def take(self, report: Sent | SendFailed | Arrived | ArrivalFailed) -> None:
        if isinstance(report, (Arrived, ArrivalFailed)):
            self.arrived = report
            return
        self.sent, self._offset_s = report, self._source.clock.offset_s
        if isinstance(report, SendFailed):
            self._target.send_if_same(self._agents[1], CancelExpected(self.number))


class RemoteTransfer:
    """Carries blocks between two remote cards by NIXL; a `KVTransfer`.

    The receiver's blocks are leased before anything is sent; the sender pushes them behind the step that computes them,
    and each of the two says when it is through.
    """

    name = "nixl"

    def __init__(self, source: RemoteRunner, target: RemoteRunner, *, verify: bool) -> None:
        self._source, self._target, self._verify = source, target, verify

    def send(self, pairs: abc.Sequence[BlockPair], after: Any) -> TransferHandle:
        assert isinstance(after, RemoteStep), "a remote card pushes behind steps of its own"
        number, blocks = self._source.next_push(), np.array(pairs, dtype=np.int64).T.copy()
        push = RemotePush(number, self._source, self._target)
        with without_interrupts():  # one side would wait for the other
            self._source.pushes[number] = self._target.pushes[number] = push
            self._target.send(Expect(number, self._source.agent, blocks[1], self._verify))
            self._source.send(Push(number, after.number, self._target.agent, blocks, self._verify))
        return push


class RemoteRunner:
    """A runner in a process of its own.

    Args:
        device: the device that the process is given.
        spec: of the model, as the process will find it.
        model: the checkpoint's folder.
        options: of an engine, for the process.
        sockets: makes the sockets.
        starter: starts the process.
        push_numbers: gives every push of the cluster a number.
        silence_timeout_s: seconds of silence after which the process is taken for hung, and killed.
        explains_transports: whether the process can be asked for `transports`.

    Attributes:
        state: whether the card is there.
        reason: why it was lost, the last time; empty if it never was.
        agent: the name of the process among those of all cards, now and before.
        pushes: pushes to and from this card that are not over, by number.
        clock: that of the card's host.
        transports: those by which UCX writes into other processes' memory; None until `ask_transports` is answered.
    """

    arrivals = None
    is_decode_runner = True

    def __init__(
        self,
        device: Device,
        spec: RunnerSpec,
        model: str,
        options: dict[str, Any],
        sockets: CardSockets,
        starter: CardStarter,
        push_numbers: abc.Iterator[int],
        silence_timeout_s: float,
        *,
        explains_transports: bool = False,
    ) -> None:
        self.device = device
        self.spec = spec
        self.state = CardState.STARTING
        self.reason = ""
        self.pushes: dict[int, RemotePush] = {}
        self.clock = CardClock(is_ours=True)
        self.transports: dict[str, list[str]] | None = None
        self._explains_transports = explains_transports
        self._model, self._options = model, dict(options)
        self._sockets, self._starter = sockets, starter
        self._push_numbers = push_numbers
        self._silence_timeout_s = silence_timeout_s
        self._ready: Ready | None = None
        self._geometry: Geometry | None = None
        self._packer: TaskPacker | None = None
        self._steps: dict[int, RemoteStep] = {}
        self._step_numbers = itertools.count(1)
        self._batch = 0
        self._num_starts = self._num_failed_starts = 0
        self._ready_s = self._restart_at_s = self._pause_s = 0.0
        self._failure: Exception | None = None
        self._start()

    # What a card is

    @property
    def ready(self) -> Ready:
        """What the process has said of itself when it was ready."""
        assert self._ready is not None, f"{self.device} has not been ready yet"
        return self._ready

    @property
    def geometry(self) -> Geometry:
        """Sizes of its pool and steps, once it has been up."""
        assert self._geometry is not None, f"{self.device} has not been ready yet"
        return self._geometry

    @property
    def num_kv_blocks(self) -> int:
        return self.geometry.num_kv_blocks

    @property
    def block_size(self) -> int:
        return self.geometry.block_size

    @property
    def max_prefill_tokens(self) -> int:
        return self.geometry.max_prefill_tokens

    @property
    def pid(self) -> int:
        """The id of the process on its host, once it has been up."""
        return self.ready.pid

    def may_run(self, agent: str) -> bool:
        """Whether the process of this name may still touch its device, or is not yet known to be gone."""
        return agent == self.agent and not (self._is_noted and self._client.is_reaped())

    def note_loss(self) -> None:
        """The loop has noted that the card is lost: what was under way to and from it may end now."""
        self._is_noted = True

    # Steps

    def prepare(self, step: Step) -> None:
        """Packs the step that is launched next."""
        assert self._packer is not None, f"{self.device} has not been ready yet"
        self._packer.prepare(step)

    def launch(self, step: Step) -> RemoteStep:
        """Sends a step; waits for nothing."""
        assert self._packer is not None, f"{self.device} has not been ready yet"
        task = self._packer.pack(step)
        self._packer.launched(step)
        handle = RemoteStep(self, next(self._step_numbers))
        with without_interrupts():  # what was not sent would be waited for
            self._steps[handle.number] = handle
            self._client.send(Launch(handle.number, self._batch, task))
        return handle

    def forget_device_batch(self) -> None:
        """Discards the rows on the card, and what was launched there and has not run."""
        self._batch += 1
        self._steps.clear()
        if self._packer is not None:
            self._packer.forget()

    def synchronize(self, *, copies: bool = True) -> None:
        """Waits for all steps, and pushes, until they are through or the card is lost."""
        deadline_s, told = time.monotonic() + self.spec.step_timeout_s, set[str]()
        while self.state is CardState.UP:
            self.poll()
            is_failed = any(step.failure is not None for step in self._steps.values())
            pushes = [push for push in list(self.pushes.values()) if copies]
            for push in pushes:
                push.poll()
                for other in push.cards:
                    if other.is_lost and other.agent not in told:  # the loop may not have come to do so
                        told.add(other.agent)
                        other.note_loss()
                        self.remove_peer(other)
            pushes = [push for push in pushes if not push.is_done()]
            if (is_failed or not self._steps) and not pushes:
                return
            if time.monotonic() > deadline_s:
                self.give_up(f"its work has not ended within step_timeout_s={self.spec.step_timeout_s}")
            time.sleep(CLOCK_REST_S)

    # Pushes

    def next_push(self) -> int:
        return next(self._push_numbers)

    def send(self, command: Expect | Push | AddPeer | RemovePeer | CancelExpected) -> None:
        """Tells the card something; one that is not up hears nothing."""
        if self.state is CardState.UP:
            self._client.send(command)

    def send_if_same(self, agent: str, command: CancelExpected) -> None:
        """Tells the process of this name something."""
        if agent == self.agent:
            self.send(command)

    def remove_peer(self, other: RemoteRunner) -> None:
        """Tells the card that another one's process is gone."""
        self.send(RemovePeer(other.agent))

    def add_peer(self, other: RemoteRunner) -> None:
        """Tells the card of another one's process, which is up."""
        there = other.ready
        self.send(AddPeer(other.agent, there.host, there.metadata, there.pool_address, there.pool_device))

    def ping(self) -> None:
        """Begins a round trip, of which `clock` learns."""
        self._client.send(Ping(time.perf_counter()))

    def ask_transports(self) -> None:
        """Asks for `transports`."""
        self._client.send(AskTransports())

    # Whether it is there

    @property
    def is_up(self) -> bool:
        return self.state is CardState.UP

    @property
    def is_lost(self) -> bool:
        """Whether its process is gone, and no other was started yet."""
        return self.state in (CardState.LOST, CardState.OUT)

    @property
    def is_out(self) -> bool:
        """Whether it is lost for good."""
        return self.state is CardState.OUT

    @property
    def may_restart(self) -> bool:
        """Whether it is lost, its old process has left its device, and the pause before the next is over."""
        is_free = self.state is CardState.LOST and self._is_noted and self._client.is_reaped()
        return is_free and time.monotonic() >= self._restart_at_s

    def poll(self) -> None:
        """Takes in what the card has said; notices that it is gone or silent."""
        if self._client.has_messages():
            self.take_in()
        if self.state not in (CardState.STARTING, CardState.UP):
            return
        try:
            if self._client.is_gone():
                if not self._client.may_have_sent_more():  # its last messages, which say more than its exit status
                    self._lose(self._client.how_it_ended())
            elif self._client.silence_s > self._silence_timeout():
                self._lose(f"its process has said nothing for {self._client.silence_s:.1f} s")
            elif self.is_up and self._client.stalled_s > self.spec.step_timeout_s:
                limit = f"step_timeout_s={self.spec.step_timeout_s}"
                self._lose(f"its process runs, and has stood still for {self._client.stalled_s:.1f} s ({limit})")
            elif self.is_up and self.clock.wants_ping(time.perf_counter()):
                self.ping()
        except ClusterError as error:
            self._failure = error
            self._lose(str(error))

    def take_in(self) -> None:
        """Takes in what the card has said."""
        if self.state not in (CardState.STARTING, CardState.UP):
            return
        try:
            with without_interrupts():  # what was received and not taken in would be missed for ever
                for report in self._client.receive():
                    self._take(report)
        except ClusterError as error:
            self._failure = error
            self._lose(str(error))

    def give_up(self, reason: str) -> None:
        """Takes the card for lost."""
        if self.state in (CardState.STARTING, CardState.UP):
            self._lose(reason)

    def restart(self) -> None:
        """Starts a new process for a lost card. If the system starts none, that counts as a start that failed."""
        assert self.may_restart, "two processes do not share a device"
        self._client.close()
        try:
            self._start()
        except ClusterError as error:
            self._lose(str(error))

    def check_start(self) -> bool:
        """Takes in what the card has said. Returns whether it is up, for the first time.

        Raises:
            ConfigError, ModelLoadError, ...: what the process could not be made for.
            ClusterError: it ended without a reason.
        """
        self.poll()
        if self.is_lost:
            raise self._failure or ClusterError(f"{self.device} cannot be started: {self.reason}")
        return self.is_up

    # The rest of a runner's interface

    def check_workers(self) -> None:
        """Whether its process is there is looked after elsewhere, and ends no other card's work."""

    def diagnose(self, error: DeviceError) -> DeviceError:
        return error

    def take_lane_times(self) -> None:
        """A remote card has no lanes."""

    def get_pipeline_statistics(self) -> dict[str, Any]:
        raise ClusterError(f"{self.device} is in a process of its own, and has no decode pipeline")

    def hang_up(self) -> None:
        """Tells the process to end; waits for nothing."""
        self._client.hang_up()

    def close_workers(self) -> None:
        """Ends the process."""
        self._client.close()

    def close(self) -> None:
        """The process has ended, and its memory with it."""

    # Inside

    def _start(self) -> None:
        self._num_starts += 1
        self.agent = f"{self.device} of start {self._num_starts}"
        self.state, self._failure = CardState.STARTING, None
        self._ready, self._is_noted = None, False
        self.pushes.clear()
        start = Start(
            self._model, self._options, self.device.kind, self.device.index, self.agent, self._explains_transports
        )
        self._client = CardClient(str(self.device), self.agent, start, self._sockets, self._starter)

    def _silence_timeout(self) -> float:
        return self._silence_timeout_s if self.state is CardState.UP else START_TIMEOUT_S

    def _lose(self, reason: str) -> None:
        logger.error("%s is lost: %s", self.device, reason)
        now_s = time.monotonic()
        if self.state is CardState.STARTING:
            self._num_failed_starts += 1
        elif now_s - self._ready_s >= PROVEN_S:
            self._num_failed_starts, self._pause_s = 0, 0.0
        self._restart_at_s = now_s + self._pause_s
        self._pause_s = min(max(FIRST_PAUSE_S, 2 * self._pause_s), LONGEST_PAUSE_S)
        self.state = CardState.OUT if self._num_failed_starts >= MAX_FAILED_STARTS else CardState.LOST
        self.reason = reason
        self._client.kill()
        self.pushes.clear()
        self.forget_device_batch()

    def _take(self, report: Report) -> None:
        if isinstance(report, (StepEnded, StepFailed)):
            step = self._steps.get(report.number)  # None of one that nobody waits for any more
            if step is not None:
                step.take(report)
                if isinstance(report, StepEnded):
                    del self._steps[report.number]
        elif isinstance(report, (Sent, SendFailed, Arrived, ArrivalFailed)):
            push = self.pushes.pop(report.number, None)
            if push is not None:
                push.take(report)
        elif isinstance(report, Transports):
            self.transports = report.by_place
        elif isinstance(report, Pong):
            self.clock.learn(report.sent_s, report.card_s, time.perf_counter())
        elif isinstance(report, Ready):
            self._came_up(report)
        elif isinstance(report, CardFailed):
            self._failure = error_of(report.failure, self.device)
            self._lose(f"{report.failure.kind}: {report.failure.message}")
        elif isinstance(report, InvalidMessage):
            self._failure = ClusterError(report.reason)
            self._lose(f"it refuses a message: {report.reason}")
        else:
            raise ClusterError(f"{self.device} greets twice")

    def _came_up(self, ready: Ready) -> None:
        geometry, spec, before = ready.geometry, self.spec, self._geometry
        if before is not None:
            was, now = (f"{each.num_kv_blocks} {blocks_of(each)}" for each in (before, geometry))
            if was != now:
                raise ClusterError(f"{self.device} had {was}, and has {now} since it was started again")
        self._ready, self._geometry = ready, geometry
        self._options["num_kvcache_blocks"] = geometry.num_kv_blocks  # the next process makes a pool of the same size
        layout = PrefillLayout(
            geometry.max_step_tokens,
            geometry.max_num_chunks,
            spec.max_model_len,
            geometry.block_size,
            geometry.num_kv_blocks,
            pushes=False,
        )
        self._packer = TaskPacker(
            layout,
            DecodeRowTable(geometry.max_num_rows, layout.max_blocks),
            spec.model_config.vocab_size,
            prefill_sizes=geometry.prefill_sizes,
            mixed_sizes=geometry.mixed_sizes,
        )
        self.clock = CardClock(is_ours=ready.host == host_id())
        if self.clock.wants_ping(time.perf_counter()):  # before the first step, whose moments need it
            self.ping()
        self._ready_s = time.monotonic()
        self.state = CardState.UP
        logger.info("%s is up: process %d on %s, %s", self.device, ready.pid, ready.hostname, ready.device)
