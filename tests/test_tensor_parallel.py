"""Several ranks that compute one model: its layers, and engines with worker processes, on CPUs."""

from __future__ import annotations

import functools
import gc
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from nanovllm import LLM, ConfigError, OutOfKVCacheError, SamplingParams, WorkerError
from nanovllm.engine.distributed import tensor_parallel
from nanovllm.engine.distributed.tensor_parallel import Workers
from nanovllm.kernels import AttentionMetadata, torch_reference
from nanovllm.layers.ranks import OneRank
from nanovllm.layers.sampler import SamplingInputs, sample
from nanovllm.models import resolve_model
from nanovllm.utils.checkpoint import checkpoint_folder, read_json
from nanovllm.utils.device import Device
from nanovllm.utils.loader import fill_randomly, load_weights
from tests import tiny
from tests.processes import process_state
from tests.test_engine import drain, tokens_of
from tests.test_prompt_logprobs import assert_reported


class ThreadRanks:
    """A rank of several that are threads of this process."""

    def __init__(self, rank, size, board, barrier):
        self.rank, self.size, self._board, self._barrier = rank, size, board, barrier

    def _all(self, x):
        self._board[self.rank] = x.clone()
        self._barrier.wait()
        everybody = list(self._board)
        self._barrier.wait()
        return everybody

    def all_reduce(self, x):
        return torch.stack(self._all(x)).sum(dim=0)

    def all_gather(self, x):
        return torch.cat(self._all(x), dim=1)


def on_ranks(size, run):
    board, barrier = [None] * size, threading.Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, [ThreadRanks(rank, size, board, barrier) for rank in range(size)]))


def make_model(folder, ranks, *, is_dummy=False):
    model_class, config = resolve_model(read_json(checkpoint_folder(folder), "config.json"))
    model = model_class(
        config, torch_reference.Backend(), 128, dtype=torch.float32, device=torch.device("cpu"), ranks=ranks
    )
    with torch.inference_mode():
        if is_dummy:
            fill_randomly(model.checkpoint_tensors(), 7)
        else:
            load_weights(
                checkpoint_folder(folder),
                model.checkpoint_tensors(),
                model.ignored_checkpoint_tensors(),
            )
    return model


