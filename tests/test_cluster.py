"""Cards in processes of their own: one device's tokens, whatever happens to a card, and nobody else gets a word in."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import zmq

from nanovllm import (
    LLM,
    AsyncLLM,
    ClusterError,
    ConfigError,
    DeviceError,
    HandoffTimeout,
    OutOfKVCacheError,
    SamplingParams,
)
from nanovllm.engine import scheduler
from nanovllm.engine.distributed import card_local, remote_card
from nanovllm.engine.distributed.card_messages import Push, decode_report, encode
from nanovllm.engine.execution.tasks import StepTask
from nanovllm.engine.scheduling import cluster_placement
from tests import tiny
from tests.test_engine import drain, tokens_of

pytestmark = pytest.mark.skipif(importlib.util.find_spec("nixl_cu13") is None, reason="needs nixl-cu13 (Linux)")

CLUSTER = {
    "device": "cpu",
    "cluster": "local",
    "prefill_cards": 2,
    "decode_cards": 1,
    "num_kvcache_blocks": 200,
    "step_timeout_s": 600.0,  # nothing here goes by it
}
GREEDY = SamplingParams(temperature=0, max_tokens=24)
SETTLED_S = 240.0


@pytest.fixture(scope="module", autouse=True)
def over_tcp() -> Iterator[None]:
    """KV crosses by TCP, as it would from host to host, not through memory that processes share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UCX_TLS", "tcp")
        patch.setattr(remote_card, "FIRST_PAUSE_S", 0.01)  # cards are ended here time and again
        yield


@pytest.fixture(scope="module")
def cluster(tiny_path) -> Iterator[LLM]:
    """Three cards; a test that ends one leaves it to be started again."""
    with LLM(tiny_path, **CLUSTER, max_num_batched_tokens=64, verify_kv_handoff=True) as llm:
        yield llm


@pytest.fixture
def llm(cluster) -> Iterator[LLM]:
    """The three cards, all there; when the test ends, nothing is under way, and every block is free."""
    settle(cluster)
    yield cluster
    settle(cluster)
    cluster.scheduler.check_integrity()
    assert [card.block_manager.num_held_blocks for card in cluster.scheduler.cards] == [0, 0, 0]


def settle(llm: LLM) -> None:
    """Waits until all cards are there and no handoff is under way."""
    deadline_s = time.monotonic() + SETTLED_S
    while not all(card.is_up for card in llm.scheduler.cards) or llm._handoffs.under_way or llm._steps:
        assert time.monotonic() < deadline_s, "a card is not there, or a handoff has no end"
        llm.step()
        time.sleep(0.01)


