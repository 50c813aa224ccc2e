"""Names that other programs rely on: where they are, how they are called, and what they do."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.green_manager import GreenManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.pipeline_scheduler import PipelineScheduler
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.kernels import AttentionMetadata
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.utils.device import Device
from nanovllm.utils.green_ctx import split_device_green_ctx_by_sm_count
from tests import tiny

ROOT = Path(__file__).parent.parent
GREEDY = SamplingParams(temperature=0, max_tokens=6)
OPTIONS = {
    "max_num_batched_tokens": 16384,
    "max_num_seqs": 512,
    "max_model_len": None,
    "gpu_memory_utilization": 0.9,
    "tensor_parallel_size": 1,
    "enforce_eager": False,
    "kvcache_block_size": None,
    "num_kvcache_blocks": None,
    "device": "auto",
    "dtype": "auto",
    "load_format": "auto",
    "attention_backend": "auto",
    "enable_prefix_caching": True,
    "seed": 0,
    "enable_two_gpu_pd": False,
    "prefill_device_id": 0,
    "decode_device_id": 1,
    "kv_handoff": "auto",
    "verify_kv_handoff": False,
    "enable_decode_pipeline": False,
    "decode_pipeline": None,
    "decode_attention_sm": None,
    "decode_ffn_sm": None,
    "decode_micro_batches": 2,
    "decode_pipeline_profiling": False,
}


def parameters(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize(
    "module",
    [
        "config",
        "engine.llm_engine",
        "engine.scheduler",
        "engine.model_runner",
        "engine.block_manager",
        "engine.sequence",
        "engine.green_manager",
        "engine.pipeline_scheduler",
        "models.qwen3",
        "layers.attention",
        "layers.embed_head",
        "layers.layernorm",
        "layers.linear",
        "layers.rotary_embedding",
        "layers.sampler",
        "utils.green_ctx",
    ],
)
def test_modules_are_where_they_were(module):
    importlib.import_module(f"nanovllm.{module}")


@pytest.mark.parametrize("name", OPTIONS)
def test_options_have_their_defaults(name):
    assert getattr(EngineConfig(model="m"), name) == OPTIONS[name]


def test_signatures():
    assert parameters(LLM.__init__)[0] == "model"
    assert parameters(LLM.generate)[:3] == ["prompts", "sampling_params", "use_tqdm"]
    assert parameters(LLM.chat)[:3] == ["messages", "sampling_params", "use_tqdm"]
    assert parameters(LLMEngine.add_request)[:2] == ["prompt", "sampling_params"]
    assert {"is_decode_runner"} <= set(parameters(ModelRunner.__init__))
    assert parameters(ModelRunner.sync_kv_cache_to)[:2] == ["other", "pairs"]
    assert parameters(ModelRunner.run_decode_core)[0] == "size"
    assert parameters(GreenManager.__init__) == ["device", "attention_sm", "ffn_sm", "enable_rebalance"]
    assert parameters(PipelineScheduler.__init__)[:3] == ["model", "green_manager", "enable_profiling"]
    assert parameters(split_device_green_ctx_by_sm_count)[0].startswith("device")
    for method in ("schedule_prefill", "schedule_decode", "get_prefilled_sequences"):
        required = inspect.signature(getattr(Scheduler, method)).parameters.values()
        assert all(p.default is not p.empty for p in required if p.name != "self"), method


def test_runners_of_one_device_and_of_two(tiny_path):
    with LLM(tiny_path, device="cpu") as llm:
        assert llm.prefill_runner is llm.decode_runner
    with LLM(tiny_path, device="cpu", enable_two_gpu_pd=True, card_roles="fixed") as llm:
        assert isinstance(llm.prefill_runner, ModelRunner)
        assert not llm.prefill_runner.is_decode_runner
        assert llm.decode_runner.is_decode_runner
        assert (llm.prefill_runner.device.index, llm.decode_runner.device.index) == (0, 1)


@pytest.mark.parametrize("two_devices", [False, True])
def test_a_request_goes_through_the_scheduler_by_its_three_methods(checkpoint, two_devices):
    """A loop of one's own over scheduler, runners and transfer."""
    path, reference = checkpoint("gqa2")
    prompt = [5, 6, 7, 8] * 9
    with LLM(path, device="cpu", max_num_batched_tokens=16, **tiny.fixed_roles(two_devices)) as llm:
        scheduler = llm.scheduler
        seq = Sequence(1, prompt, GREEDY, seed=1, arrival_s=0.0, max_num_tokens=len(prompt) + 6)
        scheduler.add(seq)
        assert scheduler.schedule_decode() is None
        num_chunks = 0
        while seq.status in (SequenceStatus.WAITING, SequenceStatus.PREFILLING):
            assert scheduler.get_prefilled_sequences() == []
            step = scheduler.schedule_prefill()
            handle = llm.prefill_runner.launch(step)
            tokens = handle.collect().after_chunks.token_ids
            for chunk in step.chunks:
                if chunk.handoff:
                    llm.kv_transfer.send(chunk.handoff, handle.event).wait()
                scheduler.prefill_done(chunk)
            num_chunks += 1
        seq.token_ids.append(int(tokens[0]))
        assert num_chunks == 3
        assert scheduler.get_prefilled_sequences() == [seq]
        assert scheduler.get_prefilled_sequences() == []
        while seq.num_output_tokens < 6:
            step = scheduler.schedule_decode()
            (token,) = llm.decode_runner.launch(step).collect().after_decode.token_ids
            scheduler.decode_done(step)
            seq.token_ids.append(int(token))
            scheduler.token_appended(seq)
        assert seq.output_token_ids == tiny.reference_tokens(reference, prompt, 6)
        scheduler.finish(seq, "length")
        scheduler.check_integrity()