def prefill(model, num_tokens=9):
    config, size = model.config, model.ranks.size
    pool = torch.zeros(4, config.num_hidden_layers, 2, config.num_key_value_heads // size, 16, config.head_dim)
    positions = torch.arange(num_tokens)
    metadata = AttentionMetadata(
        slot_mapping=positions + 16,
        block_tables=torch.tensor([[1]], dtype=torch.int32),
        context_lens=torch.tensor([num_tokens], dtype=torch.int32),
        query_starts=torch.tensor([0, num_tokens], dtype=torch.int32),
        max_query_len=num_tokens,
        max_context_len=num_tokens,
    )
    with torch.inference_mode():
        tokens = (positions * 7 + 3) % config.vocab_size
        return model.ranks.all_gather(model.compute_logits(model(tokens, positions, pool, metadata)))


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """Checkpoints that four ranks can share: with biases, and with tied embeddings."""
    made = {}
    for name, options in (("biased", {"attention_bias": True}), ("tied", {"tie_word_embeddings": True})):
        sizes = {"vocab_size": 208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
        model = tiny.make_reference(seed=3, **sizes, **options)
        made[name] = tiny.save(model, tmp_path_factory.mktemp(name))
        made[name, "reference"] = model
    return made


@pytest.mark.parametrize("is_dummy", [False, True], ids=["checkpoint", "dummy"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["biased", "tied"])
def test_ranks_compute_what_one_does(even, name, size, is_dummy):
    expected = prefill(make_model(even[name], None, is_dummy=is_dummy))
    shares = on_ranks(size, lambda ranks: prefill(make_model(even[name], ranks, is_dummy=is_dummy)))
    for logits in shares:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(logits, shares[0])


# Engines

MODES = {
    "plain": {},
    "chunked": {"max_num_batched_tokens": 24, "prefill_chunk_tokens": 7},
    "preempted": {"num_kvcache_blocks": 9},
    "no_cache": {"enable_prefix_caching": False},
}


def prompts_for(count, seed, **options):
    return [[token % 208 for token in prompt] for prompt in tiny.random_prompts(count, seed=seed, **options)]


@functools.cache
def fork_server():
    """Its start method; it has imported all that a worker needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nanovllm.engine.builder"])
    first = context.Process(target=gc.collect)  # it imports before it forks
    first.start()
    first.join()
    return context


@pytest.fixture
def start_method(request, monkeypatch):
    """How workers are started: as for users, or forked from a server that has imported torch, seconds sooner.

    Scripts, below, always start them as for users.
    """
    how = getattr(request, "param", "forked")
    if how == "forked":
        context = fork_server()
        monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    return how


uses_workers = pytest.mark.usefixtures("start_method")
starts_workers = pytest.mark.parametrize(
    "start_method", ["forked", pytest.param("spawned", marks=pytest.mark.slow)], indirect=True
)
"""Marks tests in which it matters how workers are started."""


def assert_no_process_is_left():
    assert multiprocessing.active_children() == []


MANY = 200


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["plain", "bfloat16", "ties", "nan", "filters", "banned"])
def test_ranks_draw_the_tokens_that_one_does(kind, size):
    logits = torch.randn(MANY, 208, generator=torch.Generator().manual_seed(0)) * 3
    options = {}
    if kind == "bfloat16":
        logits = logits.bfloat16()
    elif kind == "ties":
        logits = (logits * 0.3).round()
    elif kind == "nan":
        logits[5, 100] = logits[7] = float("nan")
        logits[8] = float("-inf")
        logits[[9, 9, 12, 12], [3, 150, 60, 150]] = float("inf")
    elif kind == "filters":
        columns = (torch.full((MANY,), 20), torch.full((MANY,), 0.9), torch.zeros(MANY))
        options = {"filters": columns, "num_logprobs": 3}
    elif kind == "banned":
        options = {"banned": (torch.arange(MANY), logits.argmax(dim=1))}
    temperatures = torch.where(torch.arange(MANY) % 3 == 0, 0.0, 0.8)
    inputs = SamplingInputs(temperatures, torch.arange(MANY) * 77_777_777, torch.arange(MANY), **options)
    alone = sample(logits, inputs, torch_reference.Backend(), OneRank())
    parts = logits.chunk(size, dim=1)
    together = on_ranks(size, lambda ranks: sample(parts[ranks.rank], inputs, torch_reference.Backend(), ranks))
    for of_rank in together:
        assert torch.equal(of_rank.token_ids, alone.token_ids)
        assert of_rank.token_ids.dtype == alone.token_ids.dtype
        if alone.logprobs is not None:
            assert torch.equal(of_rank.logprobs, alone.logprobs)


@uses_workers
@pytest.mark.parametrize(
    ("name", "size", "mode"),
    [*(("biased", 2, mode) for mode in MODES), ("tied", 4, "chunked"), ("tied", 4, "preempted")],
)
def test_greedy_tokens_equal_transformers(even, name, size, mode):
    prompts = prompts_for(4, seed=1) + prompts_for(4, seed=2, longest=40, shared=48)
    with LLM(even[name], device="cpu", tensor_parallel_size=size, **MODES[mode]) as llm:
        answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
        again = llm.generate(prompts[4:], SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
        while llm._steps:
            llm.step()
        llm.scheduler.check_integrity()
        assert llm.scheduler.placement.decode_card.block_manager.num_held_blocks == 0
        assert (llm.scheduler.num_preemptions > 0) == (mode == "preempted")
    assert_no_process_is_left()
    for prompt, answer in zip(prompts + prompts[4:], answers + again, strict=True):
        assert answer["token_ids"] == tiny.reference_tokens(even[name, "reference"], prompt, 24)


@starts_workers
def test_sampled_tokens_and_logprobs_equal_those_of_one_rank(even, start_method):
    prompts = prompts_for(10, seed=5)
    params = [
        SamplingParams(
            temperature=0.9, top_p=0.8 + 0.2 * (i % 2), top_k=20, seed=i, max_tokens=12, logprobs=i % 3 or None
        )
        for i in range(4)
    ] + [SamplingParams(temperature=1.1, seed=i, max_tokens=30) for i in range(2)]
    # Each rank counts and penalises its part of the vocabulary.
    penalties = [{"repetition_penalty": 1.3}, {"frequency_penalty": 1.0}, {"presence_penalty": 2.0}]
    params += [SamplingParams(temperature=0, max_tokens=25, **one) for one in [*penalties, {"logit_bias": {5: 3.0}}]]
    found = []
    for size in (1, 4):
        with LLM(even["biased"], device="cpu", tensor_parallel_size=size) as llm:
            found.append(llm.generate(prompts, params, use_tqdm=False))
    for alone, together in zip(*found, strict=True):
        assert together["token_ids"] == alone["token_ids"]
        for one, other in zip(alone["logprobs"] or [], together["logprobs"] or [], strict=True):
            assert other.logprob == pytest.approx(one.logprob, abs=1e-4)


@uses_workers
@pytest.mark.parametrize(
    ("name", "size", "options"),
    [("biased", 2, {}), ("biased", 2, MODES["chunked"]), ("tied", 4, MODES["preempted"])],
    ids=["plain", "chunked", "preempted"],
)
def test_log_probabilities_of_prompts_are_those_of_transformers(even, name, size, options):
    """Each rank has the logits of its part of the vocabulary."""
    prompts = prompts_for(4, seed=8) + prompts_for(4, seed=9, longest=40, shared=48)
    params = [SamplingParams(temperature=0, max_tokens=24, prompt_logprobs=i % 3 or None) for i in range(8)]
    with LLM(even[name], device="cpu", tensor_parallel_size=size, **options) as llm:
        answers = llm.generate(prompts, params, use_tqdm=False)
        assert (llm.scheduler.num_preemptions > 0) == (options is MODES["preempted"])
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert answer["token_ids"] == tiny.reference_tokens(even[name, "reference"], prompt, 24)
        if index % 3:
            assert_reported(answer["prompt_logprobs"], prompt, even[name, "reference"], index % 3)


@uses_workers
def test_aborts_change_no_other_token(even):
    prompts = prompts_for(10, seed=6, longest=50)
    greedy = SamplingParams(temperature=0, max_tokens=20)
    with LLM(even["biased"], device="cpu", tensor_parallel_size=2, num_kvcache_blocks=20) as llm:
        ids = {llm.add_request(prompt, greedy): prompt for prompt in prompts}
        outputs = drain(llm, {request_id: 3 * place for place, request_id in enumerate(list(ids)[::3])})
    for request_id, prompt in ids.items():
        got = tokens_of(outputs[request_id])
        expected = tiny.reference_tokens(even["biased", "reference"], prompt, 20)
        assert got == expected[: len(got)]
        assert len(got) == 20 or outputs[request_id][-1].finish_reason == "abort"


@uses_workers
def test_only_what_changes_crosses(even):
    with LLM(even["biased"], device="cpu", tensor_parallel_size=2) as llm:
        sent = []
        for pipe in llm.decode_runner._workers._pipes:
            send = pipe.send
            pipe.send = lambda task, send=send: (sent.append(task), send(task))[1]
        llm.generate(prompts_for(3, seed=7), SamplingParams(temperature=0, max_tokens=30), use_tqdm=False)
        decodes = [task.decode for task in sent if task.decode is not None]
    assert sent[0].prefill is not None
    assert sent[0].decode is None
    # One step tells who is in the batch; the others, but for a block or two, nothing.
    told = [task for task in decodes if task.changes.order is not None]
    assert len(told) <= 2
    assert sum(task.changes.grown is not None for task in decodes) < len(decodes) / 3
    assert all(task.changes.joined is None for task in decodes if task.changes.order is None)
    assert min(len(pickle.dumps(task)) for task in decodes) < 300  # names of classes and fields, mostly


@starts_workers
def test_two_engines_at_once_do_not_mix(even, start_method):
    prompts = prompts_for(4, seed=8)
    greedy = SamplingParams(temperature=0, max_tokens=15)
    with ThreadPoolExecutor(2) as pool:
        names = ("biased", "tied")
        llms = list(pool.map(lambda name: LLM(even[name], device="cpu", tensor_parallel_size=2), names))
        answers = list(pool.map(lambda llm: llm.generate(prompts, greedy, use_tqdm=False), llms))
    for name, llm, of_it in zip(names, llms, answers, strict=True):
        llm.close()
        for prompt, answer in zip(prompts, of_it, strict=True):
            assert answer["token_ids"] == tiny.reference_tokens(even[name, "reference"], prompt, 15)
    assert_no_process_is_left()


HOW_GONE = pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])


@starts_workers
@HOW_GONE
def test_a_worker_that_is_gone_ends_all_requests_by_name(even, start_method, how):
    # A rank that is killed breaks its connections, one that is stopped does not.
    options = {"step_timeout_s": 10.0} if how is signal.SIGSTOP else {}
    with LLM(even["biased"], device="cpu", tensor_parallel_size=2, **options) as llm:
        check_all_end_without_a_worker(llm, how)
    assert_no_process_is_left()


def check_all_end_without_a_worker(llm, how):
    (process,) = llm.decode_runner._workers._processes
    for prompt in prompts_for(6, seed=9):
        llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=400))
    for _ in range(5):
        llm.step()
    os.kill(process.pid, how)
    started, ended = time.monotonic(), []
    while not llm.is_finished():
        ended += [output for output in llm.step() if output.finished]
    assert time.monotonic() - started < 120
    assert [output.finish_reason for output in ended] == ["error"] * 6
    assert all(isinstance(output.error, WorkerError) for output in ended)
    reason = "rank 1 is gone (exit status -9)" if how is signal.SIGKILL else "no longer in step"
    assert reason in str(ended[0].error)
    with pytest.raises(WorkerError, match="start a new process"):
        llm.add_request([1])


@pytest.fixture
def hears_interrupts():
    """Hears interrupts where the tests run in the background, too, which ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@uses_workers
@pytest.mark.usefixtures("hears_interrupts")
def test_an_interrupt_within_a_step_leaves_the_ranks_in_step(even):
    """Ctrl-C as it comes: to the process, some of whose threads are not the interpreter's."""
    prompts = prompts_for(4, seed=10)
    greedy = SamplingParams(temperature=0, max_tokens=25)
    with LLM(even["biased"], device="cpu", tensor_parallel_size=2) as llm:
        runner, calls = llm.decode_runner, [0]
        run = runner._run

        def interrupted(task):
            calls[0] += 1
            if calls[0] in (1, 4, 9):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)
            return run(task)

        runner._run = interrupted
        ids = [llm.add_request(prompt, greedy) for prompt in prompts]
        got, num_interrupts = {request_id: [] for request_id in ids}, 0
        while not llm.is_finished():
            try:
                outputs = llm.step()
            except KeyboardInterrupt:
                num_interrupts += 1
                continue
            for output in outputs:
                assert output.error is None
                got[output.request_id] += output.new_token_ids
    assert num_interrupts == 3
    for prompt, tokens in zip(prompts, got.values(), strict=True):
        assert tokens == tiny.reference_tokens(even["biased", "reference"], prompt, 25)


@uses_workers
@pytest.mark.usefixtures("hears_interrupts")
@pytest.mark.parametrize("raised", [SystemExit, RuntimeError])
def test_no_interrupt_or_exit_within_a_step_is_lost(even, raised):
    """An exit is the caller's to hear, and an interrupt is, when the step fails that it strikes in."""
    heard = SystemExit if raised is SystemExit else KeyboardInterrupt
    with LLM(even["biased"], device="cpu", tensor_parallel_size=2) as llm:

        def broken_off(task):
            if heard is KeyboardInterrupt:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)
            raise raised(7)

        llm.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=5))
        llm.decode_runner._run = broken_off
        with pytest.raises(heard):
            llm.step()
        (output,) = llm.step()
        assert isinstance(output.error, WorkerError)
    assert_no_process_is_left()


