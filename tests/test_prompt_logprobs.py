"""Log-probabilities of prompts: those of transformers, each of them once, in every mode; and what they cost others."""

from __future__ import annotations

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.engine.execution import prefill_executor
from tests import tiny
from tests.test_engine import drain, tokens_of
from tests.test_mixed_step import SMALL_STEPS
from tests.test_two_devices import assert_whole, two_devices

CHUNKED = {"max_num_batched_tokens": 24, "prefill_chunk_tokens": 7}
TIGHT = {"num_kvcache_blocks": 9, "kvcache_block_size": 16}
ONE_DEVICE = {
    "plain": {},
    "chunked": CHUNKED,
    "one token at a time": {"max_num_batched_tokens": 1, "prefill_chunk_tokens": 1, "max_num_seqs": 1},
    "preempting": TIGHT,
    "preempting and chunked": {**TIGHT, **CHUNKED},
    "without prefix cache": {"enable_prefix_caching": False},
    "mixed": SMALL_STEPS,
    "mixed and preempting": {**SMALL_STEPS, **TIGHT},
}
TWO_DEVICES = {
    "plain": {},
    "chunked": CHUNKED,
    "preempting": TIGHT,
    "direct and chunked": {"kv_handoff": "direct", **CHUNKED},
    "pipeline": {"enable_decode_pipeline": True, "decode_pipeline": "static"},
}


def asking(count: int | None = 2, **more) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 6, "prompt_logprobs": count, **more})


def some_prompts(seed: int) -> list[list[int]]:
    """With equal beginnings, one of a single token, and one that many slices of logits take."""
    prompts = tiny.random_prompts(3, seed=seed) + tiny.random_prompts(4, seed=seed + 1, longest=40, shared=48)
    return [*prompts, [8], (prompts[-1] * 4)[:140]]


@torch.inference_mode()
def assert_reported(entries, prompt, reference, count=2):
    """They are the log-softmax of transformers' logits, and what is equal there is equal here."""
    expected = reference(torch.tensor([prompt])).logits[0].float().log_softmax(dim=-1)
    assert len(entries) == len(prompt)
    assert entries[0] is None
    for position, entry in enumerate(entries[1:], start=1):
        token, row = prompt[position], expected[position - 1]
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(row[token].item(), abs=2e-4)
        assert list(entry.top.values()) == pytest.approx(row.topk(count).values.tolist(), abs=2e-4)
        assert list(entry.top.values()) == pytest.approx([row[other].item() for other in entry.top], abs=2e-4)
        assert entry.top.get(token, entry.logprob) == entry.logprob


@pytest.mark.parametrize("mode", ONE_DEVICE)
def test_they_are_those_of_transformers(checkpoint, mode):
    path, reference = checkpoint("gqa2")
    prompts = some_prompts(80) if "num_kvcache_blocks" not in ONE_DEVICE[mode] else some_prompts(80)[:-1]
    max_tokens = 40 if "preempting" in mode else 6
    with LLM(path, **{"device": "cpu", **ONE_DEVICE[mode]}) as llm:
        answers = llm.generate(prompts, asking(max_tokens=max_tokens), use_tqdm=False)
        assert_whole(llm)
        assert (llm.scheduler.num_preemptions > 0) == ("preempting" in mode)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, max_tokens)
        assert_reported(answer["prompt_logprobs"], prompt, reference)


@pytest.mark.parametrize("mode", TWO_DEVICES)
def test_they_are_those_of_transformers_on_two_devices(checkpoint, mode):
    path, reference = checkpoint("gqa4_bias")
    prompts = some_prompts(82) if mode != "preempting" else some_prompts(82)[:-1]
    max_tokens = 40 if mode == "preempting" else 6
    with two_devices(path, **TWO_DEVICES[mode]) as llm:
        answers = llm.generate(prompts, asking(max_tokens=max_tokens), use_tqdm=False)
        assert_whole(llm)
        assert llm.counters.handoff_blocks > 0
        assert (llm.scheduler.num_preemptions > 0) == (mode == "preempting")
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, max_tokens)
        assert_reported(answer["prompt_logprobs"], prompt, reference)