def mixed_load(count: int, max_tokens: int = 24) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts, some of which begin alike, with parameters that use every part of a task."""
    prompts = tiny.random_prompts(count - 3, seed=41) + tiny.random_prompts(3, seed=42, shared=48)
    kinds = [
        {"temperature": 0},
        {"temperature": 0.8, "seed": 5},
        {"temperature": 0.7, "seed": 6, "top_k": 8, "presence_penalty": 0.5, "logprobs": 2},
        {"temperature": 0, "prompt_logprobs": 1, "min_tokens": 3, "logit_bias": {7: 2.0}},
    ]
    return prompts, [SamplingParams(max_tokens=max_tokens, **kinds[index % 4]) for index in range(count)]


def answers_of(llm: LLM, prompts, params) -> list[tuple[list[int], list]]:
    """Tokens, and the tokens that log-probabilities name: their values differ in the last bits with the batch."""
    answers = llm.generate(prompts, params, use_tqdm=False)
    return [
        (answer["token_ids"], [list(entry.top) for entry in answer.get("prompt_logprobs") or [] if entry])
        for answer in answers
    ]


@pytest.fixture(scope="module")
def expected(tiny_path):
    """What one device of this process answers."""
    with LLM(tiny_path, device="cpu", num_kvcache_blocks=400) as one:
        return {count: answers_of(one, *mixed_load(*count)) for count in ((12, 24), (40, 60))}


def test_tokens_are_those_of_one_device(llm, expected):
    before = llm.metrics()
    assert answers_of(llm, *mixed_load(12)) == expected[12, 24]
    after = llm.metrics()
    links = after["handoff_bytes_by_link"]
    assert links.keys() == {"card 0 to card 2", "card 1 to card 2"}, "both cards prefill, and the third decodes"
    assert after["decode_steps"] > before["decode_steps"]
    assert after["busy_s"]["card 0"]["decode"] == after["busy_s"]["card 1"]["decode"] == 0


def test_streams_come_from_other_processes_too(llm, checkpoint):
    _, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(4, seed=43)
    ids = [llm.add_request(prompt, GREEDY) for prompt in prompts]
    aborted = llm.add_request(prompts[0], SamplingParams(temperature=0, max_tokens=400, ignore_eos=True))
    llm.step()
    llm.abort(aborted)
    outputs = drain(llm, steps_overlap=True)
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert tokens_of(outputs[request_id]) == tiny.reference_tokens(reference, prompt, 24)
    assert outputs[aborted][-1].finish_reason == "abort"


def test_a_prompt_goes_where_its_beginning_is(llm):
    """And to the other card, if that has less to compute."""
    first, other = tiny.random_prompts(2, seed=44, longest=200)
    first = (first * 10)[:160]
    hits = llm.scheduler.num_hit_tokens
    where = []
    for prompt in (first, other, [*first, 1, 2, 3], [*first, 5]):
        before = dict(llm.metrics()["handoff_bytes_by_link"])
        llm.generate([prompt], SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
        after = llm.metrics()["handoff_bytes_by_link"]
        where.append([link for link in after if after[link] != before.get(link)])
    assert where[0] == where[2] == where[3]
    assert llm.scheduler.num_hit_tokens - hits >= 2 * 160


def test_a_step_that_fails_ends_its_request_alone(llm, checkpoint, monkeypatch):
    """Its task is one that the card cannot run; others of its steps are recomputed, and none of them is blamed."""
    _, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(3, seed=45)
    bad = list(range(40, 80))

    def spoil(runner) -> None:
        pack = runner._packer.pack

        def packed(step) -> StepTask:
            task = pack(step)
            if all(seq.prompt_token_ids != bad for seq in step.seqs) or task.prefill is None:
                return task
            prefill = task.prefill
            too_long = np.zeros(10**6, dtype=np.int64)
            return StepTask(dataclasses.replace(prefill, packed=too_long), task.decode)

        monkeypatch.setattr(runner._packer, "pack", packed)

    for runner in llm._runners:
        spoil(runner)
    blamed, fail = [], llm._outputs.fail
    monkeypatch.setattr(
        llm._outputs, "fail", lambda seq, error, **options: (blamed.append(seq.request_id), fail(seq, error, **options))
    )
    ids = [llm.add_request(prompt, GREEDY) for prompt in prompts[:2]]
    failing = llm.add_request(bad, GREEDY)
    ids.append(llm.add_request(prompts[2], GREEDY))
    outputs = good = drain(llm, steps_overlap=True)
    assert blamed == [failing, failing]
    assert outputs[failing][-1].finish_reason == "error"
    assert re.match(r"RuntimeError on card \d: ", str(outputs[failing][-1].error))
    assert all(card.is_up for card in llm.scheduler.cards)
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert tokens_of(good[request_id]) == tiny.reference_tokens(reference, prompt, 24)
    assert answers_of(llm, prompts, GREEDY)[0][0] == tiny.reference_tokens(reference, prompts[0], 24)


# Cards that are gone


def end_one(llm: LLM, card: int, how: signal.Signals, after_s: float) -> threading.Timer:
    pid = next(runner.pid for runner in llm._runners if runner.device.index == card)
    timer = threading.Timer(after_s, os.kill, (pid, how))
    timer.start()
    return timer


@pytest.mark.parametrize("card", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_killed_card_takes_no_request_with_it(llm, expected, card):
    """Its requests are recomputed, with the same tokens, and a new process takes its place."""
    pids = {runner.pid for runner in llm._runners}
    timer = end_one(llm, card, signal.SIGKILL, 0.3)
    assert answers_of(llm, *mixed_load(40, 60)) == expected[40, 60]
    timer.join()
    settle(llm)
    assert len(pids & {runner.pid for runner in llm._runners}) == 2
    assert answers_of(llm, *mixed_load(12)) == expected[12, 24], "the new one works, too"


def test_a_card_is_gone_when_a_launch_fails(llm, expected, monkeypatch):
    """Its steps in flight have no end; they are taken back, and no request has failed."""
    runner, failed = llm.decode_runner, []
    pack, fail = runner._packer.pack, llm._outputs.fail
    monkeypatch.setattr(
        llm._outputs, "fail", lambda *arguments, **options: (failed.append(arguments), fail(*arguments))
    )

    def packed(step) -> StepTask:
        if step.decode and runner._steps:
            os.kill(runner.pid, signal.SIGSTOP)
            runner.give_up("the test says so")
            raise RuntimeError("injected")
        return pack(step)

    monkeypatch.setattr(runner._packer, "pack", packed)
    assert answers_of(llm, *mixed_load(12)) == expected[12, 24]
    assert runner.reason == "the test says so"
    assert not failed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "seed"),
    [(signal.SIGKILL, 0), (signal.SIGKILL, 1), (signal.SIGKILL, 2), (signal.SIGSTOP, 4), (signal.SIGSTOP, 5)],
)
def test_cards_end_or_stop_at_any_moment(llm, expected, how, seed):
    rng = random.Random(seed)
    timer = end_one(llm, seed % 3, how, rng.uniform(0.0, 2.0))
    assert answers_of(llm, *mixed_load(40, 60)) == expected[40, 60]
    timer.join()
    settle(llm)
    assert answers_of(llm, *mixed_load(12)) == expected[12, 24]


def test_elastic_cards_prefill_and_decode_whatever_happens_to_one(tiny_path, expected, monkeypatch):
    with LLM(tiny_path, **CLUSTER, card_roles="elastic", max_num_batched_tokens=64, verify_kv_handoff=True) as llm:
        assert answers_of(llm, *mixed_load(12)) == expected[12, 24]
        busy_s = llm.metrics()["busy_s"]
        assert all(shares["decode"] + shares["mixed"] > 0 for shares in busy_s.values()), "on every card"
        assert all(shares["prefill"] + shares["mixed"] > 0 for shares in busy_s.values())
        monkeypatch.setattr(
            cluster_placement, "MOST_EXCESS_PROMPTS", -1
        )  # every request decodes where least context is
        timer = end_one(llm, 1, signal.SIGKILL, 0.3)
        assert answers_of(llm, *mixed_load(40, 60)) == expected[40, 60]
        timer.join()
        settle(llm)
        assert llm.metrics()["handoff_bytes_by_link"]
        llm.scheduler.check_integrity()
        assert [card.block_manager.num_held_blocks for card in llm.scheduler.cards] == [0, 0, 0]


@pytest.mark.slow
def test_all_cards_are_killed_at_once(llm, expected):
    """The requests wait until one is there again."""
    timers = [end_one(llm, card, signal.SIGKILL, 0.4) for card in range(3)]
    assert answers_of(llm, *mixed_load(40, 60)) == expected[40, 60]
    for timer in timers:
        timer.join()


@pytest.mark.slow
def test_a_stopped_card_is_ended_after_its_time(llm, expected):
    timer = end_one(llm, 1, signal.SIGSTOP, 0.1)
    assert answers_of(llm, *mixed_load(40, 60)) == expected[40, 60]
    timer.join()


@pytest.mark.slow
def test_blocks_of_a_push_without_end_stay_held(llm, checkpoint, monkeypatch):
    """A card that never pushes what it was told to may still do so; its blocks come back when its process is gone."""
    _, reference = checkpoint("gqa2")
    monkeypatch.setattr(llm._handoffs, "_timeout_s", 0.3)
    lazy = next(runner for runner in llm._runners if runner.device.index == 0)
    send = lazy.send
    monkeypatch.setattr(lazy, "send", lambda command: None if isinstance(command, Push) else send(command))
    (prompt,) = tiny.random_prompts(1, seed=46)
    errors = []
    fail = llm._outputs.fail
    monkeypatch.setattr(llm._outputs, "fail", lambda seq, error: (errors.append(error), fail(seq, error))[1])
    assert answers_of(llm, [prompt], GREEDY)[0][0] == tiny.reference_tokens(reference, prompt, 24)
    (error,) = errors
    assert isinstance(error, HandoffTimeout)
    assert "blocks held" in str(error)
    needed = -(-len(prompt) // llm.decode_runner.block_size)
    held = {card.name: card.block_manager.num_held_blocks for card in llm.scheduler.cards}
    assert held["card 0"] == needed
    assert held["card 2"] >= needed
    os.kill(lazy.pid, signal.SIGKILL)


def test_an_interrupt_leaves_whole_cards(llm, expected, monkeypatch):
    """All requests are recomputed, once the cards are through with what was launched."""
    take, calls = llm._outputs.take_decoded_tokens, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        take(*arguments)

    monkeypatch.setattr(llm._outputs, "take_decoded_tokens", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(tiny.random_prompts(6, seed=47), GREEDY, use_tqdm=False)
    assert answers_of(llm, *mixed_load(12)) == expected[12, 24]


@pytest.mark.slow
def test_an_interrupt_while_a_card_is_gone(llm, expected, monkeypatch):
    """Nobody has told the others of it when all is put right again."""
    take, killed = llm._outputs.take_tokens_after_chunks, []

    def interrupted(*arguments):
        if not killed:
            killed.append(llm.prefill_runner.pid)
            os.kill(killed[0], signal.SIGKILL)
            raise KeyboardInterrupt
        take(*arguments)

    monkeypatch.setattr(llm._outputs, "take_tokens_after_chunks", interrupted)
    began_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(tiny.random_prompts(12, seed=49, longest=60), GREEDY, use_tqdm=False)
    assert answers_of(llm, *mixed_load(12)) == expected[12, 24]
    assert time.monotonic() - began_s < SETTLED_S, "it waited for a card that is gone"


@pytest.mark.slow
def test_over_a_process_of_its_own_that_has_the_engine(tiny_path, checkpoint):
    """The server's way: cards of an engine in a process, which end with it."""
    _, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(4, seed=50)

    async def serve() -> list[list[int]]:
        async with AsyncLLM(tiny_path, **CLUSTER) as llm:
            return await asyncio.gather(*(tokens(llm, prompt) for prompt in prompts))

    async def tokens(llm: AsyncLLM, prompt: list[int]) -> list[int]:
        return [token async for output in llm.generate(prompt, GREEDY) for token in output.new_token_ids]

    assert asyncio.run(serve()) == [tiny.reference_tokens(reference, prompt, 24) for prompt in prompts]