def test_run_decode_core_is_one_decode_step(checkpoint):
    path, reference = checkpoint("gqa2")
    with LLM(path, device="cpu") as llm:
        llm.add_request([1, 2, 3], GREEDY)
        while not (step := llm.scheduler.schedule_decode()):
            llm.step()
        runner = llm.decode_runner
        with torch.inference_mode():
            runner.decode.rows.apply(runner.decode.rows.table.changes(step.decode))
            output = runner.run_decode_core(1)
        fed = step.seqs[0].num_output_tokens
        assert output.sampled.token_ids.tolist() == tiny.reference_tokens(reference, [1, 2, 3], 6)[fed : fed + 1]
        assert output.logits.shape == (1, tiny.VOCAB_SIZE)


def test_sync_kv_cache_to_copies_blocks(tiny_path):
    with LLM(tiny_path, device="cpu", enable_two_gpu_pd=True) as llm:
        source, target = llm.prefill_runner, llm.decode_runner
        with torch.inference_mode():
            source.kv_pool[3].normal_()
        source.sync_kv_cache_to(target, [(3, 5)]).synchronize()
        assert torch.equal(target.kv_pool[5], source.kv_pool[3])


def test_statistics_of_the_pipeline(tiny_path, capsys):
    with LLM(tiny_path, device="cpu", enable_two_gpu_pd=True, enable_decode_pipeline=True) as llm:
        llm.generate([[1, 2]], GREEDY, use_tqdm=False)
        assert isinstance(llm.decode_runner.get_pipeline_statistics(), dict)
        llm.decode_runner.print_pipeline_statistics()
    assert capsys.readouterr().out


def test_green_manager_and_pipeline_scheduler(checkpoint):
    manager = GreenManager(Device("cpu", 0), 16, 16, True)
    assert manager.allocate().split == (16, 16)
    assert manager.rebalance(8, 24).split == (8, 24)
    assert manager.stats()["rebalances"] == 1
    with LLM(checkpoint("gqa2")[0], device="cpu") as llm, torch.inference_mode():
        pipeline = PipelineScheduler(llm.decode_runner.model, manager, False)
        step = decode_inputs(llm)
        expected = llm.decode_runner.model(*step)
        torch.testing.assert_close(pipeline.decode_token(*step), expected)


@pytest.mark.parametrize("level", ["layer", "model", "causal LM"])
def test_stages_of_a_layer_compose_to_the_model(checkpoint, level):
    """One layer index a call: attention of a layer, its FFN, then the next layer."""
    with LLM(checkpoint("gqa8_three_layers")[0], device="cpu") as llm, torch.inference_mode():
        model: Qwen3ForCausalLM = llm.decode_runner.model
        input_ids, positions, kv_pool, metadata = decode_inputs(llm)
        expected = model(input_ids, positions, kv_pool, metadata)
        hidden, residual = model.model.embed_tokens(input_ids), None
        for index, layer in enumerate(model.model.layers):
            if level == "layer":
                hidden, residual = layer.forward_attention_stage(
                    hidden, residual, positions, kv_pool[:, index], metadata
                )
                hidden, residual = layer.forward_ffn_stage(hidden, residual)
            else:
                owner = model if level == "causal LM" else model.model
                hidden, residual = owner.forward_attention_stage(index, hidden, residual, positions, kv_pool, metadata)
                hidden, residual = owner.forward_ffn_stage(index, hidden, residual)
        assert torch.equal(model.model.norm(hidden, residual)[0], expected)


def decode_inputs(llm):
    """Two requests of three and five tokens, each about to be fed its last one, in blocks 1 and 2."""
    lengths, block_size = torch.tensor([3, 5], dtype=torch.int32), llm.decode_runner.block_size
    llm.decode_runner.kv_pool[:4].normal_(0.0, 0.3)
    positions = lengths.long() - 1
    metadata = AttentionMetadata(
        slot_mapping=torch.tensor([1, 2]) * block_size + positions,
        block_tables=torch.tensor([[1], [2]], dtype=torch.int32),
        context_lens=lengths,
        query_starts=torch.arange(3, dtype=torch.int32),
        max_query_len=1,
        max_context_len=5,
    )
    return torch.tensor([7, 11]), positions, llm.decode_runner.kv_pool, metadata


def test_block_manager_and_sequence():
    assert parameters(BlockManager.__init__)[:2] == ["num_blocks", "block_size"]
    assert next(iter(SequenceStatus)) is SequenceStatus.WAITING


@pytest.mark.parametrize("script", ["example.py", "example_two_gpu.py", "example_m2_pipeline.py"])
def test_example_scripts_tell_what_they_take(script):
    run = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "usage" in run.stdout
