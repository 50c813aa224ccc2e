"""What the benchmarks count, what a trace becomes, and that those that serve run without a GPU."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer

from nanovllm import LLM, RequestOutput, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.engine.execution.step_handle import StepHandle

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SMALL_POOLS = ("--num-kvcache-blocks", "500")  # 32 MiB of the demo model


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def online_load():
    import online_load

    return online_load


@pytest.fixture
def online():
    from lib import online

    return online


@pytest.fixture
def drift():
    from lib import drift

    return drift


@pytest.fixture
def traces():
    from lib import traces

    return traces


@pytest.fixture
def loads():
    from lib import loads

    return loads


def test_lengths_of_workloads(loads):
    rng = random.Random(0)
    draw_input, draw_output = loads.WORKLOADS["chat"]
    assert statistics.mean(draw_input(rng) for _ in range(20_000)) == pytest.approx(450, rel=0.03)
    assert statistics.mean(draw_output(rng) for _ in range(20_000)) == pytest.approx(200, rel=0.03)
    load = loads.make_load("rag", rate=5.0, duration_s=200.0, vocab_size=99, longest=4096, seed=1)
    assert len(load) == pytest.approx(1000, rel=0.1)
    assert [request.due_s for request in load] == sorted(request.due_s for request in load)
    assert all(len(request.prompt) + request.params.max_tokens <= 4096 for request in load)
    assert max(map(max, (request.prompt for request in load))) == 98


def test_latencies_count_from_the_moment_a_request_was_due(online, loads):
    params = SamplingParams()
    quick = loads.Request(1.0, [1, 2], params, token_times_s=[1.5, 1.7, 2.5])
    late = loads.Request(2.0, [1], params, token_times_s=[6.0])
    failed = loads.Request(4.0, [1], params, error=ValueError("injected"))
    summary = online.summarize_requests([quick, late, failed], ttft_limit_s=0.6, itl_limit_s=0.9)
    assert (summary["num_requests"], summary["num_failed"]) == (3, 1)
    assert (summary["input_tokens"], summary["output_tokens"], summary["seconds"]) == (4, 4, 6.0)
    assert summary["ttft_ms"]["max"] == 4000.0
    assert summary["itl_ms"]["max"] == pytest.approx(800.0)
    assert summary["first_gap_ms"]["max"] == pytest.approx(200.0)
    assert summary["tpot_ms"]["p50"] == pytest.approx(500.0)
    # Requests were due until 4.0; three tokens came between 0.4 and then.
    assert summary["saturated_tokens_per_s"] == pytest.approx(3 / 3.6)
    assert summary["goodput_per_s"] == pytest.approx(1 / 6.0)
    assert quick.is_good(0.6, 0.7), "one gap may be longer"
    assert not quick.is_good(0.6, 0.1), "two may not"
    assert not quick.is_good(0.6, 0.25), "nor one that is three times as long"
    assert not quick.is_good(0.4, 0.9)
    steady = loads.Request(0.0, [1], params, token_times_s=[0.1 * number for number in range(250)] + [26.0, 28.0])
    assert steady.is_good(0.6, 1.5), "of 251 gaps two"
    assert not steady.is_good(0.6, 0.6), "and one of these is three times as long"
    assert not failed.is_good(100.0, 100.0)
    assert failed.flaws(0.1, 0.1) == ["error"]
    assert quick.flaws(0.4, 0.25) == ["TTFT", "stall"]
    assert quick.flaws(0.6, 0.1) == ["gaps", "stall"]


def write_trace(path: Path, rows) -> str:
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    path.write_text("\n".join(json.dumps(dict(zip(names, row, strict=False))) for row in rows) + "\n")
    return str(path)


def test_a_trace_is_ordered_and_what_does_not_fit_is_counted(traces, tmp_path):
    rows = [(9_000, 5, 3), (4_000, 50, 100), (4_500, 7, 2), (5_000, 60, 1), (5_000, 59, 1), (90_000, 1, 1)]
    path = write_trace(tmp_path / "trace.jsonl", [(*row, []) for row in rows])
    trace = traces.read_trace(path, longest=60, duration_s=10.0)
    load = trace.requests(vocab_size=99, seed=0)
    served = [(0.0, 50, 10), (0.5, 7, 2), (1.0, 59, 1), (5.0, 5, 3)]
    assert [(r.due_s, len(r.prompt), r.params.max_tokens) for r in load] == served
    assert (trace.num_left_out, trace.num_cut, trace.has_hash_ids) == (1, 1, False)
    assert max(map(max, (request.prompt for request in load))) < 99
    # Twice as fast, twice as much comes in the same time.
    fast = traces.read_trace(path, longest=60, duration_s=50.0, speed=2.0)
    assert [row.due_s for row in fast.rows] == [0.0, 0.25, 0.5, 2.5, 43.0]
    with pytest.raises(ValueError, match="of 6 requests in 100 s none leaves room in 1 tokens"):
        traces.read_trace(path, longest=1, duration_s=100.0)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("nonsense", "line 2: Expecting value"),
        ("[1]", "not an object with the numbers"),
        ('{"timestamp": 1, "input_length": 3}', "not an object with the numbers"),
        ('{"timestamp": 1, "input_length": 0, "output_length": 1}', "must be at least 1"),
        (
            '{"timestamp": 1, "input_length": 513, "output_length": 1, "hash_ids": [4]}',
            "1 hash_ids, but 513 tokens take 2",
        ),
    ],
)
def test_a_line_that_is_no_request_is_named(traces, tmp_path, line, complaint):
    path = Path(write_trace(tmp_path / "trace.jsonl", [(0, 5, 3)]))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=complaint):
        traces.read_trace(str(path), longest=60)


SHARED = [(0, 1100, 2, [7, 8, 9]), (1, 700, 2, [7, 8]), (2, 1100, 2, [7, 8, 10]), (3, 600, 2, [8, 7])]
SHARED += [(4, 520, 2, [7, 11]), (5, 400, 2, [7]), (6, 1100, 2, [7, 8, 9]), (7, 30_000, 2, list(range(59)))]
SHARED_TOKENS = [0, 700, 1024, 0, 512, 400, 1100]
"""Tokens at its beginning that each prompt shares with one before it."""


def num_alike(prompt: list[int], other: list[int]) -> int:
    """Tokens at the beginning of both."""
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, other, strict=False))))


def test_hash_ids_stand_for_the_same_tokens_in_every_prompt(traces, tmp_path):
    path = write_trace(tmp_path / "trace.jsonl", SHARED)
    trace = traces.read_trace(path, longest=2048)
    prompts = [request.prompt for request in trace.requests(vocab_size=1536, seed=0)]
    assert [len(prompt) for prompt in prompts] == [1100, 700, 1100, 600, 520, 400, 1100]
    again = [request.prompt for request in traces.read_trace(path, longest=2048).requests(vocab_size=1536, seed=1)]
    assert prompts == again
    assert prompts[3][:512] == prompts[0][512:1024]
    for place, shared in enumerate(SHARED_TOKENS):
        assert max((num_alike(prompts[place], earlier) for earlier in prompts[:place]), default=0) == shared


@pytest.mark.slow
def test_the_prefix_cache_hits_where_hash_ids_repeat(tmp_path):
    """One request at a time, so that what the cache holds for one is known: all full blocks of those before it."""
    trace = write_trace(tmp_path / "trace.jsonl", SHARED)
    options = ("--mode", "pd", "--max-model-len", "2048", "--max-num-seqs", "1", "--speed", "20")
    run = run_on_cpu("online_load.py", "--trace", trace, *options, "--num-kvcache-blocks", "1000")
    assert run.returncode == 0, run.stderr
    (load,) = json.loads(run.stdout.splitlines()[-1])["loads"]
    assert (load["num_requests"], load["num_failed"], load["output_tokens"]) == (7, 0, 14)
    # At least one token of each prompt is computed.
    lengths = [row[1] for row in SHARED[:-1]]
    hits = [min(n, length - 1) // 16 * 16 for n, length in zip(SHARED_TOKENS, lengths, strict=True)]
    found = {"queried_tokens": sum(lengths), "hit_tokens": sum(hits), "hit_rate": sum(hits) / sum(lengths)}
    assert load["prefix_cache"] == found
    assert load["trace"] == {"num_left_out": 1, "num_cut": 0}
    assert "1 prompts left out and 0 answers cut" in run.stdout
    assert f"{sum(hits)} of {sum(lengths)} tokens" in run.stdout


def replicas_of(loads, prompts, *, by_prefix=False):
    """Two routers of a load, and what both know; requests that are due at once."""
    from lib import replicas

    requests = [loads.Request(0.0, prompt, SamplingParams()) for prompt in prompts]
    decisions = replicas.Decisions(multiprocessing.get_context("spawn"), 2, len(prompts))
    routers = [replicas.ReplicaRouter(decisions, replica, requests, by_prefix=by_prefix) for replica in range(2)]
    return routers, decisions, requests


def test_a_request_goes_to_the_replica_with_less_to_do(loads):
    (first, second), decisions, requests = replicas_of(loads, [[1] * n for n in (100, 40, 50, 20, 10)])
    assert [first.takes(number) for number in range(3)] == [True, False, False]
    assert [second.takes(number) for number in range(4)] == [False, True, True, True], "100 there, 40 + 50 here"
    second.has_to_do([])  # those of the second have ended
    assert list(decisions.prompt_tokens) == [100, 0]
    requests[0].token_times_s = [0.1]
    first.has_to_do([requests[0]])
    assert not first.takes(3)
    assert list(decisions.prompt_tokens) == [0, 0]
    assert list(decisions.context_tokens) == [101, 0]
    assert not first.takes(4), "less context there"


def test_what_another_replica_has_decided_for_one_counts(loads):
    (first, second), decisions, _ = replicas_of(loads, [[1] * n for n in (100, 40, 70)])
    assert [first.takes(number) for number in range(3)] == [True, False, False]
    second.has_to_do([])
    assert list(decisions.prompt_tokens) == [100, 110], "it has not asked yet"
    assert [second.takes(number) for number in range(3)] == [False, True, True]
    second.has_to_do([])
    assert list(decisions.prompt_tokens) == [100, 0]


def test_a_later_turn_goes_where_its_history_is(loads):
    history = [7] * 1100
    prompts = [history, [8] * 40, [*history, *[9] * 900], [8] * 600, history[:511]]
    (first, second), _, _ = replicas_of(loads, prompts, by_prefix=True)
    assert [first.takes(number) for number in range(5)] == [True, False, True, False, False]
    assert [second.takes(number) for number in range(5)] == [False, True, False, True, True]


def test_loads_follow_each_other_each_at_its_rate(drift, tmp_path):
    path = write_trace(tmp_path / "steady.jsonl", [(500 * number, 40, 3) for number in range(400)])
    phases = [drift.parse_phase("chat:20"), drift.parse_phase(f"{path}:5")]
    requests = drift.drift_load(phases, 30.0, vocab_size=99, longest=2048, seed=1)
    first, second = ([r for r in requests if low <= r.due_s < low + 30.0] for low in (0.0, 30.0))
    assert len(first) + len(second) == len(requests)
    assert len(first) == pytest.approx(600, rel=0.15)
    assert len(second) == 150
    assert [request.due_s for request in second] == pytest.approx([30.0 + 0.2 * number for number in range(150)])
    assert {len(request.prompt) for request in second} == {40}


def test_each_load_is_summarized_and_its_beginning_apart(drift, loads):
    params = SamplingParams()
    phases = [drift.Phase("chat", 1.0), drift.Phase("rag", 1.0)]
    due_and_ttft_s = [(0.0, 0.1), (19.0, 0.2), (20.0, 0.9), (31.0, 0.3), (41.0, 0.4)]
    requests = [loads.Request(due, [1], params, token_times_s=[due + ttft]) for due, ttft in due_and_ttft_s]
    first, second = drift.summarize_phases(phases, requests, 20.0, 0.6, 0.1)
    assert (first["num_requests"], first["num_good"], first["ttft_ms"]["max"]) == (2, 2, pytest.approx(200))
    assert (second["load"], second["num_requests"], second["num_good"]) == ("rag", 3, 2)
    assert second["ttft_after_change_ms"]["p99"] == pytest.approx(900)
    assert second["ttft_later_ms"]["p99"] == pytest.approx(400)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        ("chat", "'chat' is not LOAD:RATE"),
        ("chat:0", "the rate must be above 0"),
        ("chat:many", "could not convert"),
        ("gossip:3", "no workload (chat, rag, reason) and no file of that name"),
    ],
)
def test_a_load_that_is_none_is_refused(refusal, load, message):
    assert message in refusal("online_load.py", "--drift", "chat:3", load)


def test_drift_excludes_other_loads(refusal):
    assert "--drift excludes --rate" in refusal("online_load.py", "--drift", "chat:3", "--rate", "2")


@pytest.mark.slow
def test_a_drift_is_served(tmp_path):
    run = run_on_cpu("online_load.py", "--drift", "chat:4", "chat:8", "--duration", "2", "--max-model-len", "128")
    assert run.returncode == 0, run.stderr
    (load,) = json.loads(run.stdout.splitlines()[-1])["loads"]
    assert [phase["rate"] for phase in load["phases"]] == [4, 8]
    assert sum(phase["num_requests"] for phase in load["phases"]) == load["num_requests"]
    assert "soon p99" in run.stdout


def test_methods_of_one_process_are_refused_between_processes(refusal):
    assert "not of --processes" in refusal("handoff.py", "--processes", "--kv-handoff", "direct")
    assert "not of --processes" in refusal("handoff.py", "--processes", "--blocks", "4")


def test_a_speed_without_a_trace_is_refused(refusal):
    assert "--speed is of a trace" in refusal("online_load.py", "--speed", "2")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["processes", "elastic-processes"])
def test_cards_in_processes_of_their_own_serve_the_same_load(mode):
    arguments = ("--mode", mode, "--prefill-cards", "2", "--rate", "4", "--duration", "2")
    run = run_on_cpu("online_load.py", *arguments, "--max-model-len", "128")
    assert run.returncode == 0, run.stderr
    (load,) = json.loads(run.stdout.splitlines()[-1])["loads"]
    assert load["num_failed"] == 0
    busy = load["busy_share"]
    assert busy.keys() == {"card 0", "card 1", "card 2"}
    assert busy["card 2"] > 0
    assert busy["card 0"] > 0
    assert mode == "elastic-processes" or load["handoff"]["bytes"] > 0


@pytest.mark.parametrize("mode", ["single", "pd", pytest.param("dp2", marks=pytest.mark.slow)])
def test_it_runs_on_a_cpu_and_ends_with_a_line_of_json(mode):
    command = [
        *(sys.executable, str(BENCHMARKS / "online_load.py"), "--model", str(DEMO_MODEL_PATH), "--device", "cpu"),
        *("--mode", mode, "--rate", "4", "6", "--duration", "2", "--max-model-len", "128", *SMALL_POOLS),
    ]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    result = json.loads(run.stdout.splitlines()[-1])
    assert [load["rate"] for load in result["loads"]] == [4, 6]
    for load in result["loads"]:
        assert load["num_failed"] == 0
        assert load["output_tokens"] > 0
        assert len(load["busy_share"]) == (1 if mode == "single" else 2)
        assert all(0 < share < 1 for share in load["busy_share"].values())
        assert load["idle_share"].keys() == load["busy_share"].keys()
        assert all(0 <= share < 1 for share in load["idle_share"].values())
        assert max(load["idle_share"].values()) > 0  # on a CPU, which waits for the host after each step
        assert (load["handoff"].get("bytes", 0) > 0) == (mode == "pd")
    assert "TTFT" in run.stdout


@pytest.mark.parametrize(
    ("command", "results"),
    [
        (("host_time.py", "--rows", "4", "--turns", "5"), "results"),
        (("text_streams.py", "--model", str(DEMO_MODEL_PATH), "--rounds", "1"), "us_per_token"),
        (
            (
                *("prompt_latency.py", "--model", str(DEMO_MODEL_PATH), "--device", "cpu", "--mode", "elastic"),
                *("--lengths", "64", "--repeats", "2", *SMALL_POOLS),
            ),
            "rows",
        ),
    ],
    ids=lambda part: part[0] if isinstance(part, tuple) else part,
)
def test_what_needs_no_gpu_ends_with_a_line_of_json(command, results):
    script, *options = command
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / script), *options]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["benchmark"] == script.removesuffix(".py")
    assert result[results]


@pytest.mark.slow
def test_the_controller_is_measured_with_cards_that_compute_nothing(tmp_path):
    pytest.importorskip("nixl_cu13")
    trace = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 0, "input_length": 40 + index, "output_length": 20} for index in range(50)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(BENCHMARKS / "controller.py"), "--cards", "4", "--rows", "8", "--trace", str(trace)]
    command += ["--step-ms", "5", "--warm-up", "2", "--duration", "2"]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    (found,) = json.loads(run.stdout.splitlines()[-1])["results"]
    assert found["tokens_per_s"] > 0
    assert 0 < found["loop_us_per_step"] < found["cpu_us_per_step"]
    assert 0 <= found["wait_ms_p50"] <= found["wait_ms_p99"]


SEEN_IN_THE_PROCESS = {"idle_share", "handoff", "step_time"}


@pytest.mark.slow
def test_the_same_load_over_http_and_in_the_engines_process(tmp_path):
    rates = ("--rate", "4", "6", "--duration", "2", "--max-model-len", "128", "--clients", "2", "--compare", "before")
    run = run_on_cpu("serve_load.py", *rates, "--output", str(tmp_path / "result.json"))
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert run.stdout.index("in the engine's process") < run.stdout.index("after its start")
    for rate, load, other, ratios in zip((4, 6), result["loads"], result["in_process"], result["ratios"], strict=True):
        assert other.keys() - SEEN_IN_THE_PROCESS <= load.keys()
        for name in ("num_requests", "input_tokens", "output_tokens"):
            assert load[name] == other[name] > 0, "the load is the same"
        assert (load["rate"], load["num_failed"], load["errors"]) == (rate, 0, {})
        assert ratios["itl_ms"]["p50"] == load["itl_ms"]["p50"] / other["itl_ms"]["p50"]
        assert 0 < load["events_per_token"] <= 1, "on a busy machine tokens that wait leave together"
        assert all(us > 0 for us in load["cpu_us_per_token"].values())
        assert 0 < load["client_busy_share"] < 1
        assert 0 < load["busy_share"]["cpu:0"] < 1
        assert load["chunks"]["single"] >= load["num_requests"]
        assert load["chunks"]["shared"] == load["chunks"]["wait_share"] == 0
    assert (result["shutdown"]["exit_status"], "under_way" in result["shutdown"]) == (0, False)


def test_each_token_of_the_made_tokenizer_is_a_word(tmp_path):
    from lib.checkpoint import write_tokenizer

    write_tokenizer(tmp_path, 50)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [tokenizer.decode([token]) for token in range(50)] == [f" {token}" for token in range(50)]


def test_streams_over_http_until_the_server_is_told_to_end():
    streams = ("--streams", "4", "--duration", "1", "--clients", "2", "--max-model-len", "2048")
    run = run_on_cpu("serve_load.py", "--mode", "pd", *streams, "--sigterm-under-load", "--shutdown-timeout", "1")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    (load,) = result["loads"]
    assert load["num_requests"] >= 4
    assert load["num_failed"] == 0
    assert load["busy_share"].keys() == {"cpu:0", "cpu:1"}
    assert result["start_to_ready_s"] > 0
    ended = result["shutdown"]
    assert (ended["exit_status"], ended["under_way"], ended["outcomes"]) == (0, 4, {"told": 4})
    assert ended["seconds"] > 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--streams", "2", "--rate", "3"), "--streams excludes --rate"),
        (("--streams", "0"), "at least one"),
        (("--clients", "0"), "at least one"),
        (("--mode", "dp2"), "invalid choice: 'dp2'"),
        (("--model", "nowhere"), "is not the folder of a checkpoint"),
    ],
)
def test_what_a_server_cannot_be_loaded_with_is_refused(refusal, options, complaint):
    assert complaint in refusal("serve_load.py", *options)


@pytest.mark.slow
def test_the_cpu_of_the_server_is_measured_of_streams_that_have_their_own_texts():
    command = [sys.executable, str(BENCHMARKS / "server_cpu.py"), "--streams", "20", "--seconds", "1", "--rounds", "1"]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    one, chat, eight = (each["best"] for each in report["results"])
    for found in (one, chat, eight):
        assert found["tokens_per_s"] > 0, "how many is the machine's to say"
        assert found["us_per_token"] > 0
        assert found["events_per_token"] * found["us_per_event"] == pytest.approx(found["us_per_token"])
    assert 0 < one["events_per_token"] <= 1, "tokens that wait leave together"
    assert 0 < chat["events_per_token"] <= 1
    assert 0 < eight["events_per_token"] < 0.3
    for found in (each["best"] for each in report["requests"]):
        assert 0 < found["us_per_request"] * found["requests_per_s"] / 1e6 == pytest.approx(found["busy_share"])


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


def event(**content) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


STREAM = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
WORD, NO_WORD = event(choices=[{"text": "word\r\n"}]), event(choices=[{"text": ""}])
USAGE = event(choices=[], usage={"completion_tokens": 4})
SENT = {
    "answered": STREAM + chunked(WORD, WORD + WORD[:9], WORD[9:] + NO_WORD, USAGE, b"data: [DONE]\n\n", b""),
    "told": STREAM + chunked(WORD, event(error={"message": "it was stopped"})),
    "cut": STREAM + chunked(WORD, WORD, USAGE),
    "refused": b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nbusy",
}


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("outcome", SENT)
def test_a_client_notes_when_words_came_and_how_it_ended(outcome, size):
    """However what was sent is divided into packets."""
    from lib.http_streams import Answer

    ticks = itertools.count()
    sent = SENT[outcome]

    async def receive():
        answer = Answer(b"", lambda: next(ticks))
        for begin in range(0, len(sent), size):
            answer.data_received(sent[begin : begin + size])
        answer.connection_lost(None)
        await answer.over
        return answer

    answer = asyncio.run(receive())
    assert answer.outcome == outcome
    assert len(answer.times_s) == {"answered": 3, "told": 1, "cut": 2, "refused": 0}[outcome]
    assert answer.num_tokens == (4 if outcome in ("answered", "cut") else 0)
    says = {"answered": "", "told": "it was stopped", "refused": "status 503: busy", "cut": "ended before"}
    assert says[outcome] in answer.message
    if size == 1 and WORD in sent:
        assert answer.times_s[0] == sent.index(WORD) + len(WORD) + 1, "a word is there with the end of its chunk"
        assert answer.times_s == sorted(set(answer.times_s))


def test_an_answer_of_another_length_has_failed(loads):
    from serve_load import with_answer

    request = loads.Request(0.0, [1, 2], loads.full_length(5))
    came = {"due_s": 2.0, "times_s": [2.5, 3.0], "num_tokens": 5, "outcome": "answered", "message": ""}
    made = with_answer(request, came)
    assert (made.error, made.ttft_s, made.num_tokens, made.gaps_s) == (None, 0.5, 5, [0.5])
    assert "4 tokens came of 5" in str(with_answer(request, {**came, "num_tokens": 4}).error)
    assert "told: no more" in str(with_answer(request, {**came, "outcome": "told", "message": "no more"}).error)


def test_streams_in_the_engines_process_follow_each_other(loads, monkeypatch):
    """On a clock that goes a millisecond further with each look."""
    ticks = itertools.count()
    monkeypatch.setattr(loads, "time", SimpleNamespace(perf_counter=lambda: next(ticks) * 1e-3))
    streams = loads.make_streams("chat", 3, vocab_size=1536, longest=64, seed=0)
    assert [len(stream) for stream in streams] == [loads.REQUESTS_OF_A_STREAM] * 3
    with LLM(str(DEMO_MODEL_PATH), device="cpu", enable_prefix_caching=False) as llm:
        served = loads.serve_streams(llm, streams, duration_s=0.3)
    assert all(request.error is None and request.num_tokens == request.params.max_tokens for request in served)
    first = [request for request in served if request.prompt in [each.prompt for each in streams[0]]]
    assert len(first) > 1
    for before, after in itertools.pairwise(first):
        assert after.due_s == pytest.approx(before.token_times_s[-1], abs=0.004)
    assert served[-1].due_s <= 0.3 + 0.003


@pytest.fixture
def soak():
    import soak

    return soak


def test_the_soak_complains_of_what_was_not_planned(soak):
    def complaints(finish_reason, plan, error=None):
        output = RequestOutput(7, [], "", finished=True, finish_reason=finish_reason, error=error)
        return soak._complaints(output, soak._outcome(output), plan)

    assert not complaints("stop", soak.Plan())
    assert not complaints("abort", soak.Plan(is_aborted=True))
    assert not complaints("error", soak.Plan(hits=2), soak.InjectedError())
    assert "nobody aborted it" in complaints("abort", soak.Plan())[0]
    assert "was not injected" in complaints("error", soak.Plan(), RuntimeError("a real one"))[0]
    assert "before its second fault" in complaints("error", soak.Plan(hits=1), soak.InjectedError())[0]


PD = ["pd", "--decode-pipeline", "static", "--chaos-share", "0.1"]
ELASTIC = ["elastic", "--chaos-share", "0.1"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", [["single"], PD, ELASTIC], ids=["single", "pd", "elastic"])
def test_a_short_soak_on_a_cpu_loses_nothing(mode):
    command = [
        *(sys.executable, str(BENCHMARKS / "soak.py"), "--model", str(DEMO_MODEL_PATH), "--device", "cpu"),
        *("--mode", *mode, "--num-requests", "150", "--concurrency", "16", "--max-model-len", "256"),
        *("--num-kvcache-blocks", "50", "--fault-share", "0.1", "--check-tokens"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["requests"] == result["answered"] + result["aborted"] + result["failed"] == 150
    assert result["failed"] > 0
    assert result["aborted"] > 0
    assert result["preemptions"] > sum(number for kind, number in result["faults"].items() if kind != "late step") / 2
    assert result["repeated"] > 0
    if mode == ELASTIC:
        assert {"step", "late step"} <= result["faults"].keys()
        assert result["prefill_chunks"]["shared"] > 20
    if mode == PD:
        assert {"step", "card", "lane", "rebalance"} <= result["faults"].keys()
        assert result["rebalances"] > 5
        assert result["recoveries"] > 0


def test_the_cost_of_handoffs_on_two_logical_devices():
    command = [
        *(sys.executable, str(BENCHMARKS / "handoff.py"), "--model", str(DEMO_MODEL_PATH), "--device", "cpu"),
        *("--prompt-lens", "20", "60", "--max-num-batched-tokens", "32", "--blocks", "1", "4"),
        *("--kv-handoff", "copy", "direct", *SMALL_POOLS),
    ]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    result = json.loads(run.stdout.splitlines()[-1])
    assert [(row["method"], row["blocks"]) for row in result["copies"]] == [("copy", 1), ("copy", 4)]
    served = [(row["method"], row["prompt_len"], row["sends"]) for row in result["exposure"]]
    assert served == [(method, *sends) for method in ("copy", "direct") for sends in ((20, 1), (60, 2))]
    assert all(row["prefill_s"] > row["exposed_s"] > 0 for row in result["exposure"])


@pytest.mark.slow
def test_the_cost_of_handoffs_between_processes():
    pytest.importorskip("nixl_cu13")
    command = [
        *(sys.executable, str(BENCHMARKS / "handoff.py"), "--model", str(DEMO_MODEL_PATH), "--device", "cpu"),
        *("--prompt-lens", "20", "60", "--max-num-batched-tokens", "32", "--processes", *SMALL_POOLS),
    ]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["copies"] == []
    served = [(row["method"], row["prompt_len"], row["handoffs"]) for row in result["exposure"]]
    assert served == [("nixl", 20, 1), ("nixl", 60, 2)]
    assert all(row["bytes"] > 0 and row["ttft_s"] > 0 and row["handoff_s"] > 0 for row in result["exposure"])


@pytest.mark.parametrize("mode", ["single", "pd"])
def test_what_prefill_does_to_decode_on_a_cpu(mode):
    command = [
        *(sys.executable, str(BENCHMARKS / "interference.py"), "--model", str(DEMO_MODEL_PATH), "--device", "cpu"),
        *("--mode", mode, "--num-decoding", "3", "--context", "8", "--num-tokens", "15", "--prompt-len", "40"),
        *SMALL_POOLS,
    ]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    result = json.loads(run.stdout.splitlines()[-1])
    before, flooded, after = result["thirds"]
    assert flooded["prefill_tokens_per_s"] > 0
    assert before["prefill_tokens_per_s"] == 0
    assert after["itl_ms"]["p50"] > 0
    outside = before["itl_ms"]["p50"] + after["itl_ms"]["p50"]
    assert result["ratio"]["p50"] == pytest.approx(2 * flooded["itl_ms"]["p50"] / outside)


@pytest.fixture
def refusal(monkeypatch, capsys):
    """Runs a benchmark, within this process, that refuses its arguments; gives what it says."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, "--model", str(DEMO_MODEL_PATH), "--device", "cpu", *arguments])
        with pytest.raises(SystemExit, match="2"):
            importlib.import_module(script.removesuffix(".py")).main()
        return capsys.readouterr().err

    return run


