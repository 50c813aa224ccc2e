"""The server as its clients see it: the openai package, raw sockets, signals, and processes that die."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import time

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH
from tests.server_process import ANSWERS, OPTIONS, PRIMES, ServerProcess, ask, events, head, metric, read_head

for package in ("starlette", "uvicorn", "httptools", "msgspec", "zmq"):
    pytest.importorskip(package, reason="needs the extra `serve`")
openai = pytest.importorskip("openai")

ENDLESS = {"temperature": 0, "max_tokens": 1900, "ignore_eos": True, "stream": True}


def chat_body(question, **more):
    return {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 600, **more}


def at_rest(server, within_s=120.0):
    """Waits until the engine holds nothing."""
    deadline = time.monotonic() + within_s
    while metric(server, r'nanovllm_kv_blocks\{.*state="held"') or metric(server, r"nanovllm_requests\{"):
        assert time.monotonic() < deadline, "requests or blocks are still held"
        time.sleep(0.02)


async def until_there(server, count, pattern=r"nanovllm_requests\{", headers=()):
    """Waits until the engine has so many requests, by the metrics that begin like this."""
    deadline = time.monotonic() + 120
    while await asyncio.to_thread(metric, server, pattern, headers) < count:
        assert time.monotonic() < deadline, f"the engine has not got {count} requests"
        await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def start_server(tmp_path_factory):
    """Makes servers; whatever becomes of the test, none is left behind."""
    made = []

    def start(*arguments):
        made.append(ServerProcess(tmp_path_factory.mktemp("served"), *arguments))
        return made[-1].await_ready()

    yield start
    for server in made:
        server.kill()


@pytest.fixture(scope="module")
def server(start_server):
    made = start_server("--max-queued-requests", "72", "--max-body-bytes", "2000000")
    yield made
    assert made.process.poll() is None, made.log.read_text()
    at_rest(made)
    assert made.stop() == 0
    assert "Traceback" not in made.log.read_text()


@pytest.fixture(scope="module")
def client(server):
    with server.client() as made:
        yield made


@pytest.fixture(scope="module")
def reference():
    with LLM(DEMO_MODEL_PATH, **OPTIONS) as made:
        yield made


# The openai package


def test_chat(client):
    answer = client.chat.completions.create(model="demo", **chat_body(PRIMES))
    assert answer.choices[0].message.content == ANSWERS[PRIMES]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.completion_tokens > 50


def test_chat_in_chunks(client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client.chat.completions.create(model="demo", **chat_body(PRIMES, **options))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == ANSWERS[PRIMES]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk.id for chunk in (*chunks, last)}) == 1
    assert last.choices == []
    assert last.usage.completion_tokens > 50


def test_seeds_give_the_tokens_that_they_give_in_process(client, reference):
    prompts = ["The capital of", "Once upon a time"]
    params = SamplingParams(temperature=1.2, top_k=50, top_p=0.9, min_p=0.01, seed=7, max_tokens=30, min_tokens=12)
    expected = reference.generate(prompts, params, use_tqdm=False)
    more = {"top_k": 50, "min_p": 0.01, "min_tokens": 12}
    given = {"temperature": 1.2, "top_p": 0.9, "seed": 7, "max_tokens": 30, "extra_body": more}
    answer = client.completions.create(model="demo", prompt=prompts, **given)
    assert [choice.text for choice in answer.choices] == [each["text"] for each in expected]
    assert [choice.finish_reason for choice in answer.choices] == [each["finish_reason"] for each in expected]
    tokens = [each["prompt_token_ids"] for each in expected]
    again = client.completions.create(model="demo", prompt=tokens, **given)
    assert [choice.text for choice in again.choices] == [each["text"] for each in expected]
    other = client.completions.create(model="demo", prompt=prompts, **{**given, "seed": 8})
    assert [choice.text for choice in other.choices] != [each["text"] for each in expected]


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_with_penalties_and_biases(client, reference, stream):
    messages = chat_body("introduce yourself")["messages"]
    given = {"temperature": 1.5, "max_tokens": 20, "presence_penalty": 0.5, "frequency_penalty": 0.3, "seed": 5, "n": 3}
    params = SamplingParams(**given, repetition_penalty=1.2, logit_bias={20: 3.0}, skip_special_tokens=False)
    (expected,) = reference.chat(messages, params, use_tqdm=False)
    more = {"repetition_penalty": 1.2, "skip_special_tokens": False}
    found = client.chat.completions.create(
        model="demo", messages=messages, **given, logit_bias={"20": 3}, extra_body=more, stream=stream
    )
    texts = ["", "", ""]
    for part in found if stream else [found]:
        for choice in part.choices:
            texts[choice.index] += (choice.delta if stream else choice.message).content
    assert texts == [each["text"] for each in expected["outputs"]]
    if not stream:
        assert found.usage.prompt_tokens == len(expected["prompt_token_ids"])


@pytest.mark.parametrize("stop", ["37", "<|im_end|>"])
def test_the_stop_may_be_part_of_the_text(client, stop):
    more = {"include_stop_str_in_output": True, "skip_special_tokens": False}
    answer = client.chat.completions.create(model="demo", **chat_body(PRIMES, stop=stop), extra_body=more)
    assert answer.choices[0].message.content == (ANSWERS[PRIMES] + stop).partition(stop)[0] + stop


def test_several_prompts_in_chunks(client, reference):
    prompts = ["The capital of", "Once upon a time", "Hello"]
    expected = reference.generate(prompts, SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
    texts = ["", "", ""]
    given = {"temperature": 0, "max_tokens": 20, "stream": True, "echo": True}
    for chunk in client.completions.create(model="demo", prompt=prompts, **given):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [prompt + each["text"] for prompt, each in zip(prompts, expected, strict=True)]


def test_log_probabilities(client, reference):
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=2)
    (expected,) = reference.chat(chat_body(PRIMES)["messages"], params, use_tqdm=False)
    for stream in (False, True):
        found = client.chat.completions.create(
            model="demo", **chat_body(PRIMES, max_tokens=6, logprobs=True, top_logprobs=2, stream=stream)
        )
        parts = list(found) if stream else [found]
        entries = [entry for part in parts for entry in part.choices[0].logprobs.content]
        assert "".join(entry.token for entry in entries) == expected["text"]
        assert b"".join(bytes(entry.bytes) for entry in entries).decode() == expected["text"]
        for entry, wanted in zip(entries, expected["logprobs"], strict=True):
            assert entry.logprob == pytest.approx(wanted.logprob, abs=1e-3)
            assert len(entry.top_logprobs) == 2
            assert entry.top_logprobs[0].token == entry.token
    prompt = expected["prompt_token_ids"]
    answer = client.completions.create(model="demo", prompt=prompt, max_tokens=6, temperature=0, logprobs=2)
    listed = answer.choices[0].logprobs
    assert "".join(listed.tokens) == expected["text"]
    assert listed.text_offset == [expected["text"].index(token) for token in listed.tokens]
    assert listed.token_logprobs == pytest.approx([entry.logprob for entry in expected["logprobs"]], abs=1e-3)
    assert [len(top) for top in listed.top_logprobs] == [2] * 6


TEXT = "The capital of France is Paris, and that of"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("as_tokens", [False, True])
def test_an_echo_has_the_log_probabilities_of_the_prompt(client, reference, stream, max_tokens, as_tokens):
    """What lm-eval's `local-completions` asks for to score a text, several at a time."""
    texts = [TEXT, "Once upon a time", "x"]
    more = {"ignore_eos": True, "skip_special_tokens": False}
    params = SamplingParams(temperature=0, max_tokens=max(max_tokens, 1), logprobs=1, prompt_logprobs=1, **more)
    expected = reference.generate(texts, params, use_tqdm=False)
    prompts = [answer["prompt_token_ids"] for answer in expected] if as_tokens else texts
    given = {"temperature": 0, "seed": 1234, "max_tokens": max_tokens, "echo": True, "logprobs": 1, "stream": stream}
    found = client.completions.create(model="demo", prompt=prompts, **given, extra_body=more)
    fields = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    told, listed = ["", "", ""], [{name: [] for name in fields} for _ in texts]
    for part in found if stream else [found]:
        for choice in part.choices:
            told[choice.index] += choice.text
            for name in fields:
                listed[choice.index][name] += getattr(choice.logprobs, name)
    for text, answer, whole, columns in zip(texts, expected, told, listed, strict=True):
        entries = [*answer["prompt_logprobs"], *answer["logprobs"][:max_tokens]]
        assert whole == text + (answer["text"] if max_tokens else "")
        assert "".join(columns["tokens"]) == whole
        assert all(whole[place:].startswith(token) for token, place in by_token(columns, "tokens", "text_offset"))
        assert columns["token_logprobs"][0] is columns["top_logprobs"][0] is None
        scored = by_token(columns, "token_logprobs", "top_logprobs")[1:]
        for (logprob, top), entry in zip(scored, entries[1:], strict=True):
            assert logprob == pytest.approx(entry.logprob, abs=1e-3)
            assert (logprob == max(top.values())) == (entry.token_id in entry.top)
    if not stream:
        assert found.usage.completion_tokens == 3 * max_tokens
        assert found.usage.prompt_tokens == sum(len(answer["prompt_token_ids"]) for answer in expected)


