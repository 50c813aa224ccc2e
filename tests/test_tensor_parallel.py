"""Several ranks that compute one model: its layers, and engines with worker processes, on CPUs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nanovllm.kernels import AttentionMetadata, torch_reference
from nanovllm.models import resolve_model
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.utils.loader import checkpoint_folder, fill_randomly, load_weights, read_json
from tests import tiny


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
    _, config = resolve_model(read_json(checkpoint_folder(folder), "config.json"))
    model = Qwen3ForCausalLM(
        config, torch_reference.Backend(), 128, dtype=torch.float32, device=torch.device("cpu"), ranks=ranks
    )
    with torch.inference_mode():
        if is_dummy:
            fill_randomly(model.checkpoint_tensors(), 7, model.checkpoint_parts())
        else:
            load_weights(
                checkpoint_folder(folder),
                model.checkpoint_tensors(),
                model.ignored_checkpoint_tensors(),
                model.checkpoint_parts(),
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
        return model.compute_logits(model(tokens, positions, pool, metadata))


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """Checkpoints that four ranks can share: with biases, and with tied embeddings."""
    made = {}
    for name, options in (("biased", {"attention_bias": True}), ("tied", {"tie_word_embeddings": True})):
        sizes = {"vocab_size": 208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
        model = tiny.make_reference(seed=3, **sizes, **options)
        made[name] = tiny.save(model, tmp_path_factory.mktemp(name))
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