def run_on_cpu(script, *arguments):
    model = ("--model", str(DEMO_MODEL_PATH), "--device", "cpu", *SMALL_POOLS)
    command = [sys.executable, str(BENCHMARKS / script), *model, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_flood_with_a_target_is_of_two_devices(refusal):
    assert "are of mode pd" in refusal("flood.py", "--mode", "single", "--itl-target-ms", "8")


def test_a_flood_on_a_cpu_leaves_requests_in_the_queue():
    lengths = ("--batch", "6", "--input", "20", "--num-output", "20", "--seconds", "1.5")
    run = run_on_cpu("flood.py", *lengths, "--max-handoff-backlog", "3")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["flood"]["arrived_per_s"] > 3 * result["steady"]["arrived_per_s"]
    assert result["flood"]["waiting"] > result["steady"]["waiting"] == 0
    assert result["flood"]["most_backlog"] <= 3  # none, where a step has ended when it was launched


def test_what_it_costs_to_look_is_measured_on_a_cpu():
    run = run_on_cpu("observing.py", "--num-requests", "6", "--max-model-len", "96", "--rounds", "1", "--mode", "pd")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert {way: len(rates) for way, rates in result["tokens_per_s"].items()} == {
        "nothing": 1,
        "metrics": 1,
        "metrics and trace": 1,
    }
    assert result["trace_bytes"] > 1000


def test_ways_to_decode_take_turns_on_a_cpu():
    points = ("--batches", "4", "--contexts", "8", "16", "--grow", "4", "8", "14")
    run = run_on_cpu("decode_pipeline.py", *points)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert [(row["batch"], row["context"]) for row in result["rows"]] == [(4, 8), (4, 16)]
    for row in result["rows"]:
        assert row["auto"]["chosen"] == "plain"
        assert all(0 < point["attention_s"] < point["s"] * 100 for point in row["points"]), "one step of several"
    assert {"auto", "plain"} < result["grown_s"].keys()


@pytest.mark.parametrize("streamed", [False, True])
def test_decode_steps_are_timed_by_a_listener(streamed):
    import decode_latency

    with LLM(str(DEMO_MODEL_PATH), device="cpu", enable_prefix_caching=False) as llm:
        step_ms, host_us = decode_latency.measure(llm, batch=3, context=40, num_steps=16, streamed=streamed)
        # On a CPU, which runs a step while it is launched, the loop never waits.
        assert host_us == pytest.approx(step_ms * 1e3)
        assert llm.metrics()["decode_steps"] >= 9
        assert llm.is_finished()
        llm.scheduler.check_integrity()


def test_waiting_is_not_host_work(monkeypatch):
    import decode_latency

    ends_s = {}
    late = lambda handle: time.perf_counter() > ends_s.setdefault(handle, time.perf_counter() + 0.1)  # noqa: E731
    monkeypatch.setattr(StepHandle, "is_done", late)
    with LLM(str(DEMO_MODEL_PATH), device="cpu", enable_prefix_caching=False) as llm:
        step_ms, host_us = decode_latency.measure(llm, batch=3, context=40, num_steps=16, streamed=False)
    assert step_ms - host_us / 1e3 > 5, "of 100 ms"


def test_every_benchmark_says_what_it_takes(monkeypatch, capsys):
    """All but plots.py, which takes nothing; a parser with two options of a name would fail."""
    names = sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem != "plots")
    assert len(names) == 25
    for name in names:
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit, match="0"):
            importlib.import_module(name).main()
        assert "--output" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("nixl_cu13") is None, reason="needs nixl-cu13")