def by_token(columns, *names):
    return list(zip(*(columns[name] for name in names), strict=True))


def test_prompt_logprobs_are_listed_as_in_vllm(client, reference):
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=2)
    (expected,) = reference.generate([TEXT], params, use_tqdm=False)
    more = {"prompt_logprobs": 2}
    answer = client.completions.create(model="demo", prompt=TEXT, max_tokens=2, n=2, extra_body=more)
    for choice in answer.choices:
        assert_listed(choice.prompt_logprobs, expected["prompt_logprobs"])
        assert choice.logprobs is None
    # An echo lists its own number of tokens beside each.
    answer = client.completions.create(
        model="demo", prompt=TEXT, max_tokens=2, echo=True, logprobs=1, extra_body={"prompt_logprobs": 2}
    )
    assert_listed(answer.choices[0].prompt_logprobs, expected["prompt_logprobs"])
    assert [len(top or ()) for top in answer.choices[0].logprobs.top_logprobs[:3]] == [0, 1, 1]
    (expected,) = reference.chat(chat_body(PRIMES)["messages"], params, use_tqdm=False)
    answer = client.chat.completions.create(model="demo", **chat_body(PRIMES, max_tokens=2), extra_body=more)
    assert_listed(answer.prompt_logprobs, expected["prompt_logprobs"])
    for asked in (client.completions, client.chat.completions):
        given = {"prompt": "a"} if asked is client.completions else {"messages": chat_body("a")["messages"]}
        answer = asked.create(model="demo", max_tokens=1, **given)
        assert "prompt_logprobs" not in answer.model_dump_json(exclude_unset=True)


