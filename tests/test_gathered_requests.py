"""Elastic cards at low load: requests gather on one card, and KV of short prompts crosses from the other one."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from nanovllm import SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduling.card import Card
from nanovllm.engine.scheduling.placement import ElasticPlacement, OtherPrompts, Places
from nanovllm.engine.scheduling.step_time import StepSize
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import HandoffError
from tests import tiny
from tests.test_engine import drain, tokens_of
from tests.test_shared_prompts import GREEDY, assert_whole, make, num_shared, teach

MODES = {
    "plain": {},
    "small chunks": {"max_num_batched_tokens": 64, "prefill_chunk_tokens": 32},
    "without prefix cache": {"enable_prefix_caching": False},
    "small pools": {"num_kvcache_blocks": 40, "max_num_batched_tokens": 64, "prefill_chunk_tokens": 32},
    "verified": {"verify_kv_handoff": True, "prefill_chunk_tokens": 48},
    "few rows": {"max_num_seqs": 3},
}


def make_gathering(path: str, **options):
    """An engine whose requests gather, whatever their prompts, while one that decodes to the end is there."""
    llm = make(path, **options)
    llm.scheduler.placement.least_shared_when_gathered = 1000
    teach(llm, 1e-4, 5e-4)
    first = llm.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))
    while not llm.step():
        pass
    return llm, first


def crossed(llm) -> dict[str, int]:
    """Bytes of KV, by link."""
    return llm.metrics()["handoff_bytes_by_link"]


@pytest.mark.parametrize("mode", MODES)
def test_tokens_equal_transformers(checkpoint, mode):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(8, seed=81, longest=110) + tiny.random_prompts(4, seed=82, longest=40, shared=50)
    llm, first = make_gathering(path, **MODES[mode])
    with llm:
        ids = [llm.add_request(prompt, GREEDY) for prompt in prompts]
        outputs = drain(llm)
        assert sum(crossed(llm).values()) > 0
        if mode != "small pools":  # where half of one is soon held
            assert num_shared(llm) == 0
            assert len(crossed(llm)) == 1, "they all gather on one card"
            _, idle = sorted(llm.metrics()["busy_s"].values(), key=lambda kinds: -kinds["decode"])
            assert idle["prefill"] > 0
            assert idle["decode"] == idle["mixed"] == 0, "the other one has no decode rows"
        assert_whole(llm)
    assert len(tokens_of(outputs[first])) > 100
    for number, prompt in zip(ids, prompts, strict=True):
        assert tokens_of(outputs[number]) == tiny.reference_tokens(reference, prompt, 10)


def tokens_after(llm, prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    """The answer to a streamed request."""
    number, outputs = llm.add_request(prompt, params), []
    while not (outputs and outputs[-1].finished):
        outputs += [output for output in llm.step() if output.request_id == number]
    return tokens_of(outputs)


def test_what_cannot_cross_runs_where_it_decodes(checkpoint, monkeypatch):
    """Log-probabilities of a prompt are reported there, a request that has failed once has no other chance, and one
    that ends with its first token leaves no KV that is read. Requests that are not streamed do not gather."""
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(4, seed=83, longest=60)
    llm, _ = make_gathering(path)
    llm.scheduler.placement.least_shared_tokens = 1000
    with llm:
        reporting = SamplingParams(temperature=0, max_tokens=10, prompt_logprobs=1)
        assert tokens_after(llm, prompts[0], reporting) == tiny.reference_tokens(reference, prompts[0], 10)
        launches, errors = [], [RuntimeError("injected")]
        for runner in llm._runners:

            def launch(step, launch=runner.launch):
                launches.extend(step.chunks)
                if step.chunks and errors:
                    raise errors.pop()
                return launch(step)

            monkeypatch.setattr(runner, "launch", launch)
        assert tokens_after(llm, prompts[1]) == tiny.reference_tokens(reference, prompts[1], 10)
        assert len(launches) == 2
        assert len(tokens_after(llm, prompts[2], SamplingParams(temperature=0, max_tokens=1))) == 1
        (answer,) = llm.generate([prompts[3]], GREEDY, use_tqdm=False)
        assert answer["token_ids"] == tiny.reference_tokens(reference, prompts[3], 10)
        assert not crossed(llm)
        assert tokens_after(llm, prompts[3][::-1]) == tiny.reference_tokens(reference, prompts[3][::-1], 10)
        assert crossed(llm), "others do cross"
        drain(llm)
        assert_whole(llm)


@pytest.mark.parametrize("seed", range(4))
def test_aborted_and_cut_off_at_any_moment(checkpoint, seed):
    path, reference = checkpoint("gqa2")
    rng = random.Random(seed)
    prompts = tiny.random_prompts(30, seed=84, longest=90)
    options = {"max_num_batched_tokens": 48, "prefill_chunk_tokens": 32, "verify_kv_handoff": bool(seed % 2)}
    llm, _ = make_gathering(path, **options)
    with llm:
        ids, outputs, aborted = [], {}, set()
        while len(ids) < len(prompts) or not llm.is_finished():
            if len(ids) < len(prompts):
                ids.append(llm.add_request(prompts[len(ids)], GREEDY))
            for output in llm.step():
                outputs.setdefault(output.request_id, []).append(output)
            unfinished = [seq.request_id for seq in llm.scheduler.unfinished() if seq.request_id in ids]
            if unfinished and rng.random() < 0.1:
                aborted.add(rng.choice(unfinished))
                llm.abort(max(aborted.intersection(unfinished)))
        assert sum(crossed(llm).values()) > 0
        assert_whole(llm)
    for number, prompt in zip(ids, prompts, strict=True):
        tokens = tokens_of(outputs[number])
        assert tokens == tiny.reference_tokens(reference, prompt, 10)[: len(tokens)]
        assert len(tokens) == 10 or number in aborted


def test_kv_that_does_not_arrive_as_it_left_fails_and_is_computed_again(checkpoint, monkeypatch):
    path, reference = checkpoint("gqa2")
    (prompt,) = tiny.random_prompts(1, seed=85, longest=60)
    llm, _ = make_gathering(path, verify_kv_handoff=True)
    with llm:
        compared, errors = [], []
        checksums, fail = ModelRunner.checksum_blocks, llm._outputs.fail

        def spoil(runner, blocks, after):
            compared.append(runner)
            if len(compared) == 2:  # the first ones are those of the blocks that were sent
                with torch.inference_mode():
                    runner.kv_pool[blocks[0], 0] += 1
            return checksums(runner, blocks, after)

        monkeypatch.setattr(ModelRunner, "checksum_blocks", spoil)
        monkeypatch.setattr(llm._outputs, "fail", lambda seq, error: (errors.append(error), fail(seq, error)))
        assert tokens_after(llm, prompt) == tiny.reference_tokens(reference, prompt, 10)
        (error,) = errors
        assert isinstance(error, HandoffError)
        assert "differs in layer 0" in str(error)
        drain(llm)
        assert_whole(llm)


def make_long(number: int, prompt: list[int], max_tokens: int = 8) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens)
    return Sequence(number, prompt, params, seed=0, arrival_s=0.0, max_num_tokens=len(prompt) + max_tokens)


def test_where_a_short_prompt_runs():
    busy, idle = (Card(f"cpu:{index}", "", BlockManager(200, 16), 4096) for index in range(2))
    placement = ElasticPlacement(idle, busy, can_share=True)
    sizes = {busy: StepSize(3, 300), idle: StepSize(0)}
    gathers = OtherPrompts(may_gather=lambda card: card is busy, room=lambda card: 0.5 if card is busy else 1.0)
    short, long = make_long(0, [1] * 600), make_long(1, [2] * 1200)
    assert placement.places_of(short, sizes, gathers) == Places(idle, busy), "it is not shared, either"
    assert placement.places_of(short, sizes, OtherPrompts()) == Places(busy, idle, is_shared=True)
    placement.least_shared_when_gathered = 1000
    assert placement.places_of(long, sizes, gathers) == Places(idle, busy, is_shared=True, gathers=True)
    many = dataclasses.replace(gathers, tokens_left={idle: 5000.0})
    assert placement.places_of(long, sizes, many) == Places(busy, idle, is_shared=True), (
        "both cards have prompts enough"
    )
    sooner, much_sooner = (
        dataclasses.replace(gathers, tokens_left={idle: 500.0}, tokens_in_flight={idle: tokens})
        for tokens in (200.0, 1400.0)
    )
    assert placement.places_of(short, sizes, sooner) == Places(idle, busy), "it would make the others' gaps longer"
    assert placement.places_of(short, sizes, much_sooner) == Places(busy, busy)
    full = dataclasses.replace(gathers, has_time=lambda card: card is not busy)
    assert placement.places_of(short, sizes, full).decode is idle, "it would not be admitted there"
    last = make_long(2, [3] * 600, max_tokens=1)
    assert placement.places_of(last, sizes, gathers) == Places(idle, idle), "nothing reads its KV"
    held = busy.block_manager.allocate((), 70)
    assert placement.places_of(short, sizes, gathers).is_shared, "half of the busy card's blocks stay free"
    busy.block_manager.free(held)
    history = busy.block_manager.allocate((), 75)
    busy.block_manager.cache(long, history, 0, 1200)
    busy.block_manager.free(history)
    later = make_long(3, [2] * 1200 + [4] * 50)
    assert placement.places_of(later, sizes, gathers) == Places(busy, busy), "it goes where its history is"
    apart = ElasticPlacement(idle, busy, can_share=False)
    assert apart.places_of(short, sizes, gathers) == Places(idle, idle), "nothing can cross"
