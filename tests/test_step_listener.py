"""What step listeners are told, on one device and on two, and what they may do to a call."""

from __future__ import annotations

import time
from collections import Counter
from types import SimpleNamespace

import pytest

from nanovllm import LLM, ConfigError, EngineBusyError, EngineClosedError, SamplingParams, StepReport
from nanovllm.engine import launch_times, step_listeners
from nanovllm.engine.execution.step_handle import StepHandle
from tests import tiny
from tests.test_engine import drain

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
MODES = {
    "one": {"device": "cpu", "max_num_batched_tokens": 24},
    "two": {"device": "cpu", "max_num_batched_tokens": 24, **tiny.fixed_roles(True)},
}
DEVICES = {
    "one": dict.fromkeys(("prefill", "decode", "mixed"), "cpu:0"),
    "two": {"prefill": "cpu:0", "decode": "cpu:1"},
}


@pytest.fixture(params=list(MODES))
def mode(request):
    return request.param


@pytest.fixture
def llm(mode, tiny_path):
    with LLM(tiny_path, **MODES[mode]) as llm:
        yield llm


@pytest.fixture
def late_steps(monkeypatch):
    """Steps are seen to have ended some polls late."""
    polls: Counter[StepHandle] = Counter()

    def late(handle: StepHandle) -> bool:
        polls[handle] += 1
        return polls[handle] > 20

    monkeypatch.setattr(StepHandle, "is_done", late)


@pytest.mark.usefixtures("late_steps")
def test_reports_are_what_the_metrics_count(llm, mode, monkeypatch):
    """A step is in flight when a request of it is aborted."""
    monkeypatch.setattr(launch_times, "FIRST_LEAD_S", 1e6)  # each step is launched at once
    reports: list[StepReport] = []
    llm.add_step_listener(reports.append)
    started_s = time.perf_counter()
    ids = [llm.add_request(prompt, LONG) for prompt in tiny.random_prompts(6, longest=40)]
    while not any(report.kind == "decode" and report.num_requests == len(ids) for report in reports):
        llm.step()
    llm.abort(ids[0])
    drain(llm)
    ended_s, metrics = time.perf_counter(), llm.metrics()
    num_steps = Counter(report.kind for report in reports)
    assert num_steps["prefill"] + num_steps["mixed"] == metrics["prefill_steps"]
    assert num_steps["decode"] + num_steps["mixed"] == metrics["decode_steps"]
    assert sum(report.num_tokens for report in reports) == metrics["prefill_tokens"] + metrics["decode_tokens"]
    assert {report.kind: report.device for report in reports} == DEVICES[mode]
    assert any(report.num_tokens < report.num_requests for report in reports if report.kind == "decode")
    assert all(started_s < report.launched_s <= report.ended_s < ended_s for report in reports)
    assert sum(report.waited_s for report in reports) < ended_s - started_s


@pytest.mark.usefixtures("late_steps")
def test_waiting_is_told_from_work(llm, monkeypatch):
    """By a clock on which each wait takes a second, and the rest of each turn ten."""
    now_s, waits = [0.0], []
    monkeypatch.setattr(step_listeners, "time", SimpleNamespace(perf_counter=lambda: now_s[0]))
    wait, take_in_mail = llm._loop._wait, llm._loop.take_in_mail

    def timed_wait():
        wait()
        waits.append(now_s[0])
        now_s[0] += 1.0

    def timed_work():
        take_in_mail()
        now_s[0] += 10.0

    llm._loop._wait, llm._loop.take_in_mail = timed_wait, timed_work
    reports: list[StepReport] = []
    llm.add_step_listener(reports.append)
    llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)
    before_s = 0.0
    for report in reports:
        assert report.waited_s == sum(before_s <= moment_s < report.ended_s for moment_s in waits)
        before_s = report.ended_s
    assert len(waits) > 5


def test_an_exception_ends_the_call_and_nothing_else(llm):
    """The call of `step` that told the listener; requests go on as if nothing had happened."""
    prompts = tiny.random_prompts(4, longest=40)
    expected = [answer["token_ids"] for answer in llm.generate(prompts, GREEDY, use_tqdm=False)]
    heard: list[StepReport] = []

    def fail(report: StepReport) -> None:
        heard.append(report)
        raise ArithmeticError("a listener's own")

    llm.add_step_listener(fail)
    ids = [llm.add_request(prompt, GREEDY) for prompt in prompts]
    tokens: dict[int, list[int]] = {request_id: [] for request_id in ids}
    num_failed = 0
    while not llm.is_finished() or num_failed < len(heard):
        try:
            for output in llm.step():
                tokens[output.request_id] += output.new_token_ids
                assert output.error is None
        except ArithmeticError:
            num_failed += 1
    assert list(tokens.values()) == expected
    assert num_failed == len(heard) > 12
    with pytest.raises(ArithmeticError):
        llm.generate(prompts, GREEDY, use_tqdm=False)
    llm.remove_step_listener(fail)
    assert [answer["token_ids"] for answer in llm.generate(prompts, GREEDY, use_tqdm=False)] == expected
    llm.scheduler.check_integrity()


def test_a_listener_may_add_and_abort_but_not_wait(llm):
    """It adds one more request, aborts the first, and finds that it cannot run the loop it is called by."""
    ids = [llm.add_request([1, 2, 3], GREEDY)]
    refused: list[EngineBusyError] = []

    def once(report: StepReport) -> None:
        llm.remove_step_listener(once)
        ids.append(llm.add_request([4, 5], GREEDY))
        llm.abort(ids[0])
        with pytest.raises(EngineBusyError) as error:
            llm.step()
        refused.append(error.value)

    llm.add_step_listener(once)
    ended = {}
    while not llm.is_finished():
        ended |= {output.request_id: output.finish_reason for output in llm.step() if output.finished}
    assert len(refused) == 1
    assert ended == {ids[0]: "abort", ids[1]: "length"}


def test_listeners_come_and_go(llm):
    """Each is told as often as it was added, from then on until it is removed."""
    first: list[StepReport] = []
    second: list[StepReport] = []
    for listener in (first.append, second.append, second.append):
        llm.add_step_listener(listener)
    llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)
    num_steps = len(first)
    assert num_steps >= 12
    assert second[::2] == second[1::2] == first
    llm.remove_step_listener(first.append)
    llm.remove_step_listener(second.append)
    llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)
    assert len(first) == num_steps
    assert len(second) > 2 * num_steps
    with pytest.raises(ConfigError, match="not one of this engine's"):
        llm.remove_step_listener(first.append)
    with pytest.raises(ConfigError, match="not callable"):
        llm.add_step_listener("print")
    llm.close()
    with pytest.raises(EngineClosedError):
        llm.add_step_listener(first.append)