def assert_listed(listed, entries):
    assert listed[0] is entries[0] is None
    for told, entry in zip(listed[1:], entries[1:], strict=True):
        wanted = {entry.token_id: entry.logprob, **entry.top}
        assert list(told) == [str(token_id) for token_id in wanted]
        assert [each["logprob"] for each in told.values()] == pytest.approx(list(wanted.values()), abs=1e-3)
        ranks = [list(entry.top).index(token_id) + 1 if token_id in entry.top else None for token_id in wanted]
        assert [each["rank"] for each in told.values()] == ranks
        assert all(isinstance(each["decoded_token"], str) for each in told.values())


@pytest.mark.parametrize("stream", [False, True])
def test_stop(client, stream):
    found = client.chat.completions.create(model="demo", **chat_body(PRIMES, stop=["37", "no such"], stream=stream))
    parts = list(found) if stream else [found]
    text = "".join((part.choices[0].delta if stream else part.choices[0].message).content for part in parts)
    assert text == ANSWERS[PRIMES][: ANSWERS[PRIMES].index("37")]
    assert parts[-1].choices[0].finish_reason == "stop"


def test_stop_tokens_and_template_options(client, server, reference):
    (comma,) = json.loads(server.ask("POST", "/tokenize", {"prompt": ","})[2])["tokens"]
    more = {"stop_token_ids": [comma], "chat_template_kwargs": {"enable_thinking": False}}
    answer = client.chat.completions.create(model="demo", **chat_body(PRIMES), extra_body=more)
    assert answer.choices[0].message.content == ANSWERS[PRIMES][: ANSWERS[PRIMES].index(",")]
    begun = [*chat_body(PRIMES)["messages"], {"role": "assistant", "content": "There are 25"}]
    (expected,) = reference.chat(
        begun, SamplingParams(temperature=0, max_tokens=20), False, continue_final_message=True
    )
    more = {"continue_final_message": True}
    answer = client.chat.completions.create(model="demo", messages=begun, temperature=0, max_tokens=20, extra_body=more)
    assert answer.choices[0].message.content == expected["text"]


