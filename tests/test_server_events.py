"""Chunks as JSON, and the parts in which a stream of events is sent: what comes while sending waits leaves as one."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs the extra `serve`")
pytest.importorskip("msgspec", reason="needs the extra `serve`")
pytest.importorskip("zmq", reason="needs the extra `serve`")

import msgspec

from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.engine.requests import RequestIntake
from nanovllm.engine.text.tokenizer import load_tokenizer
from nanovllm.entrypoints.output_stream import OutputStream
from nanovllm.entrypoints.server.answers import AnswerSettings, Chat, Completion, Echo, TokenNames
from nanovllm.entrypoints.server.chat_text import ChatText
from nanovllm.entrypoints.server.completions import SERVER_SEND, Events, EventStream, Requests
from nanovllm.entrypoints.server.gate import Gate
from nanovllm.errors import EngineClosedError
from nanovllm.outputs import RequestOutput, TokenLogprobs
from nanovllm.sampling_params import SamplingParams

TOKENIZER = load_tokenizer(Path(DEMO_MODEL_PATH))
WORDS = TOKENIZER.encode("The capital of France is Paris, and that of Italy is Rome.")
TEXTS = ["", "a", "", 'x"y\\', "\0", "\u2028\n\r", "<b>&", "\N{GRINNING FACE}", '"\\u0000"', "a \n b ", ""]


# Chunks


def completion(echoes=(), **options):
    return Completion(AnswerSettings("cmpl-0", 'it "\0"', TokenNames(None), **options), echoes)


def chat(finds_reasoning=False, finds_calls=False, **options):
    def make_text():
        return ChatText(finds_reasoning=finds_reasoning, in_reasoning=False, finds_calls=finds_calls)

    return Chat(AnswerSettings("chatcmpl-0", "it", TokenNames(None), **options), make_text)


MAKERS = {
    "completion": completion,
    "completion with usage": lambda: completion(includes_usage=True),
    "completion with log-probabilities": lambda: completion(wants_logprobs=True),
    "echo": lambda: completion(echoes=[Echo("Say: ", 5, None)] * 3),
    "chat": chat,
    "chat with usage": lambda: chat(includes_usage=True),
    "chat with log-probabilities": lambda: chat(wants_logprobs=True),
    "chat with reasoning": lambda: chat(finds_reasoning=True),
    "chat with calls": lambda: chat(finds_calls=True),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_chunk_made_around_its_text_is_the_chunk(name):
    fast, slow = MAKERS[name](), MAKERS[name]()
    slow._head = fast._head  # made at the same time
    entry = TokenLogprobs(5, -0.5, {5: -0.5})
    wants_logprobs = "log-probabilities" in name
    for text in ("", "<think>so</think>", *TEXTS, "end"):
        for index in (0, 2, 1):
            output = RequestOutput(index, [5], text, new_logprobs=[entry] if wants_logprobs else None)
            if text == "end":
                output.finished, output.finish_reason = True, "length"
            chunk = slow.chunk(index, output)
            assert fast.chunk_json(index, output) == (None if chunk is None else msgspec.json.encode(chunk))


def test_a_chunk_with_usage_has_it_as_null():
    output = RequestOutput(0, [5], "a")
    answers = completion(includes_usage=True)
    for _ in range(2):
        assert json.loads(answers.chunk_json(0, output))["usage"] is None
    assert "usage" not in json.loads(completion().chunk_json(0, output))


# Parts


class Streams:
    """The requests of one body, whose tokens the test gives, and a connection that the test can hold up."""

    def __init__(self, count=1, **params):
        self.gate, self.left, self.sent = Gate(100), [], []
        self.requests = Requests(self.gate, 1, count)
        self.may_send = asyncio.Event()
        self.may_send.set()
        self.client_leaves = asyncio.Event()
        intake = RequestIntake(TOKENIZER, 1536, 2048, 2048, frozenset(), 0)
        for number in range(count):
            seq, text = intake.make(number, [1], SamplingParams(max_tokens=1000, **params), streamed=True)
            self.requests.add(OutputStream(seq, text, self.left.append, self.requests.bell))
        self.streams = self.requests.streams
        self.response = EventStream(Events(self.requests, completion()), self.requests)

    async def receive(self):
        await self.client_leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        await self.may_send.wait()
        self.sent.append(message)

    async def __aenter__(self):
        self.serving = asyncio.create_task(self.response({SERVER_SEND: self.send}, self.receive, self.send))
        await self.settled()
        return self

    async def __aexit__(self, *_):
        self.serving.cancel()

    async def settled(self):
        for _ in range(10):
            await asyncio.sleep(0)

    def parts(self):
        """The events of each part that was sent."""
        start, *parts = self.sent
        assert (start["type"], start["status"]) == ("http.response.start", 200)
        assert all(part["more_body"] for part in parts[:-1])
        return [[event.removeprefix("data: ") for event in part["body"].decode().split("\n\n")[:-1]] for part in parts]

    def texts(self, part):
        return [json.loads(event)["choices"][0]["text"] for event in part]


def run(main):
    asyncio.run(asyncio.wait_for(main(), 60))


def test_each_step_is_a_part():
    async def main():
        async with Streams() as made:
            for token_id in WORDS:
                made.streams[0].add(token_id)
                await made.settled()
            made.streams[0].end("length")
            await made.settled()
            *parts, last = made.parts()
            assert [made.texts(part) for part in parts] == [[TOKENIZER.decode([token_id])] for token_id in WORDS]
            assert (json.loads(last[0])["choices"][0]["finish_reason"], last[1:]) == ("length", ["[DONE]"])
            assert not made.sent[-1]["more_body"]
            assert made.left == []
            assert await made.gate.wait_until_empty(1)

    run(main)


def test_while_a_client_does_not_read_one_part_is_sent_and_the_rest_becomes_one():
    async def main():
        async with Streams() as made:
            made.may_send.clear()
            for token_id in WORDS:
                made.streams[0].add(token_id)
                await made.settled()
            assert len(made.sent) == 1, "only the head of the response was sent"
            made.may_send.set()
            await made.settled()
            first, second = made.parts()
            assert made.texts(first) == [TOKENIZER.decode(WORDS[:1])]
            assert made.texts(second) == [TOKENIZER.decode(WORDS[1:])]

    run(main)


def test_a_stop_string_ends_a_request_whose_client_does_not_read():
    async def main():
        async with Streams(stop="Paris") as made:
            made.may_send.clear()
            for token_id in WORDS:
                made.streams[0].add(token_id)
            await made.settled()
            assert made.left == [0], "the engine is told, once"
            made.may_send.set()
            await made.settled()
            (part,) = made.parts()
            assert json.loads(part[0])["choices"][0]["finish_reason"] == "stop"
            assert made.texts(part[:-1]) == ["The capital of France is "]

    run(main)


def test_a_client_that_leaves_while_it_does_not_read_ends_its_requests():
    async def main():
        async with Streams(2) as made:
            made.may_send.clear()
            made.streams[0].add(WORDS[0])
            await made.settled()
            made.client_leaves.set()
            await made.serving
            assert made.left == [0, 1]
            assert await made.gate.wait_until_empty(1)

    run(main)


def test_several_answers_share_a_part():
    async def main():
        async with Streams(3) as made:
            for stream in made.streams[:2]:
                stream.add(WORDS[0])
            await made.settled()
            made.streams[2].add(WORDS[1])
            made.streams[0].end("length")
            await made.settled()
            made.streams[1].add(WORDS[1])
            await made.settled()
            for stream in made.streams[1:]:
                stream.end("stop")
            await made.settled()
            *parts, end = made.parts()
            choices = [[json.loads(event)["choices"][0] for event in part] for part in (*parts, end[:-1])]
            told = [[(choice["index"], choice["finish_reason"]) for choice in part] for part in choices]
            assert told == [[(0, None), (1, None)], [(0, "length"), (2, None)], [(1, None)], [(1, "stop"), (2, "stop")]]
            assert end[-1] == "[DONE]"

    run(main)


@pytest.mark.parametrize("closes", [False, True])
def test_an_error_is_the_last_event_and_what_came_before_it_is_told(closes):
    async def main():
        async with Streams(3) as made:
            made.streams[0].add(WORDS[0])
            if closes:
                made.streams[1].fail(EngineClosedError("it was closed"))
            else:
                made.streams[1].end("error", ValueError("it broke"))
            made.streams[2].add(WORDS[0])
            await made.serving
            ((first, last),) = made.parts()
            assert made.texts([first]) == [TOKENIZER.decode(WORDS[:1])]
            assert ("it was closed" if closes else "it broke") in json.loads(last)["error"]["message"]
            assert not made.sent[-1]["more_body"]
            assert made.left == [0, 2], "what still ran is aborted"

    run(main)
