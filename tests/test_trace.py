"""The trace that `trace="file.json"` writes, and what the log tells of a handoff and of the options."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nanovllm import LLM, ConfigError, EngineClosedError, SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.engine.execution.step_handle import StepHandle
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.observability import trace
from nanovllm.engine.observability.trace import Tracer
from nanovllm.utils import device as devices
from nanovllm.utils.device import Device, DeviceClock
from tests import tiny
from tests.test_two_devices import assert_whole
from tests.transfers import FaultyTransfer, LazyTransfer

GREEDY = SamplingParams(temperature=0, max_tokens=20)
ONE = {"device": "cpu"}
TWO = {"device": "cpu", "enable_two_gpu_pd": True, "card_roles": "fixed"}
PREFILL, HANDOFF, DECODE = "prefill device cpu:0", "handoff cpu:0 to cpu:1", "decode device cpu:1"
MODES = {
    "one": ONE,
    "one_preempted": ONE | {"num_kvcache_blocks": 9, "max_num_batched_tokens": 40},
    "two": TWO,
    "two_chunked": TWO | {"max_num_batched_tokens": 24, "verify_kv_handoff": True},
    "two_direct": TWO | {"kv_handoff": "direct", "max_num_batched_tokens": 64},
    "two_preempted": TWO | {"num_kvcache_blocks": 9},
}


def rows_of(path: Path) -> dict[str, list[dict]]:
    """The spans of each row."""
    events = json.loads(path.read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    rows: dict[str, list[dict]] = {name: [] for name in names.values()}
    for event in events:
        if event["ph"] == "X":
            rows[names[event["tid"]]].append(event)
    return rows


def tracks_of(path: Path) -> dict[int, list[tuple[str, float, float]]]:
    """The spans of each request's track, in the order of their ends; all of them are properly nested."""
    tracks: dict[int, list[tuple[str, float, float]]] = {}
    open_spans: dict[int, list[dict]] = {}
    last_ts: dict[int, float] = {}
    for event in json.loads(path.read_text())["traceEvents"]:
        if event["ph"] not in "be":
            continue
        track = event["id"]
        assert event["ts"] >= last_ts.get(track, 0.0)
        last_ts[track] = event["ts"]
        if event["ph"] == "b":
            open_spans.setdefault(track, []).append(event)
        else:
            begun = open_spans[track].pop()
            assert begun["name"] == event["name"]
            tracks.setdefault(track, []).append((event["name"], begun["ts"], event["ts"]))
    assert not any(open_spans.values())
    return tracks


def named(spans: list[dict], kind: str) -> list[dict]:
    return [span for span in spans if span["name"].startswith(kind)]


def total(spans: list[dict], what: str) -> int:
    return sum(span["args"][what] for span in spans)


