"""The engine in a process of its own: the same tokens, streams that are left, and either process that dies."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from nanovllm import (
    LLM,
    ConfigError,
    EngineClosedError,
    EngineProcessError,
    EngineTimeoutError,
    ModelLoadError,
    RequestError,
    SamplingParams,
    UnknownRequestError,
)
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.engine.distributed import messages
from nanovllm.engine.output_rows import OutputRows
from nanovllm.outputs import RequestOutput, TokenLogprobs
from tests.processes import cpu_ticks, process_state

msgspec = pytest.importorskip("msgspec", reason="needs the extra `serve`")
async_llm = pytest.importorskip("nanovllm.entrypoints.async_llm", reason="needs the extra `serve`")
AsyncLLM = async_llm.AsyncLLM

OPTIONS = {"device": "cpu", "num_kvcache_blocks": 300}
GREEDY = SamplingParams(temperature=0, max_tokens=200)
QUESTION = [{"role": "user", "content": "list all prime numbers within 100"}]
LONG = SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True)


@pytest.fixture(scope="module")
def llm():
    made = AsyncLLM(DEMO_MODEL_PATH, **OPTIONS)
    yield made
    asyncio.run(made.close())


@pytest.fixture(scope="module")
def reference():
    with LLM(DEMO_MODEL_PATH, **OPTIONS) as made:
        yield made


async def collected(outputs):
    """The texts, the token ids and the last output of a request."""
    texts, token_ids, last = [], [], None
    async for last in outputs:
        texts.append(last.text)
        token_ids += last.new_token_ids
    return "".join(texts), token_ids, last


async def at_rest(llm, within_s=60.0):
    """Waits until the engine holds nothing."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        metrics = await llm.metrics()
        running = sum(metrics["requests"].values())
        if not running and not any(pool["held"] for pool in metrics["kv_blocks"].values()):
            assert llm.num_open_requests == 0
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"still there: {metrics['requests']}, {metrics['kv_blocks']}")


async def until_gone(pid, within_s=120.0):
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if process_state(pid) in (None, "Z"):
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"process {pid} is still there")


def stop(pid):
    """Stops a process as SIGSTOP does, which takes a moment."""
    os.kill(pid, signal.SIGSTOP)
    while process_state(pid) != "T":
        time.sleep(0.001)


def wait_until_idle(pid):
    """Until it sleeps, and has used no time since, at four looks in a row."""
    num_idle, before = 0, None
    while num_idle < 4:
        look = process_state(pid), cpu_ticks(pid)
        num_idle = num_idle + 1 if look == before and look[0] == "S" else 0
        before = look
        time.sleep(0.5)


def test_tokens_and_texts_equal_those_of_llm(llm, reference):
    prompts = [f"Question {number}: what is" for number in range(12)]
    params = [
        SamplingParams(temperature=0.9, top_p=0.95, seed=number, max_tokens=10 + number, logprobs=number % 3 or None)
        for number in range(12)
    ]
    expected = reference.generate(prompts, params, use_tqdm=False)

    async def main():
        return await asyncio.gather(*(collected(llm.generate(*pair)) for pair in zip(prompts, params, strict=True)))

    for (text, token_ids, last), answer in zip(asyncio.run(main()), expected, strict=True):
        assert (text, token_ids, last.finish_reason) == (answer["text"], answer["token_ids"], answer["finish_reason"])


def test_log_probabilities_come_with_their_tokens(llm, reference):
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=2)
    (expected,) = reference.generate(["The capital"], params, use_tqdm=False)

    async def main():
        return [output async for output in llm.generate("The capital", params)]

    outputs = asyncio.run(main())
    found = [entry for output in outputs for entry in output.new_logprobs or []]
    assert [len(output.new_token_ids) for output in outputs] == [len(output.new_logprobs or []) for output in outputs]
    assert [(entry.token_id, list(entry.top)) for entry in found] == [
        (entry.token_id, list(entry.top)) for entry in expected["logprobs"]
    ]
    assert found[3].logprob == pytest.approx(expected["logprobs"][3].logprob, abs=1e-4)


