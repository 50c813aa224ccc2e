"""Linear layers whose weights are those of several checkpoint tensors stacked by rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from nanovllm.errors import ModelLoadError
from nanovllm.kernels import Kernels
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.utils.fp8 import Fp8Format, ScaledTokens, ScaledWeight
from nanovllm.utils.weight import Part, QuantizedWeight, Weight


class Linear(nn.Module):
    """y = x W^T + b, [num_tokens, in_features] -> [num_tokens, sum(out_features)].

    `out_features` lists the rows of each stacked part: one GEMM serves query, key and value, or gate and up. `num_sms`
    is how many SMs the current stream has, None for all of the GPU. `quantization` is how the weights are kept, None
    for `dtype`; the bias and what the layer gives are in `dtype`.
    """

    weight: torch.Tensor | ScaledWeight

    def __init__(
        self,
        in_features: int,
        out_features: Sequence[int],
        backend: Kernels,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Fp8Format | None = None,
    ) -> None:
        super().__init__()
        self.out_features = tuple(out_features)
        self.backend = backend
        self.dtype = dtype
        self.quantization = quantization
        total = sum(self.out_features)
        if quantization is None:
            self.weight = nn.Parameter(torch.empty(total, in_features, dtype=dtype, device=device), requires_grad=False)
        else:
            self.weight = quantization.empty_weight(self.out_features, in_features, device)
        self.bias = nn.Parameter(torch.empty(total, dtype=dtype, device=device), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor | ScaledTokens, num_sms: int | None = None) -> torch.Tensor:
        return self.backend.linear(x, self.weight, self.bias, num_sms)

    def forward_normed(
        self, x: torch.Tensor, residual: torch.Tensor | None, norm: RMSNorm, num_sms: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer applied to the norm of `x + residual`, and that sum."""
        return self.backend.norm_linear(x, residual, (norm.weight, norm.eps), self.weight, self.bias, num_sms)

    def forward_gated(
        self, x: torch.Tensor, residual: torch.Tensor | None, norm: RMSNorm, num_sms: int | None = None
    ) -> tuple[torch.Tensor | ScaledTokens, torch.Tensor]:
        """SwiGLU's gate and up of the norm of `x + residual`: silu(first half of y) * second half; and that sum.

        The former is for a layer of the same format.
        """
        return self.backend.norm_gated_linear(x, residual, (norm.weight, norm.eps), self.weight, self.bias, num_sms)

    def checkpoint_tensors(self, names: Sequence[str], part: Part | None) -> dict[str, Weight]:
        """Checkpoint tensors `<name>.weight` (and scales, and `<name>.bias`), one name for each of the stacked ones.

        `part` is what this rank holds of each weight: some of its outputs (dim 0), and of the bias the same, or some of
        its inputs (dim 1), and of the bias all.

        Raises:
            ModelLoadError: the parts are no whole blocks of the quantization.
        """
        if isinstance(self.weight, ScaledWeight):
            tensors = self._scaled_tensors(self.weight, names, part)
        else:
            weights = (Weight(view, part) for view in self.weight.split(self.out_features))
            tensors = dict(zip((f"{name}.weight" for name in names), weights, strict=True))
        if self.bias is not None:
            bias_part = None if part is None or part.dim == 1 else part
            biases = (Weight(view, bias_part) for view in self.bias.split(self.out_features))
            tensors |= zip((f"{name}.bias" for name in names), biases, strict=True)
        return tensors

    def _scaled_tensors(self, weight: ScaledWeight, names: Sequence[str], part: Part | None) -> dict[str, Weight]:
        assert self.quantization is not None, "a scaled weight has a format"
        self._check_blocks(weight, names, part)
        # Scales of whole rows are those of a rank's inputs, too.
        has_scale_part = part is not None and (part.dim == 0 or weight.block is not None)
        tensors: dict[str, Weight] = {}
        all_scales = weight.scales.split(self.quantization.scale_rows(self.out_features))
        for name, values, scales in zip(names, weight.values.split(self.out_features), all_scales, strict=True):
            if self.quantization.scale_name is None:
                view = ScaledWeight(values, scales, weight.block)
                tensors[f"{name}.weight"] = QuantizedWeight(values, part, scaled=view, dtype=self.dtype)
            else:
                tensors[f"{name}.weight"] = Weight(values, part)
                scale_part = part if has_scale_part else None
                tensors[f"{name}.{self.quantization.scale_name}"] = Weight(scales, scale_part)
        return tensors

    def _check_blocks(self, weight: ScaledWeight, names: Sequence[str], part: Part | None) -> None:
        if weight.block is None:
            return
        rows = self.out_features if len(names) > 1 or (part is not None and part.dim == 0) else ()
        uneven = [(name, size, "outputs") for name, size in zip(names, rows, strict=False) if size % weight.block]
        if part is not None and part.dim == 1 and weight.values.shape[1] % weight.block:
            uneven.append((names[0], weight.values.shape[1], "inputs"))
        for name, size, what in uneven:
            if part is not None and part.dim == (0 if what == "outputs" else 1):
                raise ModelLoadError(
                    f"tensor_parallel_size={part.size} leaves {size} {what} of {name}.weight to each rank, which are "
                    f"no whole blocks of {weight.block} with one scale; pass a tensor_parallel_size that cuts none, or "
                    "a checkpoint with a scale for each channel"
                )
            raise ModelLoadError(
                f"{name}.weight has {size} {what}, which are no whole blocks of {weight.block} with one scale; pass a "
                "checkpoint with a scale for each channel, or one in bfloat16 with quantization='fp8'"
            )