@pytest.mark.slow
def test_a_trace_has_the_steps_of_all_cards(tiny_path, tmp_path):
    file = tmp_path / "trace.json"
    with LLM(tiny_path, **CLUSTER, trace=file) as llm:
        llm.generate(*mixed_load(12), use_tqdm=False)
    events = json.loads(file.read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"prefill card 0", "decode card 2", "handoff card 0 to card 2"} <= names


@pytest.mark.slow
def test_a_request_that_ends_cards_is_given_up(tiny_path, expected, monkeypatch):
    """Whoever runs it is killed; the others' tokens come all the same."""
    monkeypatch.setattr(scheduler, "MOST_LOST_CARDS", 2)
    deadly = list(range(50, 90))
    with LLM(tiny_path, **CLUSTER) as llm:
        for runner in llm._runners:
            watch(runner, deadly)
        killer = llm.add_request(deadly, GREEDY)
        outputs = drain(llm, steps_overlap=True)
        assert outputs[killer][-1].finish_reason == "error"
        assert "2 cards were lost while they ran request 0" in str(outputs[killer][-1].error)
        assert answers_of(llm, *mixed_load(12)) == expected[12, 24]
        llm.scheduler.check_integrity()


def watch(runner, deadly: list[int]) -> None:
    launch = runner.launch

    def launched(step):
        handle = launch(step)
        if any(seq.prompt_token_ids == deadly for seq in step.seqs):
            os.kill(runner.pid, signal.SIGKILL)
        return handle

    runner.launch = launched