def test_log_probabilities_of_a_prompt_come_with_the_first_token(llm, reference):
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, prompt_logprobs=2)
    prompt = "The capital of France, and of other countries"
    (expected,) = reference.generate([prompt], params, use_tqdm=False)

    async def main():
        return [output async for output in llm.generate(prompt, params)]

    first, *others = asyncio.run(main())
    assert first.new_token_ids
    assert others
    assert all(output.prompt_logprobs is None for output in others)
    assert len(first.prompt_logprobs) == len(expected["prompt_token_ids"]) > 5
    assert first.prompt_logprobs[0] is None
    for entry, wanted in zip(first.prompt_logprobs[1:], expected["prompt_logprobs"][1:], strict=True):
        assert (entry.token_id, list(entry.top)) == (wanted.token_id, list(wanted.top))
        assert entry.logprob == pytest.approx(wanted.logprob, abs=1e-3)


@pytest.mark.parametrize("stop", ["37", ["no such text", "3,"], "<|im_end|>"])
def test_stop_strings_end_a_request_and_nothing_after_them_shows(llm, reference, stop):
    params = SamplingParams(temperature=0, max_tokens=200, stop=stop)
    (expected,) = reference.chat(QUESTION, params, use_tqdm=False)

    async def main():
        found = await collected(llm.chat(QUESTION, params))
        await at_rest(llm)
        return found

    text, token_ids, last = asyncio.run(main())
    assert (text, token_ids) == (expected["text"], expected["token_ids"])
    assert (last.finished, last.finish_reason) == (True, "stop")


def test_min_tokens_holds_for_stop_strings(llm, reference):
    params = SamplingParams(temperature=0, max_tokens=200, stop="2", min_tokens=40)
    (expected,) = reference.chat(QUESTION, params, use_tqdm=False)
    text, token_ids, _ = asyncio.run(collected(llm.chat(QUESTION, params)))
    assert (text, token_ids) == (expected["text"], expected["token_ids"])


def test_a_request_that_is_left_is_aborted(llm):
    async def main():
        await at_rest(llm)  # what another test has left may be aborted only now
        before = (await llm.metrics())["requests_ended"]
        async for output in llm.generate("Once", LONG):
            if output.new_token_ids:
                break
        stop(llm.engine_pid)  # so that no request ends by itself
        try:
            stream = await llm.open("Once", LONG)
            del stream  # before anything was taken
            opened = await llm.open("Once", LONG)
            for outputs in (llm.generate("Once", LONG), opened):
                task = asyncio.create_task(collected(outputs))
                await asyncio.sleep(0.05)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
        finally:
            os.kill(llm.engine_pid, signal.SIGCONT)
        await at_rest(llm)
        return before

    before = asyncio.run(main())
    ended = asyncio.run(llm.metrics())["requests_ended"]
    assert ended["abort"] == before.get("abort", 0) + 4
    assert ended.get("length") == before.get("length")


def test_abort_gives_a_last_output(llm):
    async def main():
        stream = await llm.open("Once", LONG)
        await anext(stream)
        llm.abort(stream.request_id)
        _, _, last = await collected(stream)
        with pytest.raises(UnknownRequestError):
            llm.abort(stream.request_id)
        return last

    last = asyncio.run(main())
    assert (last.finished, last.finish_reason, last.error) == (True, "abort", None)


def test_what_waits_is_given_out_as_one(llm):
    async def main():
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        stream = await llm.open("Once", params)
        while llm.num_open_requests:
            await asyncio.sleep(0.01)
        return [output async for output in stream]

    (output,) = asyncio.run(main())
    assert len(output.new_token_ids) == 40
    assert output.finish_reason == "length"


def test_a_client_that_stands_still_does_not_hold_the_engine_up(llm):
    async def main():
        stream = await llm.open("Once", SamplingParams(temperature=0, max_tokens=300, ignore_eos=True))
        first = await anext(stream)
        wait_until_idle(llm.engine_pid)  # and nothing of this process runs
        return first, [output async for output in stream]

    first, others = asyncio.run(main())
    assert [len(output.new_token_ids) for output in others] == [300 - len(first.new_token_ids)]


def test_an_idle_engine_sleeps(llm):
    async def main():
        await collected(llm.generate("Once", GREEDY))
        await at_rest(llm)

    def sleeps_for_a_second():
        before = cpu_ticks(llm.engine_pid)
        time.sleep(1.0)
        return cpu_ticks(llm.engine_pid) - before <= 2

    asyncio.run(main())
    assert any(sleeps_for_a_second() and sleeps_for_a_second() for _ in range(10))


