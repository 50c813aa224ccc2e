"""Cards that fail: a prefill card that is left out and comes back, and GPUs that are lost for good."""

from __future__ import annotations

import pytest

from nanovllm import LLM, DeviceError, SamplingParams
from nanovllm.engine.scheduling import circuit_breaker
from nanovllm.utils.device import Device, DoneEvent
from tests import tiny
from tests.test_two_devices import GREEDY, TWO, assert_whole, two_devices
from tests.transfers import FaultyTransfer


class Clock:
    """Stands for `time` in the scheduler: pauses pass when the test says so."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("nanovllm.engine.scheduling.placement.time", clock)
    return clock


def break_prefill(llm, is_broken):
    launch = llm.prefill_runner.launch

    def failing(step):
        if is_broken() and bool(step.chunks):
            raise RuntimeError("injected into the prefill device")
        return launch(step)

    llm.prefill_runner.launch = failing


def assert_right(answers, prompts, reference):
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["error"] is None
        assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, 24)


@pytest.mark.parametrize("fault", ["launch", "arrive"])
def test_a_prefill_device_that_breaks_is_left_out_and_comes_back(checkpoint, clock, caplog, fault):
    path, reference = checkpoint("gqa2")
    prompts, broken = tiny.random_prompts(10, seed=1), [True]
    with two_devices(path, enable_prefix_caching=False) as llm:
        if fault == "launch":
            break_prefill(llm, lambda: broken[0])
        else:
            llm.kv_transfer = FaultyTransfer(llm.kv_transfer, fault, lambda number: broken[0])
        assert_right(llm.generate(prompts, GREEDY, use_tqdm=False), prompts, reference)
        assert llm.scheduler.placement.prefill_card.breaker.is_open
        assert llm.metrics()["fallbacks"] == {"prefill device left out": 1}
        assert caplog.text.count("is left out for a while") == 1
        # While it is out nothing is tried there: no request fails.
        num_warnings = len(caplog.records)
        assert_right(llm.generate(prompts, GREEDY, use_tqdm=False), prompts, reference)
        assert len(caplog.records) == num_warnings
        handoffs = llm.counters.handoffs
        assert_whole(llm)
        # A trial by one request, which fails, costs nothing but time.
        clock.now += circuit_breaker.FIRST_PAUSE_S
        assert_right(llm.generate(prompts, GREEDY, use_tqdm=False), prompts, reference)
        assert len(caplog.records) == num_warnings + 1
        broken[0] = False
        clock.now += 2 * circuit_breaker.FIRST_PAUSE_S
        assert_right(llm.generate(prompts, GREEDY, use_tqdm=False), prompts, reference)
        assert not llm.scheduler.placement.prefill_card.breaker.is_open
        assert llm.metrics()["recoveries"] == 1
        assert_right(llm.generate(prompts, GREEDY, use_tqdm=False), prompts, reference)
        assert llm.counters.handoffs > handoffs + len(prompts)
        assert_whole(llm)


def test_single_failures_leave_no_device_out(checkpoint):
    path, reference = checkpoint("gqa2")
    prompts, calls = tiny.random_prompts(12, seed=2), [0]

    def every_other():
        calls[0] += 1
        return calls[0] % 2 == 0

    with two_devices(path, max_num_seqs=1) as llm:
        break_prefill(llm, every_other)
        assert_right(llm.generate(prompts, GREEDY, use_tqdm=False), prompts, reference)
        assert not llm.scheduler.placement.prefill_card.breaker.is_open
        assert llm.metrics()["fallbacks"] == {}


# A lost GPU


class BrokenEvent(DoneEvent):
    def query(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    synchronize = query


class EndlessEvent(DoneEvent):
    def query(self):
        return False

    def synchronize(self):
        raise AssertionError("nobody may wait for this")


def lose(llm, monkeypatch, how, after=4):
    """From the `after`th step on the decode device is lost: when a step is launched, or when it has ended."""
    launch, calls = llm.decode_runner.launch, [0]

    def losing(step):
        calls[0] += 1
        if calls[0] < after:
            return launch(step)
        if how != "hang":
            monkeypatch.setattr(Device, "lost_reason", lambda device: "CUDA error: an illegal memory access")
        if how == "launch":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        handle = launch(step)
        handle.event = BrokenEvent() if how == "event" else EndlessEvent()
        return handle

    llm.decode_runner.launch = losing
    for runner in {llm.prefill_runner, llm.decode_runner}:
        runner.synchronize = lambda **_: pytest.fail("a lost device is not waited for") if calls[0] >= after else None


@pytest.mark.parametrize("options", [{"device": "cpu"}, TWO], ids=["one", "two"])
@pytest.mark.parametrize("how", ["launch", "event", "hang"])
def test_a_lost_device_ends_all_requests_by_name(tiny_path, monkeypatch, caplog, how, options):
    prompts = tiny.random_prompts(6, seed=3)
    message = "has not ended within step_timeout_s=0.05" if how == "hang" else "is lost: CUDA error: an illegal memory"
    with LLM(tiny_path, **options, max_num_seqs=4, step_timeout_s=0.05) as llm:
        lose(llm, monkeypatch, how)
        answers = llm.generate(prompts, GREEDY, use_tqdm=False)
        for answer in answers:
            assert answer["finish_reason"] == "error"
            assert isinstance(answer["error"], DeviceError)
            assert message in str(answer["error"])
        assert any(answer["token_ids"] for answer in answers), "what was there is given out"
        assert caplog.text.count("all requests end") == 1
        assert llm.is_finished()
        assert llm.step() == []
        with pytest.raises(DeviceError, match="start a new process"):
            llm.generate(prompts, GREEDY, use_tqdm=False)
        assert llm.metrics()["requests_ended"] == {"error": 6}


@pytest.mark.parametrize("how", ["launch", "event", "hang"])
def test_streams_end_when_the_device_is_lost(tiny_path, monkeypatch, how):
    with LLM(tiny_path, device="cpu", step_timeout_s=0.05) as llm:
        stream = llm.generate_stream([1, 2, 3], SamplingParams(temperature=0, max_tokens=30))
        other = llm.add_request([4, 5, 6], GREEDY)
        lose(llm, monkeypatch, how)
        outputs = list(stream)
        assert outputs[-1].finish_reason == "error"
        assert isinstance(outputs[-1].error, DeviceError)
        rest = llm.step()
        assert [output.finish_reason for output in rest if output.request_id == other][-1] == "error"


def test_an_error_that_loses_no_device_ends_nothing(tiny_path):
    with LLM(tiny_path, device="cpu") as llm:
        launch, calls = llm.decode_runner.launch, [0]

        def failing_once(step):
            calls[0] += 1
            if calls[0] == 3:
                raise RuntimeError("CUDA error: out of memory")
            return launch(step)

        llm.decode_runner.launch = failing_once
        (answer,) = llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)
        assert answer["error"] is None


def test_a_device_that_fails_and_works_within_a_turn_is_told_of(checkpoint, caplog):
    """Three handoffs fail and a later one arrives, all collected at once."""
    path, _ = checkpoint("gqa2")
    with two_devices(path, lazy=False) as llm:
        llm.kv_transfer = FaultyTransfer(llm.kv_transfer, "arrive", lambda number: number < 3)
        llm.generate(tiny.random_prompts(5, seed=3), GREEDY, use_tqdm=False)
        found = llm.metrics()
    assert found["fallbacks"]["prefill device left out"] == 1
    assert found["recoveries"] == 1
    assert "is left out for a while" in caplog.text
    assert "works again" in caplog.text


def test_decode_failures_leave_the_prefill_device_in(checkpoint):
    path, reference = checkpoint("gqa2")
    prompts, calls = tiny.random_prompts(6, seed=4), [0]
    with two_devices(path) as llm:
        launch = llm.decode_runner.launch

        def failing(step):
            calls[0] += not bool(step.chunks)
            if not bool(step.chunks) and 3 <= calls[0] < 8:
                raise RuntimeError("injected into the decode device")
            return launch(step)

        llm.decode_runner.launch = failing
        assert_right(llm.generate(prompts, GREEDY, use_tqdm=False), prompts, reference)
        assert calls[0] > 8
        assert not llm.scheduler.placement.prefill_card.breaker.is_open


def test_requests_of_one_token_show_that_the_prefill_device_works(tiny_path, clock):
    prompts, broken = tiny.random_prompts(3, seed=5), [True]
    one_token = SamplingParams(temperature=0, max_tokens=1)
    with two_devices(tiny_path) as llm:
        break_prefill(llm, lambda: broken[0])
        for turn in range(4):
            broken[0] = True
            llm.generate(prompts[:1], one_token, use_tqdm=False)
            broken[0] = turn == 3
            llm.generate(prompts[1:2], one_token, use_tqdm=False)
        assert not llm.scheduler.placement.prefill_card.breaker.is_open, (
            "two failures in a row are the most that there were"
        )
        llm.generate(prompts, one_token, use_tqdm=False)
        assert llm.scheduler.placement.prefill_card.breaker.is_open
        broken[0] = False
        clock.now += circuit_breaker.FIRST_PAUSE_S
        llm.generate(prompts, one_token, use_tqdm=False)
        assert llm.metrics()["recoveries"] == 1


def test_a_step_that_hangs_is_noticed_while_the_other_device_works(tiny_path, monkeypatch):
    with two_devices(tiny_path, lazy=False, step_timeout_s=0.1) as llm:
        launch = llm.prefill_runner.launch
        long = llm.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=480, ignore_eos=True))
        while not llm.metrics()["requests"]["decoding"]:
            llm.step()

        def hanging(step):
            handle = launch(step)
            handle.event = EndlessEvent()
            return handle

        llm.prefill_runner.launch = hanging
        hung = llm.add_request([4, 5, 6], GREEDY)
        ended = {}
        while not llm.is_finished():
            ended |= {output.request_id: output for output in llm.step() if output.finished}
        assert {request_id: output.finish_reason for request_id, output in ended.items()} == {
            long: "error",
            hung: "error",
        }
        assert "a prefill step of 1 requests has not ended within step_timeout_s=0.1" in str(ended[hung].error)


@pytest.mark.parametrize("how", ["error", "hang"])
def test_closing_a_lost_device_does_not_hide_what_happened(tiny_path, monkeypatch, caplog, how):
    def lost(**_):
        if how == "hang":
            raise DeviceError("cpu:0 is lost: its work has not ended within step_timeout_s=0.1")
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def serve():
        with LLM(tiny_path, device="cpu") as llm:
            llm.add_request([1, 2, 3], GREEDY)
            llm.step()
            monkeypatch.setattr(Device, "lost_reason", lambda device: "CUDA error: an illegal memory access")
            llm.decode_runner.synchronize = lost
            raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        serve()
    assert "is lost" in caplog.text


def test_an_interrupt_of_a_hung_step_ends_all_requests(tiny_path):
    with LLM(tiny_path, device="cpu") as llm:
        request_id = llm.add_request([1, 2, 3], GREEDY)
        llm.step()

        def interrupted(step):
            raise KeyboardInterrupt

        def hung(**_):
            raise DeviceError("cpu:0 is lost: its work has not ended within step_timeout_s=0.1")

        llm.decode_runner.launch, llm.decode_runner.synchronize = interrupted, hung
        with pytest.raises(KeyboardInterrupt):
            llm.step()
        (output,) = llm.step()
        assert output.request_id == request_id
        assert isinstance(output.error, DeviceError)
