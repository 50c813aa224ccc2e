"""What comes of holding requests back by what decode steps are predicted to take.

The scheduler runs on simulated devices here, whose steps cost what no model says exactly.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from dataclasses import replace

import numpy as np
import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.execution.layer_exchange import WaitReport
from nanovllm.engine.execution.step_handle import StepHandle
from nanovllm.engine.scheduler import Scheduler, SchedulerLimits
from nanovllm.engine.scheduling.decode_set import LOOK_AHEAD_STEPS
from nanovllm.engine.scheduling.step import Step
from nanovllm.engine.scheduling.step_time import StepSize, StepTimeModel
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.entrypoints.prometheus import Collector
from tests import tiny
from tests.steps import SimulatedTime, launch_decode, place
from tests.test_engine import drain, tokens_of
from tests.test_metrics import phases

MS = 1e-3


# The scheduler on simulated devices


PREFILL_TOKENS_PER_S = 40_000.0
HANDOFF_S = 1 * MS


def true_step_s(rows: int, tokens: int) -> float:
    """A staircase in rows, as of graphs by bucket, and contexts that cost less each the more there are."""
    return 4 * MS + 0.5 * MS * math.ceil(rows / 16) + 2 * MS * (tokens / 100_000) ** 0.8


class Simulation(SimulatedTime):
    """Devices by simulated time, and the engine's loop between them.

    Args:
        trace: arrivals, as (seconds, prompt tokens, most output tokens, output tokens after which it stops).
        give_up_s: when all that still wait are aborted.
    """

    def __init__(
        self,
        trace: list[tuple[float, int, int, int]],
        *,
        max_backlog: int = 64,
        target_ms: float | None = None,
        max_num_seqs: int = 512,
        give_up_s: float | None = None,
    ) -> None:
        super().__init__()
        target_s = None if target_ms is None else target_ms * MS
        limits = SchedulerLimits(2048, max_num_seqs, max_backlog, target_s)
        pools = [BlockManager(2**17, 64, enable_prefix_caching=False) for _ in range(2)]
        self.scheduler = Scheduler(limits, place(*pools, 16384, 2048))
        self.rng = random.Random(0)
        self.seqs: list[Sequence] = []
        self.num_stopped: dict[Sequence, int] = {}
        self.admitted: list[int] = []
        self.most_under_way = self.most_running = 0
        self.prefills: deque[Step] = deque()
        self.decodes: deque[Step] = deque()
        self.prefill_free_s = self.decode_free_s = 0.0
        self.gap_start_s: float | None = None
        self.last_token_s: dict[Sequence, float] = {}
        self.gaps: list[float] = []
        for arrival in trace:
            self.at(arrival[0], self.arrive, *arrival)
        if give_up_s is not None:
            self.at(give_up_s, self.give_up)
        self.run(self.launch)
        assert all(seq.is_finished for seq in self.seqs), "a request is lost"
        self.scheduler.check_integrity()

    @property
    def itl_p99_ms(self) -> float:
        return float(np.percentile(self.gaps, 99)) / MS

    @property
    def tokens_per_s(self) -> float:
        return len(self.gaps) / max(self.last_token_s.values())

    def arrive(self, moment: float, prompt: int, most: int, stop: int) -> None:
        number = len(self.seqs)
        seq = Sequence(number, [1] * prompt, SamplingParams(max_tokens=most), number, moment, prompt + most)
        self.num_stopped[seq] = prompt + min(stop, most)
        self.seqs.append(seq)
        self.scheduler.add(seq)

    def give_up(self) -> None:
        for seq in self.scheduler.unfinished():
            if seq.status is SequenceStatus.WAITING:
                self.scheduler.finish(seq, "abort")

    def launch(self) -> None:
        while len(self.decodes) < 2 and (step := self.scheduler.schedule_decode()) is not None:
            self.decodes.append(step)
            took = true_step_s(len(step.decode), step.decode.num_tokens) * math.exp(self.rng.gauss(0, 0.02))
            if self.rng.random() < 0.002:
                took *= 5
            self.decode_free_s = max(self.decode_free_s, self.now) + took
            self.at(self.decode_free_s, self.decode_ended)
        while len(self.prefills) < 2 and (step := self.scheduler.schedule_prefill()) is not None:
            self.prefills.append(step)
            self.admitted += [chunk.seq.request_id for chunk in step.chunks if chunk.start == 0]
            took = 2 * MS + step.num_prefill_tokens / PREFILL_TOKENS_PER_S
            self.prefill_free_s = max(self.prefill_free_s, self.now) + took
            self.at(self.prefill_free_s, self.prefill_ended)
        running = self.scheduler._running
        num_decoding = sum(seq.status is SequenceStatus.DECODING for seq in running)
        self.most_under_way = max(self.most_under_way, len(running) - num_decoding)
        self.most_running = max(self.most_running, len(running))

    def prefill_ended(self) -> None:
        for chunk in self.prefills.popleft().chunks:
            if self.scheduler.prefill_done(chunk) and chunk.is_last:
                self.append(chunk.seq)
        for seq in self.scheduler.get_prefilled_sequences():
            self.scheduler.hold(seq.lease)
            self.at(self.now + HANDOFF_S, self.scheduler.release, seq.lease)

    def decode_ended(self) -> None:
        step = self.decodes.popleft()
        self.scheduler.decode_done(step)
        if self.gap_start_s is not None:
            self.scheduler.step_took(step, self.now - self.gap_start_s)
        self.gap_start_s = self.now if self.decodes else None
        for seq, lease in zip(step.seqs, step.leases, strict=True):
            if seq.lease is lease:
                self.append(seq)

    def append(self, seq: Sequence) -> None:
        seq.token_ids.append(2)
        if seq in self.last_token_s:
            self.gaps.append(self.now - self.last_token_s[seq])
        self.last_token_s[seq] = self.now
        if seq.num_tokens == self.num_stopped[seq]:
            self.scheduler.finish(seq, "stop")


def poisson(
    per_s: float, start_s: float, end_s: float, prompt: tuple[int, int], most: tuple[int, int], used: float = 1.0
) -> list[tuple[float, int, int, int]]:
    rng = random.Random(per_s)
    trace, moment = [], start_s
    while (moment := moment + rng.expovariate(per_s)) < end_s:
        num_most = rng.randint(*most)
        trace.append((moment, rng.randint(*prompt), num_most, int(used * num_most)))
    return trace


CHAT = {"prompt": (100, 900), "most": (50, 250)}
SUSTAINABLE_PER_S = 55
FEW_FIRST = poisson(5, 0, 2, **CHAT)
TRACES = {
    "sustainable": FEW_FIRST + poisson(0.9 * SUSTAINABLE_PER_S, 2, 12, **CHAT),
    "flood": FEW_FIRST + poisson(10 * SUSTAINABLE_PER_S, 2, 12, **CHAT),
    "burst": FEW_FIRST + [(2.0, 500, 300, 300)] * 300,
    "burst_onto_one": [(0.0, 200, 300, 300)] + [(1.0, 500, 300, 300)] * 300,
    "burst_onto_none": [(0.0, 500, 300, 300)] * 300,
    "long_contexts": FEW_FIRST[:5] + poisson(8, 2, 8, prompt=(6000, 12_000), most=(400, 800)),
    "stops_early": FEW_FIRST + poisson(100, 2, 12, prompt=(100, 900), most=(1000, 1000), used=0.15),
}
FIXED = dict.fromkeys(TRACES, (64, 72, 80, 88)) | {"long_contexts": (14, 16, 18, 20)}
"""Requests at a time, about the most that honour the target."""
GIVE_UP_S = 13.0
TARGET_MS = 8.0


def simulated(name: str, **options) -> Simulation:
    return Simulation(TRACES[name], give_up_s=GIVE_UP_S, **options)


def itl_and_rate(name: str, **options) -> tuple[float, float]:
    """Without a target."""
    run = simulated(name, **options)
    return run.itl_p99_ms, run.tokens_per_s


@pytest.mark.parametrize("name", TRACES)
def test_itl_keeps_to_the_target_and_throughput_near_the_best_that_does(name):
    held = simulated(name, target_ms=TARGET_MS)
    assert held.itl_p99_ms < 1.1 * TARGET_MS
    assert held.admitted == sorted(held.admitted)
    assert held.most_under_way <= 64
    held_tokens_per_s = held.tokens_per_s
    del held  # its thousands of requests take as much memory as the rest of the tests
    free_itl_p99_ms, _ = itl_and_rate(name)
    assert (free_itl_p99_ms > 1.1 * TARGET_MS) == (name != "sustainable")
    # Whoever knows the load beforehand can find the most requests at a time that honour the target.
    fixed = [itl_and_rate(name, max_num_seqs=number) for number in FIXED[name]]
    best = max(tokens_per_s for itl_p99_ms, tokens_per_s in fixed if itl_p99_ms <= 1.02 * TARGET_MS)
    assert held_tokens_per_s > 0.9 * best


def test_long_answers_that_begin_together_grow_past_the_target_by_what_is_not_looked_ahead():
    held = Simulation(FEW_FIRST + [(2.0, 500, 1000, 1000)] * 150, target_ms=TARGET_MS)
    assert held.itl_p99_ms < 1.2 * TARGET_MS


def test_a_target_just_above_one_requests_steps_is_used_all_the_same():
    """16 rows cost as much as one, which nothing says until they are tried."""
    trace = [(0.0, 200, 400, 400)] + [(1.0, 500, 300, 300)] * 100
    held = Simulation(trace, target_ms=5.2)
    assert true_step_s(1, 200) > 0.85 * 5.2 * MS
    assert held.most_running >= 12
    assert held.itl_p99_ms < 1.15 * 5.2


def test_an_impossible_target_lets_one_at_a_time_through():
    trace = [(0.0, 200, 20, 20)] + [(0.1, 500, 20, 20)] * 50
    held = Simulation(trace, target_ms=1e-3)
    assert held.most_running == 1
    assert held.admitted == list(range(51))


@pytest.mark.parametrize("limit", [1, 5])
@pytest.mark.parametrize("target_ms", [None, TARGET_MS])
def test_the_backlog_is_bounded_with_and_without_a_target(limit, target_ms):
    assert Simulation(TRACES["burst"][:60], max_backlog=limit, target_ms=target_ms).most_under_way == limit


def test_without_a_target_requests_run_as_with_one_that_holds_nobody_back():
    without, generous = simulated("burst"), simulated("burst", target_ms=1e9)
    assert without.admitted == generous.admitted
    assert without.gaps == generous.gaps


class Asked(StepTimeModel):
    """Keeps what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.questions: list[StepSize] = []

    def may_exceed(self, limit_s: float, size: StepSize) -> bool:
        self.questions.append(size)
        return super().may_exceed(limit_s, size)


