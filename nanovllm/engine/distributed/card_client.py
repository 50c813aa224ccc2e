"""The controller's end of a card's process: has it started, sends and receives, notices that it is gone or silent.

Everything between the two is encrypted and authenticated by ZMQ's CURVE. The keys of a card are made when its process
is started, and whoever starts it hands them over.
"""

from __future__ import annotations

import contextlib
import logging
import time

import zmq
from zmq.auth.thread import ThreadAuthenticator

from nanovllm.engine.distributed.card_messages import (
    VERSION,
    Command,
    Contact,
    Hello,
    Report,
    Start,
    decode_heartbeat,
    decode_report,
    encode,
)
from nanovllm.engine.distributed.card_starter import CardStarter
from nanovllm.errors import ClusterError

LEAST_LOOK_S = 0.02
"""Seconds from one look whether the process is there to the next."""
MOST_SILENCE_PER_LOOK_S = 0.1
"""Silence is counted only while somebody listens: of a longer time between two looks no more than this counts."""
LAST_MESSAGES_S = 0.5
"""Seconds for which what a process has said before its end may be on the way."""


class CardSockets:
    """Lets a card's keys, and no others, into the sockets that are made here. A context of ZMQ and its thread."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._allowed: dict[str, bytes] = {}
        self._poller = zmq.Poller()
        self._agents: dict[zmq.Socket[bytes], str] = {}
        self._authenticator = ThreadAuthenticator(self.context)
        self._authenticator.start()

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a client with this public key may connect to the sockets of a domain; called by ZMQ."""
        return self._allowed.get(domain) == key

    def allow(self, domain: str, key: bytes) -> None:
        """Lets clients with this public key into the sockets of a domain."""
        self._allowed[domain] = key
        self._authenticator.configure_curve_callback(domain, credentials_provider=self)

    def revoke(self, domain: str) -> None:
        """Lets nobody in any more."""
        self._allowed.pop(domain, None)

    def watch(self, messages: zmq.Socket[bytes], agent: str) -> None:
        """Counts a socket among those of `agents_with_messages`."""
        self._poller.register(messages, zmq.POLLIN)
        self._agents[messages] = agent

    def unwatch(self, messages: zmq.Socket[bytes]) -> None:
        """Stops watching a socket."""
        if self._agents.pop(messages, None) is not None:
            self._poller.unregister(messages)

    def agents_with_messages(self, timeout_ms: int) -> set[str]:
        """The agents that have said something; waits up to `timeout_ms` milliseconds for the first."""
        return {self._agents[messages] for messages, _ in self._poller.poll(timeout_ms)}

    def socket(self, kind: int, domain: str, secret_key: bytes, address: str) -> tuple[zmq.Socket[bytes], str]:
        """A socket on a free port of an address that only the key of the domain gets into, and its endpoint."""
        made = self.context.socket(kind)
        made.linger = 0
        made.sndhwm = 0  # the loop never waits for a card
        made.curve_server = True
        made.curve_secretkey = secret_key
        made.zap_domain = domain.encode()
        made.bind(f"tcp://{address}:*")
        return made, made.getsockopt_string(zmq.LAST_ENDPOINT)

    def close(self) -> None:
        if self._authenticator.is_alive():
            self._authenticator.stop()
        self.context.destroy(linger=0)


