"""The request-level API: steps, streams, aborts, times, and requests that fail without taking others down."""

from __future__ import annotations

import itertools
import logging
import random
import sys
import weakref

import pytest
import torch

from nanovllm import LLM, OutOfKVCacheError, RequestOutput, SamplingParams
from nanovllm.engine import scheduler
from nanovllm.engine.execution import kv_pool, prefill_executor, step_handle
from nanovllm.engine.execution.cuda_graph import bucket_for, prefill_buckets
from nanovllm.engine.execution.step_handle import StepHandle
from nanovllm.engine.scheduling import chunk_room
from nanovllm.layers.ranks import OneRank
from tests import tiny
from tests.steps import launch_decode

GREEDY = SamplingParams(temperature=0, max_tokens=20)


def drain(
    llm: LLM, aborts: dict[int, int] | None = None, *, steps_overlap: bool = False
) -> dict[int, list[RequestOutput]]:
    """All outputs by request; requests of `aborts` that still run in their turn are aborted there.

    On a CPU a step has ended when it was launched; if `steps_overlap`, two are launched before one is collected, as on
    a GPU.
    """
    outputs: dict[int, list[RequestOutput]] = {}
    for turn in itertools.count():
        if llm.is_finished():
            break
        for request_id, its_turn in (aborts or {}).items():
            if turn == its_turn and not any(output.finished for output in outputs.get(request_id, [])):
                llm.abort(request_id)
        if steps_overlap:
            llm._loop.launch_steps()
            launch_decode(llm)
        for output in llm.step():
            outputs.setdefault(output.request_id, []).append(output)
        llm.scheduler.check_integrity()
    return outputs


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]


@pytest.fixture
def llm(tiny_path):
    with LLM(tiny_path, device="cpu", max_num_batched_tokens=64, prefill_chunk_tokens=16) as llm:
        yield llm
        llm.scheduler.check_integrity()


def test_requests_join_and_leave_while_others_run(checkpoint, llm):
    _, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(10, seed=20)
    ids, outputs = [], {}
    for prompt in prompts:
        ids.append(llm.add_request(prompt, GREEDY))
        for _ in range(3):
            for output in llm.step():
                outputs.setdefault(output.request_id, []).append(output)
    for request_id, more in drain(llm).items():
        outputs.setdefault(request_id, []).extend(more)
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert tokens_of(outputs[request_id]) == tiny.reference_tokens(reference, prompt, 20)
        last = outputs[request_id][-1]
        assert [output.finished for output in outputs[request_id]] == [False] * 19 + [True]
        assert last.finish_reason == "length"
        assert 0 < last.ttft_s <= last.latency_s
    assert llm.is_finished()
    assert llm.step() == []


def test_abort_in_every_state_leaves_the_others_alone(checkpoint, llm):
    _, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(6, seed=21, longest=80)
    for aborted_after in range(12):
        ids = [llm.add_request(prompt, GREEDY) for prompt in prompts]
        outputs: dict[int, list[RequestOutput]] = {}
        for turn in range(12):
            if turn == aborted_after:
                llm.abort(ids[3])
                llm.scheduler.check_integrity()
            for output in llm.step():
                outputs.setdefault(output.request_id, []).append(output)
        for request_id, more in drain(llm).items():
            outputs.setdefault(request_id, []).extend(more)
        assert outputs[ids[3]][-1].finish_reason == "abort"
        assert sum(output.finished for output in outputs[ids[3]]) == 1
        for index in (0, 1, 2, 4, 5):
            assert tokens_of(outputs[ids[index]]) == tiny.reference_tokens(reference, prompts[index], 20)
        assert llm.scheduler.placement.decode_card.block_manager.num_held_blocks == 0


