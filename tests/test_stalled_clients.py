"""Clients that open a stream and do not read, on real sockets: whom they hold up, what they are given, how they end."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from collections import Counter
from pathlib import Path

import pytest

from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.engine.text.tokenizer import load_tokenizer
from tests.server_process import ANSWERS, PRIMES, ServerProcess, ask, head, metric

for package in ("starlette", "uvicorn", "httptools", "msgspec", "zmq"):
    pytest.importorskip(package, reason="needs the extra `serve`")

NUM_ANSWERS = 8
PROMPT_TOKENS = 900
STREAMED = {"n": NUM_ANSWERS, "logprobs": 20, "echo": True, "stream": True, "ignore_eos": True, "temperature": 0}
"""The log-probabilities of eight prompts are more than all buffers between server and client hold."""


class StalledClient:
    """A connection that has asked for a stream and of which nothing is read until `read_all`."""

    def __init__(self, port, max_tokens):
        token_ids = load_tokenizer(Path(DEMO_MODEL_PATH)).encode(" ".join(ANSWERS.values()))[:PROMPT_TOKENS]
        body = json.dumps({"prompt": token_ids, "max_tokens": max_tokens, **STREAMED}).encode()
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        self._socket.connect(("127.0.0.1", port))
        self._socket.sendall(head("POST", "/v1/completions", len(body), ["Connection: close"]) + body)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._socket.close()

    def read_all(self):
        """Everything to the end of the connection."""
        self._socket.settimeout(30)
        parts = []
        while part := self._socket.recv(1 << 20):
            parts.append(part)
        return b"".join(parts)


def num_ended(server, reason):
    return metric(server, rf'nanovllm_requests_ended_total\{{reason="{reason}"')


def wait_until(holds, within_s=120.0):
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def events_of(response):
    """The data of the events of a response that came in chunks."""
    head_, _, rest = response.partition(b"\r\n\r\n")
    assert head_.startswith(b"HTTP/1.1 200")
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return [event.removeprefix("data: ") for event in body.decode().split("\n\n")[:-1]]


def ask_for_primes(port):
    body = {"messages": [{"role": "user", "content": PRIMES}], "temperature": 0, "max_tokens": 600}
    status, _, content = asyncio.run(ask(port, "POST", "/v1/chat/completions", body))
    assert status == 200
    assert json.loads(content)["choices"][0]["message"]["content"] == ANSWERS[PRIMES]


@pytest.fixture
def start_server(tmp_path):
    made = []

    def start(*arguments):
        made.append(ServerProcess(tmp_path, *arguments))
        return made[-1].await_ready()

    yield start
    for server in made:
        server.kill()


def test_a_client_that_reads_late_gets_all_of_it_and_holds_nobody_up(start_server):
    server = start_server("--shutdown-timeout", "1", "--send-timeout", "0")
    with StalledClient(server.port, max_tokens=200) as client:
        wait_until(lambda: metric(server, r"nanovllm_decode_tokens_total") > 0)
        ask_for_primes(server.port)
        wait_until(lambda: num_ended(server, "length") == NUM_ANSWERS)
        *events, end = events_of(client.read_all())
    assert end == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    num_tokens, num_events = Counter(), Counter()
    for choice in choices:
        num_tokens[choice["index"]] += len(choice["logprobs"]["tokens"])
        num_events[choice["index"]] += 1
    assert num_tokens == dict.fromkeys(range(NUM_ANSWERS), PROMPT_TOKENS + 200)
    # The system's buffers take the first of them, how many is the system's to say.
    assert max(num_events.values()) < 100, "what waited came as one"
    with StalledClient(server.port, max_tokens=1000):
        before = metric(server, r"nanovllm_decode_tokens_total")
        wait_until(lambda: metric(server, r"nanovllm_decode_tokens_total") > before)
        assert server.stop() == 0, "a client that does not read keeps no server alive"


def test_a_client_that_reads_nothing_for_too_long_is_left(start_server):
    server = start_server("--send-timeout", "1")
    with StalledClient(server.port, max_tokens=1100) as client:
        wait_until(lambda: num_ended(server, "abort") == NUM_ANSWERS)
        wait_until(lambda: not metric(server, r'nanovllm_kv_blocks\{.*state="held"'))
        with pytest.raises(ConnectionError):
            client.read_all()
    ask_for_primes(server.port)
    assert server.stop(signal.SIGTERM) == 0
    assert "Traceback" not in server.log.read_text()
