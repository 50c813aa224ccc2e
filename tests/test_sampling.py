"""Sampling draws from the right distribution, with random numbers that belong to the request."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from nanovllm import LLM, RequestError, SamplingParams
from nanovllm.engine.execution.token_counts import TokenCounts
from nanovllm.kernels import torch_reference
from nanovllm.kernels.torch_reference import gumbel_noise
from nanovllm.layers.ranks import OneRank
from nanovllm.layers.sampler import IN_PROMPT, SamplingInputs, sample
from nanovllm.utils.device import Device
from tests import tiny
from tests.test_engine import drain, tokens_of


def inputs(count: int, *, temperature: float = 1.0, top_k: int = 10**6, top_p: float = 1.0, min_p: float = 0.0):
    return SamplingInputs(
        temperatures=torch.full((count,), temperature),
        seeds=torch.arange(count) * 7919,
        output_indices=torch.arange(count) % 13,
        filters=(torch.full((count,), top_k), torch.full((count,), top_p), torch.full((count,), min_p)),
    )


def frequencies(probabilities: list[float], **options: float) -> torch.Tensor:
    count = 20_000
    logits = torch.tensor(probabilities).log().expand(count, -1)
    drawn = sample(logits, inputs(count, **options), torch_reference.Backend(), OneRank()).token_ids
    return torch.bincount(drawn, minlength=len(probabilities)) / count


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [0.16 / 0.3, 0.09 / 0.3, 0.04 / 0.3, 0.01 / 0.3]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_p": 0.69}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.71}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        ({"min_p": 0.4}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_k": 3, "top_p": 0.7}, [4 / 7, 3 / 7, 0, 0]),  # 0.7 of what top_k leaves: 0.444 + 0.333
    ],
)
def test_frequencies(options, expected):
    order = [2, 0, 3, 1]  # the filters must not depend on tokens being sorted
    drawn = frequencies([[0.4, 0.3, 0.2, 0.1][i] for i in order], **options)
    torch.testing.assert_close(drawn, torch.tensor(expected, dtype=torch.float32)[order], atol=0.012, rtol=0)


def test_noise_is_gumbel_and_differs_by_seed_index_and_token():
    noise = gumbel_noise(torch.arange(64), torch.zeros(64, dtype=torch.int64), 4096).double()
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(torch.pi**2 / 6, abs=0.03)
    correlations = torch.corrcoef(noise) - torch.eye(64)
    assert correlations.abs().max() < 0.1
    indices = gumbel_noise(torch.zeros(64, dtype=torch.int64), torch.arange(64), 4096).double()
    assert (torch.corrcoef(indices) - torch.eye(64)).abs().max() < 0.1
    large = torch.tensor([2**63 - 1, 2**62, 2**32, 0])
    assert len({row.tobytes() for row in gumbel_noise(large, torch.zeros(4, dtype=torch.int64), 64).numpy()}) == 4


def test_noise_has_fixed_values():
    """The numbers are part of what a seed means: a change of the hash changes everyone's tokens."""
    noise = gumbel_noise(torch.tensor([0, 12345678901]), torch.tensor([0, 7]), 3)
    expected = torch.tensor(NOISE_SAMPLES)
    torch.testing.assert_close(noise, expected, atol=1e-5, rtol=0)


NOISE_SAMPLES = [[0.76926, 0.52098, 0.2949], [1.49122, 0.64739, 1.49163]]


def test_seeded_tokens_do_not_depend_on_batch_or_preemption(tiny_path):
    prompts = tiny.random_prompts(8, seed=11)
    params = [
        SamplingParams(temperature=0.9, top_p=0.9 if i % 2 else 1.0, seed=i, max_tokens=30, ignore_eos=True)
        for i in range(8)
    ]
    with LLM(tiny_path, device="cpu") as llm:
        alone = [llm.generate([p], s, use_tqdm=False)[0]["token_ids"] for p, s in zip(prompts, params, strict=True)]
        together = [a["token_ids"] for a in llm.generate(prompts, params, use_tqdm=False)]
    with LLM(tiny_path, device="cpu", num_kvcache_blocks=9, max_num_batched_tokens=32) as llm:
        squeezed = [a["token_ids"] for a in llm.generate(prompts, params, use_tqdm=False)]
        assert llm.scheduler.num_preemptions > 0
    assert alone == together == squeezed