@pytest.mark.parametrize("lazy", [False, True], ids=["", "lazy"])
@pytest.mark.parametrize("mode", MODES)
def test_every_step_handoff_and_request_is_there_once(tiny_path, tmp_path, mode, lazy):
    prompts = tiny.random_prompts(4, seed=1) + tiny.random_prompts(4, seed=2, longest=40, shared=48)
    max_tokens = 40 if "preempted" in mode else 20
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    with LLM(tiny_path, **MODES[mode]) as llm:
        expected = [answer["token_ids"] for answer in llm.generate(prompts, params, use_tqdm=False)]
    path = tmp_path / "trace.json"
    with LLM(tiny_path, trace=path, **MODES[mode]) as llm:
        if lazy:
            llm.kv_transfer = LazyTransfer(llm.kv_transfer)
        answers = llm.generate(prompts, params, use_tqdm=False)
        assert_whole(llm)
        counters, block_bytes = llm.counters, llm.decode_runner.spec.block_bytes
        raw = [(span.row, span.start_s, span.end_s) for span in llm._observer._tracer._spans]
        assert not path.exists()
    assert [answer["token_ids"] for answer in answers] == expected

    rows = rows_of(path)
    is_one = "one" in mode
    assert set(rows) == ({"device cpu:0"} if is_one else {PREFILL, HANDOFF, DECODE})
    steps = [span for spans in rows.values() for span in spans]
    mixed = named(steps, "mixed")
    assert bool(mixed) == (mode == "one_preempted")
    decodes = named(rows["device cpu:0" if is_one else DECODE], "decode") + mixed
    prefills = named(steps, "prefill") + mixed
    handoffs = rows.get(HANDOFF, [])
    assert (len(prefills), total(prefills, "tokens")) == (counters.prefill_steps, counters.prefill_tokens)
    assert len(decodes) == counters.decode_steps
    assert total(decodes, "requests") >= counters.decode_tokens
    assert total(handoffs, "blocks") == counters.handoff_blocks
    assert total(handoffs, "bytes") == counters.handoff_blocks * block_bytes
    assert sum(len(span["args"]["request_ids"]) for span in handoffs) == counters.handoffs
    for place, answer in enumerate(answers):
        theirs = [span for span in decodes if place in span["args"]["request_ids"]]
        assert len(theirs) >= len(answer["token_ids"]) - 1 - ("preempted" in mode) * max_tokens

    for _, spans in itertools.groupby(sorted(raw), key=lambda span: span[0]):
        ends_s = 0.0
        for _, start_s, end_s in spans:
            assert ends_s <= start_s < end_s
            ends_s = end_s
    for spans in rows.values():
        for before, span in itertools.pairwise(spans):
            assert before["ts"] + before["dur"] <= span["ts"] + 1e-3

    tracks = tracks_of(path)
    assert set(tracks) == set(range(len(prompts)))
    for place, answer in enumerate(answers):
        name, begins, ends = tracks[place][-1]
        assert name == f"request {place}"
        assert ends - begins == pytest.approx(answer["latency_s"] * 1e6, abs=1e6)
        of_it = [span for spans in rows.values() for span in spans if place in span["args"].get("request_ids", ())]
        assert of_it
        assert begins <= min(span["ts"] for span in of_it)
        assert ends >= min(span["ts"] + span["dur"] for span in of_it), "it ends after its first step"
        assert any(what.startswith("prefill of tokens") for what, _, _ in tracks[place])


