"""The decode pipeline on a card: disjoint SMs, lanes that run at a time, plain decode's tokens, and its speed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from nanovllm import LLM, GreenContextError, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.engine import pipeline_scheduler
from nanovllm.engine.execution import decode_calibrator
from nanovllm.engine.execution.cuda_graph import StepGraphs
from nanovllm.engine.green_manager import GreenManager
from nanovllm.engine.pipeline_scheduler import PipelineScheduler
from nanovllm.engine.scheduling.pipeline_plan import Arrangement, Cut, Lane
from nanovllm.kernels import AttentionMetadata, cuda_gemm
from nanovllm.kernels.triton_attention import Backend
from nanovllm.kernels.triton_stamps import sms_of_streams
from nanovllm.models.qwen3 import Qwen3Config, Qwen3ForCausalLM
from nanovllm.utils import green_ctx
from nanovllm.utils.device import Device
from nanovllm.utils.loader import fill_randomly
from tests import tiny

pytestmark = [pytest.mark.gpu]

GREEDY = SamplingParams(temperature=0, max_tokens=24)
TWO_GPUS = {
    "device": "cuda",
    "dtype": "float32",
    "enable_two_gpu_pd": True,
    "card_roles": "fixed",
    "kvcache_block_size": 16,
}


@pytest.fixture
def manager():
    torch.zeros(1, device="cuda:0")
    manager = GreenManager(Device("cuda", 0), 48, 84, enable_rebalance=True)
    yield manager
    manager.close()


@pytest.fixture(scope="module")
def tiny_on_disk(tmp_path_factory):
    model = tiny.make_reference(seed=1, head_dim=64)
    return tiny.save(model, tmp_path_factory.mktemp("tiny64")), model


@pytest.mark.parametrize("split", [(16, 116), (32, 100), (36, 96), (48, 84), (64, 68), (96, 36)])
def test_lanes_have_the_sms_they_were_given_and_share_none(manager, split):
    streams = list(manager.allocate(split).streams.values())
    for captured in (False, True):
        attention, ffn = sms_of_streams(streams, captured=captured)
        assert not attention & ffn
        assert -1 not in attention | ffn
        assert (len(attention), len(ffn)) == split


@pytest.mark.whole_card
def test_a_thousand_rebalances_leak_nothing(manager):
    free = []
    for turn in range(1000):
        manager.rebalance(*[(40, 92), (48, 84), (64, 68)][turn % 3])
        if turn % 100 == 99:
            free.append(torch.cuda.mem_get_info(0)[0])
    assert free == free[:1] * 10
    assert manager.stats()["splits_held"] == 3


def test_what_cannot_be_granted_is_an_error():
    torch.zeros(1, device="cuda:0")
    with pytest.raises(GreenContextError, match="are left"):
        green_ctx.split_device_green_ctx_by_sm_count(0, [100, 100])
    with pytest.raises(GreenContextError, match="grants 48 and 84"):
        GreenManager(Device("cuda", 0), 44, 84).allocate()


@pytest.fixture(scope="module")
def model():
    """Small, of sizes that the GEMMs for lanes take."""
    config = {
        "vocab_size": 512,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 1024,
    }
    device = torch.device("cuda", 0)
    model = Qwen3ForCausalLM(Qwen3Config.from_dict(config), Backend(), 1024, dtype=torch.bfloat16, device=device)
    with torch.inference_mode():
        fill_randomly(model.checkpoint_tensors(), seed=0)
    return model


def decode_step(num_rows):
    """A decode step of requests of 1 to 192 tokens, over a pool of random KV."""
    generator = torch.Generator("cuda:0").manual_seed(num_rows)
    where = {"generator": generator, "device": "cuda:0"}
    pool = torch.randn(3 * num_rows, 4, 2, 2, 64, 128, **where).bfloat16()
    tables = torch.randperm(3 * num_rows, **where).int().view(num_rows, 3)
    lengths = torch.randint(1, 193, (num_rows,), **where)
    positions = lengths - 1
    slots = tables.gather(1, positions[:, None] // 64)[:, 0].long() * 64 + positions % 64
    metadata = AttentionMetadata(
        slot_mapping=slots,
        block_tables=tables,
        context_lens=lengths.int(),
        query_starts=torch.arange(num_rows + 1, dtype=torch.int32, device="cuda:0"),
        max_query_len=1,
        max_context_len=192,
    )
    return torch.randint(0, 512, (num_rows,), **where), positions, pool, metadata


@pytest.mark.parametrize("cut", Cut, ids=lambda cut: cut.name)
@pytest.mark.parametrize("num_rows", [1, 7, 300, 512])
def test_lanes_compute_what_is_computed_in_order(model, manager, cut, num_rows):
    """Bit for bit: eagerly and in many replays of a graph, in which kernels start while others end."""
    step, arrangement = decode_step(num_rows), Arrangement((32, 100), cut)
    stream = torch.cuda.Stream(0)
    with torch.inference_mode(), torch.cuda.stream(stream):
        expected = PipelineScheduler(model, manager, in_order=True).decode_token(*step, arrangement)
        plain = model(*step)
        pipeline = PipelineScheduler(model, manager)
        assert torch.equal(pipeline.decode_token(*step, arrangement), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            hidden = pipeline.decode_token(*step, arrangement)
        for _ in range(100):
            hidden.zero_()
            graph.replay()
            assert torch.equal(hidden, expected)
    torch.testing.assert_close(expected.float(), plain.float(), rtol=0.05, atol=0.1)


GEMMS = [(512, 4096, 4096), (256, 6144, 4096), (384, 1024, 3072), (640, 4096, 1024), (130, 1008, 520), (1024, 512, 72)]


@pytest.mark.parametrize("split", [(32, 100), (28, 104), (96, 36)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gemms_of_a_lane_are_right(manager, split, dtype):
    num_sms = split[1]
    generator = torch.Generator("cuda:0").manual_seed(1)
    stream = manager.allocate(split).streams[Lane.FFN]
    with torch.cuda.stream(stream):
        for num_tokens, num_outputs, num_inputs in GEMMS:
            x = torch.randn(num_tokens, num_inputs, generator=generator, device="cuda:0").to(dtype)
            weight = torch.randn(num_outputs, num_inputs, generator=generator, device="cuda:0") * num_inputs**-0.5
            weight = weight.to(dtype)
            assert cuda_gemm.can_serve(x, weight)
            expected = x.float() @ weight.float().T
            got = cuda_gemm.shared_linear(x, weight, num_sms)
            tolerance = {"rtol": 1e-2, "atol": 1e-2}
            torch.testing.assert_close(got.float(), expected, **tolerance)
            assert torch.equal(got, cuda_gemm.shared_linear(x, weight, num_sms))
            gated = cuda_gemm.shared_linear(x, weight, num_sms, is_gated=True)
            gate, up = expected.to(dtype).chunk(2, dim=1)
            torch.testing.assert_close(
                gated.float(), (torch.nn.functional.silu(gate) * up).float(), rtol=3e-2, atol=3e-2
            )
    stream.synchronize()


def test_a_gemm_that_no_tile_fits_is_left_to_others():
    x = torch.zeros(256, 64, device="cuda:0", dtype=torch.bfloat16)
    weight = torch.zeros(64, 64, device="cuda:0", dtype=torch.bfloat16)
    assert cuda_gemm.can_serve(x, weight)
    assert not cuda_gemm.can_serve(x, weight.float())
    assert not cuda_gemm.can_serve(x[:64], weight)
    assert not cuda_gemm.can_serve(x.float(), weight)
    assert not cuda_gemm.can_serve(x[:, :60], weight)
    assert not cuda_gemm.can_serve(x, weight[:40])


@pytest.mark.two_gpu
@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("num_micro_batches", [2, 3])
def test_float32_tokens_equal_transformers(tiny_on_disk, num_micro_batches, eager):
    path, reference = tiny_on_disk
    prompts = tiny.random_prompts(7, seed=1) + tiny.random_prompts(4, seed=2, longest=40, shared=48)
    lengths = [1 + 5 * (place % 5) for place in range(len(prompts))]  # they end mid-way
    params = [SamplingParams(temperature=0, max_tokens=length) for length in lengths]
    options = {"num_kvcache_blocks": 2000, "decode_micro_batches": num_micro_batches, "enforce_eager": eager}
    with LLM(path, **TWO_GPUS, **options, enable_decode_pipeline=True, decode_pipeline="static") as llm:
        answers = llm.generate(prompts, params, use_tqdm=False)
        statistics = llm.decode_runner.get_pipeline_statistics()
        alone = llm.generate(prompts[:1], GREEDY, use_tqdm=False)[0]
    assert statistics["fallbacks"] == {}
    assert statistics["steps"] > 0
    assert alone["token_ids"] == tiny.reference_tokens(reference, prompts[0], 24)
    for prompt, answer, length in zip(prompts, answers, lengths, strict=True):
        assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, length)


@pytest.mark.whole_card
@pytest.mark.two_gpu
def test_tokens_are_those_of_plain_decode_and_speed_is_reported(tiny_on_disk, capsys):
    """Of a tiny model, which the pipeline does not make faster: benchmarks/decode_pipeline.py is for real shapes."""
    path, _ = tiny_on_disk
    prompts = tiny.random_prompts(64, seed=5, longest=60)
    answers, seconds = {}, {}
    for mode in ("disabled", "static"):
        options = {"num_kvcache_blocks": 4000, "enable_decode_pipeline": True, "decode_pipeline": mode}
        with LLM(path, **TWO_GPUS, **options) as llm:
            llm.generate(prompts, GREEDY, use_tqdm=False)
            started = time.perf_counter()
            answers[mode] = [answer["token_ids"] for answer in llm.generate(prompts, GREEDY, use_tqdm=False)]
            seconds[mode] = time.perf_counter() - started
    assert answers["static"] == answers["disabled"]
    num_tokens = sum(map(len, answers["static"]))
    with capsys.disabled():
        print(*(f"\n{mode}: {num_tokens / s:.0f} tok/s" for mode, s in seconds.items()))  # noqa: T201 - the report


@pytest.mark.whole_card
@pytest.mark.two_gpu
def test_demo_answers_in_bfloat16_equal_the_written_ones():
    pairs = json.loads((Path(DEMO_MODEL_PATH) / "questions.json").read_text(encoding="utf-8"))
    conversations = [[{"role": "user", "content": pair["question"]}] for pair in pairs]
    options = {"gpu_memory_utilization": 0.2, "enable_decode_pipeline": True, "decode_pipeline": "static"}
    with LLM(DEMO_MODEL_PATH, device="cuda", enable_two_gpu_pd=True, **options) as llm:
        answers = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=512), use_tqdm=False)
        assert llm.decode_runner.get_pipeline_statistics()["fallbacks"] == {}
    wrong = [pair for pair, answer in zip(pairs, answers, strict=True) if answer["text"] != pair["answer"]]
    assert not wrong


@pytest.mark.whole_card
@pytest.mark.two_gpu
def test_lanes_overlap_and_one_stream_does_not(tiny_on_disk, monkeypatch):
    path, _ = tiny_on_disk
    prompts = tiny.random_prompts(64, seed=3, longest=60)
    options = {"num_kvcache_blocks": 4000, "enable_decode_pipeline": True, "decode_pipeline": "static"}
    overlaps = {}
    for in_order in (False, True):
        if in_order:
            # Before the graphs are captured.
            monkeypatch.setattr(
                "nanovllm.engine.pipeline_scheduler._run_on_streams",
                lambda plan, streams, run: [run(index) for index in range(len(plan))],
            )
        with LLM(path, **TWO_GPUS, **options, decode_pipeline_profiling=True) as llm:
            llm.generate(prompts, GREEDY, use_tqdm=False)
            overlaps[in_order] = llm.decode_runner.get_pipeline_statistics()["avg_overlap_ms"]
    assert overlaps[True] == 0
    assert overlaps[False] > 0


@pytest.mark.whole_card
@pytest.mark.two_gpu
def test_auto_calibrates_and_answers_right(tiny_on_disk, monkeypatch):
    monkeypatch.setattr(decode_calibrator, "CALIBRATED_BATCHES", (64, 128))
    path, reference = tiny_on_disk
    prompts = tiny.random_prompts(70, seed=3, longest=60)
    with LLM(path, **TWO_GPUS, num_kvcache_blocks=4000, max_num_seqs=128, enable_decode_pipeline=True) as llm:
        assert {point.batch for point in llm.decode_runner.decode.paths.calibration.points} == {64, 128}
        assert all(point.pipelined_s for point in llm.decode_runner.decode.paths.calibration.points)
        answers = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert llm.decode_runner.get_pipeline_statistics()["fallbacks"] == {}
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, 24)


@pytest.mark.two_gpu
def test_a_failed_capture_falls_back_to_plain_graphs(tiny_on_disk, monkeypatch):
    path, reference = tiny_on_disk
    run, prompts = pipeline_scheduler.MicroBatch.run, tiny.random_prompts(5, seed=4)

    def failing(micro_batch, step, layers, kv_pool, num_sms):
        if torch.cuda.is_current_stream_capturing() and step.pieces[0] == (1, "attend"):
            raise RuntimeError("injected into a capture")
        run(micro_batch, step, layers, kv_pool, num_sms)

    monkeypatch.setattr(pipeline_scheduler.MicroBatch, "run", failing)
    options = {"num_kvcache_blocks": 2000, "enable_decode_pipeline": True, "decode_pipeline": "static"}
    with LLM(path, **TWO_GPUS, **options) as llm:
        assert list(llm.decode_runner.decode.paths.steps) == [None]
        assert isinstance(llm.decode_runner.decode.paths.steps[None], StepGraphs)
        answers = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert sum(llm.decode_runner.get_pipeline_statistics()["fallbacks"].values()) == 1
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, 24)
