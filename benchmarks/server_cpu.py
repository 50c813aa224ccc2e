"""CPU of the server's process for each token that it streams over HTTP, and for each request that it takes in.

A token is detokenizing, stop strings, JSON and sending; a request is all else, from its connection on.

Needs no GPU. Behind the server is an engine that computes nothing: it answers each prompt with itself, a token of each
stream a step, on time whatever the server does. `--streams` clients on 127.0.0.1 read as fast as they can; the clients
are this process, which does not count. The tokenizer is the bundled model's. Each round is a new server.

With 8 tokens waiting, the engine tells of eight steps at once, and the server finds eight tokens of each stream, as it
does when it has fallen behind: they leave as one event. Otherwise each token has an event of its own unless the machine
is busy, which `events_per_token` says. Shown are the best round and the median of all. Each stream has two stop
strings, which it never reaches.

Requests are those of 16 clients that ask again and again, each time by a new connection, for a stream of four tokens,
which are counted with the request. Their prompts are 450 token ids, or a chat of some hundreds.
"""

from __future__ import annotations

import json
import math
import select
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from lib.arguments import new_parser
from lib.report import report
from lib.server_process import ServerFailedError, ServerProcess
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.engine.text.chat import ChatTemplate
from nanovllm.engine.text.tokenizer import load_tokenizer
from nanovllm.errors import ends_with_message

ECHO_ENGINE = Path(__file__).parent / "lib" / "echo_engine.py"
MAX_TOKENS = 1_000_000
"""More than a stream lasts: it ends when its client leaves."""
ANSWERS_IN_A_PROMPT = 10
REQUESTS_AT_A_TIME = 16
TOKENS_OF_A_PROMPT = 450
TOKENS_OF_AN_ANSWER = 4
WARM_UP_S = 1.0
START_TIMEOUT_S = 60.0
RECEIVE_BYTES = 1 << 18


@dataclass(frozen=True)
class Load:
    """What the streams ask for.

    Attributes:
        name: as it is shown.
        is_chat: whether it is a chat, or a completion.
        more: parameters of the body.
        steps_at_once: of the engine.
    """

    name: str
    is_chat: bool
    more: dict[str, Any]
    steps_at_once: int = 1


STOP = {"stop": ["User:", "###"]}
USAGE = {"stream_options": {"include_usage": True}}
LOADS = (
    Load("completions", False, STOP),
    Load("chats, with usage", True, STOP | USAGE),
    Load("completions, 8 tokens waiting", False, STOP, steps_at_once=8),
)


@dataclass(frozen=True)
class Prompt:
    """What one stream sends, and what it gets again and again."""

    content: str
    period: str
    token_ids: list[int]