def test_refused_requests_harm_nobody(llm):
    async def main():
        with pytest.raises(RequestError, match="empty"):
            await collected(llm.generate(""))
        with pytest.raises(RequestError, match="vocabulary"):
            await llm.open([10**9])
        with pytest.raises(RequestError, match="leave room"):
            await llm.open([1] * 100_000)
        with pytest.raises(RequestError, match="characters"):
            await llm.open("word " * 1_000_000)
        with pytest.raises(RequestError, match="not a non-empty list"):
            await collected(llm.chat([{"content": "hello"}]))
        huge = SamplingParams(temperature=0, max_tokens=10**30, top_k=10**25, stop="37")
        return await collected(llm.chat(QUESTION, huge))

    text, _, last = asyncio.run(main())
    assert text.endswith("31, ")
    assert last.finish_reason == "stop"


def test_explain_and_metrics(llm):
    async def main():
        stream = await llm.open("Once", SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))
        await collected(stream)
        with pytest.raises(UnknownRequestError):
            await llm.explain(10**6)
        return await llm.explain(stream.request_id)

    spans = list(asyncio.run(main()).spans())
    assert spans[-1].what == "ended: length"
    assert [span.start_s for span in spans] == sorted(span.start_s for span in spans)
    assert spans[-2].end_s == spans[-1].start_s


def test_a_process_that_does_not_answer_is_an_error(llm, monkeypatch):
    monkeypatch.setattr(async_llm, "ANSWER_TIMEOUT_S", 0.2)
    stop(llm.engine_pid)
    try:
        with pytest.raises(EngineTimeoutError, match=r"within 0\.2 s"):
            asyncio.run(llm.metrics())
    finally:
        os.kill(llm.engine_pid, signal.SIGCONT)
    monkeypatch.undo()
    asyncio.run(at_rest(llm))  # the late answer is dropped


def test_ctrl_c_in_a_terminal_is_not_for_the_engine(llm):
    assert os.getsid(llm.engine_pid) != os.getsid(0)


def test_the_sockets_are_for_this_user_alone(llm):
    folder = Path(llm._engine._folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.name for path in folder.iterdir()} == {"commands", "reports"}


def test_a_loop_that_is_gone_leaves_no_request_behind(llm):
    async def main():
        stream = await llm.open("Once", LONG)
        await anext(stream)
        stop(llm.engine_pid)  # so that the request does not end by itself
        return stream

    async def next_main():
        question = asyncio.create_task(llm.metrics())
        await asyncio.sleep(0)  # until it is asked
        os.kill(llm.engine_pid, signal.SIGCONT)
        await question
        await at_rest(llm)

    before = asyncio.run(llm.metrics())["requests_ended"].get("abort", 0)
    stream = asyncio.run(main())
    asyncio.run(next_main())
    assert asyncio.run(llm.metrics())["requests_ended"]["abort"] == before + 1
    del stream


def test_close_ends_streams_and_the_process(tiny_path):
    async def main():
        llm = AsyncLLM(tiny_path, device="cpu", num_kvcache_blocks=100, max_num_seqs=1)
        params = SamplingParams(max_tokens=400, ignore_eos=True)
        streams = [await llm.open([1, 2, 3], params) for _ in range(100)]  # one after the other
        await anext(streams[0])
        waiting = asyncio.create_task(collected(streams[-1]))
        await asyncio.sleep(0)
        folder, pid = Path(llm._engine._folder), llm.engine_pid
        await llm.close()
        with pytest.raises(EngineClosedError):
            await waiting
        with pytest.raises(EngineClosedError):
            await llm.open([1])
        with pytest.raises(EngineClosedError):
            await llm.metrics()
        assert llm._engine._process.returncode == 0, "it was not killed"
        await until_gone(pid)
        assert not folder.exists()

    asyncio.run(main())


def test_the_end_of_the_process_loses_nothing(tiny_path, tmp_path):
    """It ends without freeing the devices, and without the interpreter's own end."""
    trace = tmp_path / "trace.json"

    async def main():
        llm = AsyncLLM(tiny_path, device="cpu", num_kvcache_blocks=100, trace=trace)
        _, _, ended = await collected(llm.generate([1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True)))
        under_way = await llm.open([4, 5, 6], SamplingParams(max_tokens=400, ignore_eos=True))
        await anext(under_way)
        await llm.close()
        assert ended.finished
        return llm._engine._process.returncode

    assert asyncio.run(main()) == 0
    assert json.loads(trace.read_text())


