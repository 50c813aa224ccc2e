"""Linear layers whose weights are those of several checkpoint tensors stacked by rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from nanovllm.kernels import Kernels
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.utils.weight import Part, Weight


class Linear(nn.Module):
    """y = x W^T + b, [num_tokens, in_features] -> [num_tokens, sum(out_features)].

    `out_features` lists the rows of each stacked part: one GEMM serves query, key and value, or gate and up. `num_sms`
    is how many SMs the current stream has, None for all of the GPU.
    """

    def __init__(
        self,
        in_features: int,
        out_features: Sequence[int],
        backend: Kernels,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.out_features = tuple(out_features)
        self.backend = backend
        total = sum(self.out_features)
        self.weight = nn.Parameter(torch.empty(total, in_features, dtype=dtype, device=device), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(total, dtype=dtype, device=device), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor, num_sms: int | None = None) -> torch.Tensor:
        return self.backend.linear(x, self.weight, self.bias, num_sms)

    def forward_normed(
        self, x: torch.Tensor, residual: torch.Tensor | None, norm: RMSNorm, num_sms: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer applied to the norm of `x + residual`, and that sum."""
        return self.backend.norm_linear(x, residual, (norm.weight, norm.eps), self.weight, self.bias, num_sms)

    def forward_gated(
        self, x: torch.Tensor, residual: torch.Tensor | None, norm: RMSNorm, num_sms: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """SwiGLU's gate and up of the norm of `x + residual`: silu(first half of y) * second half; and that sum."""
        return self.backend.norm_gated_linear(x, residual, (norm.weight, norm.eps), self.weight, self.bias, num_sms)

    def checkpoint_tensors(self, names: Sequence[str], part: Part | None) -> dict[str, Weight]:
        """Checkpoint tensors `<name>.weight` (and `<name>.bias`), one name for each of the stacked ones.

        `part` is what this rank holds of each weight: some of its outputs (dim 0), and of the bias the same, or some of
        its inputs (dim 1), and of the bias all.
        """
        weights = (Weight(view, part) for view in self.weight.split(self.out_features))
        tensors = dict(zip((f"{name}.weight" for name in names), weights, strict=True))
        if self.bias is not None:
            bias_part = None if part is None or part.dim == 1 else part
            biases = (Weight(view, bias_part) for view in self.bias.split(self.out_features))
            tensors |= zip((f"{name}.bias" for name in names), biases, strict=True)
        return tensors
