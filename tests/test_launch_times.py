"""Steps that are launched just before they can begin, on devices whose steps take a while."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
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
LOOK_S = 20e-6


@pytest.fixture
def timed_steps(monkeypatch):
    """Steps of a device end one after another, decode steps after STEP_S each, as on a GPU.

    The clock is a virtual one, on which each look takes LOOK_S and all else that the host does nothing.
    """
    now_s = 0.0

    def look() -> float:
        nonlocal now_s
        now_s += LOOK_S
        return now_s

    def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    monkeypatch.setattr(time, "perf_counter", look)
    monkeypatch.setattr(time, "sleep", sleep)
    moments: dict[StepHandle, tuple[float, float]] = {}
    free_s: dict[str, float] = {}
    make, collect = StepHandle.__init__, StepHandle.collect

    def made(handle, device, stream, sampled, *rest):
        sampled = list(sampled)
        make(handle, device, stream, sampled, *rest)
        took_s = STEP_S if sampled[-1] is not None else PREFILL_S
        began_s = max(free_s.get(str(device), 0.0), time.perf_counter())
        free_s[str(device)] = began_s + took_s
        moments[handle] = began_s, began_s + took_s

    def collected(handle):
        time.sleep(max(0.0, moments[handle][1] - time.perf_counter()))
        return collect(handle)

    monkeypatch.setattr(StepHandle, "__init__", made)
    monkeypatch.setattr(StepHandle, "is_done", lambda handle: time.perf_counter() >= moments[handle][1])
    monkeypatch.setattr(StepHandle, "moments", lambda handle: moments[handle])
    monkeypatch.setattr(StepHandle, "collect", collected)


def first_gaps(path: str, prompts: list[list[int]], **options) -> tuple[list[float], list[list[int]], dict]:
    """The gap between the first two tokens of each request, in decode steps, while another request decodes."""
    params = SamplingParams(temperature=0, max_tokens=4)
    token_times: dict[int, list[float]] = {}
    tokens: dict[int, list[int]] = {}
    with LLM(path, device="cpu", enable_two_gpu_pd=True, card_roles="fixed", **options) as llm:
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
    # Between one and two steps if it joins the next one, between two and three if it joins the one after that.
    assert median(in_time) < median(at_once) - 0.5
    assert metrics["late_launches"] < 0.2 * metrics["decode_steps"]
    assert metrics["step_time"]["cpu:1"]["seen_s"] == pytest.approx(STEP_S, rel=0.3)


def card_of_steps(name: str) -> Card:
    """A card that is known to take STEP_S for a step."""
    card = Card(name, f"device {name}", BlockManager(8, 4), 100)
    for _ in range(20):
        card.step_time.observe(StepSize(0), STEP_S)
    return card


class Clock:
    """A device whose steps take STEP_S, with a noise of 1 %, and the host that launches them, on a virtual clock."""

    def __init__(self, monkeypatch, launch_s: Callable[[random.Random], float], caller_s: float = 0.0) -> None:
        self.now_s, self.rng = 0.0, random.Random(0)
        self.launch_s, self.caller_s = launch_s, caller_s
        monkeypatch.setattr(launch_times.time, "perf_counter", lambda: self.now_s)
        self.card = card_of_steps("cpu:0")
        self.steps, self.counters = StepsInFlight(), Counters()
        self.times = LaunchTimes(self.steps, self.counters)
        self.idle_s: list[float] = []
        self.leads_s: list[float] = []
        self.free_s = 0.0

    def launch(self) -> None:
        before, began_s = self.steps.on(self.card), self.now_s
        self.now_s += self.launch_s(self.rng)
        self.idle_s.append(max(0.0, self.now_s - self.free_s))
        self.free_s = max(self.now_s, self.free_s) + STEP_S * self.rng.gauss(1, 0.01)
        self.steps.put(Work(self, self.now_s, self.free_s))
        self.times.launched(self.card, before, self.now_s - began_s)

    def run(self, num_steps: int) -> None:
        """A step is collected when it has ended, and the next one is launched when it is time."""
        while len(self.idle_s) < num_steps:
            works = self.steps.on(self.card)
            launch_at_s = self.times.next_on(self.card)
            if len(works) < 2 and launch_at_s <= self.now_s:
                self.leads_s.append(self.free_s - self.now_s)
                self.launch()
                continue
            self.now_s = max(self.now_s, min(work.end_s for work in works))
            if len(works) == 1:
                self.now_s = min(self.now_s, max(launch_at_s, works[0].launched_s))
            if works[0].is_done():
                self.steps.remove(works[0], self.now_s)
                self.now_s += self.caller_s


class Work:
    """A step in flight, as far as `LaunchTimes` looks at it."""

    def __init__(self, clock: Clock, launched_s: float, end_s: float, card: Card | None = None) -> None:
        self.clock, self.launched_s, self.end_s = clock, launched_s, end_s
        self.step = Step(card or clock.card)
        self.queue, self.handle = self.step.card, self

    def is_done(self) -> bool:
        return self.clock.now_s >= self.end_s


LAUNCHES = {
    "quick": lambda rng: 3e-4,
    "slow": lambda rng: 5e-3,
    "slow at times": lambda rng: 3e-3 if rng.random() < 0.1 else 5e-4,
}


@pytest.mark.parametrize("launch_s", LAUNCHES.values(), ids=LAUNCHES)
def test_the_device_is_hardly_ever_idle_and_steps_are_launched_late(monkeypatch, launch_s):
    clock = Clock(monkeypatch, launch_s)
    clock.run(20_000)
    idle_s, leads_s = clock.idle_s[2000:], clock.leads_s[2000:]
    assert sum(idle_s) / len(idle_s) < 0.002 * STEP_S
    assert sum(idle > 0 for idle in idle_s) / len(idle_s) < 1.5 * launch_times.LATE_SHARE
    assert clock.counters.late_launches / 20_000 < 1.5 * launch_times.LATE_SHARE
    assert median(leads_s) < launch_s(random.Random(1)) + 0.1 * STEP_S + 3e-3


def test_a_slow_caller_has_its_steps_launched_at_once(monkeypatch):
    clock = Clock(monkeypatch, lambda rng: 5e-4, caller_s=0.6 * STEP_S)
    clock.run(3000)
    assert sum(clock.idle_s[1000:]) / 2000 < 0.01 * STEP_S


def test_a_lead_has_a_lower_bound(monkeypatch):
    clock = Clock(monkeypatch, lambda rng: 0.0)
    clock.run(5000)
    assert clock.times._leads_s[clock.card] >= launch_times.LEAST_LEAD_S
    assert max(clock.idle_s[2000:]) < 0.03 * STEP_S


def test_what_is_not_known_is_not_waited_for(monkeypatch):
    clock = Clock(monkeypatch, lambda rng: 0.0)
    assert clock.times.next_on(clock.card) == AT_ONCE
    clock.launch()
    assert clock.times.next_on(clock.card) > clock.now_s
    clock.card.step_time = StepTimeModel()
    assert clock.times.next_on(clock.card) == AT_ONCE


def test_behind_a_step_that_has_ended_there_is_no_wait(monkeypatch):
    clock = Clock(monkeypatch, lambda rng: 0.0)
    clock.launch()
    clock.now_s = clock.free_s
    assert clock.times.next_on(clock.card) == AT_ONCE
    clock.times.launched(clock.card, clock.steps.on(clock.card), 0.0)
    assert clock.counters.late_launches == 0, "it was not put off"


def test_a_launch_as_long_as_the_last_one_must_end_before_the_moment_of_another(monkeypatch):
    clock = Clock(monkeypatch, lambda rng: 2e-3)
    assert not clock.times.makes_late(clock.card, clock.now_s + 1e-6), "how long it takes is not known yet"
    clock.launch()
    assert clock.times.makes_late(clock.card, clock.now_s + 1.9e-3)
    assert not clock.times.makes_late(clock.card, clock.now_s + 2.1e-3)


@pytest.mark.parametrize(
    ("ends_ms", "moved_ms"), [(-0.6, 0), (-0.4, 0.5), (0.4, 0.5), (0.6, -1.4), (1.9, -0.1), (2.1, 0), (30, 0)]
)
def test_a_launch_keeps_clear_of_the_end_of_another_cards_step(monkeypatch, ends_ms, moved_ms):
    """A launch of 2 ms that is due 2.5 ms before its card's step may end."""
    clock = Clock(monkeypatch, lambda rng: 2e-3)
    clock.now_s = 1.0
    clock.launch()
    clock.times._leads_s[clock.card] = 2.5e-3
    due_s = clock.times.next_on(clock.card)
    other = card_of_steps("cpu:1")
    end_s = due_s + ends_ms / 1e3
    clock.steps.put(Work(clock, end_s - STEP_S, end_s, other))
    launch_at_s = clock.times.next_on(clock.card)
    assert launch_at_s == pytest.approx(due_s + moved_ms / 1e3, abs=1e-6)
    clock.now_s = launch_at_s
    assert clock.times.next_on(clock.card) <= clock.now_s + 1e-9, "asked again, it is launched then"
    clock.now_s = 1.0
    clock.steps.put(Work(clock, end_s - STEP_S, end_s + STEP_S, other))
    assert clock.times.next_on(clock.card) == pytest.approx(due_s + moved_ms / 1e3, abs=1e-6), "the first one counts"


