"""Token embedding and the head that turns hidden states into logits; the two may share one weight."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class TokenEmbedding(nn.Module):
    """[num_tokens] int64 -> [num_tokens, hidden_size]; `project` is the transposed use, as output head."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        weight = torch.empty(vocab_size, hidden_size, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return functional.embedding(token_ids, self.weight)

    def project(self, hidden: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, vocab_size], in `out` if given."""
        return torch.mm(hidden, self.weight.T, out=out)
