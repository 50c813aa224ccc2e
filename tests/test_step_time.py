"""What mixed steps are predicted to take, and how much of a prompt they take by it: on simulated cards.

The times of the simulated card are those measured of the 8B shape on an H100: a staircase in tokens, bytes of KV, pairs
of attention.
"""

from __future__ import annotations

import bisect
import json
import math
import random
import time
from collections import Counter, deque
from collections.abc import Callable

import numpy as np
import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.engine import loop, scheduler
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler, SchedulerLimits
from nanovllm.engine.scheduling.card import Card
from nanovllm.engine.scheduling.placement import Placement
from nanovllm.engine.scheduling.step import Step
from nanovllm.engine.scheduling.step_time import CAREFUL_TOKENS, NOISE_MARGIN, ModelCosts, StepSize, StepTimeModel
from tests import tiny
from tests.steps import SimulatedRequests
from tests.test_mixed_step import SMALL_STEPS, serve

MS = 1e-3
TOKENS = [1, 64, 128, 192, 256, 320, 384, 512, 768, 1024, 2048, 4096, 8192]
GEMMS_MS = [5.29, 5.52, 5.57, 6.00, 6.87, 8.16, 8.84, 11.4, 15.9, 21.0, 41.9, 83.2, 166.0]
KV_BYTES, WEIGHT_BYTES, BYTES_PER_S = 147_456, 16.4e9, 3.0e12
COSTS = ModelCosts(KV_BYTES / WEIGHT_BYTES, 4 * 4096 * 36 / WEIGHT_BYTES)