@uses_workers
def test_what_a_lost_rank_leaves_of_a_step_is_given_to_nobody(even):
    """On GPUs what waits for a rank that is gone is ended, and the step looks as if it had been computed."""
    with LLM(even["biased"], device="cpu", tensor_parallel_size=2) as llm:
        (process,) = llm.decode_runner._workers._processes
        llm.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
        while llm._loop.launch_steps():
            pass
        process.kill()
        process.join()
        outputs = drain(llm)
    (of_it,) = outputs.values()
    assert tokens_of(of_it) == []
    assert isinstance(of_it[-1].error, WorkerError)


@pytest.fixture
def long_last_words(monkeypatch):
    """A worker that fails may take its time to say so and to end."""
    monkeypatch.setattr(tensor_parallel, "LAST_WORDS_S", 60.0)


@uses_workers
@pytest.mark.usefixtures("long_last_words")
def test_of_many_workers_the_one_that_failed_first_is_told_of(even):
    with LLM(even["biased"], device="cpu", tensor_parallel_size=4) as llm:
        workers = llm.decode_runner._workers
        for rank, no_task in ((3, "none"), (1, 1.5), (2, 2)):
            workers._pipes[rank - 1].send(no_task)
            assert workers._pipes[rank - 1].poll(60), "it does not say that it fails"
        with pytest.raises(WorkerError, match=r"rank 3(.|\n)*AttributeError: 'str' object has no attribute"):
            workers.check()
    assert_no_process_is_left()