@pytest.mark.slow
def test_when_no_card_can_be_started_all_requests_end(tiny_path, monkeypatch):
    with LLM(tiny_path, **{**CLUSTER, "prefill_cards": 1}) as llm:
        monkeypatch.setattr(
            card_local, "_command_line", lambda arguments: [sys.executable, "-c", "raise SystemExit(3)"]
        )
        for runner in llm._runners:
            os.kill(runner.pid, signal.SIGKILL)
        answers = llm.generate(tiny.random_prompts(3, seed=48), GREEDY, use_tqdm=False)
        assert [answer["finish_reason"] for answer in answers] == ["error"] * 3
        assert all("no card of the cluster can be started: card " in str(answer["error"]) for answer in answers)
        with pytest.raises(DeviceError):
            llm.add_request([1, 2, 3])


@pytest.mark.slow
def test_cards_end_with_their_controller(tiny_path):
    code = (
        "import os, time\n"
        "from nanovllm import LLM\n"
        f"llm = LLM({tiny_path!r}, device='cpu', num_kvcache_blocks=50, cluster='local')\n"
        "print(*(runner.pid for runner in llm._runners), flush=True)\n"
        "time.sleep(100)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as controller:
        pids = [int(pid) for pid in controller.stdout.readline().split()]
        controller.kill()
    assert len(pids) == 2
    deadline_s = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline_s, "a card goes on without its controller"
        time.sleep(0.02)


# What is said to cards, and by whom


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickled_message_executes_nothing(llm, expected, tmp_path):
    """The card refuses it; since the two disagree, it is started again."""
    trap = tmp_path / "sprung"
    runner = llm.prefill_runner
    runner._client._messages.send(pickle.dumps(Trap(str(trap))))
    assert answers_of(llm, *mixed_load(12)) == expected[12, 24]
    deadline_s = time.monotonic() + 60
    while runner.is_up and time.monotonic() < deadline_s:
        llm.step()
        time.sleep(0.01)
    assert "no command of" in runner.reason
    assert not trap.exists()


@pytest.mark.slow
def test_a_card_that_is_not_understood_is_lost(llm, expected, monkeypatch, tmp_path):
    trap = tmp_path / "sprung"
    client, said = llm.decode_runner._client, [pickle.dumps(Trap(str(trap)))]
    receive = client.receive

    def heard() -> list:
        if said:
            decode_report(said.pop())
        return receive()

    monkeypatch.setattr(client, "receive", heard)
    assert answers_of(llm, *mixed_load(12)) == expected[12, 24]
    assert "are no report of" in llm.decode_runner.reason
    assert llm.decode_runner._client is not client
    assert not trap.exists()


def test_whoever_has_no_key_can_neither_speak_nor_listen(llm, expected):
    client = llm.decode_runner._client
    endpoint = client._messages.getsockopt_string(zmq.LAST_ENDPOINT)
    assert endpoint.startswith("tcp://127.0.0.1:"), "nobody outside of this host gets as far"
    context = zmq.Context()
    public, secret = zmq.curve_keypair()
    # It knows the controller's public key even, but its own is not the card's; another one has no keys at all.
    intruders = []
    for keys in ((public, secret), None):
        intruder = context.socket(zmq.DEALER)
        intruder.linger = 0
        if keys is not None:
            intruder.curve_serverkey = client.controller_key
            intruder.curve_publickey, intruder.curve_secretkey = keys
        intruder.connect(endpoint)
        intruder.send(b"nonsense that would end the card, if it were heard")
        intruders.append(intruder)
    pid = llm.decode_runner.pid
    assert answers_of(llm, *mixed_load(12)) == expected[12, 24]
    assert not any(intruder.poll(200) for intruder in intruders), "nothing is said to them"
    assert llm.decode_runner.is_up
    assert llm.decode_runner.pid == pid
    context.destroy(linger=0)


def test_a_card_of_another_version_is_refused(tiny_path, monkeypatch):
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from nanovllm.engine.distributed import card_process\n"
        "card_process.VERSION = 'nanovllm 0.0.9, cards 0'\n"
        "card_process.main()\n"
    )
    monkeypatch.setattr(card_local, "_command_line", lambda arguments: [sys.executable, "-c", code])
    with pytest.raises(ClusterError, match=r"runs 'nanovllm 0.0.9, cards 0', the controller 'nanovllm .*same version"):
        LLM(tiny_path, device="cpu", num_kvcache_blocks=50, cluster="local")