def true_step_s(size: StepSize, padding: int = 16) -> float:
    tokens = -(-size.num_tokens // padding) * padding
    if tokens >= TOKENS[-1]:
        gemms = GEMMS_MS[-1] * tokens / TOKENS[-1]
    else:
        index = max(bisect.bisect_left(TOKENS, tokens), 1)
        (low, high), (first, last) = TOKENS[index - 1 : index + 1], GEMMS_MS[index - 1 : index + 1]
        gemms = first + (last - first) * (tokens - low) / (high - low)
    attention_s = 4 * 4096 * 36 * size.num_pairs / 480e12
    return gemms * MS + 1.25e9 / BYTES_PER_S + 1.05 * size.context * KV_BYTES / BYTES_PER_S + attention_s + 0.15 * MS


# The model


def test_nothing_is_predicted_from_nothing_and_little_fits():
    model = StepTimeModel(COSTS)
    assert model.predict(StepSize(3, 100)) is None
    assert model.tokens_that_fit(1.0, StepSize(3, 100), 0, 5000) == CAREFUL_TOKENS
    assert model.tokens_that_fit(1.0, StepSize(3, 100), 0, 7) == 7
    assert model.statistics()["steps"] == 0


def test_one_step_gives_the_scale_and_a_few_the_shape():
    model = StepTimeModel(COSTS)
    model.observe(StepSize(8, 8000), true_step_s(StepSize(8, 8000)))
    assert model.predict(StepSize(8, 8000)) == pytest.approx(true_step_s(StepSize(8, 8000)), rel=1e-6)
    first = model.tokens_that_fit(12 * MS, StepSize(8, 8000), 0, 2048)
    for tokens in (64, 128, 256, 512, 1024, 2048) * 3:
        model.observe(StepSize(tokens, 8000), true_step_s(StepSize(tokens, 8000)))
    for tokens in (64, 200, 256, 500, 700, 1024, 1500):
        size = StepSize(tokens, 8000)
        assert model.predict(size) == pytest.approx(true_step_s(size), rel=0.06)
    later = model.tokens_that_fit(12 * MS, StepSize(8, 8000), 0, 2048)
    assert 0 < first < later, "it is careful where it has seen nothing"
    assert true_step_s(StepSize(8 + later, 8000)) <= 12 * MS


def test_a_prediction_is_the_product_of_features_and_what_was_learned():
    model, rng = StepTimeModel(COSTS), random.Random(8)
    for _ in range(300):
        size = StepSize(rng.randrange(1, 3000), rng.randrange(40_000)).with_chunk(rng.randrange(9000), 16)
        model.observe(size, true_step_s(size) * rng.uniform(0.97, 1.03))
    for tokens in (1, 2, 31, 32, 33, 500, 512, 1000, 40_000):
        size = StepSize(tokens, rng.randrange(40_000), rng.uniform(0, 1e7))
        expected_s = float(model._features(size) @ model._coefficients) * model._unit_s
        assert model.predict(size) == pytest.approx(expected_s, rel=1e-12)


def test_a_prompt_costs_more_behind_what_is_computed_of_it():
    model = StepTimeModel(COSTS)
    rng = random.Random(4)
    for _ in range(400):
        size = StepSize(16, 16_000).with_chunk(rng.randrange(30_000), rng.choice([64, 128, 256, 512]))
        model.observe(size, true_step_s(size))
    size = StepSize(16, 16_000)
    fits = [model.tokens_that_fit(15 * MS, size, start, 4096) for start in (0, 8_000, 16_000, 32_000)]
    assert fits == sorted(fits, reverse=True)
    assert fits[0] > 1.2 * fits[-1]
    for start, count in zip((0, 8_000, 16_000, 32_000), fits, strict=True):
        assert 0.85 * 15 * MS < true_step_s(size.with_chunk(start, count)) < 1.03 * 15 * MS


def test_steps_are_filled_up_to_what_graphs_are_padded_to():
    model = StepTimeModel(COSTS)
    for tokens in (16, 64, 256, 1024) * 5:
        model.observe(StepSize(tokens, 8000), true_step_s(StepSize(tokens, 8000)))
    for rows in (1, 7, 16, 33):
        count = model.tokens_that_fit(12 * MS, StepSize(rows, 8000), 0, 4096)
        assert (rows + count) % 16 == 0
    assert model.tokens_that_fit(12 * MS, StepSize(7, 8000), 0, 5) == 5
    assert model.tokens_that_fit(1 * MS, StepSize(7, 8000), 0, 4096) == 0


def test_a_hitch_changes_little_and_a_slower_card_is_noticed():
    model, size = StepTimeModel(COSTS), StepSize(32, 16_000)
    for _ in range(200):
        model.observe(size, 6 * MS)
    model.observe(size, 2.0)
    assert model.predict(size) < 6.6 * MS
    for _ in range(300):
        model.observe(size, 9 * MS)
    assert model.predict(size) == pytest.approx(9 * MS, rel=0.02)
    assert model.predict(StepSize(34, 17_000)) > 8.5 * MS


def test_steps_that_begin_within_their_launch_teach_what_they_can():
    """None begins otherwise on a card that is idle each time a prompt comes; how long the launch took is not known."""
    rng, model, size = random.Random(3), StepTimeModel(COSTS), StepSize(0).with_chunk(0, 300)
    model.observe(size, 2.0, 1.9)
    assert not model.has_learned, "it was compiled meanwhile"
    for _ in range(40):
        model.observe(size, true_step_s(size) + rng.uniform(0, 2 * MS), 2 * MS)
    assert model.predict(size) == pytest.approx(true_step_s(size), abs=1 * MS), "within half of the launch"
    unsure_s = model.predict(size)
    model.observe(size, true_step_s(size))
    assert model.predict(size) != unsure_s, "one whose launch took nothing still teaches"
    assert model.statistics()["steps"] == 1


def test_steps_that_end_together_teach_nothing():
    model = StepTimeModel(COSTS)
    model.observe(StepSize(1, 1), 0.0)
    model.observe(StepSize(1, 1), 1e-6)
    assert not model.has_learned


@pytest.mark.parametrize("first_s", [2e-5, 3.0])
def test_a_first_step_that_was_no_measure_is_forgotten(first_s):
    """The scale is taken from it."""
    rng, model = random.Random(6), StepTimeModel(COSTS)
    model.observe(StepSize(8, 8000), first_s)
    for _ in range(40):
        size = StepSize(rng.randint(1, 64), 8000).with_chunk(0, rng.randrange(400))
        model.observe(size, true_step_s(size) * math.exp(rng.gauss(0, 0.015)))
    for tokens in (32, 200):
        assert model.predict(StepSize(tokens, 8000)) == pytest.approx(true_step_s(StepSize(tokens, 8000)), rel=0.08)


def test_a_card_unlike_the_prior_is_learned_all_the_same():
    """Launches cost it more than weights: sizes that take turns are far from what either says of the other."""
    model, errors = StepTimeModel(COSTS), []
    for step in range(400):
        size = StepSize(1 + step % 4, 4000)
        if step % 2:
            size = size.with_chunk(0, 2032 * (1 + step % 3 % 2))
        took_s = 1.2 * MS + 0.35e-6 * size.num_tokens
        errors.append(abs((model.predict(size) or took_s) / took_s - 1))
        model.observe(size, took_s)
    assert np.median(errors[200:]) < 0.05


@pytest.mark.parametrize("factor", [1.25, 1.5, 0.7])
def test_other_clocks_change_the_scale_and_leave_the_shape(factor):
    rng, model = random.Random(7), StepTimeModel(COSTS)

    def observe(count: int, scale: float, most_tokens: int) -> None:
        for _ in range(count):
            size = StepSize(32, 30_000)
            if most_tokens:
                size = size.with_chunk(rng.randrange(4000), rng.randrange(1, most_tokens))
            model.observe(size, scale * true_step_s(size) * math.exp(rng.gauss(0, 0.015)))

    def ratio(scale: float) -> float:
        size = StepSize(32, 30_000).with_chunk(2000, 1024)
        return model.predict(size) / (scale * true_step_s(size))

    observe(400, 1.0, 1500)
    observe(20, 1.0, 0)  # a size that was never seen may be fast or slow for itself
    assert ratio(1.0) == pytest.approx(1.0, abs=0.05)
    observe(20, factor, 0)  # decode steps alone tell of all others
    assert ratio(factor) == pytest.approx(1.0, abs=0.1)
    observe(20, 1.0, 0)
    assert ratio(1.0) == pytest.approx(1.0, abs=0.1)


OTHER_WORK = {
    "now and then": lambda rng: rng.choice([1.0, 1.0, 2.5]),
    "a hang now and then": lambda rng: rng.choice([1.0, 20.0]),
    "always": lambda rng: rng.uniform(1.0, 3.0),
    "a little": lambda rng: rng.uniform(1.0, 1.6),
}


def share_of_what_fits(seed: int, slower: Callable[[random.Random], float]) -> float:
    """Prompt tokens that a model takes over those that would fit, a good while after other work on the card."""
    rng, model = random.Random(seed), StepTimeModel(COSTS)
    for step in range(150):
        size = StepSize(step % 20, step % 20 * 600)
        if step % 5 < 2 or not size.num_tokens:
            size = size.with_chunk(0, model.tokens_that_fit(11 * MS, size, 0, 1024) or 32)
        model.observe(size, true_step_s(size) * slower(rng))
    fitting, size = [], StepSize(20, 40_000)
    for _ in range(1200):
        fitting.append(model.tokens_that_fit(11 * MS, size, 2000, 2048))
        size_with = size.with_chunk(2000, fitting[-1] or 32)
        model.observe(size_with, true_step_s(size_with) * math.exp(rng.gauss(0, 0.02)))
    return float(np.median(fitting[-100:])) / max(
        count for count in range(16, 512, 16) if true_step_s(size.with_chunk(2000, count)) < 11 * MS
    )


@pytest.mark.parametrize("slower", OTHER_WORK.values(), ids=OTHER_WORK)
def test_what_other_work_on_the_card_has_taught_is_forgotten(slower):
    """Such as of another engine that starts there: sizes that were once slow are tried again. In one of ten courses it
    takes longer than a thousand steps."""
    shares = sorted(share_of_what_fits(seed, slower) for seed in range(8))
    assert shares[1] > 0.7, shares
    assert shares[-1] <= 1


@pytest.mark.parametrize("factor", [2.5, 0.4])
def test_what_is_no_change_of_clocks_begins_anew(factor):
    rng, model = random.Random(8), StepTimeModel(COSTS)

    def observe(count: int, scale: float, size: StepSize) -> None:
        for _ in range(count):
            model.observe(size, scale * true_step_s(size) * math.exp(rng.gauss(0, 0.01)))

    decode, chunk = StepSize(32, 30_000), StepSize(32, 30_000).with_chunk(2000, 1024)
    observe(50, 1.0, chunk)
    for _ in range(50):
        observe(1, 3.0, StepSize(32, 30_000).with_chunk(2000, rng.randrange(64, 800)))  # a shape that is no card's
    observe(40, 1.0, decode)
    observe(5, factor, decode)
    observe(1, 40 * factor, decode)
    observe(6, factor, decode)
    assert model.predict(decode) == pytest.approx(factor * true_step_s(decode), rel=0.05)
    assert model.predict(chunk) == pytest.approx(factor * true_step_s(chunk), rel=0.5), "as the prior has it"


@pytest.mark.parametrize("noise", [0.1, 0.25])
def test_steps_that_vary_much_are_predicted_by_their_mean(noise):
    """A CPU that others use has such steps."""
    rng, model, size, errors = random.Random(9), StepTimeModel(COSTS), StepSize(8, 8000), []
    for step in range(600):
        if step > 200:
            errors.append(model.predict(size) / true_step_s(size) - 1)
        model.observe(size, true_step_s(size) * rng.uniform(1 - noise, 1 + noise))
    assert abs(np.median(errors)) < 0.03
    assert np.abs(errors).max() < noise


def test_a_launch_that_is_always_hidden_misleads_little():
    """Half of it is taken off, though none of it is in the time: so exact steps of that size count for more."""
    rng, model, size = random.Random(4), StepTimeModel(COSTS), StepSize(0).with_chunk(0, 600)
    for _ in range(200):
        model.observe(size, true_step_s(size) * math.exp(rng.gauss(0, 0.01)), 0.4 * true_step_s(size))
    for _ in range(3):
        model.observe(size, true_step_s(size))
    assert model.predict(size) == pytest.approx(true_step_s(size), rel=0.02)


def test_sizes_that_are_padded_to_each_other_are_one():
    """GEMMs of 288 tokens that take longer than of 304, as on an H200."""
    rng, model = random.Random(9), StepTimeModel(COSTS)

    def seconds(num_tokens: int) -> float:
        return 10 * MS * (1.06 if 272 < num_tokens <= 288 else 1.0)

    for _ in range(400):
        size = StepSize(4, 0).with_chunk(0, rng.randrange(200, 380))
        model.observe(size, seconds(size.num_tokens))
    for num_tokens in range(210, 380):
        size = StepSize(4, 0).with_chunk(0, num_tokens - 4)
        assert model.predict(size) == pytest.approx(seconds(num_tokens), rel=0.01), num_tokens


def test_noisy_steps_are_given_less():
    """So that hardly a step in a hundred takes longer than it may."""
    fits, too_long = {}, {}
    for noise in (0.005, 0.04):
        rng, model = random.Random(10), StepTimeModel(COSTS)

        def took_s(size: StepSize, rng=rng, noise=noise) -> float:
            return true_step_s(size) * math.exp(rng.gauss(0, noise))

        for _ in range(600):
            size = StepSize(8, 20_000).with_chunk(rng.randrange(4000), rng.randrange(1, 600))
            model.observe(size, took_s(size))
        fits[noise] = model.tokens_that_fit(12 * MS, StepSize(8, 20_000), 2000, 600)
        size = StepSize(8, 20_000).with_chunk(2000, fits[noise])
        too_long[noise] = np.mean([took_s(size) > 12 * MS for _ in range(4000)])
    assert fits[0.04] < fits[0.005]
    for _ in range(50):
        model.observe(StepSize(8, 20_000), true_step_s(StepSize(8, 20_000)))
    decode_s = model.predict(StepSize(8, 20_000))
    assert not model.may_exceed(1.02 * decode_s, StepSize(8, 20_000)), "steps without chunks have hardly any noise"
    assert too_long[0.005] < 0.03
    assert 0.001 < too_long[0.04] < 0.03


def test_gaps_that_exceed_their_steps_leave_less_time_for_chunks():
    model, rng = StepTimeModel(COSTS), random.Random(0)
    size = StepSize(20, 20 * 3000)
    for _ in range(2000):
        mixed = size.with_chunk(1000, rng.randint(64, 512))
        model.observe(mixed, true_step_s(mixed))
    room = model.tokens_that_fit(12 * MS, size, 1000, 4096)
    for _ in range(2000):
        mixed = size.with_chunk(1000, rng.randint(64, 512))
        model.observe_gap(mixed, true_step_s(mixed) + rng.expovariate(1 / (0.2 * MS)))
        model.observe_gap(size, true_step_s(size) + 5 * MS)  # without a chunk, nothing can be left out
    # Of an exponential distribution one in a hundred exceeds 4.6 times the mean.
    assert model.statistics()["gap_excess_s"] == pytest.approx(4.6 * 0.2 * MS, rel=0.3)
    assert model.tokens_that_fit(12 * MS, size, 1000, 4096) < room
    for _ in range(2000):
        model.observe_gap(mixed, 3 * true_step_s(mixed))
    assert model.tokens_that_fit(12 * MS, size, 1000, 4096) > 0, "a slow caller leaves time for prompts"
    for _ in range(40_000):
        model.observe_gap(mixed, true_step_s(mixed))
    assert model.statistics()["gap_excess_s"] < 0.1 * MS
    assert model.tokens_that_fit(12 * MS, size, 1000, 4096) >= room - 16, "and is forgotten"


def test_the_search_finds_what_looking_at_every_count_finds():
    rng, model = random.Random(8), StepTimeModel(COSTS)
    for _ in range(300):
        size = StepSize(rng.randint(1, 64), rng.randrange(10**5)).with_chunk(rng.randrange(8000), rng.randrange(1, 900))
        model.observe(size, true_step_s(size))
    for _ in range(60):
        size, start = StepSize(rng.randint(1, 64), rng.randrange(10**5)), rng.randrange(8000)
        most, limit_s = rng.randrange(1, 16_384), rng.uniform(4, 60) * MS
        found = model.tokens_that_fit(limit_s, size, start, most)
        first = -size.num_tokens % 16 or 16
        fitting = [
            count
            for count in (*range(first, most, 16), most)
            if bound_s(model, size.with_chunk(start, count)) <= limit_s
        ]
        assert found == max(fitting, default=0)


def bound_s(model: StepTimeModel, size: StepSize) -> float:
    """What a step with a chunk hardly takes longer than, by products with all features."""
    features = model._features(size)
    expected = features @ model._coefficients
    variance = features @ model._covariance @ features + NOISE_MARGIN**2 * model._noise_squared * expected**2
    return float(expected + math.sqrt(variance)) * model._unit_s


@pytest.mark.parametrize("seconds", [1e-4, 1e6])
def test_any_clock_will_do(seconds):
    model = StepTimeModel(COSTS)
    for _ in range(50):
        model.observe(StepSize(1, 1), seconds)
    assert 0 <= model.predict(StepSize(512, 10**8)) < math.inf
    for most in (10_000, 10**6):
        assert 0 <= model.tokens_that_fit(0.01, StepSize(512, 10**8), 0, most) <= most


def test_hours_of_steps_leave_the_model_sound():
    rng, model = random.Random(5), StepTimeModel(COSTS)
    for _ in range(30_000):
        size = StepSize(rng.randint(1, 64), rng.randint(100, 10**5)).with_chunk(rng.randrange(5000), rng.randrange(400))
        model.observe(size, true_step_s(size) * math.exp(rng.gauss(0, 0.02)))
    variances = np.linalg.eigvalsh(model._covariance)
    assert variances.min() > -1e-9
    assert model.statistics()["error_p50"] < 0.03


# The scheduler on a simulated card


class Simulation(SimulatedRequests):
    """One card by simulated time, and the engine's loop before it.

    Args:
        trace: arrivals, as (seconds, prompt tokens, output tokens).
        target_ms: `itl_target_ms`.
    """

    def __init__(self, trace, target_ms: float | None, *, chunk_tokens: int = 2048) -> None:
        limits = SchedulerLimits(chunk_tokens, 512, 64, None if target_ms is None else target_ms * MS)
        pool = BlockManager(2**13, 64, enable_prefix_caching=False)
        self.card = Card("cpu:0", "device cpu:0", pool, 16384, step_time=StepTimeModel(COSTS))
        super().__init__(Scheduler(limits, Placement(self.card, self.card)))
        self.rng = random.Random(0)
        self.free_s = 0.0
        self.steps: deque[Step] = deque()
        self.queued: tuple[Step | None, float] = (None, 0.0)
        self.errors: list[float] = []
        self.kinds: Counter[str] = Counter()
        self.launched: list[Step] = []
        self.most_in_flight = 0
        self.serve(trace, self.launch)

    def launch(self) -> None:
        for _ in range(2):
            step = self.scheduler.schedule(self.card, list(self.steps))
            if step is not None:
                took = true_step_s(step.size) * math.exp(self.rng.gauss(0, 0.015))
                self.launched.append(step)
                self.kinds[step.kind] += 1
                self.steps.append(step)
                self.most_in_flight = max(self.most_in_flight, len(self.steps))
                self.free_s = max(self.free_s, self.now) + took
                self.at(self.free_s, self.step_ended)

    def step_ended(self) -> None:
        step = self.steps.popleft()
        if self.queued[0] is step:
            took = self.now - self.queued[1]
            predicted = self.card.step_time.predict(step.size)
            if predicted is not None:
                self.errors.append(abs(predicted / took - 1))
            self.scheduler.step_took(step, took)
        self.queued = (self.steps[0] if self.steps else None, self.now)
        for chunk in step.chunks:
            if self.scheduler.prefill_done(chunk) and chunk.is_last:
                self.append(chunk.seq)
        self.take_decoded_tokens(step)


def poisson(per_s: float, seconds: float, prompt, output, seed: int = 0) -> list[tuple[float, int, int]]:
    rng, moment, trace = random.Random(seed), 0.0, []
    while (moment := moment + rng.expovariate(per_s)) < seconds:
        trace.append((moment, prompt(rng), output(rng)))
    return trace


def rag(per_s: float, seconds: float = 40.0, seed: int = 0) -> list[tuple[float, int, int]]:
    return poisson(per_s, seconds, lambda rng: rng.randint(2000, 8000), lambda rng: rng.randint(64, 256), seed)


def chat(per_s: float, seconds: float = 20.0, seed: int = 0) -> list[tuple[float, int, int]]:
    def length(mean: float):
        return lambda rng: max(4, min(4000, int(rng.lognormvariate(math.log(mean), 0.7))))

    return poisson(per_s, seconds, length(350), length(160), seed)


def test_a_step_that_is_full_ends_with_a_full_tile_of_its_gemms():
    """Unless little of the chunk would be left."""
    trace = [(0.0, 50, 200)] * 12 + [(0.5, 5000, 2)]
    for budget, expected in ((1024, 1024 - 12), (200, 128 - 12), (100, 100)):
        steps = Simulation(trace, None, chunk_tokens=budget).launched
        chunks = [chunk for step in steps if step.decode for chunk in step.chunks if chunk.seq.num_prompt_tokens > 50]
        assert {chunk.num_tokens for chunk in chunks if not chunk.is_last} == {expected}


def test_gaps_of_long_prompts_keep_to_the_target():
    held = Simulation(rag(3), 15.0)
    assert held.kinds["mixed"] > 100
    assert held.itl_ms(0.99) <= 16.0
    assert held.ttft_ms(0.5) <= 260
    assert np.quantile(held.errors, 0.5) <= 0.03
    assert np.quantile(held.errors, 0.95) <= 0.08


def test_chat_keeps_to_its_target():
    held = Simulation(chat(24), 15.0)
    assert held.itl_ms(0.99) <= 16.0
    assert held.ttft_ms(0.99) <= 130
    assert np.quantile(held.errors, 0.5) <= 0.03
    assert np.quantile(held.errors, 0.95) <= 0.08


def test_short_prompts_are_not_held_up_by_long_ones():
    short = chat(8)
    long = [(second, 32_000, 64) for second in (4.0, 9.0, 14.0)]
    alone, beside = Simulation(short, 15.0), Simulation(sorted(short + long), 15.0)
    assert beside.ttft_ms(0.99, longest=4000) < 4 * alone.ttft_ms(0.99)
    assert beside.itl_ms(0.99) <= 16.5
    assert max(beside.ttfts_s.values()) < 8.0, "and the long ones come to an end"


def test_a_target_that_no_step_keeps_to_lets_prompts_come_to_an_end():
    held = Simulation([(0.0, 500, 400), (0.1, 3000, 20)], 5.5)
    assert len(held.ttfts_s) == 2


def test_a_first_gap_is_one_step():
    run = Simulation([(0.0, 300, 400), (1.0, 600, 3)], 15.0)
    second = run.seqs[1]
    assert run.last_token_s[second] - (second.arrival_s + run.ttfts_s[second]) < 2.2 * true_step_s(StepSize(2, 1500))


# The engine


def test_gaps_are_those_that_a_caller_sees(checkpoint, monkeypatch):
    path, _ = checkpoint("gqa2")
    told: list[float | None] = []
    monkeypatch.setattr(loop, "LONGEST_PAUSE_S", math.inf)  # of a slow machine, too
    with LLM(path, device="cpu") as llm:
        monkeypatch.setattr(llm.scheduler, "step_took", lambda step, seconds, gap_s, *, launch_s: told.append(gap_s))
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        llm.generate([[1, 2, 3]], params, use_tqdm=False)
        assert told
        assert not any(told), "nobody sees single tokens"
        told.clear()
        began_s = time.perf_counter()
        llm.add_request([1, 2, 3], params)
        while not llm.is_finished():
            llm.step()
        took_s = time.perf_counter() - began_s
    gaps = [gap_s for gap_s in told if gap_s is not None]
    assert 8 <= len(gaps) <= 10, "those of twelve tokens but the first, of what was told before the end"
    assert 0 < min(gaps) <= sum(gaps) < took_s


def test_a_prompt_says_that_it_waited_for_the_target(checkpoint, monkeypatch):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(6, seed=81, longest=60)
    params = SamplingParams(temperature=0, max_tokens=12)
    with LLM(path, **SMALL_STEPS, itl_target_ms=1000) as llm:
        # As if nothing but the least that a step takes had time.
        monkeypatch.setattr(llm.scheduler.placement.decode_card.step_time, "tokens_that_fit", lambda *_: 0)
        monkeypatch.setattr(scheduler, "LEAST_TOKENS", 7)
        found, kinds = serve(llm, prompts, params, steps_ahead=2)
        assert "mixed" in kinds
        statistics = llm.metrics()["step_time"]["cpu:0"]
        assert statistics["steps"] > 3
        assert statistics["predicted_s"] > 0
        assert statistics["error_p95"] >= statistics["error_p50"] >= 0
        json.dumps(statistics)
        phases = [span.what for number in range(6) for span in llm.explain(number).spans()]
    assert any(phase.startswith("prefill of tokens 0 to 7") and "(itl_target_ms=1000)" in phase for phase in phases)
    assert found == [tiny.reference_tokens(reference, prompt, 12) for prompt in prompts]


def test_an_engine_goes_on_from_what_the_one_before_it_learned(tiny_path):
    prompts, params = tiny.random_prompts(4, seed=82), SamplingParams(temperature=0, max_tokens=8)
    with LLM(tiny_path, **SMALL_STEPS) as llm:
        serve(llm, prompts, params, steps_ahead=2)
        learned = llm.scheduler.placement.decode_card.step_time.state()
    with LLM(tiny_path, **SMALL_STEPS) as llm:
        assert llm.scheduler.placement.decode_card.step_time.state() == learned
        assert llm.metrics()["step_time"]["cpu:0"]["steps"] == 0
    with LLM(tiny_path, **{**SMALL_STEPS, "enforce_eager": True}) as llm:
        assert not llm.scheduler.placement.decode_card.step_time.has_learned


@pytest.mark.parametrize(
    "damage",
    [
        {"unit_s": -1.0},
        {"unit_s": None},
        {"coefficients": [1.0]},
        {"covariance": [[1.0]]},
        {"coefficients": [math.nan] * 50},
        "lopsided",
    ],
)
def test_a_damaged_state_is_refused(damage):
    model = StepTimeModel(COSTS)
    model.observe(StepSize(1), 0.1)
    state = model.state()
    if "coefficients" in damage and len(damage["coefficients"]) > 1:
        damage = {"coefficients": damage["coefficients"][: len(state["coefficients"])]}
    if damage == "lopsided":
        state["covariance"][0][5] += 100
        damage = {}
    other = StepTimeModel(COSTS)
    with pytest.raises((TypeError, ValueError)):
        other.restore({**state, **damage})
    assert not other.has_learned
    other.restore(model.state())
    assert other.predict(StepSize(1)) == model.predict(StepSize(1))


def test_a_card_is_not_idle_between_the_chunks_of_a_prompt():
    """Nobody decodes, and the next chunk is launched behind the one that runs."""
    alone = Simulation([(0.0, 32_000, 1)], None)
    steps_s = sum(true_step_s(step.size) for step in alone.launched)
    assert len(alone.launched) >= 8
    assert alone.ttft_ms(0.5) == pytest.approx(steps_s / MS, rel=0.03)
    assert alone.most_in_flight == 2