def hang(ranks):
    time.sleep(600)


@starts_workers
def test_a_worker_that_hangs_while_it_starts_is_told_of(start_method):
    workers = Workers(2, hang, lambda rank: Device("cpu", rank), 60.0)
    timer = workers._start_timer
    assert (timer.interval, timer.is_alive()) == (600.0, True)
    threading.Timer(0.2, timer.function).start()  # as if the time were over
    with pytest.raises(RuntimeError, match="a rank is gone"):
        workers.ranks.all_reduce_min(0)
    with pytest.raises(WorkerError, match="not all ranks have started within 600 s"):
        workers.check()
    workers.abandon()
    assert_no_process_is_left()


@starts_workers
@pytest.mark.usefixtures("long_last_words")
def test_what_fails_in_a_worker_is_told_with_its_traceback(even, start_method):
    with LLM(even["biased"], device="cpu", tensor_parallel_size=2) as llm:
        llm.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=5))
        for pipe in llm.decode_runner._workers._pipes:
            pipe.send("what is no task")
        outputs = drain(llm)
    (error,) = {str(of_it[-1].error) for of_it in outputs.values()}
    assert "AttributeError: 'str' object has no attribute" in error
    assert_no_process_is_left()


@starts_workers
def test_a_worker_that_cannot_start_is_told_of(even, start_method):
    with pytest.raises((WorkerError, OutOfKVCacheError), match="KV pool"):
        LLM(even["biased"], device="cpu", tensor_parallel_size=2, num_kvcache_blocks=10**9)
    assert_no_process_is_left()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 3}, "tensor_parallel_size=3 does not divide 8 attention heads, 4 KV heads"),
        ({"tensor_parallel_size": 8}, "does not divide 4 KV heads"),
        ({"tensor_parallel_size": 2, "enable_two_gpu_pd": True}, "exclude each other"),
        ({"tensor_parallel_size": 2, "device": "cuda:1"}, "names one GPU"),
        ({"tensor_parallel_size": 0}, "is not a positive integer"),
    ],
)
def test_refused_sizes(even, options, message):
    with pytest.raises(ConfigError, match=message):
        LLM(even["biased"], **{"device": "cpu", **options})