def test_decode_goes_on_while_a_long_prompt_is_prefilled(llm):
    first = llm.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=60))
    while not any(output.new_token_ids for output in llm.step()):
        pass
    late = llm.add_request(tiny.random_prompts(1, longest=1, shared=150)[0], GREEDY)
    before_late = 0
    while True:
        ids = [output.request_id for output in llm.step()]
        if late in ids:
            break
        before_late += ids.count(first)
    # 151 tokens in chunks of 16: a token of the first request beside each but the last.
    assert before_late >= 9


def test_steps_are_launched_ahead_and_no_token_shows_after_a_stop_token(checkpoint, llm):
    _, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(4, seed=26)
    expected = [tiny.reference_tokens(reference, prompt, 20) for prompt in prompts]
    params = [SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[tokens[9]]) for tokens in expected]
    most_in_flight = 0
    launch = llm.decode_runner.launch

    def counting(step):
        nonlocal most_in_flight
        handle = launch(step)
        most_in_flight = max(most_in_flight, sum(bool(work.step.decode) for work in llm._steps) + 1)
        return handle

    llm.decode_runner.launch = counting
    ids = [llm.add_request(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    outputs = drain(llm, steps_overlap=True)
    assert most_in_flight == 2
    for request_id, tokens in zip(ids, expected, strict=True):
        stop = tokens.index(tokens[9]) + 1
        assert tokens_of(outputs[request_id]) == tokens[:stop]
        assert outputs[request_id][-1].finish_reason == "stop"
    assert llm.scheduler.placement.decode_card.block_manager.num_held_blocks == 0 or llm._steps
    while llm._steps:
        llm.step()
    assert llm.scheduler.placement.decode_card.block_manager.num_held_blocks == 0


class PaddedSteps:
    """What `StepGraphs` does, without a GPU to capture on: every step is padded to a bucket."""

    def __init__(self, step, sizes):
        self.step, self.sizes, self.num_replays = step, sizes, 0

    def size_for(self, size):
        return bucket_for(self.sizes, size)

    def replay(self, size):
        assert size in self.sizes, "there are graphs of buckets only"
        self.num_replays += 1
        return self.step(size)


@pytest.mark.parametrize("most_requests", [1, 3, 32])
def test_padded_steps_give_the_same_tokens(checkpoint, monkeypatch, most_requests):
    path, reference = checkpoint("gqa2")
    for module in (prefill_executor, scheduler, chunk_room):
        monkeypatch.setattr(module, "MAX_CHUNKS", most_requests)
    prompts = tiny.random_prompts(8, seed=30) + tiny.random_prompts(4, seed=31, longest=40, shared=48)
    filtered = SamplingParams(temperature=0, max_tokens=20, min_tokens=1, top_k=5)
    with LLM(path, device="cpu", max_num_batched_tokens=50, max_num_seqs=6) as llm:
        runner = llm.decode_runner
        runner.prefill.graphs = PaddedSteps(runner.prefill.run_core, prefill_buckets(50))
        runner.packer = runner._make_packer()
        paths = runner.decode.paths
        paths.sizes = [2, 4, 6]
        paths.steps = {None: PaddedSteps(runner.run_decode_core, paths.sizes)}
        launch, launched = runner.launch, []
        runner.launch = lambda step: (launched.append(step), launch(step))[1]
        answers = llm.generate(prompts, [GREEDY, GREEDY, filtered] * 4, use_tqdm=False)
        assert runner.prefill.graphs.num_replays > 0
        assert paths.steps[None].num_replays > 0
        assert llm.counters.prefill_steps == sum(bool(step.chunks) for step in launched), "none had to be halved"
        assert llm.counters.decode_steps == sum(bool(step.decode) for step in launched)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, 20)


def test_prefill_buckets_pad_little_and_end_where_graphs_cost_more_than_they_save():
    for most in (1, 64, 65, 2048, 16384):
        sizes = prefill_buckets(most)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == min(most, 3072)
        assert all(after - before <= 64 for before, after in itertools.pairwise(sizes))


@pytest.mark.parametrize("num_stop_ids", [1, 3, 20])
def test_unwatched_requests_end_at_their_own_stop_tokens(checkpoint, llm, num_stop_ids):
    """The batch compares few stop tokens as an array; a request with more is looked at token by token."""
    _, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(4, seed=29)
    expected = [tiny.reference_tokens(reference, prompt, 20) for prompt in prompts]
    params = []
    for place, tokens in enumerate(expected):
        absent = [token for token in range(211) if not any(token in others for others in expected)]
        ids = [tokens[7], *absent[: num_stop_ids - 1]] if place % 2 else []
        params.append(SamplingParams(temperature=0, max_tokens=20, stop_token_ids=ids))
    answers = llm.generate(prompts, params, use_tqdm=False)
    for place, (answer, tokens) in enumerate(zip(answers, expected, strict=True)):
        assert answer["token_ids"] == (tokens[: tokens.index(tokens[7]) + 1] if place % 2 else tokens)
        assert answer["finish_reason"] == ("stop" if place % 2 else "length")


def test_max_model_len_ends_a_request(checkpoint):
    path, reference = checkpoint("gqa2")
    prompt = tiny.random_prompts(1, seed=22)[0][:20]
    with LLM(path, device="cpu", max_model_len=32) as llm:
        answer = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=100), use_tqdm=False)[0]
    assert answer["finish_reason"] == "length"
    assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, 32 - len(prompt))


