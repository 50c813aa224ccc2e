"""The engine in a process of its own: takes requests from one client and tells it of their tokens, a message a step.

Knows nothing of texts, which are the client's: what comes and goes are token ids. The loop never waits for the client.
`engine_client.py` starts this process; it ends when the client does, however that ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import os
import shutil
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import zmq

from nanovllm.engine.distributed.messages import (
    Abort,
    Add,
    Answer,
    Ask,
    Command,
    Ended,
    Failure,
    NotReady,
    Ready,
    Report,
    Start,
    Tokens,
    decode_command,
    encode,
    tokens_of,
)
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import EngineClosedError, NanoVLLMError, UnknownRequestError
from nanovllm.utils.device import leak_until_exit
from nanovllm.utils.process import end_process

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 20.0
"""How long the engine may take to close before the process ends without it."""

LAST_WORDS_MS = 1000
"""How long messages that have not left may take at the end."""
REASON_MS = 60_000
"""How long the reason why there is no engine may take to leave. If the client is gone, the process ends at once."""


class ServedEngine(LLMEngine):
    """An engine whose requests come and go as token ids."""

    def __init__(self, model: str, **options: Any) -> None:
        super().__init__(model, **options)
        self._intake = dataclasses.replace(self._intake, tokenizer=None)  # so that nothing is turned into text

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing is to be done before the next request; not so once it is closed."""
        is_busy = self._outputs.sequences or self._mailbox.arrived or self._inbox or self._steps or self._handoffs
        return not (self._closed or is_busy)

    def step_tokens(self) -> Tokens:
        """`step`, as a message."""
        return self._step(tokens_of)

    def _free_devices(self) -> None:
        """Leaves that to the end of the process, which follows: the driver takes all back at once."""
        leak_until_exit(*self._runners)

    def limits(self) -> Ready:
        intake = self._intake
        return Ready(intake.vocab_size, intake.max_model_len, intake.pool_tokens, sorted(intake.eos_ids), intake.seed)


class Outbox:
    """Sends to the client, and never waits for it. For one thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], folder: Path) -> None:
        self._socket = context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # no limit to what waits: the loop goes on
        self._socket.setsockopt(zmq.LINGER, LAST_WORDS_MS)
        self._socket.connect(f"ipc://{folder}/reports")

    def send(self, message: Report) -> None:
        self._socket.send(encode(message), zmq.NOBLOCK)

    def close(self, last_words_ms: int = LAST_WORDS_MS) -> None:
        self._socket.close(linger=last_words_ms)


class Receiver:
    """Takes in what the client asks, in a thread of its own, while the loop runs; answers questions by itself.

    Args:
        engine: gets the requests. Every one of its methods may be called from any thread.
        commands: where they come from.
        link: a socket that reads as ended once the client has closed it, or is gone.
        outbox: of this thread.
        bell: is set when there may be something to do.
    """

    def __init__(
        self,
        engine: ServedEngine,
        commands: zmq.Socket[bytes],
        link: socket.socket,
        outbox: Outbox,
        bell: threading.Event,
    ) -> None:
        self._engine = engine
        self._commands = commands
        self._link = link
        self._outbox = outbox
        self._bell = bell

    def run(self) -> None:
        """Until the client is gone; then closes the engine, which ends the loop."""
        try:
            poller = zmq.Poller()
            poller.register(self._commands, zmq.POLLIN)
            poller.register(self._link.fileno(), zmq.POLLIN)
            while True:
                ready = dict(poller.poll())
                if self._link.fileno() in ready:
                    return
                self._take_in(decode_command(self._commands.recv()))
                self._bell.set()
        finally:
            last_resort = threading.Timer(CLOSE_TIMEOUT_S, os._exit, (1,))
            last_resort.daemon = True
            last_resort.start()
            self._engine.close()
            self._bell.set()
            self._outbox.close()
            self._commands.close()

    def _take_in(self, command: Command) -> None:
        if isinstance(command, Add):
            self._add(command)
        elif isinstance(command, Abort):
            with contextlib.suppress(UnknownRequestError):  # it has ended meanwhile
                self._engine.abort(command.request_id)
        else:
            assert isinstance(command, Ask), "an engine is started once"
            self._answer(command)

    def _add(self, command: Add) -> None:
        try:
            request_id = self._engine.add_request(command.prompt_token_ids, command.params)
        except NanoVLLMError as error:
            self._outbox.send(Tokens([], [], [Ended(command.request_id, "error", Failure.of(error))]))
            return
        assert request_id == command.request_id, "the client counts requests as the engine does"

    def _answer(self, question: Ask) -> None:
        try:
            self._outbox.send(Answer(question.number, self._found(question.request_id)))
        except NanoVLLMError as error:
            self._outbox.send(Answer(question.number, failure=Failure.of(error)))

    def _found(self, request_id: int | None) -> Any:
        if request_id is None:
            return self._engine.metrics()
        return [(span.what, span.start_s) for span in self._engine.explain(request_id).spans()]


def serve(engine: ServedEngine, outbox: Outbox, bell: threading.Event) -> None:
    """Runs the engine's loop until the engine is closed; sleeps while there is nothing to do."""
    with contextlib.suppress(EngineClosedError):
        while True:
            bell.clear()
            if engine.is_at_rest:
                bell.wait()
            tokens = engine.step_tokens()
            if tokens.request_ids or tokens.ended:
                outbox.send(tokens)


def main() -> None:
    """The whole life of the process; its argument is the folder of the sockets, its standard input the client's end."""
    folder = Path(sys.argv[1])
    link = _take_link()
    is_made = threading.Event()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        commands = context.socket(zmq.PULL)
        commands.setsockopt(zmq.RCVHWM, 0)
        commands.bind(f"ipc://{folder}/commands")
        # From here on, since a file that is made while the folder is removed would keep it.
        threading.Thread(target=_end_if_alone, args=(link, is_made, folder), name="watch", daemon=True).start()
        start = decode_command(commands.recv())
        assert isinstance(start, Start), "the first message starts the engine"
        logging.basicConfig(level=start.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        outbox = Outbox(context, folder)
        engine = _made(start, outbox)
        is_made.set()
        gc.freeze()  # what is loaded stays: to look through it took a collection 125 ms, in which no step is launched
        bell = threading.Event()
        receiver = Receiver(engine, commands, link, Outbox(context, folder), bell)
        thread = threading.Thread(target=receiver.run, name="receiver")
        outbox.send(engine.limits())
        thread.start()
        try:
            serve(engine, outbox, bell)
        finally:
            # If the loop broke, nobody will close the link; to shut it down ends the receiver, too.
            link.shutdown(socket.SHUT_RDWR)
            thread.join()
            outbox.close()
    finally:
        context.term()
        shutil.rmtree(folder, ignore_errors=True)
    end_process(0)


def _end_if_alone(link: socket.socket, is_made: threading.Event, folder: Path) -> None:
    """Ends the process if the client is gone before the engine is made; later the receiver sees to that."""
    link.recv(1)  # nothing is ever sent, so that this is its end
    if not is_made.is_set():
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)


def _made(start: Start, outbox: Outbox) -> ServedEngine:
    try:
        return ServedEngine(start.model, **start.options)
    except Exception as error:
        outbox.send(NotReady(Failure.of(error)))
        outbox.close(REASON_MS)
        if isinstance(error, NanoVLLMError):
            sys.exit(1)  # the client says what it was
        raise


def _take_link() -> socket.socket:
    """The socket that is standard input, moved where processes that this one starts do not inherit it."""
    link = socket.socket(fileno=os.dup(0))
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    return link