REFUSED = {
    "n": 0,
    "presence_penalty": 2.5,
    "frequency_penalty": "much",
    "repetition_penalty": 0,
    "logit_bias": {"five": 1},
    "best_of": 3,
    "response_format": {"type": "json_object"},
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "wav"},
    "reasoning_effort": "low",
    "guided_regex": "a+",
    "include_stop_str_in_output": "yes",
    "prompt_logprobs": 21,
    "temprature": 1,
    "temperature": -1,
    "top_p": 2,
    "max_tokens": 0,
    "seed": "seven",
    "stop": "",
    "stream": "yes",
    "stream_options": {"include_usage": True},
    "logprobs": 5,
    "top_logprobs": 3,
    "min_tokens": 10_000,
    "messages": [],
    "chat_template_kwargs": {"messages": []},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_by_name(client, name):
    with pytest.raises(openai.BadRequestError, match=name) as caught:
        client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "hello"}], extra_body={name: REFUSED[name]}
        )
    assert caught.value.status_code == 400
    assert caught.value.type == "invalid_request_error"


def test_values_that_ask_for_nothing_are_accepted(client):
    neutral = {
        "n": 1,
        "best_of": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "tools": None,
        "user": "someone",
        "seed": None,
        "top_logprobs": None,
        "skip_special_tokens": True,
        "stream_options": None,
    }
    answer = client.chat.completions.create(model="demo", **chat_body(PRIMES), extra_body=neutral)
    assert answer.choices[0].message.content == ANSWERS[PRIMES]


def test_a_bool_is_not_the_number_that_it_equals(client):
    with pytest.raises(openai.BadRequestError, match="best_of=True"):
        client.chat.completions.create(model="demo", **chat_body("hello"), extra_body={"best_of": True})


def test_errors_of_completions(client):
    for given, message in (
        ({"prompt": "a", "max_tokens": 0}, "max_tokens=0"),
        ({"prompt": "a", "max_tokens": 0, "echo": True, "logprobs": 21}, "logprobs=21"),
        ({"prompt": "a", "prompt_logprobs": "all"}, "prompt_logprobs='all'"),
        ({"prompt": "a", "prompt_logprobs": 0, "stream": True}, "prompt_logprobs is not served with stream=true"),
        ({"prompt": []}, "prompt="),
        ({"prompt": ["a", 5]}, "mixes"),
        ({"prompt": [10**9]}, "vocabulary"),
        ({"prompt": "word " * 50_000}, "characters"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "messages": []}, "messages"),
        ({}, "prompt="),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.post("/completions", body=given, cast_to=object)
    with pytest.raises(openai.NotFoundError, match="'demo' is"):
        client.completions.create(model="other", prompt="a")


# Other addresses