def test_what_spans_are_called(tiny_path, tmp_path):
    path = tmp_path / "trace.json"
    with LLM(tiny_path, trace=str(path), kv_handoff="copy", **TWO) as llm:
        llm.generate([[1] * 20, [2] * 30, [3] * 40], SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
        llm.generate([[4] * 70], SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
        block_bytes = llm.decode_runner.spec.block_bytes
    rows = {name: [(span["name"], span["args"]) for span in spans] for name, spans in rows_of(path).items()}
    assert [name for name, _ in rows[PREFILL]] == ["prefill 3 requests, 90 tokens", "prefill 1 request, 70 tokens"]
    assert rows[DECODE][0] == (
        "decode 3 requests, mean context 31",
        {"requests": 3, "context": 31, "request_ids": [0, 1, 2]},
    )
    assert rows[DECODE][-1][0] == "decode 1 request, mean context 72"
    assert rows[HANDOFF][-1] == (
        "handoff of request 3, 5 blocks",
        {"blocks": 5, "bytes": 5 * block_bytes, "request_ids": [3]},
    )


def test_a_direct_handoff_is_a_span_over_its_step(tiny_path, tmp_path):
    path = tmp_path / "trace.json"
    with LLM(tiny_path, trace=path, kv_handoff="direct", **TWO) as llm:
        llm.generate([[1] * 20, [2] * 30], SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
    rows = rows_of(path)
    (step,), (handoff,) = rows[PREFILL], rows[HANDOFF]
    assert (handoff["ts"], handoff["dur"]) == (step["ts"], step["dur"])
    assert handoff["name"] == "handoff of 2 requests, 4 blocks"


def test_lanes_are_busy_within_the_decode_steps(tiny_path, tmp_path):
    options = {"enable_decode_pipeline": True, "decode_pipeline": "static", "decode_pipeline_profiling": True}
    with LLM(tiny_path, **TWO, **options, trace=tmp_path / "trace.json") as llm:
        llm.generate(tiny.random_prompts(5, seed=1), GREEDY, use_tqdm=False)
        num_steps = llm.decode_runner.get_pipeline_statistics()["steps"]
    rows = rows_of(tmp_path / "trace.json")
    lanes = {"attention": rows["attention lane cpu:1"], "ffn": rows["ffn lane cpu:1"]}
    # Two layers and two micro-batches; the FFN lane has the first layer's QKV projection to itself.
    assert [len(spans) for spans in lanes.values()] == [4 * num_steps, 6 * num_steps]
    assert lanes["attention"][0]["name"] == "store_kv(0), attend(0) of micro-batch 0"
    for span in (span for spans in lanes.values() for span in spans):
        begin, end = span["ts"], span["ts"] + span["dur"]
        around = [step for step in rows[DECODE] if step["ts"] <= begin and end <= step["ts"] + step["dur"]]
        assert len(around) == 1, span


def test_a_copy_begins_after_its_step_has_ended(tiny_path, tmp_path):
    path = tmp_path / "trace.json"
    with LLM(tiny_path, trace=path, max_num_batched_tokens=32, kv_handoff="copy", **TWO) as llm:
        llm.generate([[1] * 90], GREEDY, use_tqdm=False)
    rows = rows_of(path)
    assert len(rows[PREFILL]) == len(rows[HANDOFF]) == 3
    for step, handoff in zip(rows[PREFILL], rows[HANDOFF], strict=True):
        assert step["ts"] + step["dur"] <= handoff["ts"]
        assert handoff["dur"] > 0


def test_a_span_names_so_many_requests_and_no_more(tiny_path, tmp_path):
    path = tmp_path / "trace.json"
    with LLM(tiny_path, trace=path, **ONE) as llm:
        llm.generate([[1, 2]] * 40, SamplingParams(max_tokens=3), use_tqdm=False)
    (spans,) = rows_of(path).values()
    assert max(total([span], "requests") for span in spans) == 40
    assert max(len(span["args"]["request_ids"]) for span in spans) == 32


# The file


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{tmp}/missing/trace.json", "there is no folder {tmp}/missing; make it"),
        ("{tmp}", "is there and is not a file"),
        ("", "is there and is not a file"),
        ("/dev/null", "is there and is not a file"),
        ("trace\0.json", "cannot be written"),
        ("{tmp}/" + "x" * 300, "cannot be written"),
        (7, "trace=7 is not the path of a file"),
        (True, "trace=True is not the path of a file"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused_before_anything_is_loaded(tmp_path, path, message):
    path = path.replace("{tmp}", str(tmp_path)) if isinstance(path, str) else path
    with pytest.raises(ConfigError, match=message.replace("{tmp}", str(tmp_path))):
        LLM("there is no such model", trace=path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path, monkeypatch):
    def refuse(path, *args):
        raise PermissionError(f"[Errno 13] Permission denied: {path}")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(ConfigError, match="Permission denied"):
        LLM("there is no such model", trace=tmp_path / "trace.json")


def test_it_is_written_when_the_engine_ends_by_an_exception(tiny_path, tmp_path):
    path = tmp_path / "trace.json"

    def serve_and_fail():
        with LLM(tiny_path, trace=path, max_num_seqs=2, **TWO) as llm:
            for prompt in tiny.random_prompts(3, seed=3):
                llm.add_request(prompt, GREEDY)
            for _ in range(6):
                llm.step()
            llm._loop.launch_steps()
            assert llm._steps
            num_steps.append(llm.counters.decode_steps)
            raise ZeroDivisionError

    num_steps: list[int] = []
    with pytest.raises(ZeroDivisionError):
        serve_and_fail()
    assert len(rows_of(path)[DECODE]) > num_steps[0] > 0
    all_args = [event.get("args", {}) for event in json.loads(path.read_text())["traceEvents"]]
    assert [args["finish_reason"] for args in all_args if "finish_reason" in args] == ["abort"] * 3
    assert [track[-1][0] for track in tracks_of(path).values()] == ["request 0", "request 1", "request 2"]


def test_steps_that_an_interrupt_drops_are_there(tiny_path, tmp_path, monkeypatch):
    path = tmp_path / "trace.json"
    launched = []
    with LLM(tiny_path, trace=path, **ONE) as llm:
        launch = llm.decode_runner.launch
        llm.decode_runner.launch = lambda step: (launched.append(step), launch(step))[1]
        request_id = llm.add_request([1, 2, 3], GREEDY)
        for _ in range(4):
            llm.step()
        with monkeypatch.context() as patch:
            patch.setattr(StepHandle, "collect", lambda *args: sys.exit())
            with pytest.raises(SystemExit):
                llm.step()
        while not llm.is_finished():
            llm.step()
        assert llm.explain(request_id)
    (spans,) = rows_of(path).values()
    assert len(spans) == len(launched)


def test_it_is_written_when_closing_fails(tiny_path, tmp_path, monkeypatch):
    path = tmp_path / "trace.json"
    llm = LLM(tiny_path, trace=path, **ONE)
    llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)
    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "synchronize", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llm.close()
    assert len(tracks_of(path)) == 1


def test_an_error_while_writing_is_logged_and_leaves_the_file_that_was_there(tiny_path, tmp_path, monkeypatch, caplog):
    path = tmp_path / "trace.json"
    path.write_text("of an earlier run")
    with LLM(tiny_path, trace=path, **ONE) as llm:
        llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)
        dumps, calls = json.dumps, []

        def fail_midway(event, **options):
            if options:  # what was learned of step times, which is written as well
                return dumps(event, **options)
            calls.append(event)
            if len(calls) > 5:
                raise OSError("no space left on device")
            return dumps(event)

        monkeypatch.setattr(trace.json, "dumps", fail_midway)
    assert len(calls) == 6
    assert "the trace could not be written" in caplog.text
    assert "no space left on device" in caplog.text
    assert path.read_text() == "of an earlier run"
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"]
    with pytest.raises(EngineClosedError):
        llm.step()


def test_a_link_stays_one_and_a_second_close_writes_nothing(tiny_path, tmp_path):
    path, link = tmp_path / "trace.json", tmp_path / "link.json"
    link.symlink_to(path)
    with LLM(tiny_path, trace=link, **ONE) as llm:
        llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)
    assert link.is_symlink()
    assert len(tracks_of(path)) == 1
    path.unlink()
    llm.close()
    assert not path.exists()


def test_it_holds_so_many_events_and_says_once_that_it_is_full(tiny_path, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(trace, "MAX_EVENTS", 10)
    path = tmp_path / "trace.json"
    with LLM(tiny_path, trace=path, **ONE) as llm:
        answers = llm.generate([[1, 2, 3]] * 2, GREEDY, use_tqdm=False)
    assert [len(answer["token_ids"]) for answer in answers] == [20, 20]
    (spans,) = rows_of(path).values()
    assert len(spans) == 10
    assert tracks_of(path) == {}
    assert caplog.text.count("the trace is full (10 events)") == 1


def test_a_tracer_takes_rows_of_any_name_and_shows_no_overlap(tmp_path):
    path = tmp_path / "trace.json"
    tracer = Tracer(path)
    now = tracer._began_s
    tracer.add("attention lane", "attend of layer {layer}", now + 2.0, now + 3.0, layer=7)
    tracer.add("FFN lane", "GEMMs", now + 1.0, now + 4.0)
    tracer.add("attention lane", "attend of layer {layer}", now + 3.0 - 4e-6, now + 3.5, layer=8)
    tracer.write()
    rows = rows_of(path)
    assert [(span["name"], span["ts"], span["dur"]) for span in rows["attention lane"]] == [
        ("attend of layer 7", pytest.approx(2e6), pytest.approx(1e6)),
        ("attend of layer 8", pytest.approx(3e6), pytest.approx(0.5e6)),
    ]
    assert rows["attention lane"][1]["ts"] == rows["attention lane"][0]["ts"] + rows["attention lane"][0]["dur"]
    assert [span["name"] for span in rows["FFN lane"]] == ["GEMMs"]


# Clocks


def test_nothing_is_timed_without_a_trace(tiny_path, monkeypatch):
    monkeypatch.setattr(DeviceClock, "record_moment", lambda *args: 1 / 0)
    with LLM(tiny_path, **TWO) as llm:
        llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)


def test_a_cpus_clock_is_the_hosts():
    clock = DeviceClock(Device("cpu", 3))
    before_s = devices.time.perf_counter()
    moment = clock.record_moment()
    assert before_s <= moment.seconds() == moment.seconds() <= devices.time.perf_counter()


class FakeGpu:
    """Its clock is a little fast, and it tells times between events in float32 milliseconds, as CUDA does.

    From `busy_from_s` until `busy_until_s` it records nothing new.
    """

    def __init__(self) -> None:
        self.host_s = 1e5
        self.busy_from_s = self.busy_until_s = 0.0

    def perf_counter(self) -> float:
        self.host_s += 1e-7
        return self.host_s

    def event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        event = SimpleNamespace(ms=0.0)

        def record(stream: object) -> None:
            self.host_s += 3e-6
            is_busy = self.busy_from_s <= self.host_s
            event.done_s = max(self.host_s, self.busy_until_s) if is_busy else self.host_s
            event.ms = (event.done_s - 7.0) * (1 + 20e-6) * 1e3

        def query() -> bool:
            self.host_s += 2.5e-6
            return self.host_s >= event.done_s

        def synchronize() -> None:
            self.host_s = max(self.host_s, event.done_s) + 5e-6

        event.record, event.query, event.synchronize = record, query, synchronize
        event.elapsed_time = lambda later: float(np.float32(later.ms - event.ms))
        return event


@pytest.fixture
def gpu(monkeypatch):
    gpu = FakeGpu()
    monkeypatch.setattr(devices.torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(devices.torch.cuda, "Stream", lambda *args, **options: None)
    monkeypatch.setattr(devices.torch.cuda, "current_stream", lambda *args: None)
    monkeypatch.setattr(devices.time, "perf_counter", gpu.perf_counter)
    return gpu


@pytest.mark.parametrize("pause_s", [0.013, 1.7, 300.0])
def test_a_gpus_clock_stays_within_microseconds_of_the_hosts(gpu, pause_s):
    clock = DeviceClock(Device("cuda", 0))
    last_s = 0.0
    for _ in range(1000):
        gpu.host_s += pause_s
        moment = clock.record_moment()
        recorded_s = gpu.host_s
        gpu.host_s += 0.01
        assert moment.seconds() == pytest.approx(recorded_s, abs=30e-6)
        assert moment.seconds() > last_s
        last_s = moment.seconds()


def test_a_busy_gpu_keeps_nobody_waiting_for_a_new_base(gpu):
    """A step's times are read while the next one runs, which may keep other streams from recording anything. Only once
    in a while the host waits for that, or its clock and the GPU's would come apart."""
    clock, waits = DeviceClock(Device("cuda", 0)), []
    for _ in range(1200):
        gpu.host_s += 0.05
        moment = clock.record_moment()
        recorded_s = gpu.host_s
        gpu.host_s += 0.001
        gpu.busy_until_s = gpu.host_s + 0.01
        assert moment.seconds() == pytest.approx(recorded_s, abs=30e-6 + 20e-6 * 10.2)
        waits.append(gpu.host_s - recorded_s)
    assert sum(wait_s > 0.0015 for wait_s in waits) <= 1200 * 0.051 / 10
    gpu.busy_until_s = 0.0
    gpu.host_s += 0.1
    moment = clock.record_moment()
    recorded_s = gpu.host_s
    moment.seconds()
    assert moment.seconds() == pytest.approx(recorded_s, abs=30e-6)


def test_one_quick_try_is_a_base(gpu):
    clock = DeviceClock(Device("cuda", 0))
    gpu.host_s += 2.0
    gpu.busy_from_s, gpu.busy_until_s = gpu.host_s + 15e-6, gpu.host_s + 0.5
    base_s = clock._base_s
    clock.record_moment().seconds()
    assert clock._base_s > base_s + 1.9


# The log


def test_the_log_has_every_stage_of_a_handoff(tiny_path, caplog):
    caplog.set_level(logging.DEBUG, "nanovllm")
    with LLM(tiny_path, max_num_batched_tokens=32, verify_kv_handoff=True, kv_handoff="copy", **TWO) as llm:
        llm.generate([[1] * 40], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
        size = llm.decode_runner.spec.block_bytes
    about = "handoff of request 0 from cpu:0 to cpu:1 by 'copy':"
    stages = [
        "request 0: lease granted of 3 blocks of the decode pool (0 cached) and 3 to prefill into (0 cached)",
        "request 0: prefill of tokens 0 to 32 of 40 launched on cpu:0, completes 2 blocks to hand over",
        f"{about} 2 blocks ({2 * size} bytes) sent",
        f"{about} 2 blocks ({2 * size} bytes) arrived and verified",
        "request 0: prefill of tokens 32 to 40 of 40 launched on cpu:0, completes 1 blocks to hand over",
        f"{about} 1 blocks ({size} bytes) sent",
        f"{about} 1 blocks ({size} bytes) arrived and verified",
        "request 0: releases 3 blocks that it was prefilled into, joins decode with 3",
        "request 0: gives up its lease of 3 blocks",
    ]
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG]
    assert [line for line in said if "request 0" in line] == stages


def test_the_log_tells_no_arrival_of_a_copy_that_failed(tiny_path, caplog):
    caplog.set_level(logging.DEBUG, "nanovllm")
    with LLM(tiny_path, kv_handoff="copy", **TWO) as llm:
        llm.kv_transfer = FaultyTransfer(llm.kv_transfer, "arrive", lambda number: True)
        llm.generate([[1] * 40], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    assert "3 blocks" in caplog.text
    assert "sent" in caplog.text
    assert "arrived" not in caplog.text


@pytest.mark.parametrize("two_devices", [False, True], ids=["one", "two"])
def test_the_log_has_every_option_with_what_it_has_come_to(tiny_path, caplog, two_devices):
    caplog.set_level(logging.INFO, "nanovllm")
    options = tiny.fixed_roles(two_devices) | ({"decode_device_id": 5} if two_devices else {})
    with LLM(tiny_path, device="cpu", num_kvcache_blocks=50, **options):
        pass
    (line,) = [text for text in caplog.messages if text.startswith("resolved options: ")]
    for field in dataclasses.fields(EngineConfig):
        assert f"{field.name}=" in line
    assert "auto" not in line
    expected = ["dtype=float32", "attention_backend=torch", "kvcache_block_size=16", "max_model_len=512"]
    expected += ["num_kvcache_blocks={'prefill': 50, 'decode': 50}", "decode_pipeline=disabled"]
    expected += [f"kv_handoff={'copy' if two_devices else 'none'}", f"decode_device_id={5 if two_devices else 0}"]
    for item in expected:
        assert item in line