def test_a_pool_that_nobody_sized_takes_half_a_gib_or_a_request(tiny_path, monkeypatch, default_pool_bytes):
    with LLM(tiny_path, device="cpu") as llm:
        runner = llm.decode_runner

        def num_blocks():
            return kv_pool.num_kv_blocks(runner.spec, runner.device, OneRank(), 64, lambda pool, num_tokens: None)

        assert runner.kv_pool.nbytes == kv_pool.CPU_POOL_BYTES + runner.spec.block_bytes
        monkeypatch.setattr(kv_pool, "CPU_POOL_BYTES", default_pool_bytes)
        assert num_blocks() * runner.spec.block_bytes == 512 * 2**20
        monkeypatch.setattr(kv_pool, "CPU_POOL_BYTES", 1)
        assert num_blocks() * runner.block_size == llm.decode_runner.spec.max_model_len


def test_generate_leaves_outputs_of_other_requests_for_step(checkpoint, llm):
    _, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(3, seed=23)
    mine = llm.add_request(prompts[0], GREEDY)
    answer = llm.generate([prompts[1]], GREEDY, use_tqdm=False)[0]
    assert answer["token_ids"] == tiny.reference_tokens(reference, prompts[1], 20)
    stream = llm.generate_stream(prompts[2], GREEDY)
    next(stream)
    stream.close()
    assert tokens_of(drain(llm)[mine]) == tiny.reference_tokens(reference, prompts[0], 20)


def failing_launch(llm, monkeypatch, request_id: int, kind: str, times: int) -> None:
    """Makes steps with this part that have this request in them fail, `times` times when it stands alone in one."""
    launch, left = llm.prefill_runner.launch, [times]

    def fail(step):
        part = step.chunks if kind == "prefill" else step.decode
        if any(each.seq.request_id == request_id for each in part):
            if step.num_requests > 1:
                raise RuntimeError("injected")
            if left[0] > 0:
                left[0] -= 1
                raise RuntimeError("injected")
        return launch(step)

    monkeypatch.setattr(llm.prefill_runner, "launch", fail)


