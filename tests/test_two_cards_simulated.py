"""Roles of two cards, by simulated time: what sharing prompts gives, and that nobody starves of it."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache

import numpy as np
import pytest

from nanovllm.engine.scheduling import placement
from nanovllm.engine.scheduling.step_time import StepTimeModel
from tests.simulated_cards import TwoCards
from tests.test_step_time import MS, chat, poisson, rag


class Courses:
    """Three courses of a load, whose figures are the means: those of one alone are chance to a few percent."""

    def __init__(self, mode: str, load: str, target_ms: float | None) -> None:
        name, _, rate = load.partition(" ")
        traces = [{"rag": rag, "chat": chat}[name](float(rate), 15.0, seed) for seed in range(3)]
        self.courses = [TwoCards(trace, mode, target_ms) for trace in traces]
        self.chunks = sum((course.chunks for course in self.courses), Counter())

    def ttft_ms(self, share: float) -> float:
        return float(np.mean([course.ttft_ms(share) for course in self.courses]))

    def itl_ms(self, share: float) -> float:
        return float(np.mean([course.itl_ms(share) for course in self.courses]))

    def first_gap_ms(self, share: float) -> float:
        gaps_s = [gaps[0] for course in self.courses for gaps in course.gaps_s.values() if gaps]
        return float(np.quantile(gaps_s, share)) / MS


@cache
def served(mode: str, load: str, target_ms: float | None) -> Courses:
    return Courses(mode, load, target_ms)


@pytest.mark.parametrize("rate", [2, 6])
def test_first_tokens_of_long_prompts_come_sooner_and_gaps_are_as_asked_for(rate):
    elastic, fixed, replicas = (served(mode, f"rag {rate}", 12.0) for mode in ("elastic", "fixed", "replicas"))
    assert elastic.ttft_ms(0.5) < 0.72 * min(fixed.ttft_ms(0.5), replicas.ttft_ms(0.5))
    assert elastic.itl_ms(0.99) < 12.8
    assert elastic.chunks["shared"] > 3 * elastic.chunks["single"]


def some_long_prompts(rng: random.Random) -> int:
    return rng.randint(300, 1900) if rng.random() < 0.65 else rng.randint(3000, 7500)


@pytest.mark.parametrize("mode", ["elastic", "replicas"])
def test_gaps_are_as_asked_for_though_tokens_are_taken_in_late(mode, monkeypatch):
    """Steps with chunks leave time for a busy host: it is seen in the gaps, not in the steps."""

    def mean_of_courses() -> tuple[float, float, float]:
        """Good requests, ITL p99 and TTFT p50."""
        found = []
        for seed in range(3):
            trace = poisson(4.5, 20.0, lambda rng: rng.randint(2000, 8000), lambda rng: rng.randint(64, 256), seed)
            cards = TwoCards(trace, mode, 11.2, late_ms=0.6)
            found.append((cards.good_share(600, 12.0), cards.itl_ms(0.99), cards.ttft_ms(0.5)))
        good, itl_ms, ttft_ms = np.mean(found, axis=0)
        return good, itl_ms, ttft_ms

    good, itl_ms, ttft_ms = mean_of_courses()
    assert good > 0.85
    monkeypatch.setattr(StepTimeModel, "observe_gap", lambda *_: None)
    unaware_good, unaware_itl_ms, unaware_ttft_ms = mean_of_courses()
    assert unaware_good < 0.7
    assert itl_ms < 11.6 < 12.0 < unaware_itl_ms
    assert ttft_ms < 1.1 * unaware_ttft_ms


def test_requests_do_not_gather_beside_many_prompts(monkeypatch):
    """Else prompts are computed beside all decode rows, and first gaps are two full steps."""

    def mean_of_courses() -> tuple[float, float, float]:
        """Share of first gaps beyond 16 ms, ITL p99 and TTFT p50."""
        found = []
        for seed in range(4):
            trace = poisson(9.0, 12.0, some_long_prompts, lambda rng: rng.randint(16, 40), seed)
            elastic = TwoCards(trace, "elastic", 15.0)
            share_of_long = float(np.mean([gaps[0] > 16 * MS for gaps in elastic.gaps_s.values()]))
            found.append((share_of_long, elastic.itl_ms(0.99), elastic.ttft_ms(0.5)))
        share_of_long, itl_ms, ttft_ms = np.mean(found, axis=0)
        return share_of_long, itl_ms, ttft_ms

    few, itl_ms, ttft_ms = mean_of_courses()
    monkeypatch.setattr(placement, "MOST_TOKENS_LEFT", 10**9)
    many, itl_gathered_ms, ttft_gathered_ms = mean_of_courses()
    assert few < 0.9 * many
    assert itl_ms < 1.01 * itl_gathered_ms, "gaps are no longer for it"
    assert ttft_ms < 1.05 * ttft_gathered_ms


@pytest.mark.parametrize("seed", [0, 2, 4, 6])
def test_a_card_with_nothing_to_decode_is_soon_ready_for_what_will_join(seed):
    """Whoever is to decode there would wait for a long step of prompts behind the first token."""
    trace = poisson(9.0, 10.0, some_long_prompts, lambda rng: rng.randint(4, 20), seed)
    elastic = TwoCards(trace, "elastic", 11.2, late_ms=0.3)
    assert max(max(gaps) for gaps in elastic.gaps_s.values()) < 2.7 * 11.2 * MS


def test_short_prompts_are_not_shared_and_lose_nothing():
    elastic, replicas = (served(mode, "chat 40", 15.0) for mode in ("elastic", "replicas"))
    assert elastic.chunks["single"] > elastic.chunks["shared"]  # few prompts have 2,048 tokens
    assert elastic.ttft_ms(0.5) < 1.05 * replicas.ttft_ms(0.5)
    assert elastic.ttft_ms(0.99) < 1.2 * replicas.ttft_ms(0.99)


@pytest.mark.parametrize(
    ("load", "target_ms"),
    [("chat 4", 15.0), ("chat 12", 15.0), ("chat 4", None), ("chat 24", None)],
)
def test_while_two_steps_of_all_fit_the_target_first_tokens_come_as_soon_as_with_fixed_roles(load, target_ms):
    elastic, fixed = (served(mode, load, target_ms) for mode in ("elastic", "fixed"))
    assert elastic.ttft_ms(0.5) < 1.05 * fixed.ttft_ms(0.5)
    assert elastic.ttft_ms(0.99) < 1.03 * fixed.ttft_ms(0.99)
    assert elastic.itl_ms(0.5) < 1.03 * fixed.itl_ms(0.5)


@pytest.mark.parametrize("load", ["chat 28", "chat 48", "chat 67"])
def test_no_first_gap_is_longer_than_the_target_because_requests_gather(load):
    """With fixed roles it is nearly two steps of all requests."""
    elastic, fixed, replicas = (served(mode, load, 15.0) for mode in ("elastic", "fixed", "replicas"))
    assert elastic.first_gap_ms(0.9) < 15.0 < fixed.first_gap_ms(0.9)
    assert elastic.ttft_ms(0.5) < 1.02 * replicas.ttft_ms(0.5)
    assert elastic.itl_ms(0.5) < fixed.itl_ms(0.5)


@pytest.mark.parametrize(("per_s", "most"), [(12.0, 1.1), (28.0, 1.25), (40.0, 1.15)])
def test_a_long_prompt_among_short_ones_costs_these_little(per_s, most):
    """While few are there, its request decodes where the others do, though both cards compute it: else short prompts
    would wait for steps of rows on either. With more, any first gap of two steps would be longer than the target."""

    def num_input(rng: random.Random) -> int:
        return min(max(int(rng.lognormvariate(6.1, 0.8)), 16), 4096)

    ratios = []
    for seed in range(3):
        trace = poisson(per_s, 10.0, num_input, lambda rng: max(int(rng.lognormvariate(5.3, 0.7)), 8), seed)
        elastic, fixed = (TwoCards(trace, mode, 15.0) for mode in ("elastic", "fixed"))
        ratios.append((elastic.ttft_ms(0.5) / fixed.ttft_ms(0.5), elastic.ttft_ms(0.99) / fixed.ttft_ms(0.99)))
    median, slowest = np.mean(ratios, axis=0)
    assert median < most
    assert slowest < 0.9


def test_elastic_cards_of_a_cluster_serve_as_replicas_at_least():
    """Under load their first tokens come sooner than with fixed roles, where prompts wait for one card."""
    cluster, fixed, replicas = (served(mode, "rag 6", 12.0) for mode in ("cluster", "fixed", "replicas"))
    assert cluster.ttft_ms(0.5) < 1.05 * replicas.ttft_ms(0.5)
    assert cluster.ttft_ms(0.99) < min(1.05 * replicas.ttft_ms(0.99), 0.7 * fixed.ttft_ms(0.99))
    assert cluster.itl_ms(0.99) < 12.5
    unbounded, plain = served("cluster", "rag 3", None), served("fixed", "rag 3", None)
    assert unbounded.itl_ms(0.99) < 1.35 * plain.itl_ms(0.99), "steps with prompts are bounded without a target, too"


@pytest.mark.parametrize("load", ["rag 3", "rag 6", "chat 24", "chat 60"])
def test_without_a_target_gaps_stay_near_those_of_fixed_roles(load):
    elastic, fixed = (served(mode, load, None) for mode in ("elastic", "fixed"))
    assert elastic.itl_ms(0.5) < 1.15 * fixed.itl_ms(0.5)
    assert elastic.itl_ms(0.99) < 1.35 * fixed.itl_ms(0.99)
    if load.startswith("rag"):
        assert elastic.ttft_ms(0.5) < 0.75 * fixed.ttft_ms(0.5)
        assert elastic.ttft_ms(0.99) < 0.78 * fixed.ttft_ms(0.99)


@pytest.mark.parametrize("length", [4096, 8192, 32768])
def test_two_idle_cards_halve_the_time_to_a_first_token(length):
    """One prompt after another, some of which teach how long steps take."""
    trace = [(3.0 * number, length, 2) for number in range(10)]
    one, two = (np.median(list(TwoCards(trace, mode, None).ttfts_s.values())[4:]) for mode in ("replicas", "elastic"))
    assert two < 0.53 * one


def bursts(rng: random.Random) -> list[tuple[float, int, int]]:
    return [(float(second), rng.randint(50, 9000), rng.randint(2, 80)) for second in range(0, 12, 3) for _ in range(12)]


def all_long(rng: random.Random) -> list[tuple[float, int, int]]:
    return [(0.4 * number, 9000, 40) for number in range(24)]


def all_short(rng: random.Random) -> list[tuple[float, int, int]]:
    return [(0.01 * number, rng.randint(1, 200), rng.randint(1, 60)) for number in range(400)]


def by_turns(rng: random.Random) -> list[tuple[float, int, int]]:
    return [(0.3 * number, (30, 12_000)[number % 2], 50) for number in range(30)]


def one_endless(rng: random.Random) -> list[tuple[float, int, int]]:
    return [(0.0, 2000, 2500), *((0.5 + 0.5 * number, rng.randint(50, 6000), 60) for number in range(20))]


@pytest.mark.parametrize("target_ms", [None, 12.0, 7.0])
@pytest.mark.parametrize("arrivals", [bursts, all_long, all_short, by_turns, one_endless])
def test_nobody_starves(arrivals, target_ms):
    """Whoever comes, every request has its first token in a few times what its own prompt and those before it take."""
    slowest_s: Counter[str] = Counter()
    for seed in range(1, 4):
        trace = arrivals(random.Random(seed))
        cards = {mode: TwoCards(trace, mode, target_ms) for mode in ("elastic", "replicas")}
        for mode, served_by in cards.items():
            slowest_s[mode] = max(slowest_s[mode], *served_by.ttfts_s.values())
        if target_ms is not None:
            assert cards["elastic"].itl_ms(0.99) < max(1.1 * cards["replicas"].itl_ms(0.99), 1.1 * target_ms)
    assert slowest_s["elastic"] < 1.3 * slowest_s["replicas"] + 0.1


def test_the_same_arrivals_are_served_the_same_way():
    first, second = (TwoCards(bursts(random.Random(2)), "elastic", 12.0) for _ in range(2))
    assert list(first.ttfts_s.values()) == list(second.ttfts_s.values())
