"""Numbers at their edges: logits that are not finite, integers beyond any machine's, and torch's global settings."""

from __future__ import annotations

import contextlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm import LLM, NonFiniteLogitsError, SamplingParams
from nanovllm.kernels import NO_FINITE_TOKEN, torch_reference
from nanovllm.layers.ranks import OneRank
from nanovllm.layers.sampler import SamplingInputs, sample
from tests import tiny

GREEDY = SamplingParams(temperature=0, max_tokens=16)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7], [8] * 40]
MODES = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.9},
    "filtered": {"temperature": 0.9, "top_k": 5, "top_p": 0.9},
    "logprobs": {"temperature": 0.0, "logprobs": 3},
    "min_tokens": {"temperature": 0.9, "min_tokens": 12, "stop_token_ids": [3]},
}


def poison(folder, token, value=float("nan")):
    """Makes the embedding of a token, and so every logit after it, something else."""
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("two_devices", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_request_whose_logits_are_nan_ends_with_an_error(checkpoint, tiny_copy, mode, two_devices):
    """In its prompt, and as soon as its own token makes them so; others are as they were."""
    path, _ = checkpoint("gqa2")
    params = SamplingParams(**MODES[mode], max_tokens=16, seed=1)
    with LLM(path, device="cpu") as llm:
        expected = llm.generate(PROMPTS, params, use_tqdm=False)
    seen = {token for answer in expected for token in answer["token_ids"]} | {token for p in PROMPTS for token in p}
    unused = next(token for token in range(tiny.VOCAB_SIZE) if token not in seen)
    poison(tiny_copy, unused)
    bad_prompt = [7] * 33 + [unused] + [7] * 20
    with LLM(str(tiny_copy), device="cpu", enable_two_gpu_pd=two_devices) as llm:
        *good, bad = llm.generate([*PROMPTS, bad_prompt], params, use_tqdm=False)
        assert [answer["token_ids"] for answer in good] == [answer["token_ids"] for answer in expected]
        assert bad["finish_reason"] == "error"
        assert isinstance(bad["error"], NonFiniteLogitsError)
        assert "NaN" in str(bad["error"])
        assert bad["token_ids"] == []
        # KV that may be bad is nobody else's.
        hits = llm.metrics()["prefix_cache_hit_tokens"]
        (again,) = llm.generate([bad_prompt], params, use_tqdm=False)
        assert isinstance(again["error"], NonFiniteLogitsError)
        assert llm.metrics()["prefix_cache_hit_tokens"] == hits
        while llm._steps or llm._handoffs:
            llm.step()
        llm.scheduler.check_integrity()
        assert (
            llm.scheduler.placement.decode_card.block_manager.num_held_blocks
            == llm.scheduler.placement.prefill_card.block_manager.num_held_blocks
            == 0
        )

    # A token that one request samples on its way, and no other one has.
    tokens = expected[0]["token_ids"]
    others = {token for answer in expected[1:] for token in answer["token_ids"]} | {t for p in PROMPTS for t in p}
    index, fatal = next((i, token) for i, token in enumerate(tokens) if token not in others and i >= 2)
    index = tokens.index(fatal)
    poison(tiny_copy, unused, 0.0)
    poison(tiny_copy, fatal)
    with LLM(str(tiny_copy), device="cpu", enable_two_gpu_pd=two_devices) as llm:
        answers = llm.generate(PROMPTS, params, use_tqdm=False)
        assert answers[0]["token_ids"] == tokens[: index + 1]
        assert isinstance(answers[0]["error"], NonFiniteLogitsError)
        assert f"output token {index + 1}" in str(answers[0]["error"])
        assert [answer["token_ids"] for answer in answers[1:]] == [answer["token_ids"] for answer in expected[1:]]
        stream = list(llm.generate_stream(PROMPTS[0], params))
        assert [token for output in stream for token in output.new_token_ids] == tokens[: index + 1]
        assert isinstance(stream[-1].error, NonFiniteLogitsError)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("extra", ["plain", "filters", "logprobs", "banned"])
def test_one_bad_logit_is_enough(value, temperature, extra):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    logits[1, 17] = value
    full = torch.full((3,), 50), torch.full((3,), 0.9), torch.zeros(3)
    inputs = SamplingInputs(
        torch.full((3,), temperature),
        torch.arange(3),
        torch.zeros(3, dtype=torch.int64),
        filters=full if extra == "filters" else None,
        banned=(torch.tensor([0]), torch.tensor([5])) if extra == "banned" else None,
        num_logprobs=2 if extra == "logprobs" else None,
    )
    tokens = sample(logits, inputs, torch_reference.Backend(), OneRank()).token_ids.tolist()
    assert tokens[1] == NO_FINITE_TOKEN
    assert min(tokens[0], tokens[2]) >= 0


@pytest.mark.parametrize("two_devices", [False, True])
@pytest.mark.parametrize("huge", [2**63 - 1, 2**63, 2**64, 2**200])
def test_huge_integers_are_as_good_as_the_longest_request(checkpoint, huge, two_devices):
    path, _ = checkpoint("gqa2")
    options = {"device": "cpu", "max_model_len": 60, "enable_two_gpu_pd": two_devices}
    with LLM(path, **options) as llm:
        plain = llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=57), use_tqdm=False)[0]
        for params in (
            SamplingParams(temperature=0, max_tokens=huge),
            SamplingParams(temperature=0, max_tokens=huge, min_tokens=huge),
            SamplingParams(temperature=0, max_tokens=huge, min_tokens=huge, stop_token_ids=[plain["token_ids"][4] ^ 1]),
            SamplingParams(temperature=0, max_tokens=huge, top_k=huge),
            SamplingParams(temperature=1e-9, max_tokens=huge, top_k=1),
        ):
            answer, other = llm.generate([[1, 2, 3], [5]], [params, GREEDY], use_tqdm=False)
            assert (answer["error"], other["error"]) == (None, None)
            assert answer["finish_reason"] == "length"
            if params.stop_token_ids == ():
                assert answer["token_ids"] == plain["token_ids"]
            assert len(answer["token_ids"]) == 57


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default device": lambda: default_device("meta"),
    "default dtype": lambda: default_dtype(torch.float64),
    "default half": lambda: default_dtype(torch.float16),
    "inference mode": torch.inference_mode,
    "grad": torch.enable_grad,
}


@pytest.mark.parametrize("made_within", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_torchs_global_settings_change_no_token(checkpoint, setting, made_within):
    path, reference = checkpoint("yarn_tied")
    expected = [tiny.reference_tokens(reference, prompt, 16) for prompt in PROMPTS]
    params = SamplingParams(temperature=0.8, top_k=20, seed=3, max_tokens=16, logprobs=1)
    with LLM(path, device="cpu", enable_two_gpu_pd=True) as llm:
        sampled = llm.generate(PROMPTS, params, use_tqdm=False)
    with contextlib.ExitStack() as stack:
        if made_within:
            stack.enter_context(SETTINGS[setting]())
        llm = stack.enter_context(LLM(path, device="cpu", enable_two_gpu_pd=True, verify_kv_handoff=True))
        if not made_within:
            stack.enter_context(SETTINGS[setting]())
        answers = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        again = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [answer["token_ids"] for answer in answers] == expected
    assert [answer["token_ids"] for answer in again] == [answer["token_ids"] for answer in sampled]
    assert [answer["logprobs"] for answer in again] == [answer["logprobs"] for answer in sampled]
