"""Splits that change while a card decodes, lanes that break, and GPUs that are lost for good."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.engine.execution import decode_calibrator
from nanovllm.engine.execution.cuda_graph import StepGraphs
from nanovllm.engine.scheduling import circuit_breaker
from nanovllm.engine.scheduling.calibration import Measured
from nanovllm.engine.scheduling.pipeline_plan import Arrangement, Cut
from nanovllm.engine.scheduling.rebalancer import Rebalancer
from nanovllm.entrypoints import doctor
from tests import tiny
from tests.test_two_devices import assert_whole

pytestmark = [pytest.mark.gpu]

ONE, OTHER = Arrangement((32, 100), Cut.GEMMS), Arrangement((64, 68), Cut.REST)
TWO_GPUS = {
    "device": "cuda",
    "dtype": "float32",
    "enable_two_gpu_pd": True,
    "kvcache_block_size": 16,
    "num_kvcache_blocks": 4000,
    "max_num_seqs": 32,
    "enable_decode_pipeline": True,
}


@pytest.fixture(scope="module")
def tiny_on_disk(tmp_path_factory):
    model = tiny.make_reference(seed=1, head_dim=64)
    return tiny.save(model, tmp_path_factory.mktemp("tiny64")), model


@pytest.fixture
def arranged_by_length(monkeypatch):
    """As if lanes paid from 8 requests on, split in one way up to 40 tokens, then in another; both are ready."""
    monkeypatch.setattr(decode_calibrator, "CALIBRATED_BATCHES", (8, 16))
    monkeypatch.setattr(decode_calibrator, "CALIBRATED_CONTEXTS", (8, 40, 72))

    def measured(paths, arrangements, batches, contexts):
        return [
            Measured(batch, context, 1.0, {**dict.fromkeys(arrangements, 2.0), ONE: 0.6 + context / 200, OTHER: 0.8})
            for batch in batches
            for context in contexts
        ]

    monkeypatch.setattr(decode_calibrator.DecodeCalibrator, "_measured", measured)
    monkeypatch.setattr(Rebalancer, "observe", lambda *args: None)


def assert_right(tokens, prompts, reference):
    for prompt, of_it in zip(prompts, tokens, strict=True):
        assert of_it == tiny.reference_tokens(reference, prompt, len(of_it))


@pytest.mark.whole_card
@pytest.mark.two_gpu
def test_a_hundred_forced_rebalances_change_no_token_and_leak_nothing(tiny_on_disk, arranged_by_length):
    path, reference = tiny_on_disk
    prompts = [prompt[:20] for prompt in tiny.random_prompts(8, seed=8, longest=60)]
    with LLM(path, **TWO_GPUS) as llm:
        paths = llm.decode_runner.decode.paths
        ids = [llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=200)) for prompt in prompts]
        got, turn, free = {request_id: [] for request_id in ids}, 0, []
        while not llm.is_finished():
            paths.force([ONE, OTHER, ONE, OTHER, None][turn % 5])
            turn += 1
            for output in llm.step():
                got[output.request_id] += output.new_token_ids
            free.append(torch.cuda.mem_get_info(1)[0])
        assert paths.num_rebalances >= 100, f"{turn} turns"
        assert min(free[len(free) // 2 :]) >= min(free[: len(free) // 2]) - 2**21
        assert_whole(llm)
    assert_right(got.values(), prompts, reference)


@pytest.mark.whole_card
@pytest.mark.two_gpu
def test_the_split_follows_the_contexts(tiny_on_disk, arranged_by_length):
    path, reference = tiny_on_disk
    prompts = [prompt[:20] for prompt in tiny.random_prompts(10, seed=9, longest=60)]
    with LLM(path, **TWO_GPUS) as llm:
        answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=80), use_tqdm=False)
        metrics = llm.metrics()
    assert metrics["rebalances"] >= 1
    assert metrics["pipeline_split"] == {"attention": 64, "ffn": 68}
    assert 0 < metrics["stage_s"]["attention"] < 0.1
    assert 0 < metrics["stage_s"]["ffn"] < 0.1
    assert metrics["fallbacks"] == {}
    assert_right([answer["token_ids"] for answer in answers], prompts, reference)


@pytest.mark.two_gpu
def test_lanes_that_break_are_left_out_and_come_back(tiny_on_disk, arranged_by_length, monkeypatch):
    monkeypatch.setattr(circuit_breaker, "FIRST_PAUSE_S", 0.001)
    path, reference = tiny_on_disk
    prompts = [prompt[:20] for prompt in tiny.random_prompts(10, seed=10, longest=60)]
    replay, calls = StepGraphs.replay, [0]

    def failing(graphs, size):
        if graphs is not plain:
            calls[0] += 1
            if 10 <= calls[0] < 14:
                raise RuntimeError("injected into a replay")
        return replay(graphs, size)

    with LLM(path, **TWO_GPUS) as llm:
        plain = llm.decode_runner.decode.paths.steps[None]
        llm.prefill_runner.prefill.graphs.replay = lambda size: replay(llm.prefill_runner.prefill.graphs, size)
        monkeypatch.setattr(StepGraphs, "replay", failing)
        answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=200), use_tqdm=False)
        metrics = llm.metrics()
        assert_whole(llm)
    assert metrics["fallbacks"]["lanes failed"] >= 2
    assert metrics["recoveries"] >= 1
    assert_right([answer["token_ids"] for answer in answers], prompts, reference)


@pytest.mark.whole_card
@pytest.mark.two_gpu
def test_the_second_engine_reads_what_the_first_measured(tiny_on_disk, monkeypatch, caplog):
    monkeypatch.setattr(decode_calibrator, "CALIBRATED_BATCHES", (8, 16))
    path, reference = tiny_on_disk
    prompts = tiny.random_prompts(20, seed=3, longest=60)
    caplog.set_level("INFO")
    points, seconds = [], []
    for _ in range(2):
        started = time.perf_counter()
        with LLM(path, **TWO_GPUS) as llm:
            seconds.append(time.perf_counter() - started)
            points.append(llm.decode_runner.decode.paths.calibration.points)
            answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
        assert_right([answer["token_ids"] for answer in answers], prompts, reference)
    assert points[0] == points[1]
    assert "calibration kept in" in caplog.text
    assert f"calibration of {len(points[0])} points from" in caplog.text
    assert seconds[1] < seconds[0]


LOSE = """
import json, os, sys, time
import torch
from nanovllm import LLM, SamplingParams