def test_requests_without_a_seed_differ_and_an_engine_seed_repeats_them(tiny_path):
    def run(seed: int) -> list[list[int]]:
        with LLM(tiny_path, device="cpu", seed=seed) as llm:
            params = SamplingParams(temperature=1.0, max_tokens=12)
            return [answer["token_ids"] for answer in llm.generate([[1, 2, 3]] * 3, params, use_tqdm=False)]

    first = run(0)
    assert len({tuple(tokens) for tokens in first}) == 3
    assert run(0) == first != run(1)


def test_min_tokens_bans_stop_tokens_and_logprobs_are_those_of_the_model(tiny_path):
    with LLM(tiny_path, device="cpu") as llm:
        greedy = llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)[0]
        first = greedy["token_ids"][0]
        stopped = llm.generate([[5, 6, 7]], SamplingParams(temperature=0, stop_token_ids=[first]), use_tqdm=False)[0]
        assert stopped["token_ids"] == [first]
        assert stopped["finish_reason"] == "stop"
        params = SamplingParams(temperature=0, stop_token_ids=[first], min_tokens=4, max_tokens=8, logprobs=2)
        kept = llm.generate([[5, 6, 7]], params, use_tqdm=False)[0]
        assert first not in kept["token_ids"][:4]
        # The banned token stays the most probable one of the model; the chosen one is the second.
        top = kept["logprobs"][0].top
        assert next(iter(top)) == first
        assert list(top)[1] == kept["token_ids"][0]
        assert kept["logprobs"][0].logprob == pytest.approx(top[kept["token_ids"][0]])
        assert all(len(entry.top) == 2 for entry in kept["logprobs"])


def test_logprobs_are_cut_to_each_request_and_absent_where_not_asked_for(tiny_path):
    params = [SamplingParams(temperature=0, max_tokens=3, logprobs=n) for n in (None, 0, 3)]
    with LLM(tiny_path, device="cpu") as llm:
        none, zero, three = llm.generate([[1, 2]] * 3, params, use_tqdm=False)
    assert none["logprobs"] is None
    assert [len(entry.top) for entry in zero["logprobs"]] == [0, 0, 0]
    assert [len(entry.top) for entry in three["logprobs"]] == [3, 3, 3]
    assert none["token_ids"] == [entry.token_id for entry in three["logprobs"]]


@pytest.mark.parametrize("two_devices", [False, True])
def test_biases_are_those_of_transformers(checkpoint, two_devices):
    """Its processor of sequences of one token adds the same to the logits of every step."""
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(4, seed=14, longest=40)
    biases = [{3: 2.5, 77: -1.5, 200: 0.75}, {5: 100}, dict.fromkeys(range(100), -100.0), {}]
    params = [SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logit_bias=bias) for bias in biases]
    with LLM(path, device="cpu", enable_two_gpu_pd=two_devices) as llm:
        answers = llm.generate(prompts, params, use_tqdm=False)
        plain = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False)
    for prompt, bias, answer in zip(prompts, biases, answers, strict=True):
        sequence_bias = {(token,): float(value) for token, value in bias.items()} or None
        expected = reference.generate(
            torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False, sequence_bias=sequence_bias
        )
        assert answer["token_ids"] == expected[0, len(prompt) :].tolist()
    assert answers[1]["token_ids"] == [5] * 12
    assert min(answers[2]["token_ids"]) >= 100
    assert answers[0]["token_ids"] != plain[0]["token_ids"]


def test_a_bias_on_a_stop_token_gives_way_to_min_tokens(tiny_path):
    with LLM(tiny_path, device="cpu") as llm:
        params = SamplingParams(temperature=0, max_tokens=9, min_tokens=4, stop_token_ids=[5], logit_bias={5: 100})
        assert llm.generate([[1, 2, 3]], params, use_tqdm=False)[0]["token_ids"].index(5) == 4


@pytest.mark.parametrize("seed", [None, 7, 2**63 - 1])
def test_n_answers_are_those_of_as_many_requests(tiny_path, seed):
    params = SamplingParams(temperature=1.0, max_tokens=10, seed=seed, n=3)
    prompts = [[1, 2, 3], [4, 5]]
    with LLM(tiny_path, device="cpu") as llm:
        both = llm.generate(prompts, [params, SamplingParams(temperature=0, max_tokens=4)], use_tqdm=False)
        assert "outputs" not in both[1]
        outputs = both[0]["outputs"]
        assert {key: both[0][key] for key in outputs[0]} == outputs[0]
        assert len({tuple(answer["token_ids"]) for answer in outputs}) == 3
        assert all(answer["prompt_token_ids"] == prompts[0] for answer in outputs)
        if seed is not None:
            seeds = [(seed + index) % 2**63 for index in range(3)]
            each = [SamplingParams(temperature=1.0, max_tokens=10, seed=one) for one in seeds]
            alone = llm.generate([prompts[0]] * 3, each, use_tqdm=False)
            assert [answer["token_ids"] for answer in outputs] == [answer["token_ids"] for answer in alone]


