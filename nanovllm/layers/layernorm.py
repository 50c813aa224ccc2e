"""RMSNorm (Zhang and Sennrich, 2019), with the residual addition that precedes it in a transformer layer."""

from __future__ import annotations

import torch
from torch import nn

from nanovllm.kernels import Kernels


class RMSNorm(nn.Module):
    """The norm of `x + residual` over the last dimension of [T, size], and the sum, which is the next residual."""

    def __init__(self, size: int, eps: float, backend: Kernels, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.backend.add_rms_norm(x, residual, self.weight, self.eps)