def test_contexts_count_as_long_as_they_soon_may_be():
    scheduler = Scheduler(
        SchedulerLimits(100, 8, 8, itl_target_s=1.0), place(BlockManager(64, 4), BlockManager(64, 4), 100, 100)
    )
    model = scheduler.placement.decode_card.step_time = Asked()

    def add(number: int, prompt: int, most: int) -> None:
        scheduler.add(Sequence(number, [number] * prompt, SamplingParams(), number, 0.0, prompt + most))

    add(0, 30, 1000)
    add(1, 20, 12)
    chunks = scheduler.schedule_prefill().chunks
    # The last token of an output is not fed, so that its KV is no context.
    assert model.questions == [StepSize(2, 30 + LOOK_AHEAD_STEPS + 20 + 11)]
    for chunk in chunks:
        scheduler.prefill_done(chunk)
        chunk.seq.token_ids.append(7)
        scheduler.handoff_done(chunk.seq)
    for num_fed in range(2):
        add(2 + num_fed, 5, 500)
        scheduler.schedule_prefill()
        still_there = num_fed * (5 + LOOK_AHEAD_STEPS)
        context = 31 + num_fed + LOOK_AHEAD_STEPS + 31 + still_there + 5 + LOOK_AHEAD_STEPS
        assert model.questions[-1] == StepSize(3 + num_fed, context)
        scheduler.schedule_decode()


