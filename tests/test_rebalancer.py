"""Which arrangement decode steps have: calibrations, outages, and the rebalancer in simulations."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from nanovllm.engine.scheduling import circuit_breaker
from nanovllm.engine.scheduling.calibration import (
    Calibration,
    Measured,
    keep_calibration,
    load_calibration,
)
from nanovllm.engine.scheduling.circuit_breaker import CircuitBreaker
from nanovllm.engine.scheduling.measurement_cache import cache_file
from nanovllm.engine.scheduling.pipeline_plan import Arrangement, Cut
from nanovllm.engine.scheduling.rebalancer import FIRST_TRIALS, TRIAL_EVERY, Rebalancer, StepTimes

FEW, MANY = Arrangement((48, 84), Cut.GEMMS), Arrangement((64, 68), Cut.REST)
POINTS = [
    Measured(256, 512, 1.0, {FEW: 1.2, MANY: 1.3}),
    Measured(256, 1024, 1.4, {FEW: 1.3, MANY: 1.5}),
    Measured(512, 512, 1.8, {FEW: 1.8, MANY: 1.7}),
    Measured(512, 1024, 2.6, {FEW: 2.4, MANY: 2.0}),
]
ABOUT = {
    "gpu": "NVIDIA H200",
    "driver": "580.1",
    "batches": [256, 512],
    "contexts": [512, 1024],
    "arrangements": [str(FEW), str(MANY)],
}
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def test_between_points_time_is_linear_in_requests_and_tokens():
    calibration = Calibration(POINTS)
    assert calibration.seconds(None, 256, 512.0) == 1.0
    assert calibration.seconds(None, 256, 768.0) == pytest.approx(1.2)
    assert calibration.seconds(MANY, 384, 768.0) == pytest.approx((1.3 + 1.5 + 1.7 + 2.0) / 4)
    assert calibration.seconds(None, 512, 2048.0) == pytest.approx(1.8 + 0.8 * 3)
    assert calibration.seconds(None, 1024, 512.0) == pytest.approx(1.0 + 0.8 * 3)
    assert calibration.seconds(None, 200, 100.0) == 1.0
    assert calibration.seconds(None, 128, 512.0) is None
    assert Calibration().seconds(None, 512, 512.0) is None
    assert Calibration(POINTS[:1]).seconds(FEW, 400, 9000.0) == 1.2


def test_what_was_best_nearby_is_made_ready():
    calibration = Calibration(POINTS)
    assert calibration.best_for(255) == []
    assert calibration.best_for(256) == [FEW]
    assert calibration.best_for(300) == [FEW, MANY]
    assert calibration.best_for(4096) == [FEW, MANY]
    assert calibration.best_of_all() == FEW
    assert str(POINTS[2]) == (
        "decode of 512 requests of 512 tokens: 64:68 REST; ms per step: plain 1800.00, 48:84 GEMMS 1800.00, "
        "64:68 REST 1700.00"
    )
    assert Measured(256, 1, 1.0, {FEW: 0.995}).best() is None
    with pytest.raises(AssertionError, match="every batch is measured with every context"):
        Calibration(POINTS[:3])


def test_arrangements_are_read_as_they_are_written():
    for arrangement in (FEW, MANY):
        assert Arrangement.parse(str(arrangement)) == arrangement


def test_a_calibration_is_kept_for_the_same_circumstances_only():
    assert load_calibration(ABOUT) is None
    keep_calibration(ABOUT, Calibration(POINTS))
    kept = load_calibration(ABOUT)
    assert kept is not None
    assert kept.points == POINTS
    assert cache_file(ABOUT).name.startswith("nvidia-h200-")
    for changed in ({"driver": "580.2"}, {"gpu": "NVIDIA H100"}):
        assert load_calibration(ABOUT | changed) is None
    assert [path.suffix for path in cache_file(ABOUT).parent.iterdir()] == [".json"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda kept: "half a file {",
        lambda kept: json.dumps([]),
        lambda kept: json.dumps(kept | {"points": kept["points"][:3]}),
        lambda kept: json.dumps(kept | {"points": [{"batch": "many"}]}),
        lambda kept: json.dumps({"about": kept["about"]}),
        lambda kept: json.dumps(kept | {"points": []}),
        lambda kept: json.dumps(kept).replace("1.2", "NaN"),
        lambda kept: json.dumps(kept).replace("1.2", "-1.2"),
        lambda kept: json.dumps(kept).replace('"batch": 512', '"batch": Infinity'),
        lambda kept: json.dumps(kept).replace(': 1.2, "', ': 1.2, "other '),
        lambda kept: "[" * 100_000,
    ],
    ids=["cut", "list", "hole", "words", "no points", "empty", "nan", "negative", "infinite", "renamed", "deep"],
)
def test_a_spoilt_file_is_measured_anew(spoil, caplog):
    keep_calibration(ABOUT, Calibration(POINTS))
    path = cache_file(ABOUT)
    path.write_text(spoil(json.loads(path.read_text())))
    assert load_calibration(ABOUT) is None
    assert "cannot be used" in caplog.text


def test_a_folder_that_cannot_be_written_is_said(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_calibration(ABOUT, Calibration(POINTS))
    assert "cannot be kept" in caplog.text
    assert load_calibration(ABOUT) is None


def test_a_machine_without_a_home_measures_each_time(monkeypatch, caplog):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    assert load_calibration(ABOUT) is None
    keep_calibration(ABOUT, Calibration(POINTS))
    assert "the calibration cannot be kept (Could not determine home directory.)" in caplog.text


def test_an_outage_ends_with_a_trial_that_works():
    path = CircuitBreaker()
    assert path.allows_trial(0.0)
    assert path.failed(1.0)
    assert not path.failed(2.0), "what was begun before tells nothing new"
    assert not path.allows_trial(1.0 + circuit_breaker.FIRST_PAUSE_S / 2)
    assert path.allows_trial(1.0 + circuit_breaker.FIRST_PAUSE_S)
    path.begin_trial(1.0 + circuit_breaker.FIRST_PAUSE_S)
    assert not path.allows_trial(1.5 + circuit_breaker.FIRST_PAUSE_S), "one trial at a time"
    assert not path.failed(20.0), "it was out already"
    assert not path.allows_trial(20.0 + 1.5 * circuit_breaker.FIRST_PAUSE_S), "the second pause is twice as long"
    assert path.allows_trial(20.0 + 2 * circuit_breaker.FIRST_PAUSE_S)
    assert path.worked()
    assert not path.worked()
    assert path.allows_trial(20.0)
    assert path.failed(100.0)
    assert path.allows_trial(100.0 + circuit_breaker.FIRST_PAUSE_S), "pauses begin anew"


def test_an_outage_tolerates_failures_between_successes():
    card = CircuitBreaker(num_tolerated=2)
    for _ in range(3):
        assert not card.failed(0.0)
        assert not card.failed(0.0)
        assert not card.worked()
    assert not card.failed(0.0)
    assert not card.failed(0.0)
    assert card.failed(0.0)
    assert card.is_open


# The rebalancer


def ready_for(calibration: Calibration, *sizes: int) -> dict[int, list[Arrangement]]:
    return {size: calibration.best_for(size) for size in sizes}


def simulate(rebalancer: Rebalancer, contexts: list[float], batch: int, true_s, noise: float = 0.0, lanes=None):
    """A step for each context; seconds in total, what ran, and how often something else was chosen."""
    rng = random.Random(0)
    total_s, ran, changes, chosen = 0.0, [], 0, None
    for turn, context in enumerate(contexts):
        if turn % 8 == 0:
            before, chosen = chosen, rebalancer.choose(batch, context, now=float(turn))
            changes += turn > 0 and chosen != before
        path = rebalancer.trial(batch, context) if turn % 8 == 0 else chosen
        step_s = true_s(path, batch, context)
        total_s += step_s
        ran.append(path)
        if turn % 8 == 0:
            busy = (None, None) if lanes is None or path is None else lanes(path, batch, context)
            rebalancer.observe(batch, context, path, StepTimes(step_s * rng.gauss(1.0, noise), *busy))
    return total_s, ran, changes


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_a_growing_context_changes_what_runs_once(noise):
    calibration = Calibration(POINTS)
    rebalancer = Rebalancer(calibration, ready_for(calibration, 256))
    contexts = [512 + 512 * step / 4000 for step in range(4000)]
    true_s = calibration.seconds
    total_s, ran, changes = simulate(rebalancer, contexts, 256, true_s, noise)
    assert ran[0] is None
    assert ran[-1] == FEW
    assert 1 <= changes <= 3
    best_static = min(sum(true_s(path, 256, context) for context in contexts) for path in (None, FEW, MANY))
    best = sum(min(true_s(path, 256, context) for path in (None, FEW)) for context in contexts)
    assert total_s < best_static
    assert total_s < 1.005 * best


def test_a_calibration_of_another_card_is_found_out():
    calibration = Calibration(POINTS)
    rebalancer = Rebalancer(calibration, ready_for(calibration, 512))

    def true_s(path, batch, context):  # plain decode is faster than calibrated, lanes are slower
        return calibration.seconds(path, batch, context) * (0.91 if path is None else 1.04)

    contexts = [560.0] * 4000
    total_s, ran, _ = simulate(rebalancer, contexts, 512, true_s, noise=0.01)
    assert ran[0] == MANY
    assert ran[-1] is None
    assert total_s < 1.01 * len(contexts) * true_s(None, 512, 560.0)


def test_equal_paths_are_not_changed_for_each_other():
    calibration = Calibration([Measured(256, 512, 1.0, {FEW: 0.98, MANY: 1.5})])
    rebalancer = Rebalancer(calibration, ready_for(calibration, 256))
    _, ran, changes = simulate(rebalancer, [512.0] * 8000, 256, lambda path, *_: 0.985 if path else 0.987, noise=0.01)
    assert changes <= 2
    assert {None, FEW} == set(ran)


def test_trials_cost_little_and_follow_the_busier_lane():
    less, more = Arrangement((32, 100), Cut.GEMMS), Arrangement((64, 68), Cut.GEMMS)
    times = {less: 1.04, FEW: 1.0, more: 1.05}
    calibration = Calibration([Measured(256, 512, 1.2, times)])
    rebalancer = Rebalancer(calibration, {256: [less, FEW, more]})
    true_s = lambda path, *_: 1.2 if path is None else times[path]  # noqa: E731 - as short as it is
    busy = lambda path, *_: (0.9, 0.7)  # noqa: E731 - the attention lane is busy for longer
    total_s, ran, changes = simulate(rebalancer, [512.0] * 8000, 256, true_s, lanes=busy)
    assert changes == 0
    tried = [path for path in ran if path != FEW]
    # What takes SMs from attention is not tried but before anything is known, and what is 20 % slower never.
    assert set(tried[1:]) == {more}
    assert len(tried) == pytest.approx(8000 / 8 / TRIAL_EVERY, abs=2 + FIRST_TRIALS)
    assert total_s < 1.001 * 8000


def test_what_fails_is_left_out_and_comes_back():
    calibration = Calibration(POINTS)
    rebalancer = Rebalancer(calibration, ready_for(calibration, 512))
    assert rebalancer.choose(512, 1000.0, now=0.0) == MANY
    assert rebalancer.failed(MANY, now=1.0)
    assert rebalancer.current is None
    assert rebalancer.choose(512, 1000.0, now=1.5) == FEW
    assert rebalancer.failed(FEW, now=2.0)
    assert rebalancer.choose(512, 1000.0, now=2.5) is None
    assert rebalancer.choose(512, 1000.0, now=1.0 + circuit_breaker.FIRST_PAUSE_S) == MANY
    assert rebalancer.worked(MANY)


def test_what_is_always_to_be_chosen_is_unless_it_fails():
    rebalancer = Rebalancer(Calibration(), {4: [FEW]}, always=FEW)
    for _ in range(3 * TRIAL_EVERY):
        assert rebalancer.choose(4, 30.0, now=0.0) == FEW
        assert rebalancer.trial(4, 30.0) == FEW
        rebalancer.observe(4, 30.0, FEW, StepTimes(1.0))
    rebalancer.failed(FEW, now=0.0)
    assert rebalancer.choose(4, 30.0, now=1.0) is None
    assert rebalancer.choose(4, 30.0, now=circuit_breaker.FIRST_PAUSE_S) == FEW


def test_batches_that_were_not_calibrated_are_plain():
    calibration = Calibration(POINTS)
    rebalancer = Rebalancer(calibration, ready_for(calibration, 100, 512))
    assert rebalancer.choose(512, 1000.0, now=0.0) == MANY
    assert rebalancer.choose(100, 1000.0, now=0.0) is None
    assert rebalancer.trial(100, 1000.0) is None
    rebalancer.observe(100, 1000.0, None, StepTimes(1.0))


class Recorded:
    """A card as decode_pipeline.py has recorded it: steps and lanes of every arrangement at every point."""

    def __init__(self, name: str) -> None:
        rows = json.loads((RESULTS / f"decode_pipeline_adaptive_{name}.json").read_text())["rows"]
        # The grid has to be whole: a batch that did not fit with some contexts is left out.
        num_contexts = len({row["context"] for row in rows})
        batches = [row["batch"] for row in rows]
        self.lanes, points = {}, []
        for row in rows:
            if batches.count(row["batch"]) < num_contexts:
                continue
            times = {}
            for point in row["points"]:
                arrangement = Arrangement(tuple(point["split"]), Cut[point["cut"]])
                times[arrangement] = point["s"]
                self.lanes[arrangement, row["batch"], row["context"]] = (point["attention_s"], point["ffn_s"])
            points.append(Measured(row["batch"], row["context"], row["plain_s"], times))
        self.calibration = Calibration(points)
        self.arrangements = list(points[0].pipelined_s)

    def busy(self, path, batch, context):
        return self.lanes[path, batch, context]

    def misremembered(self, error: float, seed: int) -> Calibration:
        rng = random.Random(seed)
        return Calibration(
            [
                Measured(
                    point.batch,
                    point.context,
                    point.plain_s * rng.gauss(1.0, error),
                    {path: seconds * rng.gauss(1.0, error) for path, seconds in point.pipelined_s.items()},
                )
                for point in self.calibration.points
            ]
        )


@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen3-8b"])
@pytest.mark.parametrize(
    ("error", "num_steps", "most_loss", "mean_loss"),
    [(0.0, 200, 0.01, 0.003), (0.02, 1000, 0.01, 0.002), (0.05, 1000, 0.03, 0.005), (0.05, 8000, 0.02, 0.002)],
)
def test_recorded_cards_are_served_by_what_is_best_or_soon_is(name, error, num_steps, most_loss, mean_loss):
    """With a calibration that is right, or of a card that differs by some percent in every way: what is lost to the
    best way, while it is found out and after."""
    card = Recorded(name)
    losses = []
    for point in card.calibration.points:
        best_s = min(point.plain_s, *point.pipelined_s.values())
        for seed in range(6):
            rebalancer = Rebalancer(card.misremembered(error, seed), {point.batch: card.arrangements})
            total_s, _, changes = simulate(
                rebalancer,
                [float(point.context)] * num_steps,
                point.batch,
                lambda path, batch, context: card.calibration.seconds(path, batch, context),
                noise=0.01,
                lanes=lambda path, batch, context: card.busy(path, batch, int(context)),
            )
            losses.append(total_s / num_steps / best_s - 1)
            assert changes <= 8
    assert max(losses) < most_loss
    assert sum(losses) / len(losses) < mean_loss