@starts_workers
def test_an_engine_that_is_dropped_leaves_no_process(even, start_method):
    llm = LLM(even["biased"], device="cpu", tensor_parallel_size=2)
    llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
    del llm
    gc.collect()
    assert_no_process_is_left()


def run_script(tmp_path, code, *arguments):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


NOT_CLOSED = """
import json, sys
from nanovllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1], tensor_parallel_size=2, **json.loads(sys.argv[2]))
    llm.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=100))
    for _ in range(3):
        llm.step()
"""


def test_a_script_that_does_not_close_ends_cleanly(even, tmp_path):
    run = run_script(tmp_path, NOT_CLOSED, even["biased"], json.dumps({"device": "cpu", "num_kvcache_blocks": 100}))
    assert (run.returncode, run.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


NOT_CLOSED_BY_A_CHILD = """
import concurrent.futures, multiprocessing, sys
from nanovllm import LLM, SamplingParams

def answer(path):
    global llm
    llm = LLM(path, device="cpu", tensor_parallel_size=2, num_kvcache_blocks=100)
    return llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)[0]["token_ids"]

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
        print(executor.submit(answer, sys.argv[1]).result())
"""


def test_a_process_of_multiprocessing_that_does_not_close_ends_cleanly(even, tmp_path):
    """It ends its daemons, the other ranks, before it calls anything of `atexit`."""
    run = run_script(tmp_path, NOT_CLOSED_BY_A_CHILD, even["biased"])
    assert (run.returncode, run.stderr) == (0, "")
    assert len(json.loads(run.stdout)) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


def test_a_script_without_a_main_guard_is_told_of_it(even, tmp_path):
    code = """
    import sys
    from nanovllm import LLM

    LLM(sys.argv[1], device="cpu", tensor_parallel_size=2)
    """
    run = run_script(tmp_path, code, even["biased"])
    assert run.returncode == 1
    assert 'under `if __name__ == "__main__":`' in run.stderr.splitlines()[-1]


SERVE = """
import json, os, signal, sys, time
from nanovllm import LLM, SamplingParams

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    llm = LLM(sys.argv[1], tensor_parallel_size=2, **json.loads(sys.argv[3]))
    (process,) = llm.decode_runner._workers._processes
    print(process.pid, flush=True)
    llm.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=400))
    try:
        while not llm.is_finished():
            llm.step()
        print("ended", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        if sys.argv[2] == "close":
            llm.close()
"""


@pytest.mark.parametrize(
    ("how", "then"), [(signal.SIGKILL, ""), (signal.SIGTERM, ""), (signal.SIGINT, "close"), (signal.SIGINT, "")]
)
def test_nothing_is_left_when_the_engine_is_gone(even, tmp_path, how, then):
    check_nothing_is_left(even["biased"], {"device": "cpu", "num_kvcache_blocks": 100}, tmp_path, how, then)


def check_nothing_is_left(path, options, tmp_path, how, then):
    script = tmp_path / "serve.py"
    script.write_text(textwrap.dedent(SERVE))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(script), path, then, json.dumps(options)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as engine:
        assert engine.stdout is not None
        pid = int(engine.stdout.readline())
        time.sleep(0.2)
        # As from a terminal: all processes of the group hear of Ctrl-C.
        os.killpg(engine.pid, how) if how is signal.SIGINT else engine.send_signal(how)
        engine.wait(120)
    deadline = time.monotonic() + 60
    while process_state(pid) not in (None, "Z"):
        assert time.monotonic() < deadline, "the worker is still there"
        time.sleep(0.05)
    assert list(tmp_path.glob("nanovllm-*")) == []
