"""On cards: threads, `close` and interrupts, logits that are not finite, torch's global settings, weights' way in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm import LLM, NonFiniteLogitsError, SamplingParams
from nanovllm.utils.upload import Upload
from tests import test_threads, tiny
from tests.test_numbers import default_device, default_dtype

pytestmark = pytest.mark.gpu

GREEDY = SamplingParams(temperature=0, max_tokens=16)
CARDS = [False, pytest.param(True, marks=pytest.mark.two_gpu)]
PROMPTS = [[1, 2, 3], [4, 5, 6, 7], [8] * 40]


@pytest.fixture(scope="module")
def tiny_on_disk(tmp_path_factory):
    model = tiny.make_reference(seed=1, head_dim=64)
    return tiny.save(model, tmp_path_factory.mktemp("tiny64")), model


@pytest.fixture
def on_cards(monkeypatch):
    """The tests of `test_threads` make their engines on GPUs."""

    def make(path, two_devices, **options):
        options = {"num_kvcache_blocks": 200, "max_num_batched_tokens": 64, "kvcache_block_size": 16, **options}
        return LLM(path, device="cuda", dtype="float32", enable_two_gpu_pd=two_devices, max_num_seqs=64, **options)

    monkeypatch.setattr(test_threads, "make", make)


@pytest.mark.parametrize("two_devices", CARDS)
def test_threads_share_steps(tiny_on_disk, on_cards, two_devices):
    given = test_threads.test_threads_that_generate_get_their_own_tokens_and_share_steps
    given(lambda _: tiny_on_disk, None, two_devices)


@pytest.mark.parametrize("two_devices", CARDS)
@pytest.mark.parametrize("seed", range(2))
def test_everything_at_once(tiny_on_disk, on_cards, two_devices, seed):
    test_threads.test_everything_at_once(lambda _: tiny_on_disk, None, two_devices, seed)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("two_devices", CARDS)
def test_close_and_interrupts(tiny_on_disk, on_cards, two_devices):
    path, _ = tiny_on_disk
    test_threads.test_close_ends_what_other_threads_are_in(path, None, two_devices, 1)
    test_threads.test_close_from_a_signal_handler(path, None, int(two_devices), False)
    test_threads.test_interrupts_as_they_come(lambda _: tiny_on_disk, None, two_devices)


@pytest.mark.parametrize("two_devices", CARDS)
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_request_whose_logits_are_nan_ends_with_an_error(tiny_on_disk, tmp_path, backend, eager, two_devices):
    path, reference = tiny_on_disk
    weights = load_file(f"{path}/model.safetensors")
    tokens = tiny.reference_tokens(reference, PROMPTS[0], 16)
    fatal = next(token for token in tokens[1:] if token not in {t for prompt in PROMPTS for t in prompt})
    others = [tiny.reference_tokens(reference, prompt, 16) for prompt in PROMPTS[1:]]
    assert not any(fatal in answer for answer in others), "another seed is needed"
    weights["model.embed_tokens.weight"][fatal] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((Path(path) / name).read_bytes())
    options = {"attention_backend": backend, "enforce_eager": eager, "num_kvcache_blocks": 200, "max_num_seqs": 16}
    with LLM(str(tmp_path), device="cuda", dtype="float32", enable_two_gpu_pd=two_devices, **options) as llm:
        for params in (GREEDY, SamplingParams(temperature=0, max_tokens=16, logprobs=2)):
            bad, *good, worse = llm.generate([*PROMPTS, [7] * 50 + [fatal, 7]], params, use_tqdm=False)
            assert bad["token_ids"] == tokens[: tokens.index(fatal) + 1]
            assert worse["token_ids"] == []
            assert isinstance(bad["error"], NonFiniteLogitsError)
            assert isinstance(worse["error"], NonFiniteLogitsError)
            assert [answer["token_ids"] for answer in good] == others
        test_threads.at_rest(llm)


@pytest.mark.parametrize("two_devices", CARDS)
@pytest.mark.parametrize("eager", [False, True])
def test_torchs_global_settings_change_no_token(tiny_on_disk, eager, two_devices):
    path, reference = tiny_on_disk
    expected = [tiny.reference_tokens(reference, prompt, 16) for prompt in PROMPTS]
    for setting in (
        lambda: torch.autocast("cuda", dtype=torch.bfloat16),
        lambda: default_device("cuda:0"),
        lambda: default_device("meta"),
        lambda: default_dtype(torch.float64),
    ):
        options = {"num_kvcache_blocks": 200, "max_num_seqs": 16, "enforce_eager": eager}
        with (
            setting(),
            LLM(path, device="cuda", dtype="float32", enable_two_gpu_pd=two_devices, **options) as llm,
        ):
            answers = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
            sampled = llm.generate(PROMPTS, SamplingParams(top_k=3, top_p=0.8, logprobs=1, seed=1), use_tqdm=False)
        assert [answer["token_ids"] for answer in answers] == expected
        assert [answer["error"] for answer in sampled] == [None] * 3


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_weights_arrive_whole_through_pinned_buffers(stored):
    """Ten buffers' worth, a column slice of it, and what is smaller than a row of a buffer."""
    on_last_card = torch.device("cuda", torch.cuda.device_count() - 1)
    values = torch.randn(10_000, 8192).to(stored)
    targets = [torch.zeros(10_000, width, dtype=torch.bfloat16, device=on_last_card) for width in (8192, 4096)]
    vector = torch.zeros(8192, dtype=torch.bfloat16, device=on_last_card)
    with Upload(on_last_card) as upload:
        upload.copy(values, targets[0])
        upload.copy(values[:, 4096:], targets[1])
        upload.copy(values[0], vector)
    expected = values.bfloat16()
    assert torch.equal(targets[0].cpu(), expected)
    assert torch.equal(targets[1].cpu(), expected[:, 4096:])
    assert torch.equal(vector.cpu(), expected[0])