def test_a_killed_engine_process_is_an_error_of_everything_that_waits():
    async def main():
        llm = AsyncLLM(DEMO_MODEL_PATH, enable_two_gpu_pd=True, **OPTIONS)
        text, _, _ = await collected(llm.chat(QUESTION, SamplingParams(temperature=0, stop="37", max_tokens=200)))
        assert text.endswith("31, ")
        streams = [await llm.open("Once", LONG) for _ in range(3)]
        await anext(streams[0])
        stop(llm.engine_pid)  # so that it cannot answer
        question = asyncio.create_task(llm.metrics())
        await asyncio.sleep(0.01)
        os.kill(llm.engine_pid, signal.SIGKILL)
        for stream in streams:
            _, _, last = await collected(stream)
            assert last.finish_reason == "error"
            assert isinstance(last.error, EngineProcessError)
        with pytest.raises(EngineProcessError, match="SIGKILL"):
            await question
        with pytest.raises(EngineProcessError, match="make a new AsyncLLM"):
            await llm.open("Once")
        assert isinstance(llm.death, EngineProcessError)
        await llm.close()

    asyncio.run(main())


PROGRAM_WITHOUT_GUARD = """
import asyncio, sys, threading
from nanovllm import AsyncLLM, SamplingParams
from nanovllm.entrypoints import async_llm

def say_pid(client):
    print(client.pid, flush=True)

async def main(llm):
    async for output in llm.generate([1, 2, 3], SamplingParams(max_tokens=4)):
        pass
    print("answered", flush=True)
    await asyncio.sleep(600)

class Client(async_llm.EngineClient):
    def await_ready(self):
        say_pid(self)
        return super().await_ready()

async_llm.EngineClient = Client
asyncio.run(main(AsyncLLM(sys.argv[1], device="cpu", num_kvcache_blocks=100)))
"""


@pytest.mark.parametrize("is_ready", [False, True])
def test_the_engine_process_ends_with_its_parent(tiny_path, tmp_path, is_ready):
    """The program has no `if __name__ == "__main__"`, and needs none."""
    environment = {**os.environ, "TMPDIR": tempfile.mkdtemp(dir="/tmp")}
    program = tmp_path / "program.py"
    program.write_text(PROGRAM_WITHOUT_GUARD)
    command = [sys.executable, str(program), tiny_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        if is_ready:
            assert parent.stdout.readline() == "answered\n"
        parent.kill()
    asyncio.run(until_gone(pid))
    assert list(Path(environment["TMPDIR"]).iterdir()) == []
    os.rmdir(environment["TMPDIR"])


def test_an_engine_that_cannot_be_made_says_why(tiny_path):
    with pytest.raises(ConfigError, match="max_num_seqs"):
        AsyncLLM(tiny_path, max_num_seq=3)
    with pytest.raises(ModelLoadError, match="does not exist"):
        AsyncLLM("/no/such/folder")
    with pytest.raises(ConfigError, match="512 positions"):  # found by the engine's process
        AsyncLLM(tiny_path, device="cpu", max_model_len=10**6)


def test_a_step_becomes_columns():
    entry = TokenLogprobs(8, -0.5, {8: -0.5})
    outputs = [
        RequestOutput(3, [7], "", new_logprobs=None),
        OutputRows([3, 6], [5, 6], None, [0.1, 0.2]),
        RequestOutput(
            4, [8, 9], "", True, "error", ValueError("broken"), [entry, entry], prompt_logprobs=[None, entry]
        ),
    ]
    sent = messages.encode(messages.tokens_of(outputs))
    found = messages.decode_report(sent)
    assert (found.request_ids, found.token_ids) == ([3, 3, 6, 4, 4], [7, 5, 6, 8, 9])
    assert found.logprobs == {4: [entry, entry]}
    assert found.prompt_logprobs == {4: [None, entry]}
    assert [(end.request_id, end.reason) for end in found.ended] == [(4, "error")]
    error = found.ended[0].failure.as_error()
    assert isinstance(error, EngineProcessError)
    assert str(error) == "ValueError in the engine's process: broken"
    assert type(messages.Failure.of(RequestError("no")).as_error()) is RequestError


def test_objects_are_not_unpickled():
    with pytest.raises(msgspec.DecodeError):
        messages.decode_command(pickle.dumps(messages.Abort))
