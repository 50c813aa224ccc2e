"""The decode pipeline on logical lanes: its plan, its order, and that it computes what the model's forward computes."""

from __future__ import annotations

import random
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch

from nanovllm.engine.green_manager import GreenManager
from nanovllm.engine.observability.pipeline_statistics import (
    LaneTimes,
    MeanLaneTimes,
    PipelineCounters,
    lane_times,
    lines,
    statistics,
)
from nanovllm.engine.pipeline_scheduler import PipelineScheduler
from nanovllm.engine.scheduling.pipeline_plan import (
    PIECES,
    Arrangement,
    Cut,
    Lane,
    PlanStep,
    check_plan,
    draw,
    make_plan,
)
from nanovllm.kernels import AttentionMetadata, torch_reference
from nanovllm.models.qwen3 import Qwen3Config, Qwen3ForCausalLM
from nanovllm.utils.device import Device
from nanovllm.utils.loader import fill_randomly

BLOCK_SIZE, NUM_BLOCKS, NUM_LAYERS = 16, 40, 3
CPU = Device("cpu", 0)


@pytest.fixture(scope="module")
def model():
    config = Qwen3Config.from_dict(
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-6,
        }
    )
    device = torch.device("cpu")
    model = Qwen3ForCausalLM(config, torch_reference.Backend(), 256, dtype=torch.float32, device=device)
    with torch.inference_mode():
        fill_randomly(model.checkpoint_tensors(), seed=0)
    return model