# The engine


def two_devices(path: str, **options) -> LLM:
    return LLM(path, device="cpu", enable_two_gpu_pd=True, card_roles="fixed", **options)


def test_an_impossible_target_changes_no_token_and_explains_the_wait(tiny_path):
    prompts = tiny.random_prompts(6, seed=5)
    params = SamplingParams(temperature=0, max_tokens=12)
    with two_devices(tiny_path) as llm:
        expected = [answer["token_ids"] for answer in llm.generate(prompts, params, use_tqdm=False)]
        assert llm.metrics()["predicted_itl_s"] is None
    with two_devices(tiny_path, itl_target_ms=0.001) as llm:
        llm.add_request(prompts[0], params)
        drain(llm, steps_overlap=True)  # it has steps to predict from now
        ids = [llm.add_request(prompt, params) for prompt in prompts]
        first_outputs = llm.step()
        assert llm.metrics()["predicted_itl_s"] > 1e-6
        outputs = drain(llm, steps_overlap=True)
        outputs[ids[0]] = first_outputs + outputs[ids[0]]
        assert llm.metrics()["predicted_itl_s"] is None
        lives = [llm.explain(request_id) for request_id in ids]
    assert [tokens_of(outputs[request_id]) for request_id in ids] == expected
    reason = "waits for a lease (itl_target_ms=0.001 would be exceeded)"
    assert [reason in phases(life) for life in lives] == [False, True, True, True, True, True]
    begins = [life.arrival_s + span.start_s for life in lives for span in life.spans() if span.what == "prefill queue"]
    ends = [life.arrival_s + span.start_s for life in lives for span in life.spans() if span.what == "ended: length"]
    assert all(end < begin for end, begin in zip(ends[:-1], begins[1:], strict=True))