@pytest.mark.parametrize("kind", ["prefill", "decode"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_failing_request_is_retried_once_and_the_others_go_on(checkpoint, llm, monkeypatch, caplog, kind, times):
    _, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(6, seed=24)
    ids = [llm.add_request(prompt, GREEDY) for prompt in prompts]
    failing_launch(llm, monkeypatch, ids[2], kind, times)
    with caplog.at_level(logging.WARNING):
        outputs = drain(llm)
    assert f"request {ids[2]} failed" in caplog.text
    for index, prompt in enumerate(prompts):
        expected = tiny.reference_tokens(reference, prompt, 20)
        if index == 2 and times == 2:
            last = outputs[ids[2]][-1]
            assert last.finish_reason == "error"
            assert "injected" in str(last.error)
            assert tokens_of(outputs[ids[2]]) == expected[: len(tokens_of(outputs[ids[2]]))]
        else:
            assert tokens_of(outputs[ids[index]]) == expected
    assert llm.scheduler.placement.decode_card.block_manager.num_held_blocks == 0


def test_a_request_that_outgrows_the_pool_ends_with_an_error_and_keeps_its_tokens(checkpoint):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(2, seed=25, longest=20)
    with LLM(path, device="cpu", num_kvcache_blocks=3) as llm:
        params = [SamplingParams(temperature=0, max_tokens=n) for n in (100, 8)]
        outgrown, other = llm.generate(prompts, params, use_tqdm=False)
        llm.scheduler.check_integrity()
    assert outgrown["finish_reason"] == "error"
    assert isinstance(outgrown["error"], OutOfKVCacheError)
    assert len(prompts[0]) + len(outgrown["token_ids"]) == 3 * 16 + 1
    assert outgrown["token_ids"] == tiny.reference_tokens(reference, prompts[0], len(outgrown["token_ids"]))
    assert other["token_ids"] == tiny.reference_tokens(reference, prompts[1], 8)


def test_progress_shows_prefill_and_decode_rates(llm, capsys):
    llm.generate([[1, 2, 3]] * 2, GREEDY)
    shown = capsys.readouterr().err
    assert "prefill" in shown
    assert "decode" in shown
    llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_dummy_weights_need_no_weight_files(tiny_copy):
    (tiny_copy / "model.safetensors").unlink()
    with LLM(str(tiny_copy), device="cpu", load_format="dummy", seed=3) as llm:
        first = llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)[0]["token_ids"]
    with LLM(str(tiny_copy), device="cpu", load_format="dummy", seed=3) as llm:
        assert llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)[0]["token_ids"] == first


def test_the_choice_of_backend_is_logged_with_its_reason(tiny_path, caplog):
    with caplog.at_level(logging.INFO, logger="nanovllm"), LLM(tiny_path, device="cpu"):
        pass
    assert "attention backend torch (the best for cpu)" in caplog.text


def test_a_prompt_that_fills_the_pool_ends_even_if_it_is_preempted_at_its_first_token(checkpoint):
    """It needs a block more than there are; nothing but its own end can come of it."""
    path, _ = checkpoint("gqa2")
    prompt = tiny.random_prompts(1, seed=27, longest=1, shared=47)[0]
    with LLM(path, device="cpu", num_kvcache_blocks=3) as llm:
        request_id = llm.add_request(prompt, GREEDY)
        llm.step()
        seq = llm._outputs.sequences[request_id]
        llm.scheduler.preempt(seq)
        outputs = drain(llm)[request_id]
        assert outputs[-1].finish_reason == "error"
        assert isinstance(outputs[-1].error, OutOfKVCacheError)
        assert llm.scheduler.placement.decode_card.block_manager.num_held_blocks == 0


def test_a_failed_step_leaves_no_tensors_alive(tiny_path):
    """Its activations would be missing when its halves run, and stay as long as someone keeps the error."""
    with LLM(tiny_path, device="cpu") as llm:
        dead = []
        launch = llm.decode_runner.launch

        def fail(step):
            activation = torch.ones(10)
            dead.append(weakref.ref(activation))
            if any(seq.request_id == 1 for seq in step.seqs):
                raise RuntimeError("injected")
            return launch(step)

        llm.decode_runner.launch = fail
        answers = llm.generate([[1, 2, 3]] * 3, GREEDY, use_tqdm=False)
    assert [answer["finish_reason"] for answer in answers] == ["length", "error", "length"]
    assert not [reference for reference in dead if reference() is not None]