def decode_step(num_rows: int, seed: int):
    """Inputs of a decode step over a pool of random KV."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    pool = torch.randn(NUM_BLOCKS, NUM_LAYERS, 2, 2, BLOCK_SIZE, 16, generator=generator)
    blocks = rng.sample(range(NUM_BLOCKS), 3 * num_rows)
    tables = torch.tensor(blocks, dtype=torch.int32).view(num_rows, 3)
    context_lens = torch.tensor([rng.randint(1, 3 * BLOCK_SIZE) for _ in range(num_rows)], dtype=torch.int32)
    positions = context_lens.long() - 1
    slots = tables[torch.arange(num_rows), positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
    metadata = AttentionMetadata(
        slot_mapping=slots,
        block_tables=tables,
        context_lens=context_lens,
        query_starts=torch.arange(num_rows + 1, dtype=torch.int32),
        max_query_len=1,
        max_context_len=256,
    )
    return torch.randint(0, 64, (num_rows,), generator=generator), positions, pool, metadata


@pytest.mark.parametrize("in_order", [True, False], ids=["in_order", "lanes"])
@pytest.mark.parametrize("cut", Cut, ids=lambda cut: cut.name)
@pytest.mark.parametrize("num_micro_batches", [1, 2, 3])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 12])
def test_it_computes_what_forward_computes(model, in_order, cut, num_micro_batches, num_rows):
    input_ids, positions, pool, metadata = decode_step(num_rows, seed=num_rows)
    pipeline = PipelineScheduler(
        model, GreenManager(CPU, None, None), num_micro_batches=num_micro_batches, cut=cut, in_order=in_order
    )
    with torch.inference_mode():
        expected_pool = pool.clone()
        expected = model(input_ids, positions, expected_pool, metadata)
        for _ in Lane:  # each of them is the eager one in turn
            hidden = pipeline.decode_token(input_ids, positions, pool, metadata)
            torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(pool, expected_pool, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", Cut, ids=lambda cut: cut.name)
def test_a_step_that_does_not_wait_is_noticed(model, monkeypatch, cut):
    input_ids, positions, pool, metadata = decode_step(6, seed=3)
    pipeline = PipelineScheduler(model, GreenManager(CPU, None, None), cut=cut)
    with torch.inference_mode():
        expected = model(input_ids, positions, pool.clone(), metadata)
        for late in (index for index, step in enumerate(make_plan(NUM_LAYERS, 2, cut)) if step.wait_for):
            plan = make_plan(NUM_LAYERS, 2, cut)
            plan[late] = replace(plan[late], wait_for=())
            with pytest.raises(AssertionError, match=f"step {late} does not wait"):
                check_plan(plan, NUM_LAYERS, 2)
            monkeypatch.setattr(pipeline, "_plan", lambda *sizes, plan=plan: plan)
            noticed = 0
            for _ in Lane:  # each of them is the eager one in turn
                try:
                    hidden = pipeline.decode_token(input_ids, positions, pool.clone(), metadata)
                    noticed += not torch.allclose(hidden, expected, rtol=1e-3, atol=1e-3)
                except (AssertionError, RuntimeError):
                    noticed += 1
            assert noticed == 1


@pytest.mark.parametrize("cut", Cut, ids=lambda cut: cut.name)
@pytest.mark.parametrize("num_micro_batches", [1, 2, 3])
def test_a_plan_runs_every_piece_once_on_its_lane(cut, num_micro_batches):
    plan = make_plan(4, num_micro_batches, cut)
    check_plan(plan, 4, num_micro_batches)
    assert sum(len(step.pieces) for step in plan) == 4 * len(PIECES) * num_micro_batches
    for step in plan:
        assert {cut.lane_of(piece) for _, piece in step.pieces} == {step.lane}
        assert all(plan[earlier].lane is not step.lane for earlier in step.wait_for)


def test_a_plan_that_is_wrong_is_refused():
    plan = make_plan(2, 2, Cut.STAGES)
    with pytest.raises(AssertionError, match="micro-batch 1 runs"):
        check_plan(plan[:-1], 2, 2)
    backwards = [replace(plan[0], wait_for=(2,)), *plan[1:]]
    with pytest.raises(AssertionError, match="step 0 waits for a later one"):
        check_plan(backwards, 2, 2)


def test_plans_can_be_read_and_drawn():
    plan = make_plan(2, 2, Cut.GEMMS)
    assert str(plan[4]) == "ffn        micro-batch 0: project_out(0), feed_forward(0), project_qkv(1) after 2"
    attention, ffn = draw(plan, num_columns=5).splitlines()
    assert attention == "attention |·····|  A0 |  B0 |  A1 |  B1 |"
    assert ffn == "ffn       |  A0 |  B0 |  A0 |  B0 |  A1 |"


def test_lanes_that_wait_for_each_other_are_noticed(model, monkeypatch):
    input_ids, positions, pool, metadata = decode_step(2, seed=4)
    pipeline = PipelineScheduler(model, GreenManager(CPU, None, None))
    stuck = [
        PlanStep(Lane.ATTENTION, ((0, "attend"),), 0, (1,)),
        PlanStep(Lane.FFN, ((0, "project_qkv"),), 0, (0,)),
    ]
    monkeypatch.setattr(pipeline, "_plan", lambda *sizes: stuck)
    with pytest.raises(AssertionError, match="each lane waits for the other"):
        pipeline.decode_token(input_ids, positions, pool, metadata)


def run_timed(model, every_layer: bool):
    input_ids, positions, pool, metadata = decode_step(6, seed=5)
    pipeline = PipelineScheduler(model, GreenManager(CPU, None, None), enable_profiling=every_layer, in_order=True)
    with torch.inference_mode():
        expected = model(input_ids, positions, pool.clone(), metadata)
        torch.testing.assert_close(pipeline.decode_token(input_ids, positions, pool, metadata), expected)
    return pipeline.clock.last


def test_profiling_times_every_step_of_the_plan(model):
    moments = run_timed(model, every_layer=True)
    assert moments.steps == tuple(make_plan(NUM_LAYERS, 2, Cut.GEMMS))
    times = moments.times(moments.moments.numpy())
    # One after another on one thread.
    assert times.attention_s > 0
    assert times.ffn_s > 0
    assert times.overlap_s == 0
    assert times.total_s >= times.attention_s + times.ffn_s


def test_without_profiling_some_layers_in_the_middle_stand_for_all(model):
    moments = run_timed(model, every_layer=False)
    # The first layer's attention waits for a step of its own, its QKV projection.
    per_lane = {lane: [step.pieces[0][0] for step in moments.steps if step.lane is lane] for lane in Lane}
    assert per_lane == {Lane.ATTENTION: [0, 0, 1, 1], Lane.FFN: [0, 0, 0, 0, 1, 1]}
    assert moments.share == 2 / NUM_LAYERS
    assert moments.moments.shape == (2, len(moments.steps))


def test_overlap_is_what_steps_of_two_lanes_have_in_common():
    lanes = [Lane.ATTENTION, Lane.ATTENTION, Lane.FFN, Lane.FFN]
    moments = np.array([[0, 10, 10, 22], [10, 20, 22, 30]]) * 1_000_000
    assert lane_times(lanes, moments) == LaneTimes(0.02, 0.02, 0.01, 0.03)
    mean = MeanLaneTimes()
    assert mean.mean() is None
    mean.add(lane_times(lanes, moments))
    mean.add(lane_times(lanes, moments, share=0.5))
    total = mean.mean()
    assert total is not None
    assert astuple(total) == pytest.approx((0.03, 0.03, 0.015, 0.045))


def test_statistics_are_printed_as_documented():
    counters = PipelineCounters(steps=2, tokens=12)
    counters.fallbacks["capture failed"] += 1
    lanes = LaneTimes(attention_s=0.002, ffn_s=0.003, overlap_s=0.001, total_s=0.004)
    result = statistics(counters, [Arrangement((48, 84), Cut.GEMMS)], lanes, sequential_s=0.0044)
    assert lines(result, "cuda:3") == [
        "[M2 Pipeline Statistics - decode card cuda:3] (attention beside FFN on two SM partitions)",
        "  Total tokens:         12",
        "  Avg attention time:   2.000 ms",
        "  Avg FFN time:         3.000 ms",
        "  Avg total time:       4.000 ms",
        "  Attention SMs:        48",
        "  FFN SMs:              84",
        "  Arranged as:          48:84 GEMMS",
        "  Attention lane idle:  2.000 ms",
        "  FFN lane idle:        1.000 ms",
        "  Overlap:              1.000 ms",
        "  Sequential time:      4.400 ms",
        "  Fallbacks:            1 x capture failed",
    ]
    unmeasured = lines(statistics(counters, [], None, sequential_s=None), "cuda:3")
    assert "  Avg total time:       not measured" in unmeasured
    assert "  Sequential time:      not measured" in unmeasured
