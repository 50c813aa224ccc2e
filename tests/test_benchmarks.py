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

from nanovllm import SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


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
    summary = online_load.summarize([quick, late, failed])
    assert (summary["num_requests"], summary["num_failed"]) == (3, 1)
    assert (summary["input_tokens"], summary["output_tokens"], summary["seconds"]) == (4, 4, 6.0)
    assert summary["ttft_ms"]["max"] == 4000.0
    assert summary["itl_ms"]["max"] == pytest.approx(800.0)
    assert summary["tpot_ms"]["p50"] == pytest.approx(500.0)
    # Requests were due until 4.0; three tokens came between 0.4 and then.
    assert summary["saturated_tokens_per_s"] == pytest.approx(3 / 3.6)


def test_it_runs_on_a_cpu_and_ends_with_a_line_of_json():
    command = [
        *(sys.executable, str(BENCHMARKS / "online_load.py"), "--model", str(DEMO_MODEL_PATH), "--device", "cpu"),
        *("--rate", "4", "--duration", "2", "--max-model-len", "128"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["num_failed"] == 0
    assert result["output_tokens"] > 0
    assert "TTFT" in run.stdout