def test_n_answers_of_a_stream_are_refused(tiny_path):
    with LLM(tiny_path, device="cpu") as llm:
        for call in (llm.add_request, llm.generate_stream):
            with pytest.raises(RequestError, match="n=2: a stream, or a request of `add_request`, has one answer"):
                call([1, 2, 3], SamplingParams(n=2))
        assert llm.is_finished()


PENALTIES = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.7},
    {"frequency_penalty": -0.5, "presence_penalty": -1.0},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.4},
    {},
    {"repetition_penalty": 1.2, "top_k": 3, "logit_bias": {7: 3.0}},
]


def penalised_tokens(reference, prompt, max_tokens, penalties):
    """Greedy tokens by the definition, from logits of transformers and its processor of repetitions."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        with torch.inference_mode():
            logits = reference(torch.tensor([tokens])).logits[:, -1].float()
        repetition = RepetitionPenaltyLogitsProcessor(penalties.get("repetition_penalty", 1.0))
        logits = repetition(torch.tensor([tokens]), logits)[0]
        counts = torch.bincount(torch.tensor(tokens[len(prompt) :], dtype=torch.int64), minlength=len(logits))
        logits -= penalties.get("frequency_penalty", 0.0) * counts + penalties.get("presence_penalty", 0.0) * (
            counts > 0
        )
        for token_id, bias in penalties.get("logit_bias", {}).items():
            logits[token_id] += bias
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 24},
        {"num_kvcache_blocks": 14, "max_num_seqs": 6},
        {"enable_two_gpu_pd": True},
        {"enable_two_gpu_pd": True, "enable_decode_pipeline": True},
        {"max_num_seqs": 3},
    ],
    ids=["plain", "chunked", "preempted", "two devices", "pipeline", "rows used again"],
)
def test_penalties_are_those_of_their_definition(checkpoint, options):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(len(PENALTIES), seed=15, longest=30)
    params = [SamplingParams(temperature=0, max_tokens=25, ignore_eos=True, **penalties) for penalties in PENALTIES]
    with LLM(path, device="cpu", **options) as llm:
        ids = [llm.add_request(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
        outputs = drain(llm, steps_overlap=True)
        assert (llm.scheduler.num_preemptions > 0) == ("num_kvcache_blocks" in options)
    for request_id, prompt, penalties in zip(ids, prompts, PENALTIES, strict=True):
        assert tokens_of(outputs[request_id]) == penalised_tokens(reference, prompt, 25, penalties), penalties


def test_penalties_hold_after_a_launch_that_failed(checkpoint):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(len(PENALTIES), seed=16, longest=30)
    params = [SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, **penalties) for penalties in PENALTIES]
    with LLM(path, device="cpu") as llm:
        run, calls = llm.decode_runner.decode.run, itertools.count()

        def failing(task):
            sampled = run(task)  # the counts on the device have gone on
            if next(calls) in (5, 9, 10):
                raise RuntimeError("injected")
            return sampled

        llm.decode_runner.decode.run = failing
        answers = llm.generate(prompts, params, use_tqdm=False)
    for prompt, penalties, answer in zip(prompts, PENALTIES, answers, strict=True):
        assert answer["token_ids"] == penalised_tokens(reference, prompt, 20, penalties), penalties


def test_log_probabilities_beside_penalties_are_those_of_the_model(tiny_path):
    with LLM(tiny_path, device="cpu") as llm:
        params = SamplingParams(temperature=0, max_tokens=6, frequency_penalty=2.0, logprobs=3)
        answer = llm.generate([[1, 2, 3]], params, use_tqdm=False)[0]
        plain = llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=1, logprobs=3), use_tqdm=False)[0]
    assert answer["logprobs"][0] == plain["logprobs"][0]


def test_counts_do_not_run_into_the_mark_of_the_prompt():
    counts = TokenCounts(Device("cpu", 0), 2, 8, OneRank())
    rows, tokens = torch.tensor([0, 1]), torch.tensor([3, -1])
    counts.tensor[0, 3] = IN_PROMPT - 2
    for _ in range(4):
        counts.add(rows, tokens)
    assert counts.tensor[0].tolist() == [0, 0, 0, IN_PROMPT - 1, 0, 0, 0, 0]
    assert not counts.tensor[1].any()
