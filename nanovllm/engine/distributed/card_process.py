"""One card in a process of its own: loads the model, runs the steps that a controller sends, pushes KV to other cards.

Decides nothing. `card_client.py` starts this process; it ends when the controller does, however that ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib.metadata
import logging
import os
import platform
import signal
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zmq
from zmq.utils.monitor import recv_monitor_message

from nanovllm.config import EngineConfig
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.engine.builder import check_fp8, runner_spec
from nanovllm.engine.distributed.card_clock import host_id
from nanovllm.engine.distributed.card_messages import (
    VERSION,
    AddPeer,
    ArrivalFailed,
    Arrived,
    AskTransports,
    CancelExpected,
    CardFailed,
    Command,
    Contact,
    Expect,
    Geometry,
    Heartbeat,
    Hello,
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
    decode_command,
    decode_contact,
    encode,
)
from nanovllm.engine.distributed.kv_nixl import KVAgent, NixlPush, log_transports, transports_in
from nanovllm.engine.distributed.messages import Failure
from nanovllm.engine.execution.step_handle import StepHandle
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.errors import ClusterError, HandoffError
from nanovllm.utils.checkpoint import checkpoint_folder, read_json
from nanovllm.utils.device import Device, DoneEvent
from nanovllm.utils.process import end_process
from nanovllm.version import __version__

logger = logging.getLogger(__name__)

HEARTBEAT_S = 0.25
"""Seconds from one heartbeat to the next."""
IDLE_WAIT_MS = 1000
CPU_REST_S = 200e-6
"""Seconds between two looks at work in flight on a CPU, where the other cards compute on the same cores."""
PEER_GONE_S = 1.0
"""Seconds from the news that a card is gone to the moment when nothing of what it pushed is still being written here:
what had left it may lie in this host's sockets, from where NIXL's own thread writes it into the pool."""
REMOTE_PEER_GONE_S = 5.0
"""The same for a card of another host, whose system may send on what the card had written into its sockets."""
CONNECT_TIMEOUT_S = 30.0
"""Seconds within which a controller on another host has to be reached."""
PR_SET_PDEATHSIG = 1
LAST_MESSAGE_MS = 1000


@dataclass(frozen=True)
class WaitingPush:
    """A push whose step has not ended, or which is under way."""

    ask: Push
    under_way: NixlPush | None = None


class Progress:
    """When the thread that runs steps has last begun a turn of its loop; nothing before the first one."""

    def __init__(self) -> None:
        self._turned_s: float | None = None

    def turned(self) -> None:
        """A turn begins."""
        self._turned_s = time.monotonic()

    def stalled_s(self) -> float:
        """Seconds since then."""
        return 0.0 if self._turned_s is None else time.monotonic() - self._turned_s


class CardServer:
    """Does what a controller says, on one runner.

    Args:
        runner: runs steps.
        agent: pushes blocks, and is notified of those that arrive.
        socket: to the controller.
        progress: is told of every turn.
        ucx_log: the file that UCX writes its log to, None if it writes none.
    """

    def __init__(
        self,
        runner: ModelRunner,
        agent: KVAgent,
        socket: zmq.Socket[bytes],
        progress: Progress,
        ucx_log: str | None,
    ) -> None:
        self._runner = runner
        self._agent = agent
        self._socket = socket
        self._progress = progress
        self._ucx_log = ucx_log
        self._host = host_id()
        self._host_of: dict[str, str] = {}
        """The hosts of the other cards, by agent."""
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._steps: deque[tuple[int, StepHandle]] = deque()
        self._last_ended = 0
        self._failed_batch = -1
        self._not_run: set[int] = set()
        """Steps that failed, or came behind one of their batch that did."""
        self._pushes: list[WaitingPush] = []
        self._expected: dict[int, Expect] = {}
        self._came_early: set[int] = set()
        """Pushes that have arrived before they were announced."""
        self._leaving: list[tuple[float, int]] = []
        """Expected pushes of cards that are gone: from when on nothing is written any more, and their numbers."""

    def run(self) -> None:
        """Serves for ever."""
        while True:
            self._progress.turned()
            is_busy = bool(self._steps or self._pushes or self._expected or self._leaving)
            if self._poller.poll(0 if is_busy else IDLE_WAIT_MS):
                self._take_in_all()
            elif is_busy:
                time.sleep(0 if self._runner.device.is_cuda else CPU_REST_S)
            self._report_steps()
            self._look_after_pushes()
            self._look_for_arrivals()

    def send(self, report: Report) -> None:
        self._socket.send(encode(report), zmq.NOBLOCK)

    def _take_in_all(self) -> None:
        while self._poller.poll(0):
            data = self._socket.recv(zmq.NOBLOCK)
            try:
                command = decode_command(data)
            except ClusterError as error:
                logger.error("%s", error)
                self.send(InvalidMessage(str(error)))
                continue
            self._take_in(command)
            self._report_steps()

    def _take_in(self, command: Command) -> None:
        if isinstance(command, Launch):
            self._launch(command)
        elif isinstance(command, Push):
            self._pushes.append(WaitingPush(command))
        elif isinstance(command, Expect):
            self._expected[command.number] = command
        elif isinstance(command, CancelExpected):
            self._expect_no_more([command.number])
        elif isinstance(command, AddPeer):
            self._add_peer(command)
        elif isinstance(command, RemovePeer):
            self._remove_peer(command.agent)
        elif isinstance(command, AskTransports):
            self.send(Transports(self._transports()))
        elif isinstance(command, Ping):
            self.send(Pong(command.sent_s, time.perf_counter()))
        else:
            self.send(InvalidMessage("a card is started once"))

    def _transports(self) -> dict[str, list[str]]:
        if self._ucx_log is None:
            return {}
        ctypes.CDLL(None).fflush(None)  # UCX's log is a stream of the C library
        return transports_in(Path(self._ucx_log).read_text(errors="replace"))

    # Steps

    def _launch(self, launch: Launch) -> None:
        if launch.batch == self._failed_batch:
            self._not_run.add(launch.number)
            return
        try:
            handle = self._runner.launch_task(launch.task)
        except Exception as error:
            if self._runner.device.lost_reason() is not None:
                raise
            logger.warning("step %d failed", launch.number, exc_info=True)
            self._runner.synchronize(copies=False)  # what was launched of it may write to its blocks
            self._failed_batch = launch.batch
            self._not_run.add(launch.number)
            self.send(StepFailed(launch.number, Failure.of(error)))
            return
        self._steps.append((launch.number, handle))

    def _report_steps(self) -> None:
        while self._steps and self._steps[0][1].is_done():
            number, handle = self._steps.popleft()
            ended = StepEnded.of(number, handle.moments(), handle.collect())
            self._last_ended = number
            self.send(ended)

    # Pushes

    def _add_peer(self, peer: AddPeer) -> None:
        self._host_of[peer.agent] = peer.host
        try:
            self._agent.add_peer(peer.agent, peer.metadata, peer.pool_address, peer.pool_device)
        except HandoffError as error:  # pushes there fail, and say so
            logger.error("%s", error)

    def _remove_peer(self, name: str) -> None:
        for push in [push for push in self._pushes if push.ask.agent == name]:
            if push.under_way is not None:
                push.under_way.end()
            self._pushes.remove(push)
            self.send(SendFailed(push.ask.number, f"{name} is gone"))
        self._agent.remove_peer(name)
        self._expect_no_more([number for number, expected in self._expected.items() if expected.agent == name])

    def _look_after_pushes(self) -> None:
        for push in list(self._pushes):
            step = push.ask.after_step
            try:
                if step in self._not_run:
                    raise HandoffError("the step that computes the blocks has failed")
                if step > self._last_ended:
                    continue
                if push.under_way is None:
                    under_way = self._agent.push(push.ask.number, push.ask.agent, push.ask.blocks)
                    self._pushes[self._pushes.index(push)] = WaitingPush(push.ask, under_way)
                elif push.under_way.is_done():
                    self._pushes.remove(push)
                    checksums = self._checksums(push.ask.blocks[0]) if push.ask.verifies else None
                    self.send(Sent(push.ask.number, push.under_way.began_s, time.perf_counter(), checksums))
            except HandoffError as error:
                self._pushes.remove(push)
                self.send(SendFailed(push.ask.number, str(error)))

    def _look_for_arrivals(self) -> None:
        if not (self._expected or self._leaving):
            return
        self._came_early.update(self._agent.arrived())
        for number in self._expected.keys() & self._came_early:
            expected = self._expected.pop(number)
            self._came_early.remove(number)
            checksums = self._checksums(expected.blocks) if expected.verifies else None
            self.send(Arrived(number, checksums))
        now_s = time.monotonic()
        for until_s, number in list(self._leaving):
            if now_s >= until_s:
                self._leaving.remove((until_s, number))
                self._came_early.discard(number)
                self.send(ArrivalFailed(number, "the card that pushed is gone, or has failed to"))

    def _expect_no_more(self, numbers: list[int]) -> None:
        for number in numbers:
            expected = self._expected.pop(number, None)
            if expected is not None:
                is_near = self._host_of.get(expected.agent) == self._host
                until_s = time.monotonic() + (PEER_GONE_S if is_near else REMOTE_PEER_GONE_S)
                self._leaving.append((until_s, number))

    def _checksums(self, blocks: np.ndarray) -> np.ndarray:
        return np.asarray(self._runner.checksum_blocks(blocks.tolist(), DoneEvent()).numpy())


def main(device_index: int | None = None, *, ends_with_parent: bool = False) -> None:
    """The whole life of the process; its standard input is a socket to the process that started it.

    Args:
        device_index: the device to use instead of the one that the controller names.
        ends_with_parent: whether the system kills this process when the thread that has started it ends.
    """
    link = _take_link()
    if ends_with_parent:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    contact = _read_contact(link)
    logging.basicConfig(
        level=contact.log_level, format=f"%(asctime)s %(levelname)s {contact.card} %(name)s: %(message)s"
    )
    faulthandler.register(signal.SIGUSR1)  # so that a process that hangs can be asked where
    threading.Thread(target=_end_with, args=(link,), name="watch", daemon=True).start()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    # No limit to what waits: steps go on, whether the controller reads or not.
    messages = _connected(context, zmq.DEALER, contact, contact.messages, most_waiting=0)
    heartbeats = _connected(context, zmq.PUSH, contact, contact.heartbeats, most_waiting=1)
    progress = Progress()
    threading.Thread(
        target=_send_heartbeats, args=(heartbeats, progress, contact), name="heartbeat", daemon=True
    ).start()
    messages.send(encode(Hello(VERSION)))
    try:
        _serve(messages, progress, device_index)
    except BaseException as error:
        logger.exception("the process of %s ends", contact.card)
        messages.linger = LAST_MESSAGE_MS
        messages.send(encode(CardFailed(Failure.of(error))))
        messages.close()
        context.term()
        end_process(1)


def _serve(messages: zmq.Socket[bytes], progress: Progress, device_index: int | None) -> None:
    start = decode_command(messages.recv())
    if not isinstance(start, Start):
        raise ClusterError(f"the first message starts a card, this one is a {type(start).__name__}")
    device = Device(start.device_kind, start.device_index if device_index is None else device_index)
    if device.is_cuda:
        torch.cuda.set_device(device.index)  # NIXL registers memory in the current device's context
    config = EngineConfig.from_options(start.model or str(DEMO_MODEL_PATH), start.options)
    folder = checkpoint_folder(config.model, config.revision)
    spec = runner_spec(config, folder, read_json(folder, "config.json") or {}, device)
    check_fp8(spec.model_config, [device])
    max_prefill_tokens = config.max_num_batched_tokens
    runner = ModelRunner(spec, device, is_decode_runner=True, max_prefill_tokens=max_prefill_tokens)
    ucx_log = None
    if start.explains_transports:
        ucx_log = f"/proc/self/fd/{os.memfd_create('ucx.log')}"  # which goes with this process
        log_transports(ucx_log)
    agent = KVAgent(start.agent, runner.kv_pool, device)
    gc.freeze()  # what is loaded stays, and need not be looked through
    server = CardServer(runner, agent, messages, progress, ucx_log)
    where = os.getpid(), host_id(), socket.gethostname(), str(device), about_host(device)
    server.send(Ready(_geometry(runner), *where, agent.metadata, agent.pool_address, agent.pool_device))
    with torch.inference_mode():
        server.run()


def about_host(device: Device) -> dict[str, str]:
    """Versions of what has to be the same everywhere, and where the device is."""
    found = {"nanovllm": __version__, "python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in ("torch", "nixl-cu13")}
    if device.is_cuda:
        found["GPU"] = torch.cuda.get_device_name(device.index)
        found["NUMA node"] = _numa_node(device.index)
    return found


def _numa_node(index: int) -> str:
    card: Any = torch.cuda.get_device_properties(index)  # these three are missing in its types
    address = f"{card.pci_domain_id:04x}:{card.pci_bus_id:02x}:{card.pci_device_id:02x}.0"
    file = Path(f"/sys/bus/pci/devices/{address}/numa_node")
    return file.read_text().strip() if file.exists() else "unknown"


def _geometry(runner: ModelRunner) -> Geometry:
    layout = runner.prefill.layout
    return Geometry(
        runner.num_kv_blocks,
        runner.block_size,
        runner.spec.block_bytes,
        runner.max_prefill_tokens,
        layout.max_num_tokens,
        layout.max_num_requests,
        runner.decode.max_num_rows,
        list(runner.prefill.sizes),
        list(runner.mixed.sizes),
    )


def _connected(
    context: zmq.Context[zmq.Socket[bytes]], kind: int, contact: Contact, endpoint: str, most_waiting: int
) -> zmq.Socket[bytes]:
    made = context.socket(kind)
    made.linger = 0
    made.sndhwm = most_waiting
    if contact.controller_timeout_s:
        # A card is taken for lost after this time: it has to end before.
        made.heartbeat_ivl, made.heartbeat_timeout = (int(contact.controller_timeout_s * 1e3 / n) for n in (4, 2))
    made.curve_serverkey = contact.controller_key
    made.curve_publickey, made.curve_secretkey = contact.public_key, contact.secret_key
    made.connect(endpoint)
    return made


def _send_heartbeats(heartbeats: zmq.Socket[bytes], progress: Progress, contact: Contact) -> None:
    """Says again and again that the process runs, whatever its other threads wait for.

    Also ends it when the controller is gone, or cannot be reached, if the contact says so.
    """
    monitor = heartbeats.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
    began_s, is_connected = time.monotonic(), False
    try:
        while True:
            with contextlib.suppress(zmq.Again):  # nobody has read those before
                heartbeats.send(encode(Heartbeat(progress.stalled_s())), zmq.NOBLOCK)
            if not monitor.poll(int(HEARTBEAT_S * 1e3)):
                if not is_connected and time.monotonic() - began_s > CONNECT_TIMEOUT_S:
                    logger.error("the controller cannot be reached at %s; is there a firewall?", contact.heartbeats)
                    end_process(1)
                continue
            is_connected = recv_monitor_message(monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if not is_connected and contact.controller_timeout_s:
                logger.error("the controller is gone, or not to be reached any more")
                end_process(0)
    except zmq.ContextTerminated:  # the process ends
        pass
    finally:  # the end of the context waits until all are closed
        with contextlib.suppress(zmq.ContextTerminated):
            heartbeats.disable_monitor()
        monitor.close()
        heartbeats.close()


def _end_with(link: socket.socket) -> None:
    """Ends the process when the controller is gone: there is nothing to save."""
    try:
        link.recv(1)  # nothing more is ever sent, so that this is its end
    finally:  # a link that is reset is at its end, too
        os._exit(0)


def _read_contact(link: socket.socket) -> Contact:
    with link.makefile("rb", buffering=0) as incoming:
        length = int.from_bytes(_read(incoming, 4), "little")
        return decode_contact(_read(incoming, length))


def _read(incoming: socket.SocketIO, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = incoming.read(size - len(data))
        if not part:
            os._exit(0)  # the controller is gone
        data += part
    return data


def _take_link() -> socket.socket:
    """The socket that is standard input, moved where processes that this one starts do not inherit it."""
    link = socket.socket(fileno=os.dup(0))
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    return link