def test_the_cost_of_a_lost_card():
    command = [
        *(sys.executable, str(BENCHMARKS / "lost_card.py"), "--model", str(DEMO_MODEL_PATH), "--device", "cpu"),
        *("--streams", "8", "--prompt-len", "64", "--num-output", "300", "--num-kvcache-blocks", "300"),
        *("--rounds", "2"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1", "UCX_TLS": "tcp"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    first, second = json.loads(run.stdout.splitlines()[-1])["rounds"]
    assert {first["card"], second["card"]} == {"card 0", "card 1"}
    for found in first, second:
        assert 0 < found["num_lost"] < 8
        assert 0 < found["noticed_s"] <= found["first_token_s"] <= found["last_token_s"]
        assert found["noticed_s"] < found["back_s"]


@pytest.mark.slow
def test_modes_of_two_cards_take_turns(tmp_path):
    command = [
        *(sys.executable, str(BENCHMARKS / "two_cards.py"), "--model", str(DEMO_MODEL_PATH), "--device", "cpu"),
        *("--loads", "chat:4", "chat:2+chat:6", "--modes", "elastic", "dp2", "--duration", "2"),
        *("--max-model-len", "128", "--num-kvcache-blocks", "100"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    loads = json.loads(run.stdout.splitlines()[-1])["loads"]
    order = [("elastic", "chat:4"), ("dp2", "chat:4"), ("dp2", "chat:2+chat:6"), ("elastic", "chat:2+chat:6")]
    assert [(load["mode"], load["load"]) for load in loads] == order
    assert all(load["num_requests"] and not load["num_failed"] for load in loads)
    assert loads[0]["input_tokens"] == loads[1]["input_tokens"]
    assert [phase["rate"] for phase in loads[2]["phases"]] == [2, 6]


def test_twice_the_cards_get_twice_the_requests():
    import two_cards

    args = SimpleNamespace(prefill_cards=None)
    twice = two_cards.in_mode(args, "elastic-processes*2", ["rag:4.5", "chat:40"])
    assert (twice.mode, twice.prefill_cards, twice.decode_cards) == ("elastic-processes", 2, 2)
    assert twice.drift == ["rag:9.0", "chat:80.0"]
    once = two_cards.in_mode(args, "elastic-processes", ["rag:4.5", "chat:40"])
    assert (once.mode, once.prefill_cards, once.drift) == ("elastic-processes", None, ["rag:4.5", "chat:40"])


def test_a_load_of_two_cards_that_is_none_is_refused(refusal):
    assert "--loads chat:3+gossip:4: 'gossip:4'" in refusal("two_cards.py", "--loads", "chat:3", "chat:3+gossip:4")


def test_arrivals_and_lengths_do_not_depend_on_the_vocabulary(loads):
    few, many = (loads.make_load("chat", 20.0, 10.0, vocab_size, 2048, seed=1) for vocab_size in (2, 150_000))
    assert [(r.due_s, len(r.prompt), r.params.max_tokens) for r in few] == [
        (r.due_s, len(r.prompt), r.params.max_tokens) for r in many
    ]