@pytest.mark.parametrize("moment", [*range(2, 16), 30])
def test_a_launch_that_fails_after_its_forward_pass_changes_no_token(checkpoint, monkeypatch, moment):
    """Its rows on the device are a token further than the host's; the halves must not begin from there."""
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(5, seed=33)
    copy, calls = step_handle._to_host, itertools.count(1)

    def failing(*arguments):
        if next(calls) in (moment, moment + 1):
            raise RuntimeError("injected")
        return copy(*arguments)

    monkeypatch.setattr(step_handle, "_to_host", failing)
    with LLM(path, device="cpu") as llm:
        ids = [llm.add_request(prompt, GREEDY) for prompt in prompts]
        outputs = drain(llm, steps_overlap=True)
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert tokens_of(outputs[request_id]) == tiny.reference_tokens(reference, prompt, 20)


@pytest.mark.parametrize("num_blocks", [12, 16, 200])
def test_the_rows_on_the_device_are_those_of_the_host(checkpoint, num_blocks):
    """After every update, with requests that join, leave, grow and are preempted, two steps ahead."""
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(8, seed=34, longest=40)
    with LLM(path, device="cpu", num_kvcache_blocks=num_blocks, max_num_seqs=5) as llm:
        rows = llm.decode_runner.decode.rows
        changes, apply, num_pending, steps = rows.table.changes, rows.apply, 0, []

        def noted(step):
            steps.append(step)
            return changes(step)

        def checked(of_step):
            nonlocal num_pending
            apply(of_step)
            step = steps[-1]
            for place, row in enumerate(step):
                slot = int(rows._order[place])
                last_token, position, _, output_index = rows._fields[:, slot].tolist()
                assert (position, output_index) == (row.position, row.output_index)
                table = row.lease.decode.blocks
                assert rows._block_tables[slot, : len(table)].tolist() == table
                if row.position == row.seq.num_tokens - 1:
                    assert last_token == row.seq.token_ids[-1]
                else:
                    num_pending += 1

        rows.table.changes, rows.apply = noted, checked
        ids = [llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=40)) for prompt in prompts]
        outputs = drain(llm, steps_overlap=True)
        assert num_pending > 0
        assert llm.scheduler.num_preemptions > 0 or num_blocks == 200
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert tokens_of(outputs[request_id]) == tiny.reference_tokens(reference, prompt, 40)