def test_models_tokens_and_texts(client, server):
    (model,) = client.models.list()
    assert model.id == "demo"
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    tokens = json.loads(server.ask("POST", "/tokenize", {"prompt": "Hello there"})[2])
    assert tokens["count"] == len(tokens["tokens"])
    text = json.loads(server.ask("POST", "/detokenize", {"tokens": tokens["tokens"]})[2])
    assert text == {"prompt": "Hello there"}
    chat = json.loads(server.ask("POST", "/tokenize", {"messages": [{"role": "user", "content": "Hello"}]})[2])
    assert chat["count"] > tokens["count"]
    for path, body in (("/tokenize", {}), ("/tokenize", {"prompt": 3}), ("/detokenize", {"tokens": ["a"]})):
        assert server.ask("POST", path, body)[0] == 400
    assert server.ask("POST", "/detokenize", {"token": [1]})[0] == 400
    assert server.ask("GET", "/health")[0] == 200
    assert server.ask("GET", "/nothing")[0] == 404
    assert server.ask("GET", "/tokenize")[0] == 405


def test_explain_by_the_id_of_an_answer(client, server):
    answer = client.completions.create(model="demo", prompt="a", max_tokens=2, extra_body={"ignore_eos": True})
    status, _, content = server.ask("GET", f"/explain/{answer.id}")
    assert status == 200
    assert json.loads(content)["spans"][-1]["what"] == "ended: length"
    kind, run, _ = answer.id.split("-")
    for unknown in ("0", f"{kind}-00000000-0", f"{kind}-{run}-99999999", f"{kind}-{run}-{'9' * 500}", "x" * 999):
        assert server.ask("GET", f"/explain/{unknown}")[0] == 404


def test_metrics_count_what_was_served(client, server):
    at_rest(server)
    before = metric(server, r"nanovllm_decode_tokens_total ")
    client.completions.create(model="demo", prompt="a", max_tokens=12, extra_body={"ignore_eos": True})
    assert metric(server, r"nanovllm_decode_tokens_total ") == before + 11


# Crowds and clients of ill will


async def follow(port, question, leave_after):
    """The text of an answer; where the client leaves after so many events, the beginning of one that goes on."""
    more = {} if leave_after is None else {"max_tokens": 1900, "ignore_eos": True}
    text, stream = "", events(port, "/v1/chat/completions", chat_body(question, stream=True, **more))
    async with contextlib.aclosing(stream):
        count = 0
        async for event in stream:
            if event == "[DONE]":
                return text
            text += json.loads(event)["choices"][0]["delta"]["content"]
            count += 1
            if count == leave_after:
                return text
    raise AssertionError("the stream has ended without its end")


def test_a_crowd_of_streams_of_which_a_third_leave_early(server):
    rng = random.Random(0)
    questions = rng.sample(list(ANSWERS), 120)
    leave_after = [rng.randrange(1, 8) if number % 3 == 0 else None for number in range(120)]

    async def main():
        calls = (follow(server.port, *pair) for pair in zip(questions, leave_after, strict=True))
        return await asyncio.gather(*calls)

    before = metric(server, r'nanovllm_requests_ended_total\{reason="abort"')
    for question, left, text in zip(questions, leave_after, asyncio.run(main()), strict=True):
        expected = ANSWERS[question]
        assert text == expected if left is None else expected.startswith(text[: len(expected)])
    at_rest(server)
    assert metric(server, r'nanovllm_requests_ended_total\{reason="abort"') == before + 40


def test_a_client_that_leaves_before_its_whole_answer_is_not_served_on(server):
    async def main():
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        data = json.dumps(chat_body(PRIMES, max_tokens=1900, ignore_eos=True, n=16)).encode()
        writer.write(head("POST", "/v1/chat/completions", len(data)) + data)
        await writer.drain()
        await until_there(server, 16)
        writer.close()

    before = metric(server, r'nanovllm_requests_ended_total\{reason="abort"')
    asyncio.run(main())
    at_rest(server)
    assert metric(server, r'nanovllm_requests_ended_total\{reason="abort"') == before + 16