class CardClient:
    """A card's process, and the sockets to it.

    Args:
        card: the card's name.
        agent: the name of this process of the card, which no other has.
        start: what the process is told once it has said hello.
        sockets: makes the sockets.
        starter: starts the process.

    Attributes:
        controller_key: the public key of this end.
        silence_s: seconds for which nothing has come while somebody listened.
        stalled_s: seconds for which the process, which runs, has stood still, by its last heartbeat.

    Raises:
        ClusterError: the process cannot be started.
    """

    def __init__(self, card: str, agent: str, start: Start, sockets: CardSockets, starter: CardStarter) -> None:
        self.card = card
        self.silence_s = self.stalled_s = 0.0
        self._agent, self._start = agent, start
        self._sockets = sockets
        self._looked_s = time.monotonic()
        self._is_gone = self._has_greeted = False
        self._gone_s = 0.0
        self.controller_key, controller_secret = zmq.curve_keypair()
        public_key, secret_key = zmq.curve_keypair()
        sockets.allow(agent, public_key)
        self._messages, messages = sockets.socket(zmq.DEALER, agent, controller_secret, starter.address)
        self._heartbeats, heartbeats = sockets.socket(zmq.PULL, agent, controller_secret, starter.address)
        sockets.watch(self._messages, agent)
        contact = Contact(
            card,
            messages,
            heartbeats,
            self.controller_key,
            public_key,
            secret_key,
            starter.controller_timeout_s,
            logging.getLogger("nanovllm").getEffectiveLevel(),
        )
        try:
            self._process = starter.start(start.device_index, card, encode(contact))
        except ClusterError:
            self._close_sockets()
            raise

    def send(self, command: Command) -> None:
        """Sends without waiting. A message to a process that is gone is dropped."""
        if not self._messages.closed:
            with contextlib.suppress(zmq.Again):
                self._messages.send(encode(command), zmq.NOBLOCK)

    def has_messages(self) -> bool:
        """Whether `receive` would find something."""
        return not self._messages.closed and bool(int(self._messages.get(zmq.EVENTS)) & zmq.POLLIN)

    def receive(self) -> list[Report]:
        """All that has come.

        Raises:
            ClusterError: the process is of another version, or says what cannot be understood.
        """
        reports: list[Report] = []
        if self._messages.closed:
            return reports
        with contextlib.suppress(zmq.Again):
            while True:
                report = decode_report(self._messages.recv(zmq.NOBLOCK))
                self.silence_s = 0.0
                if not self._has_greeted:
                    self._check_hello(report)
                else:
                    reports.append(report)
        return reports

    def is_gone(self) -> bool:
        """Whether the process has ended. Also counts `silence_s`.

        Raises:
            ClusterError: the process says what cannot be understood.
        """
        now_s = time.monotonic()
        if self._is_gone or now_s - self._looked_s < LEAST_LOOK_S:
            return self._is_gone
        self.silence_s += min(now_s - self._looked_s, MOST_SILENCE_PER_LOOK_S)
        self._looked_s = now_s
        with contextlib.suppress(zmq.Again):
            while True:
                self.stalled_s = decode_heartbeat(self._heartbeats.recv(zmq.NOBLOCK)).stalled_s
                self.silence_s = 0.0
        self._is_gone = self._process.has_ended()
        self._gone_s = now_s
        return self._is_gone

    def may_have_sent_more(self) -> bool:
        """Whether what the process, which is gone, has said before its end may still be on the way."""
        return not self._process.was_killed() and time.monotonic() - self._gone_s < LAST_MESSAGES_S

    def is_reaped(self) -> bool:
        """Whether the process, which is gone or was killed, has left nothing behind on its device."""
        return self._process.is_reaped()

    def how_it_ended(self) -> str:
        """How the process has ended, in words; does not wait for it."""
        return self._process.how_it_ended()

    def kill(self) -> None:
        """Ends the process, also one that is stopped or hangs; waits for nothing. Its sockets are closed."""
        self._is_gone = True
        self._process.kill()
        self._close_sockets()

    def hang_up(self) -> None:
        """Tells the process to end; waits for nothing."""
        self._is_gone = True
        self._process.hang_up()

    def close(self) -> None:
        """Ends the process and waits for it, but not for ever. A second call does nothing."""
        self._is_gone = True
        self._process.close()
        self._close_sockets()

    def _close_sockets(self) -> None:
        self._sockets.revoke(self._agent)
        self._sockets.unwatch(self._messages)
        self._messages.close()
        self._heartbeats.close()

    def _check_hello(self, report: Report) -> None:
        if not isinstance(report, Hello):
            raise ClusterError(f"{self.card} does not greet first; it is of another version than {VERSION!r}")
        if report.version != VERSION:
            raise ClusterError(
                f"{self.card} runs {report.version!r}, the controller {VERSION!r}; install the same version for both"
            )
        self._has_greeted = True
        self.send(self._start)