path, how, two = sys.argv[1], sys.argv[2], sys.argv[3] == "two"
options = {"enable_two_gpu_pd": True, "card_roles": "fixed"} if two else {}
llm = LLM(path, device="cuda", dtype="float32", num_kvcache_blocks=2000, max_num_seqs=8, step_timeout_s=1.0, **options)
ids = [llm.add_request([1, 2, 3, place], SamplingParams(temperature=0, max_tokens=200)) for place in range(12)]
for _ in range(20):
    llm.step()
runner = llm.prefill_runner if how == "prefill" else llm.decode_runner
with torch.cuda.device(runner.device.index), torch.cuda.stream(runner.stream):
    if how == "hang":
        torch.cuda._sleep(2**35)
    else:
        where = torch.full((1,), 2**40, device=f"cuda:{runner.device.index}")
        torch.zeros(4, device=where.device)[where]
ended = {}
while not llm.is_finished():
    for output in llm.step():
        if output.finished:
            ended[output.request_id] = [output.finish_reason, type(output.error).__name__, str(output.error)]
try:
    llm.add_request([1], SamplingParams(max_tokens=2))
    refused = None
except Exception as error:
    refused = type(error).__name__
llm.close()
print(json.dumps({"ended": ended, "refused": refused, "added": len(ids)}), flush=True)
if how == "hang":
    os._exit(0)
"""


@pytest.mark.whole_card
@pytest.mark.parametrize(
    ("how", "devices"),
    [
        ("fault", "one"),
        ("hang", "one"),
        pytest.param("fault", "two", marks=pytest.mark.two_gpu),
        pytest.param("prefill", "two", marks=pytest.mark.two_gpu),
    ],
)
def test_a_lost_gpu_ends_all_requests_by_name(tiny_on_disk, tmp_path, how, devices):
    """A real error of a kernel, after which every call fails; a kernel that does not end."""
    script = tmp_path / "lose.py"
    script.write_text(textwrap.dedent(LOSE))
    command = [sys.executable, str(script), tiny_on_disk[0], how, devices]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert len(result["ended"]) == result["added"]
    errors = [ended for ended in result["ended"].values() if ended[0] == "error"]
    assert errors
    for _, kind, message in errors:
        assert kind == "DeviceError"
        assert "is lost" in message
        assert ("has not ended within step_timeout_s" if how == "hang" else "CUDA error") in message
    assert result["refused"] == "DeviceError"


@pytest.mark.whole_card
def test_doctor_finds_nothing_broken(capsys):
    started = time.perf_counter()
    assert doctor.run(None, 0, 1, as_json=True) == 0
    assert time.perf_counter() - started < 20
    findings = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert findings["GPU 0"]["verdict"] == "ok"
    assert findings["green contexts in a graph"]["found"].endswith(" 0 SMs in both")
    assert findings["handoff"]["verdict"] == "ok"