@pytest.mark.parametrize(("ends_ms", "moved_ms"), [(0.5, 0.6), (0.7, 0.8), (0.8, 0.0), (2.1, 0.0)])
def test_a_launch_that_has_no_time_waits_for_what_ends_soon(monkeypatch, ends_ms, moved_ms):
    """A launch of 2 ms, 1.5 ms before its card's step may end."""
    clock = Clock(monkeypatch, lambda rng: 2e-3)
    clock.now_s = 1.0
    clock.launch()
    clock.times._leads_s[clock.card] = 1.5e-3
    clock.now_s = due_s = clock.times.next_on(clock.card)
    other = card_of_steps("cpu:1")
    end_s = due_s + ends_ms / 1e3
    clock.steps.put(Work(clock, end_s - STEP_S, end_s, other))
    launch_at_s = clock.times.next_on(clock.card)
    assert launch_at_s == pytest.approx(due_s + moved_ms / 1e3, abs=1e-6)
    clock.now_s = launch_at_s + 1e-6
    assert clock.times.next_on(clock.card) <= clock.now_s, "it does not wait for ever"


def test_a_card_whose_steps_are_short_does_not_keep_the_other_from_launching(checkpoint, monkeypatch):
    """One card's step has always ended when a turn begins."""
    path, _ = checkpoint("gqa2")
    with LLM(path, device="cpu", enable_two_gpu_pd=True, card_roles="elastic") as llm:
        llm.scheduler.placement.shares_prompts = False
        for prompt in ([1, 2, 3], [4, 5, 6]):
            llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
        loop, launched = llm._loop, []
        for runner in llm._runners:

            def launch(step, launch=runner.launch):
                launched.append(str(step.card))
                return launch(step)

            monkeypatch.setattr(runner, "launch", launch)
        busy = llm.scheduler.cards[1]
        work = type("Work", (), {"step": Step(busy)})
        monkeypatch.setattr(loop._steps, "ended", lambda: [work])
        loop.take_in_mail()
        for _ in range(4):
            loop.launch_steps()
    assert str(llm.scheduler.cards[0]) in launched


