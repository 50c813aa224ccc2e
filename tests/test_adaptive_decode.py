"""The decode pipeline while it runs, on logical lanes: splits that follow the batch, calibrations kept, faults."""

from __future__ import annotations

import itertools

import pytest

from nanovllm import ConfigError, GreenContextError, SamplingParams
from nanovllm.engine.execution import decode_calibrator, decode_paths
from nanovllm.engine.green_manager import GreenManager
from nanovllm.engine.pipeline_scheduler import MicroBatch
from nanovllm.engine.scheduling import circuit_breaker
from nanovllm.engine.scheduling.calibration import Measured
from nanovllm.engine.scheduling.pipeline_plan import Arrangement, Cut
from nanovllm.engine.scheduling.rebalancer import Rebalancer
from tests import tiny
from tests.test_two_devices import assert_whole, two_devices

ONE, OTHER = Arrangement((1, 3), Cut.GEMMS), Arrangement((2, 2), Cut.REST)


@pytest.fixture
def arranged_by_length(monkeypatch):
    """On a CPU, which times nothing: lanes pay for 4 requests and more, split in one way up to 40 tokens, then in
    another; the first failure is forgiven at once."""
    monkeypatch.setattr(decode_calibrator, "CALIBRATED_BATCHES", (2, 4, 8))
    monkeypatch.setattr(decode_calibrator, "CALIBRATED_CONTEXTS", (8, 40, 72))
    monkeypatch.setattr(decode_paths, "DECIDE_EVERY", 2)
    monkeypatch.setattr(decode_calibrator.DecodeCalibrator, "_candidates", lambda *args: [ONE, OTHER])
    monkeypatch.setattr(Rebalancer, "observe", lambda *args: None)

    def measured(paths, arrangements, batches, contexts):
        assert arrangements == [ONE, OTHER]
        return [
            Measured(batch, context, 1.0 if batch >= 4 else 0.5, {ONE: 0.6 + context / 200, OTHER: 0.8})
            for batch in batches
            for context in contexts
        ]

    monkeypatch.setattr(decode_calibrator.DecodeCalibrator, "_measured", measured)


def serve_by_length(checkpoint, **options):
    """Six requests from 20 to 80 tokens; what the decode paths and statistics have become."""
    path, reference = checkpoint("gqa2")
    prompts = [prompt[:20] for prompt in tiny.random_prompts(6, seed=8, longest=60)]
    params = SamplingParams(temperature=0, max_tokens=60)
    with two_devices(path, lazy=False, enable_decode_pipeline=True, **options) as llm:
        answers = llm.generate(prompts, params, use_tqdm=False)
        paths, result = llm.decode_runner.decode.paths, llm.decode_runner.get_pipeline_statistics()
        metrics = llm.metrics()
        assert_whole(llm)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, 60)
    return paths, result, metrics


def test_the_split_follows_the_contexts_and_changes_no_token(checkpoint, arranged_by_length):
    _, result, metrics = serve_by_length(checkpoint)
    assert result["arrangements"] == [str(ONE), str(OTHER)]
    assert result["steps"] > 50
    assert metrics["rebalances"] >= 1
    assert metrics["pipeline_split"] == {"attention": 2, "ffn": 2}
    assert set(metrics["stage_s"]) == {"attention", "ffn"}
    assert result["fallbacks"] == {}


def test_an_engine_reads_what_another_measured(checkpoint, arranged_by_length, monkeypatch):
    serve_by_length(checkpoint)
    monkeypatch.delattr(decode_calibrator.DecodeCalibrator, "_measured")
    paths, result, _ = serve_by_length(checkpoint)
    assert len(paths.calibration.points) == 9
    assert result["arrangements"] == [str(ONE), str(OTHER)]
    with pytest.raises(AttributeError):  # of other circumstances nothing was kept
        serve_by_length(checkpoint, decode_micro_batches=3)


def test_a_failed_rebalance_goes_back_to_the_last_good_split(checkpoint, arranged_by_length, monkeypatch, caplog):
    rebalance = GreenManager.rebalance

    def refuse_other(manager, attention_sm, ffn_sm):
        if (attention_sm, ffn_sm) == OTHER.split:
            raise GreenContextError("injected into a rebalance")
        return rebalance(manager, attention_sm, ffn_sm)

    monkeypatch.setattr(GreenManager, "rebalance", refuse_other)
    monkeypatch.setattr(circuit_breaker, "FIRST_PAUSE_S", 1e6)
    paths, result, metrics = serve_by_length(checkpoint)
    assert result["fallbacks"] == {"rebalance failed": 1}
    assert metrics["fallbacks"] == {"rebalance failed": 1}
    assert paths.current == ONE
    assert result["steps"] > 50, "no step was plain for long"
    assert caplog.text.count("2:2 REST is left out for a while: injected into a rebalance") == 1


@pytest.mark.parametrize("num_failures", [1, 3, 1000])
def test_a_pipeline_that_breaks_is_left_out_and_comes_back(
    checkpoint, arranged_by_length, monkeypatch, caplog, num_failures
):
    """Its steps fail in the middle of a layer, after some KV was stored."""
    monkeypatch.setattr(circuit_breaker, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(circuit_breaker, "LONGEST_PAUSE_S", 0.0)
    attend, calls = MicroBatch._attend, itertools.count()

    def failing(micro_batch, layer, kv_cache, num_sms):
        attend(micro_batch, layer, kv_cache, num_sms)
        if 20 <= next(calls) < 20 + num_failures:
            raise RuntimeError("injected into a lane")

    monkeypatch.setattr(MicroBatch, "_attend", failing)
    _, result, metrics = serve_by_length(checkpoint)
    assert result["fallbacks"]["lanes failed"] >= 1
    assert metrics["recoveries"] == (0 if num_failures == 1000 else metrics["recoveries"])
    if num_failures < 1000:
        assert metrics["recoveries"] >= 1
        assert "works again" in caplog.text
        assert result["steps"] > 30


def test_paths_can_be_forced_for_a_soak(checkpoint, arranged_by_length):
    path, reference = checkpoint("gqa2")
    prompts = [prompt[:20] for prompt in tiny.random_prompts(6, seed=8, longest=60)]
    with two_devices(path, lazy=False, enable_decode_pipeline=True) as llm:
        paths = llm.decode_runner.decode.paths
        for prompt in prompts:
            llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=30))
        got, turn = {}, 0
        while not llm.is_finished():
            paths.force([None, ONE, OTHER][turn % 3])
            turn += 1
            for output in llm.step():
                got.setdefault(output.request_id, []).extend(output.new_token_ids)
        assert paths.num_rebalances > 10
        with pytest.raises(ConfigError, match="9:9 GEMMS is not ready"):
            paths.force(Arrangement((9, 9), Cut.GEMMS))
    for prompt, tokens in zip(prompts, got.values(), strict=True):
        assert tokens == tiny.reference_tokens(reference, prompt, 30)
