"""What the online benchmark counts, and that it runs without a GPU."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from nanovllm import RequestOutput, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SMALL_POOLS = ("--num-kvcache-blocks", "500")  # 32 MiB of the demo model


@pytest.fixture
def online_load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import online_load

    return online_load


def test_lengths_of_workloads(online_load):
    rng = random.Random(0)
    draw_input, draw_output = online_load.WORKLOADS["chat"]
    assert statistics.mean(draw_input(rng) for _ in range(20_000)) == pytest.approx(450, rel=0.03)
    assert statistics.mean(draw_output(rng) for _ in range(20_000)) == pytest.approx(200, rel=0.03)
    load = online_load.make_load("rag", rate=5.0, duration_s=200.0, vocab_size=99, longest=4096, seed=1)
    assert len(load) == pytest.approx(1000, rel=0.1)
    assert [request.due_s for request in load] == sorted(request.due_s for request in load)
    assert all(len(request.prompt) + request.params.max_tokens <= 4096 for request in load)
    assert max(map(max, (request.prompt for request in load))) == 98


def test_latencies_count_from_the_moment_a_request_was_due(online_load):
    params = SamplingParams()
    quick = online_load.Request(1.0, [1, 2], params, token_times_s=[1.5, 1.7, 2.5])
    late = online_load.Request(2.0, [1], params, token_times_s=[6.0])
    failed = online_load.Request(4.0, [1], params, error=ValueError("injected"))
    summary = online_load.summarize([quick, late, failed], ttft_limit_s=0.6, itl_limit_s=0.9)
    assert (summary["num_requests"], summary["num_failed"]) == (3, 1)
    assert (summary["input_tokens"], summary["output_tokens"], summary["seconds"]) == (4, 4, 6.0)
    assert summary["ttft_ms"]["max"] == 4000.0
    assert summary["itl_ms"]["max"] == pytest.approx(800.0)
    assert summary["tpot_ms"]["p50"] == pytest.approx(500.0)
    # Requests were due until 4.0; three tokens came between 0.4 and then.
    assert summary["saturated_tokens_per_s"] == pytest.approx(3 / 3.6)
    assert summary["goodput_per_s"] == pytest.approx(1 / 6.0)
    assert not quick.is_good(0.6, 0.7)
    assert not quick.is_good(0.4, 0.9)
    assert not failed.is_good(100.0, 100.0)


def test_a_trace_is_cut_and_ordered(online_load, tmp_path):
    rows = [(9_000, 5, 3), (4_000, 50, 100), (4_500, 7, 2), (90_000, 1, 1)]
    lines = [json.dumps({"timestamp": t, "input_length": i, "output_length": o, "hash_ids": []}) for t, i, o in rows]
    (tmp_path / "trace.jsonl").write_text("\n".join(lines) + "\n")
    load = online_load.read_trace(str(tmp_path / "trace.jsonl"), 10.0, vocab_size=99, longest=60, seed=0)
    assert [(r.due_s, len(r.prompt), r.params.max_tokens) for r in load] == [(0.0, 30, 30), (0.5, 7, 2), (5.0, 5, 3)]


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


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
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


@pytest.mark.slow
@pytest.mark.parametrize("mode", [["single"], PD], ids=["single", "pd"])
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
    assert result["preemptions"] > sum(result["faults"].values()) / 2
    assert result["repeated"] > 0
    if mode != ["single"]:
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
    # One thread does it all: a gap has a prompt in it.
    assert result["ratio"]["p50"] > 1


def run_on_cpu(script, *arguments):
    model = ("--model", str(DEMO_MODEL_PATH), "--device", "cpu", *SMALL_POOLS)
    command = [sys.executable, str(BENCHMARKS / script), *model, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_flood_on_a_cpu_leaves_requests_in_the_queue():
    lengths = ("--batch", "6", "--input", "20", "--num-output", "20", "--seconds", "1.5")
    run = run_on_cpu("flood.py", *lengths, "--max-handoff-backlog", "3")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["flood"]["arrived_per_s"] > 3 * result["steady"]["arrived_per_s"]
    assert result["flood"]["waiting"] > result["steady"]["waiting"] == 0
    assert result["flood"]["most_backlog"] <= 3  # none, where a step has ended when it was launched
    refused = run_on_cpu("flood.py", "--mode", "single", "--itl-target-ms", "8")
    assert "are of mode pd" in refused.stderr


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
        assert all(0 < point["attention_s"] < point["s"] * 2 for point in row["points"])
    assert {"auto", "plain"} < result["grown_s"].keys()