def test_too_many_requests_are_told_to_come_again(server):
    body = {"prompt": ["a"] * 201, "max_tokens": 1}
    status, headers, content = server.ask("POST", "/v1/completions", body)
    assert (status, headers["retry-after"]) == (429, "1")
    assert json.loads(content)["error"]["code"] == "queue_full"
    assert server.ask("POST", "/v1/completions", {**body, "prompt": ["a"] * 200})[0] == 200
    assert server.ask("POST", "/v1/completions", {**body, "prompt": ["a"] * 200})[0] == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"prompt": "\\ud800"}', "not JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"prompt": 1e999}', "not JSON"),
        (b'{"prompt": 1e9}', "prompt="),
        (b'{"prompt": "a", "max_tokens": 99999999999999999999999999, "stop": ["a", " ", "I"]}', None),
        (b'{"prompt": "a", "prompt": [[]]}', "empty"),
    ],
)
def test_malformed_bodies(server, body, message):
    status, _, content = server.ask("POST", "/v1/completions", body)
    if message is None:
        assert status == 200
    else:
        assert status == 400
        assert message in json.loads(content)["error"]["message"]


def test_huge_bodies(server):
    async def announced():
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(head("POST", "/v1/completions", 10**15) + b"{")
        status, headers = await read_head(reader)
        writer.close()
        return status, headers["connection"]

    async def in_chunks():
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(3):
            writer.write(b"%x\r\n" % 900_000 + b" " * 900_000 + b"\r\n")
        status, _ = await read_head(reader)
        writer.close()
        return status

    assert asyncio.run(announced()) == (413, "close")
    assert asyncio.run(in_chunks()) == 413


def test_slow_and_half_sent_bodies(start_server):
    served = start_server("--body-timeout", "1")

    async def slow():
        started_s = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(head("POST", "/v1/completions", 100))
        answer = asyncio.create_task(read_head(reader))
        while not answer.done():
            with contextlib.suppress(ConnectionError):
                writer.write(b" ")
                await writer.drain()
            await asyncio.sleep(0.2)
        writer.close()
        return (await answer)[0], time.monotonic() - started_s

    async def half():
        _, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(head("POST", "/v1/completions", 100) + b'{"prompt": "a')
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()

    async def main():
        return (await asyncio.gather(slow(), *(half() for _ in range(20))))[0]

    status, seconds = asyncio.run(main())
    assert status == 408
    assert seconds > 1
    assert served.ask("GET", "/health")[0] == 200
    assert served.stop() == 0


# Ends


def test_sigterm_under_load_lets_requests_end(start_server):
    """Those under way are answered, however long that takes, and new ones are refused meanwhile."""
    served = start_server("--shutdown-timeout", "600")

    async def main():
        stream = events(served.port, "/v1/completions", {"prompt": "a", **ENDLESS})
        short = [ask(served.port, "POST", "/v1/chat/completions", chat_body(PRIMES)) for _ in range(20)]
        tasks = [asyncio.create_task(each) for each in short]
        await until_there(served, len(tasks), r"nanovllm_requests(_ended_total)?\{")
        await anext(stream)
        served.process.send_signal(signal.SIGTERM)
        while (await ask(served.port, "GET", "/health"))[0] == 200:
            await asyncio.sleep(0.02)
        refused = await ask(served.port, "POST", "/v1/completions", {"prompt": "a"})
        return refused, await asyncio.gather(*tasks), [event async for event in stream]

    refused, short, rest = asyncio.run(main())
    assert served.wait() == 0
    assert refused[0] == 503
    assert {answer[0] for answer in short} == {200}
    assert {json.loads(answer[2])["choices"][0]["message"]["content"] for answer in short} == {ANSWERS[PRIMES]}
    assert rest[-1] == "[DONE]"


