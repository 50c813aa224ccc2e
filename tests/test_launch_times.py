"""Decode steps that are launched just before they can begin, on devices whose steps take a while."""

from __future__ import annotations

import random
import time
from statistics import median

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.engine import launch_times
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.execution.step_handle import StepHandle
from nanovllm.engine.in_flight import StepsInFlight
from nanovllm.engine.launch_times import AT_ONCE, LaunchTimes
from nanovllm.engine.observer import Counters
from nanovllm.engine.scheduling.card import Card
from nanovllm.engine.scheduling.step import Step
from nanovllm.engine.scheduling.step_time import StepSize, StepTimeModel
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


def test_a_request_joins_the_next_step(checkpoint, timed_steps, monkeypatch):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(9, seed=90, longest=30)
    expected = [tiny.reference_tokens(reference, prompt, 4) for prompt in prompts[1:]]
    monkeypatch.setattr(launch_times, "FIRST_LEAD_S", 1.0)
    at_once, tokens, _ = first_gaps(path, prompts)
    assert tokens == expected
    monkeypatch.setattr(launch_times, "FIRST_LEAD_S", STEP_S / 4)
    in_time, tokens, metrics = first_gaps(path, prompts)
    assert tokens == expected
    # Between one and two steps if it joins the next one, between two and three if it joins the one after that; beside
    # which the device's work is computed here, and a busy machine computes slowly.
    assert median(in_time) < median(at_once) - 0.5
    assert metrics["late_launches"] < 0.2 * metrics["decode_steps"]
    assert metrics["step_time"]["cpu:1"]["seen_s"] == pytest.approx(STEP_S, rel=0.3)


class Work:
    """A step of 64 rows that has been launched, as far as `LaunchTimes` looks at it."""

    def __init__(self, step: Step, launched_s: float) -> None:
        self.step, self.launched_s, self.queue, self.handle = step, launched_s, step.card, self
        self.has_ended = False

    def is_done(self) -> bool:
        return self.has_ended


@pytest.fixture
def one_in_flight():
    """Launch times of a card with a step in flight, whose time is predicted to be 20 ms."""
    card, steps, counters = Card("cpu:0", "device cpu:0", BlockManager(8, 4), 100), StepsInFlight(), Counters()
    for _ in range(20):
        card.step_time.observe(StepSize(0), 0.02)
    work = Work(Step(card), time.perf_counter())
    steps._steps.append(work)
    return LaunchTimes(steps, counters), card, work, counters


def test_a_step_is_launched_before_the_predicted_end(one_in_flight):
    times, card, work, counters = one_in_flight
    begins_s = work.launched_s + 0.02
    assert begins_s - 0.02 * launch_times.UNSURE - times.next_on(card) == pytest.approx(
        launch_times.FIRST_LEAD_S, rel=0.1
    )
    times.launching(card)
    assert counters.late_launches == 0


def test_the_lead_grows_until_one_launch_in_a_hundred_is_late(one_in_flight):
    """Launches take as long as a random host needs, 3 ms for one in ten of them."""
    times, card, work, counters = one_in_flight
    rng = random.Random(0)
    for number in range(30_000):
        work.launched_s = time.perf_counter()
        lead_s = work.launched_s + 0.02 - times.next_on(card)
        work.has_ended = lead_s < (3e-3 if rng.random() < 0.1 else 5e-4)
        times.launching(card)
        if number == 10_000:
            late_before = counters.late_launches
    assert (counters.late_launches - late_before) / 20_000 == pytest.approx(0.01, abs=0.004)


def test_a_slow_caller_has_its_steps_launched_at_once(one_in_flight):
    """It comes 15 ms after the launch before: a step of 20 ms would wait for it, were the lead not longer."""
    times, card, work, counters = one_in_flight
    for number in range(3000):
        work.launched_s = time.perf_counter()
        lead_s = work.launched_s + 0.02 - times.next_on(card)
        work.has_ended = lead_s < 0.015
        times.launching(card)
        if number == 1000:
            late_before = counters.late_launches
    assert counters.late_launches - late_before < 40


def test_a_lead_has_a_lower_bound(one_in_flight):
    times, card, work, _ = one_in_flight
    for _ in range(3000):
        work.launched_s = time.perf_counter()
        times.next_on(card)
        times.launching(card)
    assert times._leads_s[card] == launch_times.LEAST_LEAD_S


def test_what_is_not_known_is_not_waited_for(one_in_flight):
    times, card, *_ = one_in_flight
    card.step_time = StepTimeModel()
    assert times.next_on(card) == AT_ONCE
    assert LaunchTimes(StepsInFlight(), Counters()).next_on(card) == AT_ONCE


def test_ranks_in_other_processes_are_not_kept_waiting(one_in_flight):
    times, card, *_ = one_in_flight
    assert LaunchTimes(times._steps, Counters(), puts_off=False).next_on(card) == AT_ONCE


def test_a_launch_that_was_not_put_off_is_not_late(one_in_flight):
    times, card, work, counters = one_in_flight
    work.launched_s -= 1.0
    work.has_ended = True
    times.next_on(card)
    times.launching(card)
    work.launched_s, work.has_ended = time.perf_counter(), False
    times.next_on(card)
    times.nothing_to_launch(card)
    work.has_ended = True
    times.launching(card)
    assert counters.late_launches == 0