@pytest.mark.slow
def test_what_a_card_cannot_be_made_for_is_the_engines_error(tiny_path):
    with pytest.raises(OutOfKVCacheError, match="num_kvcache_blocks"):
        LLM(tiny_path, device="cpu", cluster="local", num_kvcache_blocks=10**9)


def test_a_card_that_ends_before_it_greets_is_an_error(tiny_path, monkeypatch):
    monkeypatch.setattr(card_local, "_command_line", lambda arguments: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(ClusterError, match=r"card \d cannot be started: its process has ended with exit status 3"):
        LLM(tiny_path, device="cpu", num_kvcache_blocks=50, cluster="local")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cluster": "locl"}, "did you mean 'local'"),
        ({"prefill_cards": 2}, "prefill_cards given without cluster='local' or 'ray'"),
        ({"cluster": "local", "prefill_cards": 0}, "prefill_cards=0 is not a positive integer"),
        ({"cluster": "local", "enable_two_gpu_pd": True}, "enable_two_gpu_pd=True exclude each other"),
        ({"cluster": "local", "tensor_parallel_size": 2}, "tensor_parallel_size=2 exclude each other"),
        ({"cluster": "local", "kv_handoff": "copy"}, "kv_handoff given with cluster='local'"),
        ({"cluster": "local", "card_roles": "elstic"}, "did you mean 'elastic'"),
        ({"cluster": "local", "card_timeout_s": 0}, "card_timeout_s=0 is not a positive number"),
        ({"cluster": "local", "device": "cuda:1"}, "names one GPU"),
        ({"cluster": "local", "kv_cache_dtype": "fp8"}, "each card would calibrate its own"),
        ({"cluster": "local", "enable_decode_pipeline": True}, "needs enable_two_gpu_pd=True"),
    ],
)
def test_options_of_a_cluster(tiny_path, options, message):
    with pytest.raises(ConfigError, match=message):
        LLM(tiny_path, **{"device": "cpu", **options})


def test_a_message_of_a_step_is_its_arrays():
    push = Push(3, 7, "card 1", np.array([[1, 2], [5, 9]]), False)
    assert len(encode(push)) < 100