def test_a_key_and_what_is_told_to_requests_that_do_not_end_in_time(start_server):
    served = start_server("--api-key", "secret", "--shutdown-timeout", "1", "--served-model-name", "it")
    key = ["Authorization: Bearer secret"]
    assert served.ask("GET", "/v1/models")[0] == 401
    assert served.ask("GET", "/v1/models", headers=["Authorization: Bearer secrex"])[0] == 401
    assert served.ask("GET", "/health")[0] == 200
    with served.client(api_key="secret") as client:
        assert client.models.list().data[0].id == "it"

    async def main():
        streams = [events(served.port, "/v1/completions", {"prompt": "a", **ENDLESS}, key) for _ in range(2)]
        whole = {"prompt": "a", **ENDLESS, "stream": False, "n": 16}
        answer = asyncio.create_task(ask(served.port, "POST", "/v1/completions", whole, key))
        await until_there(served, 16, headers=key)
        for stream in streams:
            await anext(stream)
        served.process.send_signal(signal.SIGTERM)
        last_events = []
        for stream in streams:
            *_, last = [event async for event in stream]
            last_events.append(last)
        return last_events, await answer

    last_events, answer = asyncio.run(main())
    assert served.wait() == 0
    assert {json.loads(event)["error"]["code"] for event in last_events} == {"stopping"}
    assert answer[0] == 503


def test_a_killed_engine_process_is_told_and_ends_the_server(start_server):
    served = start_server()

    async def main():
        stream = events(served.port, "/v1/completions", {"prompt": "a", **ENDLESS})
        whole = asyncio.create_task(
            ask(served.port, "POST", "/v1/completions", {"prompt": "a", **ENDLESS, "stream": False})
        )
        await anext(stream)
        await until_there(served, 2)
        os.kill(served.engine_pid, signal.SIGKILL)
        rest = [event async for event in stream]
        return json.loads(rest[-1]), await whole

    told, whole = asyncio.run(main())
    assert "SIGKILL" in told["error"]["message"]
    assert whole[0] == 503
    assert served.wait() == 1


def test_ctrl_c_twice_stops_at_once(start_server):
    served = start_server("--shutdown-timeout", "600")

    async def main():
        stream = events(served.port, "/v1/completions", {"prompt": "a", **ENDLESS})
        await anext(stream)
        served.process.send_signal(signal.SIGINT)
        while (await ask(served.port, "GET", "/health"))[0] == 200:
            await asyncio.sleep(0.02)
        served.process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, ValueError):
            async for _ in stream:
                pass

    asyncio.run(main())
    assert served.wait() == 0, "long before its time is up"


# The page


def test_the_page_needs_nothing_from_elsewhere(server):
    status, headers, page = server.ask("GET", "/")
    assert status == 200
    assert headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in headers["content-security-policy"]
    assert not re.search(r"https?://", page)
    assert "innerHTML" not in page, "texts of the model are no markup"


def test_the_feed_shows_a_card_at_work(server):
    async def main():
        stream = events(server.port, "/v1/completions", {"prompt": "a", "n": 8, **ENDLESS})
        await anext(stream)
        feed = events(server.port, "/live", method="GET")
        async for event in feed:
            sample = json.loads(event)
            if sample["requests"]["decoding"] == 8 and sample["tokens_per_s"] > 0:
                break
        await feed.aclose()
        await stream.aclose()
        return sample

    sample = asyncio.run(asyncio.wait_for(main(), 120))
    assert {*sample["cards"]} == {"cpu:0"}
    assert sum(sample["cards"]["cpu:0"].values()) > 0
    assert 0 < sample["itl_s"]["p50"] <= sample["itl_s"]["p99"]
    at_rest(server)


def test_who_watches_needs_the_key_and_keeps_no_server_alive(start_server):
    served = start_server("--api-key", "secret")
    assert served.ask("GET", "/")[0] == 200
    assert served.ask("GET", "/live")[0] == 401

    async def watch_to_the_end():
        feed = events(served.port, "/live", headers=["Authorization: Bearer secret"], method="GET")
        await anext(feed)
        served.process.send_signal(signal.SIGTERM)
        return [json.loads(event) async for event in feed]

    assert "ended" in asyncio.run(watch_to_the_end())[-1]
    assert served.wait() == 0
    assert "Traceback" not in served.log.read_text()