def observations(llm: LLM, monkeypatch) -> list[tuple[StepSize, float, float]]:
    """The size of each step that is observed, what it took, and how much of that may have been its launch."""
    found: list[tuple[StepSize, float, float]] = []
    model = llm.scheduler.placement.decode_card.step_time
    monkeypatch.setattr(model, "observe", lambda *observed: found.append(observed))
    return found


def test_on_a_cpu_every_step_is_observed(tiny_path, monkeypatch):
    with two_devices(tiny_path, itl_target_ms=1000) as llm:
        found = observations(llm, monkeypatch)
        llm.add_request([1] * 30, SamplingParams(temperature=0, max_tokens=9))
        started = time.perf_counter()
        drain(llm, steps_overlap=True)
        llm._loop._tell_step_times()
        passed = time.perf_counter() - started
        assert [size for size, *_ in found] == [StepSize(1, tokens) for tokens in range(31, 39)]
        assert 0 < sum(seconds for _, seconds, _ in found) < passed
        assert not any(launch_s for *_, launch_s in found), "the CPU's steps are their launches"


@pytest.mark.parametrize("waited_s", [0.0, 0.25])
def test_a_step_whose_time_includes_its_launch_is_observed_with_that(tiny_path, monkeypatch, waited_s):
    """Steps begin and end after their launch here, like those of a GPU."""
    with two_devices(tiny_path, itl_target_ms=1000) as llm:
        found = observations(llm, monkeypatch)
        llm.add_request([1] * 30, SamplingParams(temperature=0, max_tokens=20))
        for _ in range(4):
            llm.step()
        collect = StepHandle.collect
        monkeypatch.setattr(
            StepHandle, "collect", lambda handle: replace(collect(handle), waits=WaitReport(waited_s=waited_s))
        )
        for began_s in (-0.001, 0.001):
            llm._loop._tell_step_times()
            del found[:]
            assert launch_decode(llm)
            (work,) = llm._loop._steps
            work.handle.ran_in_launch = False
            moments = work.launched_s + began_s, work.launched_s + began_s + 0.5
            monkeypatch.setattr(StepHandle, "moments", lambda handle, moments=moments: moments)
            llm._loop.collect_steps()
            llm._loop._tell_step_times()
            assert [seconds for _, seconds, _ in found] == [pytest.approx(0.5 - waited_s)]
            assert [launch_s for *_, launch_s in found] == [pytest.approx(max(-began_s - waited_s, 0.0))]
            assert llm._loop._steps._last_end_s[work.queue] == moments[1]


def test_prometheus_reads_the_prediction(tiny_path):
    prometheus_client = pytest.importorskip("prometheus_client")
    with two_devices(tiny_path, itl_target_ms=1000) as llm:
        registry = prometheus_client.CollectorRegistry()
        registry.register(Collector(llm))
        name = "nanovllm_predicted_inter_token_latency_seconds"
        assert registry.get_sample_value(name) is None
        llm.add_request([1] * 30, SamplingParams(temperature=0, max_tokens=20))
        llm.step()
        llm.scheduler.placement.decode_card.step_time.observe(StepSize(1, 31), 0.25)
        assert registry.get_sample_value(name) == pytest.approx(0.25, rel=0.05)