def test_tied_embeddings_and_parameters_of_sampling_change_nothing(checkpoint):
    """They are the model's own, before temperature, penalties and biases."""
    path, reference = checkpoint("gqa1_tied")
    (prompt,) = tiny.random_prompts(1, seed=83, longest=60)
    more = {"temperature": 2.0, "repetition_penalty": 1.5, "logit_bias": {3: 50.0}, "top_k": 2, "min_tokens": 3}
    with LLM(path, device="cpu") as llm:
        (answer,) = llm.generate([prompt], asking(**more), use_tqdm=False)
    assert_reported(answer["prompt_logprobs"], prompt, reference)


@pytest.mark.parametrize("steps_overlap", [False, True])
@pytest.mark.parametrize("mode", ["chunked", "preempting and chunked", "mixed and preempting"])
def test_a_stream_has_them_with_its_first_token(checkpoint, mode, steps_overlap):
    """Beside streams that do not ask, while steps are launched before the ones before them have been collected."""
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(10, seed=84, longest=60)
    counts = [None, 0, 2, 5, 1] * 2
    with LLM(path, **{"device": "cpu", **ONE_DEVICE[mode]}) as llm:
        ids = [
            llm.add_request(prompt, asking(count, max_tokens=30)) for prompt, count in zip(prompts, counts, strict=True)
        ]
        outputs = drain(llm, steps_overlap=steps_overlap)
    for request_id, prompt, count in zip(ids, prompts, counts, strict=True):
        first, *others = outputs[request_id]
        assert tokens_of(outputs[request_id]) == tiny.reference_tokens(reference, prompt, 30)
        assert all(output.prompt_logprobs is None for output in others)
        if count is None:
            assert first.prompt_logprobs is None
        else:
            assert_reported(first.prompt_logprobs, prompt, reference, count)


def test_generate_stream_and_several_answers_have_them(checkpoint):
    path, reference = checkpoint("gqa2")
    (prompt,) = tiny.random_prompts(1, seed=85)
    with LLM(path, device="cpu") as llm:
        first, *_ = llm.generate_stream(prompt, asking())
        (answer,) = llm.generate([prompt], asking(n=3, temperature=1.0), use_tqdm=False)
    assert_reported(first.prompt_logprobs, prompt, reference)
    assert len(answer["outputs"]) == 3
    for each in answer["outputs"]:
        assert_reported(each["prompt_logprobs"], prompt, reference)


@pytest.mark.parametrize("two", [False, True])
def test_the_prefix_cache_hides_no_token_and_is_left_to_others(checkpoint, two):
    path, reference = checkpoint("gqa2")
    (prompt,) = tiny.random_prompts(1, seed=86, shared=80)
    with two_devices(path) if two else LLM(path, device="cpu") as llm:
        llm.generate([prompt], asking(None), use_tqdm=False)
        (answer,) = llm.generate([prompt], asking(), use_tqdm=False)
        assert llm.scheduler.num_hit_tokens == 0
        llm.generate([prompt], asking(None), use_tqdm=False)
        assert llm.scheduler.num_hit_tokens >= 64
    assert_reported(answer["prompt_logprobs"], prompt, reference)


@pytest.fixture
def reported(monkeypatch):
    """The numbers of rows that steps report."""
    numbers, compute = [], prefill_executor.prompt_logprobs

    def counted(hidden, asked, forward):
        numbers.append(len(asked.rows))
        return compute(hidden, asked, forward)

    monkeypatch.setattr(prefill_executor, "prompt_logprobs", counted)
    return numbers


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("num_steps", [1, 3, 5])
def test_a_preempted_request_reports_only_what_is_missing(checkpoint, reported, caching, num_steps):
    path, reference = checkpoint("gqa2")
    prompt = tiny.random_prompts(1, seed=87, longest=1, shared=95)[0]
    options = {"max_num_batched_tokens": 24, "enable_prefix_caching": caching}
    with LLM(path, device="cpu", **options) as llm:
        request_id = llm.add_request(prompt, asking())
        outputs = []
        for _ in range(num_steps):
            outputs += llm.step()
        (seq,) = llm.scheduler.unfinished()
        assert sum(reported) == len(seq.prompt_logprobs) == min(24 * num_steps, 95)
        llm.scheduler.preempt(seq)
        outputs += drain(llm)[request_id]
        assert (llm.scheduler.num_hit_tokens > 0) == caching
    assert sum(reported) == 95
    assert [output.prompt_logprobs is not None for output in outputs] == [True] + [False] * 5
    assert_reported(outputs[0].prompt_logprobs, prompt, reference)
    assert tokens_of(outputs) == tiny.reference_tokens(reference, prompt, 6)


