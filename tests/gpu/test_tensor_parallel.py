"""One model on two cards: sums by peer stores and NCCL, in CUDA graphs too, transformers' tokens, a rank that dies."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nanovllm import LLM, ConfigError, SamplingParams, WorkerError
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.engine.distributed.tensor_parallel import ProcessRanks, Workers
from nanovllm.kernels.cuda_all_reduce import PeerAllReduce
from nanovllm.utils.device import Device
from nanovllm.utils.peer_memory import PeerMemory
from tests import tiny
from tests.test_engine import drain, tokens_of
from tests.test_tensor_parallel import (
    HOW_GONE,
    NOT_CLOSED,
    check_all_end_without_a_worker,
    check_nothing_is_left,
    prompts_for,
    run_script,
)

pytestmark = [pytest.mark.gpu, pytest.mark.two_gpu]

OPTIONS = {"device": "cuda", "dtype": "float32", "kvcache_block_size": 16, "num_kvcache_blocks": 2000}
MODES = {
    "plain": {},
    "eager": {"enforce_eager": True},
    "chunked": {"max_num_batched_tokens": 24, "prefill_chunk_tokens": 7},
    "preempted": {"num_kvcache_blocks": 9},
    "few at a time": {"max_num_seqs": 3},
    "few at a time, eager": {"max_num_seqs": 3, "enforce_eager": True},
}


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    sizes = {"vocab_size": 208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    model = tiny.make_reference(seed=3, **sizes)
    return tiny.save(model, tmp_path_factory.mktemp("even")), model


@pytest.mark.parametrize("mode", MODES)
def test_float32_tokens_equal_transformers(even, mode):
    path, reference = even
    prompts = prompts_for(6, seed=1) + prompts_for(4, seed=2, longest=40, shared=48)
    with LLM(path, tensor_parallel_size=2, **{**OPTIONS, **MODES[mode]}) as llm:
        answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
    assert multiprocessing.active_children() == []
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, 24)


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs")
def test_four_ranks_give_the_tokens_of_transformers(even):
    path, reference = even
    prompts = prompts_for(6, seed=1) + prompts_for(4, seed=2, longest=40, shared=48)
    with LLM(path, tensor_parallel_size=4, **OPTIONS) as llm:
        answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
        assert all(answer["error"] is None for answer in answers)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, 24)


@pytest.mark.whole_card
def test_demo_answers_in_bfloat16_equal_the_written_ones():
    pairs = json.loads((Path(DEMO_MODEL_PATH) / "questions.json").read_text(encoding="utf-8"))
    conversations = [[{"role": "user", "content": pair["question"]}] for pair in pairs]
    with LLM(DEMO_MODEL_PATH, device="cuda", gpu_memory_utilization=0.2, tensor_parallel_size=2) as llm:
        answers = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=512), use_tqdm=False)
    wrong = [pair for pair, answer in zip(pairs, answers, strict=True) if answer["text"] != pair["answer"]]
    assert not wrong


def test_sampled_tokens_with_aborts_equal_one_card(even):
    """By temperature alone, where ranks draw from their parts of the logits, and with filters."""
    path, _ = even
    prompts = prompts_for(12, seed=7, longest=40)
    kinds = [{}, {"top_p": 0.8, "logprobs": 2}, {"temperature": 0.0}]
    params = [SamplingParams(**{"temperature": 0.9, "seed": i, "max_tokens": 20, **kinds[i % 3]}) for i in range(12)]
    found = []
    for size in (1, 2):
        with LLM(path, tensor_parallel_size=size, **OPTIONS) as llm:
            ids = [llm.add_request(prompt, of_it) for prompt, of_it in zip(prompts, params, strict=True)]
            outputs = drain(llm, {} if size == 1 else {ids[0]: 8, ids[5]: 12})
            found.append([tokens_of(outputs[request_id]) for request_id in ids])
    for alone, together in zip(*found, strict=True):
        assert together == alone[: len(together)]
    assert sum(len(together) == 20 for together in found[1]) >= 10


def test_two_engines_at_once_do_not_mix(even):
    path, reference = even
    prompts = prompts_for(4, seed=8)
    llms = [LLM(path, tensor_parallel_size=2, **OPTIONS) for _ in range(2)]
    ids = [
        [llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=15)) for prompt in prompts] for llm in llms
    ]
    outputs = [{request_id: [] for request_id in of_it} for of_it in ids]
    while not all(llm.is_finished() for llm in llms):
        for llm, of_it in zip(llms, outputs, strict=True):
            for output in llm.step():
                of_it[output.request_id].append(output)
    for llm in llms:
        llm.close()
    for of_it in outputs:
        for prompt, of_request in zip(prompts, of_it.values(), strict=True):
            assert tokens_of(of_request) == tiny.reference_tokens(reference, prompt, 15)


def test_a_script_that_does_not_close_ends_cleanly(even, tmp_path):
    run = run_script(tmp_path, NOT_CLOSED, even[0], json.dumps(OPTIONS))
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    assert "destroy_process_group" not in run.stderr


@pytest.mark.parametrize(("how", "then"), [(signal.SIGKILL, ""), (signal.SIGINT, "close")])
def test_nothing_is_left_when_the_engine_is_gone(even, tmp_path, how, then):
    check_nothing_is_left(even[0], OPTIONS, tmp_path, how, then)


@HOW_GONE
def test_a_worker_that_is_gone_ends_all_requests_by_name(even, how):
    with LLM(even[0], tensor_parallel_size=2, step_timeout_s=3.0, **OPTIONS) as llm:
        check_all_end_without_a_worker(llm, how)
        time.sleep(5)  # a watchdog that ends the process would have by now


def check_sums(folder: str, rank: int, size: int) -> None:
    torch.cuda.set_device(rank)
    with torch.cuda.stream(torch.cuda.Stream()):
        ranks = ProcessRanks(folder, rank, size, Device("cuda", rank), 30.0)
        ranks.connect()
        assert ranks._peers is not None, "these GPUs write into each other's memory"
        # From one piece on, with labels and without; NCCL's are the largest, odd sizes and integers.
        sizes = [8, 24, 4096, 4104, 100_000, 300_008, 2**20, 2**21, 2**21 + 8, 7, 2048, 8]
        random = torch.Generator("cuda").manual_seed(rank)
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int64):
            inputs = [(torch.randn(size, device="cuda", generator=random) * 9).to(dtype) for size in sizes]
            sums = [torch.empty_like(x) for x in inputs]

            def all_reduce(inputs=inputs, sums=sums):
                for x, total in zip(inputs, sums, strict=True):
                    total.copy_(ranks.all_reduce(x.clone()))

            all_reduce()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                all_reduce()
            for _ in range(20):
                for x in inputs:
                    x.copy_((torch.randn(len(x), device="cuda", generator=random) * 9).to(dtype))
                graph.replay()
                for x, total in zip(inputs, sums, strict=True):
                    both = ranks.all_gather(x.unsqueeze(0)).view(size, -1)
                    wide = torch.int64 if dtype == torch.int64 else torch.float32
                    assert torch.equal(total, both.to(wide).sum(0).to(dtype)), (dtype, len(x))
        torch.cuda.synchronize()
    Path(folder, f"done {rank}").touch()
    while not all(Path(folder, f"done {other}").exists() for other in range(size)):
        time.sleep(0.01)
    os._exit(0)  # no graph is destroyed after the group


def check_sums_of_peers(folder: str, rank: int, size: int) -> None:
    """Ranks that share cards, whose kernels take turns: NCCL knows no such thing."""
    torch.cuda.set_device(rank % 2)
    store, num_exchanges = dist.FileStore(os.path.join(folder, "store"), size), itertools.count()

    def exchange(text):
        turn = next(num_exchanges)
        store.set(f"{turn} of {rank}", text)
        return [store.get(f"{turn} of {other}").decode() for other in range(size)]

    peers = PeerAllReduce(rank, size, exchange)
    for dtype in (torch.bfloat16, torch.float32):
        for numel in (8, 4096, 100_000, 2**18, 4104):
            for turn in range(4):
                inputs = []
                for other in range(size):
                    random = torch.Generator("cuda").manual_seed(turn * size + other)
                    inputs.append(torch.randn(numel, device="cuda", generator=random).to(dtype))
                expected = torch.zeros(numel, device="cuda")
                for x in inputs:
                    expected += x
                assert peers.can_serve(inputs[rank])
                assert torch.equal(peers.all_reduce(inputs[rank]), expected.to(dtype)), (dtype, numel)
    exchange("done")
    os._exit(0)


@pytest.mark.parametrize(("check", "size"), [(check_sums, 2), (check_sums_of_peers, 4)])
def test_sums_are_right_for_all_sizes_and_types(tmp_path, check, size):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=check, args=(str(tmp_path), rank, size)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * size


def test_any_thread_may_free_memory_for_peers():
    """A thread that has used no device yet has no context, as the main thread has none while the ranks connect."""
    memory = PeerMemory(1 << 20)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(memory.close).result()


def fail(ranks):
    raise OSError("there is no model here")


@pytest.mark.parametrize("when", ["connected", "meeting"])
def test_a_worker_that_fails_at_the_start_leaves_no_kernel_waiting(when):
    code = f"import tests.gpu.test_tensor_parallel as t; t.start_with_a_worker_that_fails({when!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def start_with_a_worker_that_fails(when: str) -> None:
    index = {"connected": 1, "meeting": 99}[when]
    cause = {"connected": "there is no model here", "meeting": "invalid device ordinal"}[when]
    with pytest.raises(WorkerError, match=cause):
        start_and_add_up(lambda rank: Device("cuda", index if rank else 0))
    torch.cuda.synchronize()  # no kernel waits


def start_and_add_up(device_of: Callable[[int], Device]) -> None:
    workers = Workers(2, fail, device_of, 20.0)
    try:
        for _ in range(20):
            workers.ranks.all_reduce(torch.ones(4096, device="cuda"))
            workers.ranks.all_reduce_min(3)
            workers.check()
            time.sleep(0.1)
    except Exception as error:  # as when an engine is built
        raise workers.diagnose(error) from error
    finally:
        workers.abandon()


def test_more_ranks_than_cards_are_refused(even):
    with pytest.raises(ConfigError, match="tensor_parallel_size=64, but torch sees"):
        LLM(even[0], tensor_parallel_size=64, **OPTIONS)
