"""Decode steps that are launched just before they can begin, on devices whose steps take a while."""

from __future__ import annotations

import time
from statistics import median

import pytest

from nanovllm import LLM, ConfigError, SamplingParams
from nanovllm.engine.execution.step_handle import StepHandle
from nanovllm.engine.in_flight import StepsInFlight
from nanovllm.engine.launch_times import AT_ONCE, LaunchTimes
from nanovllm.engine.observer import Counters
from nanovllm.engine.scheduling.step import Step
from nanovllm.engine.scheduling.step_time import StepSize
from tests import tiny

STEP_S = 0.04
PREFILL_S = 0.004


@pytest.fixture
def timed_steps(monkeypatch):
    """Steps of a device end one after another, decode steps after STEP_S each, as on a GPU."""
    ends_s: dict[StepHandle, float] = {}
    free_s: dict[str, float] = {}
    make, collect = StepHandle.__init__, StepHandle.collect

    def made(handle, device, stream, sampled, began=None):
        sampled = list(sampled)
        make(handle, device, stream, sampled, began)
        took_s = STEP_S if sampled[-1] is not None else PREFILL_S
        ends_s[handle] = free_s[str(device)] = max(free_s.get(str(device), 0.0), time.perf_counter()) + took_s

    def collected(handle):
        time.sleep(max(0.0, ends_s[handle] - time.perf_counter()))
        return collect(handle)

    monkeypatch.setattr(StepHandle, "__init__", made)
    monkeypatch.setattr(StepHandle, "is_done", lambda handle: time.perf_counter() >= ends_s[handle])
    monkeypatch.setattr(StepHandle, "collect", collected)


def first_gaps(path: str, prompts: list[list[int]], **options) -> tuple[list[float], list[list[int]], dict]:
    """The gap between the first two tokens of each request, in decode steps, while another request decodes."""
    params = SamplingParams(temperature=0, max_tokens=4)
    token_times: dict[int, list[float]] = {}
    tokens: dict[int, list[int]] = {}
    with LLM(path, device="cpu", enable_two_gpu_pd=True, **options) as llm:
        llm.add_request(prompts[0], SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
        due_s, ids = time.perf_counter() + 8 * STEP_S, []  # the time of its steps is known by then
        while len(ids) < len(prompts) - 1 or any(number not in tokens or len(tokens[number]) < 4 for number in ids):
            if len(ids) < len(prompts) - 1 and time.perf_counter() >= due_s:
                ids.append(llm.add_request(prompts[len(ids) + 1], params))
                due_s += 2.3 * STEP_S
            for output in llm.step():
                token_times.setdefault(output.request_id, []).append(time.perf_counter())
                tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
        metrics = llm.metrics()
    return (
        [(token_times[number][1] - token_times[number][0]) / STEP_S for number in ids],
        [tokens[number] for number in ids],
        metrics,
    )


def test_a_request_joins_the_next_step(checkpoint, timed_steps):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(9, seed=90, longest=30)
    expected = [tiny.reference_tokens(reference, prompt, 4) for prompt in prompts[1:]]
    at_once, tokens, _ = first_gaps(path, prompts)
    assert tokens == expected
    in_time, tokens, metrics = first_gaps(path, prompts, launch_lead_ms=STEP_S * 1e3 / 4)
    assert tokens == expected
    # Between one and two steps if it joins the next one, between two and three if it joins the one after that; beside
    # which the device's work is computed here, and a busy machine computes slowly.
    assert median(in_time) < median(at_once) - 0.5
    assert metrics["late_launches"] < 0.2 * metrics["decode_steps"]
    assert metrics["step_time"]["cpu:1"]["seen_s"] == pytest.approx(STEP_S, rel=0.3)


def test_a_lead_that_is_too_short_is_seen(checkpoint, timed_steps):
    path, _ = checkpoint("gqa2")
    prompts = tiny.random_prompts(3, seed=91, longest=30)
    *_, metrics = first_gaps(path, prompts, launch_lead_ms=1e-6)
    assert metrics["late_launches"] > 0.3 * metrics["decode_steps"]


def test_what_is_not_known_is_not_waited_for(tiny_path):
    with LLM(tiny_path, device="cpu") as llm:
        card, steps = llm.scheduler.placement.decode_card, StepsInFlight()
        times = LaunchTimes(steps, 0.001, Counters())
        assert times.next_on(card) == AT_ONCE
        steps.add(Step(card), StepHandle(llm.decode_runner.device, None, [None] * 3), 0.0)
        assert times.next_on(card) == AT_ONCE
        card.step_time.observe(StepSize(4, 100), 0.02)
        (work,) = steps
        predicted_s = card.step_time.predict(work.step.size)
        assert times.next_on(card) == pytest.approx(work.launched_s + predicted_s - 0.001)
        assert LaunchTimes(steps, None, Counters()).next_on(card) == AT_ONCE


@pytest.mark.parametrize("value", [0, -1.0, "5", True, float("nan")])
def test_a_lead_that_is_no_time_is_refused(tiny_path, value):
    with pytest.raises(ConfigError, match=r"launch_lead_ms=.* is not a positive number of milliseconds"):
        LLM(tiny_path, device="cpu", launch_lead_ms=value)
