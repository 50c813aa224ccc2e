"""Token embedding and the head that turns hidden states into logits; the two may share one weight."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from nanovllm.layers.ranks import Ranks, part_of
from nanovllm.utils.weight import Weight


class TokenEmbedding(nn.Module):
    """[num_tokens] int64 -> [num_tokens, hidden_size]; `project` is the transposed use, as output head.

    The rows are divided evenly among the ranks.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, ranks: Ranks, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.ranks = ranks
        weight = torch.empty(vocab_size // ranks.size, hidden_size, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self.ranks.size == 1:
            return functional.embedding(token_ids, self.weight)
        rows = token_ids - self.ranks.rank * len(self.weight)
        is_here = (rows >= 0) & (rows < len(self.weight))
        embedded = functional.embedding(torch.where(is_here, rows, 0), self.weight)
        return self.ranks.all_reduce(torch.where(is_here.unsqueeze(1), embedded, 0.0))

    def project(self, hidden: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, vocab_size / ranks], in `out` if given."""
        return torch.mm(hidden, self.weight.T, out=out)

    def checkpoint_tensor(self) -> Weight:
        """The weight; each rank has the rows of its part of the vocabulary."""
        return Weight(self.weight, part_of(self.ranks, 0))
