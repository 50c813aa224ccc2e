"""Streams of many requests at once: the tokens and texts that each would have alone, however they are emitted."""

from __future__ import annotations

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.engine import streamed_rows
from nanovllm.engine.requests import RequestIntake
from tests import tiny
from tests.test_engine import drain
from tests.tokenizers_made import KINDS


def params_of(number: int) -> SamplingParams:
    """Sampled tokens of all kinds: open characters, special tokens, stops of many sorts, log-probabilities."""
    some = [
        {},
        {"stop_token_ids": [7, 8]},
        {"stop_token_ids": list(range(20, 60))},  # more than the batch's array holds
        {"logprobs": 2},
        {"min_tokens": 20, "stop_token_ids": list(range(100))},
        {"stop": ["e", "日"]},
    ][number % 6]
    return SamplingParams(temperature=1.3, seed=number, max_tokens=40 + number, ignore_eos=True, **some)


@pytest.mark.parametrize("steps_overlap", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_streams_add_up_to_what_generate_gives(tiny_path, kind, steps_overlap):
    tokenizer, prompts = KINDS[kind](), tiny.random_prompts(24, seed=61, longest=30)
    with LLM(tiny_path, device="cpu", num_kvcache_blocks=400) as llm:
        llm._intake = RequestIntake(tokenizer, tiny.VOCAB_SIZE, llm.config.max_model_len or 256, 6400, frozenset(), 0)
        params = [params_of(number) for number in range(len(prompts))]
        whole = llm.generate(prompts, params, use_tqdm=False)
        ids = [llm.add_request(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
        outputs = drain(llm, steps_overlap=steps_overlap)
    for request_id, answer in zip(ids, whole, strict=True):
        assert [token for output in outputs[request_id] for token in output.new_token_ids] == answer["token_ids"]
        assert "".join(output.text for output in outputs[request_id]) == answer["text"]
        assert outputs[request_id][-1].finish_reason == answer["finish_reason"]
        assert all(output.ttft_s is not None for output in outputs[request_id])


def test_most_tokens_are_emitted_at_once(tiny_path, monkeypatch):
    """The test above would not notice if all were done one by one."""
    at_once, commit = [], streamed_rows.StreamedRows._commit
    monkeypatch.setattr(
        streamed_rows.StreamedRows,
        "_commit",
        lambda rows, indices, *rest: (at_once.append(len(indices)), commit(rows, indices, *rest)),
    )
    with LLM(tiny_path, device="cpu") as llm:
        llm._intake = RequestIntake(KINDS["byte_level"](), tiny.VOCAB_SIZE, 256, 6400, frozenset(), 0)
        for number in range(6):
            llm.add_request([1 + number, 2, 3], SamplingParams(temperature=0, max_tokens=33))
        outputs = drain(llm)
    # Not the first token, which a prefill gives, nor the last, nor those of open characters.
    assert 0 < sum(at_once) <= 6 * 31
    assert sum(len(output.new_token_ids) for each in outputs.values() for output in each) == 6 * 33