def test_what_a_lost_lease_still_reports_is_dropped(checkpoint):
    """The next lease's first step is launched before the one that was in flight has been collected."""
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(3, seed=92, shared=50)
    with two_devices(path, max_num_batched_tokens=40, enable_prefix_caching=False) as llm:
        ids = [llm.add_request(prompt, asking()) for prompt in prompts]
        llm._loop.launch_steps()
        (lost,) = [work.step for work in llm._steps]
        llm.scheduler.preempt(lost.chunks[0].seq)
        llm._loop.launch_steps()
        assert [work.step.chunks[0].start for work in llm._steps] == [0, 0]
        outputs = drain(llm)
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert_reported(outputs[request_id][0].prompt_logprobs, prompt, reference)


def test_who_does_not_ask_causes_no_work(tiny_path, reported):
    prompts = tiny.random_prompts(4, seed=88, longest=60)
    with LLM(tiny_path, device="cpu") as llm:
        llm.generate(prompts, asking(None, logprobs=2), use_tqdm=False)
        assert reported == []
        answers = llm.generate(prompts, [asking(None), asking(0), asking(None), asking(None)], use_tqdm=False)
    assert reported == [len(prompts[1]) - 1]
    assert [answer["prompt_logprobs"] is not None for answer in answers] == [False, True, False, False]


def test_logits_are_made_in_slices(checkpoint, monkeypatch):
    """A large vocabulary makes those of 128 tokens as large as the workspace of a step."""
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(4, seed=89, shared=100)
    with LLM(path, device="cpu") as llm:
        model, sizes = llm.decode_runner.model, []
        compute = model.compute_logits
        monkeypatch.setattr(
            model, "compute_logits", lambda hidden, **more: (sizes.append(len(hidden)), compute(hidden, **more))[1]
        )
        answers = llm.generate(prompts, asking(), use_tqdm=False)
    assert max(sizes) == 128
    assert sum(sizes) > 500
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_reported(answer["prompt_logprobs"], prompt, reference)


def test_a_request_that_ends_before_its_first_token_has_none(checkpoint):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(4, seed=90, shared=60)
    with LLM(path, device="cpu", max_num_batched_tokens=48) as llm:
        ids = [llm.add_request(prompt, asking()) for prompt in prompts]
        outputs = drain(llm, {ids[0]: 1, ids[2]: 3})
    assert [output.prompt_logprobs for output in outputs[ids[0]]] == [None]
    for number in (1, 3):
        assert_reported(outputs[ids[number]][0].prompt_logprobs, prompts[number], reference)


def test_a_step_that_fails_is_reported_once(checkpoint):
    """Halved where it has several requests, and a request alone is tried again."""
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(5, seed=91, longest=1, shared=35)
    with LLM(path, device="cpu", max_num_batched_tokens=48) as llm:
        launch, numbers = llm.decode_runner.launch, []

        def failing(step):
            if step.chunks:
                numbers.append(len(step.chunks))
                if len(numbers) in (2, 3, 4):
                    raise RuntimeError("injected")
            return launch(step)

        llm.decode_runner.launch = failing
        answers = llm.generate(prompts, asking(), use_tqdm=False)
        assert numbers[1:5] == [2, 2, 1, 1], "with rows, without them, and one of the two alone"
        assert llm.scheduler.num_preemptions == 1
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["error"] is None
        assert_reported(answer["prompt_logprobs"], prompt, reference)