@pytest.mark.parametrize("first", [0, 1])
def test_the_card_that_needs_its_next_step_first_is_given_it_first(checkpoint, monkeypatch, first):
    """Whichever it is: in a fixed order one card's gaps would be longer. Its launch does not give way to the later
    moment of the other one, either; an idle card's does."""
    path, _ = checkpoint("gqa2")
    with LLM(path, device="cpu", enable_two_gpu_pd=True, card_roles="elastic") as llm:
        llm.scheduler.placement.shares_prompts = False
        for prompt in ([1, 2, 3], [4, 5, 6]):
            llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
        loop, launched, cards = llm._loop, [], llm.scheduler.cards
        loop.take_in_mail()
        loop.launch_steps()
        sooner, later = cards[first], cards[1 - first]
        now_s = time.perf_counter()
        moments = {sooner: now_s - 2e-3, later: now_s - 1e-3}
        for name in ("due_on", "next_on"):
            monkeypatch.setattr(loop._launch_times, name, lambda card: moments[card])
        monkeypatch.setattr(loop, "_has_tokens_of_others", lambda *_: False)
        monkeypatch.setattr(llm.scheduler, "schedule", lambda card, *_: launched.append(card))
        loop.launch_steps()
        assert launched == [sooner, later]
        del launched[:]
        moments[later] = now_s + 60
        loop._launch_times._launch_s[sooner] = 120.0
        loop.launch_steps()
        assert launched == [sooner], "it would not be in time after the other one"
        del launched[:]
        monkeypatch.setattr(loop._steps, "num_on", lambda card: int(card is later))
        loop.launch_steps()
        assert launched == [], "an idle card's launch would make the other one late"


def test_tokens_are_taken_in_before_a_launch_on_another_card(checkpoint, timed_steps, monkeypatch):
    path, _ = checkpoint("gqa2")
    with LLM(path, device="cpu", enable_two_gpu_pd=True, card_roles="elastic") as llm:
        llm.scheduler.placement.shares_prompts = False
        for prompt in ([1, 2, 3], [4, 5, 6]):
            llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
        ended_at_launch: list[set] = []
        for runner in llm._runners:

            def launch(step, launch=runner.launch):
                ended_at_launch.append({work.step.card for work in llm._steps.ended()} - {step.card})
                return launch(step)

            monkeypatch.setattr(runner, "launch", launch)
        while len(ended_at_launch) < 60:
            llm.step()
    assert sum(map(bool, ended_at_launch)) < 6


