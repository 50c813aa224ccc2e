"""How a runner captures and replays its graphs, emulated on a CPU: a replay spoils earlier outputs."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.engine.execution import cuda_graph, decode_paths, mixed_executor, prefill_executor, step_handle
from nanovllm.engine.execution.cuda_graph import bucket_for
from nanovllm.engine.execution.runner_spec import RunnerSpec
from tests import tiny
from tests.test_engine import drain, tokens_of
from tests.test_mixed_step import SMALL_STEPS, serve
from tests.test_prompt_logprobs import assert_reported

GREEDY = SamplingParams(temperature=0, max_tokens=20)
FILTERED = SamplingParams(temperature=0, max_tokens=20, min_tokens=1, top_k=5)


class EmulatedGraphs:
    """`StepGraphs` as far as its callers can tell: runs each size once, then replays into the tensors of that run.

    A replay leaves nothing of use in the outputs of the other graphs of its pool: they may share memory.
    """

    of_pool: ClassVar[dict[object, list[EmulatedGraphs]]] = {}

    def __init__(self, what, step, sizes, pool, *, prepare=lambda size: None, warm_all=False):
        assert pool is not None, "graphs have a pool"
        self.step, self.sizes, self.num_replays = step, sizes, 0
        self.outputs = {}
        for size in reversed(sizes):
            prepare(size)
            self.outputs[size] = step(size)
        self.of_pool.setdefault(pool, []).append(self)

    def size_for(self, size):
        return bucket_for(self.sizes, size)

    def replay(self, size):
        self.num_replays += 1
        for graphs in self.of_pool[self.pool]:
            for output in filter(None, graphs.outputs.values()):
                output.sampled.token_ids.fill_(-5)
        found = self.step(size)
        output = self.outputs[size]
        if output is None:
            return None
        output.sampled.token_ids.copy_(found.sampled.token_ids)
        return dataclasses.replace(output, logits=found.logits, lane_moments=found.lane_moments)

    @property
    def pool(self):
        return next(pool for pool, members in self.of_pool.items() if self in members)


@pytest.fixture
def emulated(monkeypatch):
    """CPU runners that capture graphs; tokens leave a step as soon as it is launched, as copies to the host do."""
    copy = step_handle._to_host

    def to_host(sampled, device):
        fields = {field.name: getattr(sampled, field.name) for field in dataclasses.fields(sampled)}
        cloned = {name: None if tensor is None else tensor.clone() for name, tensor in fields.items()}
        return copy(dataclasses.replace(sampled, **cloned), device)

    monkeypatch.setattr(EmulatedGraphs, "of_pool", {})
    monkeypatch.setattr(step_handle, "_to_host", to_host)
    monkeypatch.setattr(RunnerSpec, "uses_graphs", lambda spec, device: True)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    for module in (cuda_graph, decode_paths, mixed_executor, prefill_executor):
        monkeypatch.setattr(module, "StepGraphs", EmulatedGraphs)


@pytest.mark.parametrize("two_devices", [False, True])
def test_graphs_give_the_tokens_of_eager_steps(checkpoint, emulated, monkeypatch, two_devices):
    """Prompts from graphs and, where a step is larger than the largest of them, without."""
    monkeypatch.setattr(cuda_graph, "MAX_PREFILL_GRAPH_TOKENS", 110)
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(8, seed=71, longest=60) + tiny.random_prompts(4, seed=72, longest=30, shared=48)
    options = {"max_num_batched_tokens": 200, "prefill_chunk_tokens": 48, **tiny.fixed_roles(two_devices)}
    with LLM(path, device="cpu", max_num_seqs=6, **options) as llm:
        prefill, sizes = llm.prefill_runner.prefill, []
        run = prefill._run
        monkeypatch.setattr(prefill, "_run", lambda size, num, **how: (sizes.append(size), run(size, num, **how))[1])
        ids = [llm.add_request(prompt, GREEDY if i % 3 else FILTERED) for i, prompt in enumerate(prompts)]
        outputs = drain(llm, steps_overlap=True)
        assert any(size > 110 for size in sizes)
        prompts_graphs = prefill.graphs if two_devices else llm.decode_runner.mixed._pass_graphs
        graphs = [prompts_graphs, llm.decode_runner.decode.paths.steps[None]]
        assert all(isinstance(one, EmulatedGraphs) and one.num_replays for one in graphs)
        assert graphs[1].sizes == [1, 2, 4, 6]
        assert len(EmulatedGraphs.of_pool) == (2 if two_devices else 1), "a device's plain graphs share memory"
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert tokens_of(outputs[request_id]) == tiny.reference_tokens(reference, prompt, 20)


@pytest.mark.parametrize("steps_ahead", [1, 2])
def test_graphs_of_mixed_steps_give_the_tokens_of_eager_steps(checkpoint, emulated, monkeypatch, steps_ahead):
    """In graphs and, where a step is larger than the largest of them, without."""
    monkeypatch.setattr(cuda_graph, "MAX_MIXED_GRAPH_TOKENS", 30)
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(8, seed=73, longest=60) + tiny.random_prompts(4, seed=74, longest=30, shared=48)
    params = [GREEDY if index % 3 else FILTERED for index in range(12)]
    with LLM(path, **{**SMALL_STEPS, "prefill_chunk_tokens": 32}, max_num_seqs=6) as llm:
        mixed, sizes = llm.decode_runner.mixed, []
        run_pass = mixed._run_pass
        monkeypatch.setattr(
            mixed,
            "_run_pass",
            lambda size, rows, **how: (sizes.append((size, rows)), run_pass(size, rows, **how))[1],
        )
        found, kinds = serve(llm, prompts, params, steps_ahead=steps_ahead)
        assert "mixed" in kinds
        assert mixed._pass_graphs.sizes == [16, 30]
        assert mixed._pass_graphs.num_replays
        assert mixed._sampling_graphs.num_replays == kinds.count("mixed")
        assert any(size > 30 and most_rows < 6 for size, most_rows in sizes), "eager, of as many rows as there are"
        assert len(EmulatedGraphs.of_pool) == 1
    assert found == [tiny.reference_tokens(reference, prompt, 20) for prompt in prompts]


@pytest.mark.parametrize("two_devices", [False, True])
def test_prompts_are_reported_beside_graphs(checkpoint, emulated, two_devices):
    """Their steps run without one; the others, and sampling, go on as they were captured."""
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(10, seed=75, longest=60)
    params = [dataclasses.replace(GREEDY, prompt_logprobs=None if index % 3 else 2) for index in range(10)]
    with LLM(path, **SMALL_STEPS, enable_two_gpu_pd=two_devices, max_num_seqs=4) as llm:
        ids = [llm.add_request(*pair) for pair in zip(prompts, params, strict=True)]
        outputs = drain(llm, steps_overlap=two_devices)
        mixed = llm.decode_runner.mixed
        graphs = [llm.prefill_runner.prefill.graphs] if two_devices else [mixed._pass_graphs, mixed._sampling_graphs]
        assert all(one.num_replays for one in graphs)
    for index, (request_id, prompt) in enumerate(zip(ids, prompts, strict=True)):
        assert tokens_of(outputs[request_id]) == tiny.reference_tokens(reference, prompt, 20)
        if index % 3 == 0:
            assert_reported(outputs[request_id][0].prompt_logprobs, prompt, reference)


@pytest.mark.parametrize("two_devices", [False, True])
def test_all_graphs_of_a_device_write_their_logits_to_one_buffer(tiny_path, emulated, two_devices):
    with LLM(tiny_path, device="cpu", enable_two_gpu_pd=two_devices, max_num_seqs=6) as llm:
        for runner in (llm.prefill_runner, llm.decode_runner):
            graphs = [runner.prefill.graphs]
            if runner is llm.decode_runner:
                graphs += [runner.decode.paths.steps[None], runner.mixed._sampling_graphs]
            buffers = {output.logits.data_ptr() for one in graphs for output in one.outputs.values()}
            assert len(buffers) == 1


def test_a_closed_engine_holds_no_graphs(tiny_path, emulated):
    with LLM(tiny_path, device="cpu", max_num_seqs=4) as llm:
        llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)
        runner = llm.decode_runner
    assert runner.decode.paths.steps == {}
    assert not hasattr(runner, "prefill")
    assert not hasattr(runner, "kv_pool")
    assert llm.decode_runner.get_pipeline_statistics()