def prompts_of(load: Load, count: int) -> list[Prompt]:
    """Makes `count` prompts of the bundled model's answers, with what the engine sees and gives back of each."""
    pairs = json.loads((Path(DEMO_MODEL_PATH) / "questions.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(Path(DEMO_MODEL_PATH))
    assert tokenizer is not None, "the bundled model has a tokenizer"
    made = []
    for number in (index % len(pairs) for index in range(count)):
        content = "".join(pair["answer"] + "\n" for pair in (pairs[number:] + pairs)[:ANSWERS_IN_A_PROMPT])
        messages = [{"role": "user", "content": content}]
        rendered = ChatTemplate(tokenizer).render(messages) if load.is_chat else content
        token_ids = tokenizer.encode(rendered, add_special_tokens=not load.is_chat)
        made.append(Prompt(content, str(tokenizer.decode(token_ids, skip_special_tokens=True)), token_ids))
    return made


def call_of(load: Load, prompt: str | list[int], max_tokens: int = MAX_TOKENS, more_lines: Sequence[str] = ()) -> bytes:
    """A request as it is sent, with more lines in its head."""
    asked = {"messages": [{"role": "user", "content": prompt}]} if load.is_chat else {"prompt": prompt}
    body = json.dumps({**asked, "stream": True, "max_tokens": max_tokens, "temperature": 0, **load.more}).encode()
    path = "/v1/chat/completions" if load.is_chat else "/v1/completions"
    lines = (f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}", *more_lines)
    return "\r\n".join((*lines, "", "")).encode() + body


def short_calls(is_chat: bool) -> list[bytes]:
    """Requests of a short answer."""
    load = Load("", is_chat, {"min_tokens": TOKENS_OF_AN_ANSWER, "ignore_eos": True, **USAGE})
    made = []
    for prompt in prompts_of(load, REQUESTS_AT_A_TIME):
        token_ids = prompt.token_ids * math.ceil(TOKENS_OF_A_PROMPT / len(prompt.token_ids))
        given: str | list[int] = prompt.content if is_chat else token_ids[:TOKENS_OF_A_PROMPT]
        made.append(call_of(load, given, TOKENS_OF_AN_ANSWER, more_lines=("Connection: close",)))
    return made


class Readers:
    """Connections, each with a stream of events, and what has come of each."""

    def __init__(self, port: int, calls: Sequence[bytes]) -> None:
        self._sockets = [socket.create_connection(("127.0.0.1", port)) for _ in calls]
        self._places = {each.fileno(): place for place, each in enumerate(self._sockets)}
        self._poll = select.epoll()
        self.data = [bytearray() for _ in calls]
        for each, call in zip(self._sockets, calls, strict=True):
            each.sendall(call)
            self._poll.register(each.fileno(), select.EPOLLIN)

    def read(self, timeout_s: float) -> None:
        """Takes in what has come, after waiting for that.

        Raises:
            ServerFailedError: a connection has ended.
        """
        for number, _ in self._poll.poll(timeout_s):
            place = self._places[number]
            part = self._sockets[place].recv(RECEIVE_BYTES)
            if not part:
                raise ServerFailedError(f"a stream has ended: {bytes(self.data[place][-1000:])!r}")
            self.data[place] += part

    def close(self) -> None:
        self._poll.close()
        for each in self._sockets:
            each.close()


def texts_of(data: bytes) -> list[str]:
    """The texts of the events in a part of a response, which neither begins nor ends with a whole event."""
    texts = []
    for line in data.split(b"\n")[1:-1]:
        if line.startswith(b"data: "):
            (choice,) = json.loads(line[6:])["choices"]
            texts.append(choice["delta"].get("content", "") if "delta" in choice else choice["text"])
    return texts


def measure(load: Load, num_streams: int, step_s: float, seconds: float) -> dict[str, float]:
    """CPU of a new server's process for each token.

    Raises:
        ServerFailedError: a stream has ended, or had a text that is not its own.
    """
    prompts = prompts_of(load, num_streams)
    program = (str(ECHO_ENGINE), str(step_s), str(load.steps_at_once))
    options = {"max_num_seqs": num_streams}
    with ServerProcess(str(DEMO_MODEL_PATH), options, (), program=program) as server:
        readers = Readers(server.port, [call_of(load, prompt.content) for prompt in prompts])
        began = time.perf_counter()
        while any(data.count(b"data: ") < 2 for data in readers.data):
            readers.read(1.0)
            if time.perf_counter() > began + START_TIMEOUT_S:
                raise ServerFailedError(f"some streams have not begun:\n{server.log}")
        sizes = [len(data) for data in readers.data]
        cpu_s, began = server.cpu_s()["server"], time.perf_counter()
        while time.perf_counter() < began + seconds:
            readers.read(0.1)
        cpu_s, took_s = server.cpu_s()["server"] - cpu_s, time.perf_counter() - began
        readers.close()
    num_tokens, num_events = 0.0, 0
    for prompt, data, size in zip(prompts, readers.data, sizes, strict=True):
        texts = texts_of(bytes(data[size:]))
        text = "".join(texts)
        if text not in prompt.period * (len(text) // len(prompt.period) + 2):
            raise ServerFailedError(f"the text of a stream is not its own: {text[:200]!r}")
        num_events += len(texts)
        num_tokens += len(text) * len(prompt.token_ids) / len(prompt.period)
    return {
        "us_per_token": cpu_s / num_tokens * 1e6,
        "us_per_event": cpu_s / num_events * 1e6,
        "events_per_token": num_events / num_tokens,
        "tokens_per_s": num_tokens / took_s,
        "busy_share": cpu_s / took_s,
    }


def answer_of(port: int, call: bytes) -> bytes:
    """Sends a request by a connection of its own; the whole of what comes."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(call)
        return b"".join(iter(lambda: connection.recv(RECEIVE_BYTES), b""))


def ask_until(port: int, call: bytes, end_s: float) -> int:
    """Sends a request again and again; how often.

    Raises:
        ServerFailedError: it was not answered.
    """
    count = 0
    while time.perf_counter() < end_s:
        answer = answer_of(port, call)
        if b"[DONE]" not in answer:
            raise ServerFailedError(f"a request was not answered: {answer[-1000:]!r}")
        count += 1
    return count


def measure_requests(is_chat: bool, step_s: float, seconds: float) -> dict[str, float]:
    """CPU of a new server's process for each request.

    Raises:
        ServerFailedError: a request was not answered.
    """
    calls = short_calls(is_chat)
    options = {"max_num_seqs": len(calls)}
    program = (str(ECHO_ENGINE), str(step_s), "1")
    with (
        ServerProcess(str(DEMO_MODEL_PATH), options, (), program=program) as server,
        ThreadPoolExecutor(len(calls)) as clients,
    ):

        def ask(for_s: float) -> int:
            end_s = time.perf_counter() + for_s
            return sum(clients.map(lambda call: ask_until(server.port, call, end_s), calls))

        ask(WARM_UP_S)
        cpu_s, began = server.cpu_s()["server"], time.perf_counter()
        num_requests = ask(seconds)
        cpu_s, took_s = server.cpu_s()["server"] - cpu_s, time.perf_counter() - began
    return {
        "us_per_request": cpu_s / num_requests * 1e6,
        "requests_per_s": num_requests / took_s,
        "busy_share": cpu_s / took_s,
    }


@ends_with_message()
def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--step-ms", type=float, default=8.0, help="between two steps of the engine")
    parser.add_argument("--seconds", type=float, default=4.0, help="that a round is measured for")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if min(args.streams, args.rounds) < 1 or min(args.step_ms, args.seconds) <= 0:
        parser.error("--streams, --rounds, --step-ms and --seconds: above 0")
    results = []
    print(f"{'CPU us':<32}{'a token':>8}{'median':>8}{'an event':>10}{'events per token':>18}")
    for load in LOADS:
        rounds = [measure(load, args.streams, args.step_ms / 1e3, args.seconds) for _ in range(args.rounds)]
        best = min(rounds, key=lambda each: each["us_per_token"])
        middle = median(each["us_per_token"] for each in rounds)
        costs = f"{best['us_per_token']:8.1f}{middle:8.1f}{best['us_per_event']:10.1f}"
        print(f"{load.name:<32}{costs}{best['events_per_token']:18.2f}", flush=True)
        results.append({"load": load.name, "best": best, "rounds": rounds})
    requests = []
    print(f"{'CPU us':<32}{'a request':>10}{'median':>8}{'requests/s':>12}")
    for name, is_chat in (("short answers to token ids", False), ("short answers to chats", True)):
        rounds = [measure_requests(is_chat, args.step_ms / 1e3, args.seconds) for _ in range(args.rounds)]
        best = min(rounds, key=lambda each: each["us_per_request"])
        middle = median(each["us_per_request"] for each in rounds)
        print(f"{name:<32}{best['us_per_request']:10.0f}{middle:8.0f}{best['requests_per_s']:12.0f}", flush=True)
        requests.append({"load": name, "best": best, "rounds": rounds})
    report("server_cpu", {**vars(args), "results": results, "requests": requests}, args.output)


if __name__ == "__main__":
    main()