@pytest.fixture
def long_to_form(checkpoint, timed_steps, monkeypatch):
    """Two cards and four requests of which each decodes two; forming a step of the first card lasts until the step in
    flight on the second has ended. Gives the engine, the reference, the prompts, and what happens to steps."""
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(4, seed=91, longest=12)
    with LLM(path, device="cpu", enable_two_gpu_pd=True, card_roles="elastic") as llm:
        llm.scheduler.placement.shares_prompts = False
        for prompt in prompts:
            llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
        events: list[tuple[str, Card]] = []
        slow, _ = llm.scheduler.cards
        schedule, collect = llm.scheduler.schedule, llm._loop._collect

        def form(card, *rest):
            step = schedule(card, *rest)
            if card is slow and step is not None and step.decode:
                events.append(("formed", card))
                others = [work for work in llm._steps if work.step.card is not card]
                while others and not others[0].handle.is_done():
                    time.sleep(1e-4)
            return step

        def take_in(work):
            events.append(("taken in", work.step.card))
            collect(work)

        monkeypatch.setattr(llm.scheduler, "schedule", form)
        monkeypatch.setattr(llm._loop, "_collect", take_in)
        for runner in llm._runners:

            def launch(step, launch=runner.launch):
                events.append(("launched", step.card))
                return launch(step)

            monkeypatch.setattr(runner, "launch", launch)
        yield llm, reference, prompts, events


def test_tokens_of_another_card_come_between_the_parts_of_a_launch(long_to_form):
    llm, reference, prompts, events = long_to_form
    slow, other = llm.scheduler.cards
    tokens: dict[int, list[int]] = {}
    while not llm.is_finished():
        for output in llm.step():
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
    assert [tokens[number] for number in sorted(tokens)] == [tiny.reference_tokens(reference, p, 30) for p in prompts]
    between = []
    for index in [index for index, event in enumerate(events) if event == ("formed", slow)]:
        between.append(events[index : events.index(("launched", slow), index)])
    assert any(("taken in", other) in part for part in between)
    llm.scheduler.check_integrity()


@pytest.mark.parametrize("how", ["abort", "interrupt"])
def test_a_step_that_is_formed_and_not_launched_when_its_request_ends(long_to_form, monkeypatch, how):
    llm, reference, prompts, _ = long_to_form
    tokens: dict[int, list[int]] = {}

    def step():
        for output in llm.step():
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)

    while llm._steps.formed is None or not llm._steps.formed.step.decode:
        step()
    row = next(iter(llm._steps.formed.step.decode))
    left = set(range(4))
    if how == "abort":
        llm.abort(row.seq.request_id)
        left.remove(row.seq.request_id)
    else:
        watch = llm._loop._card_watch
        monkeypatch.setattr(watch, "look", interrupted(watch.look))
        with pytest.raises(KeyboardInterrupt):
            llm.step()
        assert llm._steps.formed is None
    while not llm.is_finished():
        step()
    for number in left:
        assert tokens[number] == tiny.reference_tokens(reference, prompts[number], 30)
    llm.scheduler.check_integrity()
    assert all(card.block_manager.num_held_blocks == 0 for card in llm.scheduler.cards)


def interrupted(work: Callable[[], None]) -> Callable[[], None]:
    """The same, which is interrupted the first time."""
    interrupts = [KeyboardInterrupt()]

    def interruptible() -> None:
        if interrupts:
            raise interrupts.pop()
        work()

    return interruptible


def test_a_prefill_step_is_launched_after_a_decode_step_that_it_would_make_late(checkpoint, timed_steps, monkeypatch):
    """Requests arrive just before the moment of the decode step, and a launch on the prefill card takes a while."""
    path, _ = checkpoint("gqa2")
    launched: list[str] = []
    with LLM(path, device="cpu", enable_two_gpu_pd=True, card_roles="fixed") as llm:
        for runner in llm._runners:

            def launch(step, launch=runner.launch):
                launched.append(step.kind)
                return launch(step)

            monkeypatch.setattr(runner, "launch", launch)
        llm.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
        while len(launched) < 8 or len(llm._steps) != 1:
            llm.step()
        (prefill_card,) = (card for card in llm.scheduler.cards if card is llm.scheduler.placement.prefill_card)
        llm._loop._launch_times._launch_s[prefill_card] = 10.0
        del launched[:]
        llm.add_request([4, 5, 6], SamplingParams(temperature=0, max_tokens=2))
        while "prefill" not in launched:
            llm.step()
    # On a busy machine decode steps end meanwhile, and more of them come first.
    assert launched[0] == "decode"


def test_ranks_in_other_processes_are_not_kept_waiting(monkeypatch):
    clock = Clock(monkeypatch, lambda rng: 0.0)
    clock.launch()
    assert LaunchTimes(clock.steps, Counters(), puts_off=False).next_on(clock.card) == AT_ONCE