@pytest.mark.parametrize("two_devices", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_an_interrupt_at_any_line_of_the_engine_changes_no_token(checkpoint, two_devices, seed):
    """Streamed requests, which it may abort, and others, with log-probabilities, which it may not. All of them report
    their prompts."""
    path, _ = checkpoint("gqa2")
    rng = random.Random(seed)
    prompts = tiny.random_prompts(4, seed=40, longest=50, shared=20)
    params = SamplingParams(temperature=0, max_tokens=20, logprobs=1, prompt_logprobs=1)
    options = {"max_num_batched_tokens": 48, "num_kvcache_blocks": 14}
    with LLM(path, device="cpu") as llm:
        expected = llm.generate(prompts, params, use_tqdm=False)
    with LLM(path, device="cpu", enable_two_gpu_pd=two_devices, **options) as llm:
        ids = [llm._submit(prompt, params, llm._inbox, streamed=place < 2) for place, prompt in enumerate(prompts)]
        outputs: dict[int, list[RequestOutput]] = {request_id: [] for request_id in ids}
        while not llm.is_finished():
            try:
                with InterruptedAtLine(rng.randrange(4000)):
                    for output in llm.step():
                        outputs[output.request_id].append(output)
            except KeyboardInterrupt:
                for output in llm.step():
                    outputs[output.request_id].append(output)
            llm.scheduler.check_integrity()
        while llm._steps or llm._handoffs:
            llm.step()
        assert (
            llm.scheduler.placement.decode_card.block_manager.num_held_blocks
            == llm.scheduler.placement.prefill_card.block_manager.num_held_blocks
            == 0
        )
    for place, (request_id, answer) in enumerate(zip(ids, expected, strict=True)):
        tokens = tokens_of(outputs[request_id])
        logprobs = [entry for output in outputs[request_id] for entry in output.new_logprobs or []]
        assert tokens == answer["token_ids"][: len(tokens)]
        assert [entry.token_id for entry in logprobs] == tokens
        of_prompt = [output.prompt_logprobs for output in outputs[request_id] if output.prompt_logprobs is not None]
        assert len(of_prompt) == bool(tokens)
        for first, *others in of_prompt:
            assert first is None
            assert [entry.token_id for entry in others] == prompts[place][1:]
            logprobs = [entry.logprob for entry in answer["prompt_logprobs"][1:]]
            assert [entry.logprob for entry in others] == pytest.approx(logprobs, abs=1e-4)
        assert outputs[request_id][-1].finish_reason == "length" or place < 2
        assert len(tokens) == 20 or outputs[request_id][-1].finish_reason == "abort"


class InterruptedAtLine:
    """Raises KeyboardInterrupt when the engine has run so many lines of its own in the block, if it gets that far."""

    def __init__(self, num_lines):
        self.num_lines = num_lines

    def __enter__(self):
        sys.settrace(self.trace)

    def __exit__(self, *error):
        sys.settrace(None)

    def trace(self, frame, event, argument):
        # What `step` has in its hands when it is interrupted is lost, as it would be in its caller's.
        if "nanovllm/engine/" not in frame.f_code.co_filename or frame.f_code.co_name in (
            "_start_over",
            "repair",
            "step",
        ):
            return None
        if event == "line":
            self.num_lines -= 1
            if self.num_lines == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.trace


@pytest.mark.parametrize("moment", range(1, 12, 2))
@pytest.mark.parametrize("two_devices", [False, True])
@pytest.mark.parametrize("where", ["launch", "collect", "schedule_prefill", "send", "append"])
def test_an_interrupt_anywhere_loses_no_request_and_changes_no_token(checkpoint, where, two_devices, moment):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(4, seed=28, longest=50, shared=20)
    options = {"enable_two_gpu_pd": True} if two_devices else {}
    with LLM(path, device="cpu", max_num_batched_tokens=48, **options) as llm:
        ids = [llm.add_request(prompt, GREEDY) for prompt in prompts]
        holder = {
            "launch": llm.decode_runner,
            "collect": StepHandle,
            "schedule_prefill": llm.scheduler,
            "send": llm.kv_transfer,
            "append": llm._outputs,
        }[where]
        original, calls = getattr(holder, where), [0]

        def interrupted(*args, **kwargs):
            calls[0] += 1
            result = original(*args, **kwargs)
            if calls[0] == moment:
                raise KeyboardInterrupt
            return result

        outputs: dict[int, list[RequestOutput]] = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(holder, where, interrupted)
            for _ in range(12):
                try:
                    for output in llm.step():
                        outputs.setdefault(output.request_id, []).append(output)
                except KeyboardInterrupt:
                    pass
                llm.scheduler.check_integrity()
        for request_id, more in drain(llm).items():
            outputs.setdefault(request_id, []).extend(more)
        for request_id, prompt in zip(ids, prompts, strict=True):
            assert tokens_of(outputs[request_id]) == tiny.reference_tokens(reference, prompt, 20)
        again = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert [answer["token_ids"] for answer in again] == [tiny.reference_tokens(reference, p, 20) for p in prompts]
        while llm._steps or llm._handoffs:
            llm.step()
        assert (
            llm.scheduler.placement.decode_card.block_manager.num_held_blocks
            == llm.scheduler.placement.prefill_card.block_manager.num_held_blocks
            == 0
        )
