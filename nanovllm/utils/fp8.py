"""Numbers in FP8 (e4m3) with float32 scales: what is stored, and the rules by which numbers are quantized.

A scale is 1 / 448 of the largest magnitude among the numbers that share it, 448 being the largest number of e4m3:
value * scale is the number. Scales of KV are given instead (`quantize_by`). Knows nothing of layers, checkpoints or
kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
SCALE_OF_ONE = 1.0 / LARGEST
"""The scale of a largest magnitude of 1, which others are multiplied by: torch divides by 448 otherwise on GPUs than on
CPUs, and where the last bit of a scale differs, one bfloat16 in sixteen may round the other way."""
SMALLEST_SCALE = 1e-30
"""Scale of zeros, by which they can be divided."""


@dataclass(frozen=True)
class Fp8Format:
    """How the weights of a model's linear layers are kept in FP8, and their inputs quantized, token by token.

    Attributes:
        block: outputs and inputs of a block of weights that share a scale, and inputs of a token that do; None for a
            scale for each output's weights, and for all inputs of a token.
        scale_name: what a checkpoint calls the scales of `<layer>.weight`: `<layer>.<scale_name>`; None if it has
            weights in a wider type, which are quantized as they are loaded.
    """

    block: int | None = None
    scale_name: str | None = None

    def empty_weight(self, out_features: Sequence[int], in_features: int, device: torch.device) -> ScaledWeight:
        """Uninitialized weights of stacked parts, each with scales of its own."""
        values = torch.empty(sum(out_features), in_features, dtype=E4M3, device=device)
        scale_rows, scale_columns = sum(self.scale_rows(out_features)), 1
        if self.block is not None:
            scale_columns = -(-in_features // self.block)
        scales = torch.empty(scale_rows, scale_columns, dtype=torch.float32, device=device)
        return ScaledWeight(values, scales, self.block)

    def scale_rows(self, out_features: Sequence[int]) -> list[int]:
        """Rows of scales of each of the stacked parts."""
        return [rows if self.block is None else -(-rows // self.block) for rows in out_features]


@dataclass(frozen=True)
class ScaledWeight:
    """Weights [out, in] in e4m3 and their float32 scales: [out, 1], or those of blocks, [out / block, in / block].

    The numbers of blocks are rounded up. Parts that are stacked are whole blocks each, or else have no blocks.

    Attributes:
        values, scales: as above.
        block: as in the format.
    """

    values: torch.Tensor
    scales: torch.Tensor
    block: int | None

    def quantize(self, weights: torch.Tensor) -> None:
        """Stores weights, [out, in]."""
        values, scales = quantize(weights, self.block or 1, self.block)
        self.values.copy_(values)
        self.scales.copy_(scales)

    def rows(self, rows: slice) -> ScaledWeight:
        """A view of some rows, which begin with a block."""
        size = self.block or 1
        return ScaledWeight(self.values[rows], self.scales[rows.start // size : -(-rows.stop // size)], self.block)

    def dequantized(self) -> torch.Tensor:
        """[out, in] float32."""
        return dequantized(self.values, self.scales, self.block or 1, self.block)


def parts_of(weight: torch.Tensor | ScaledWeight) -> tuple[torch.Tensor, torch.Tensor | None, int | None]:
    """The values of a weight, its scales and their block; None and None of a weight that is not quantized."""
    return (weight.values, weight.scales, weight.block) if isinstance(weight, ScaledWeight) else (weight, None, None)


@dataclass(frozen=True)
class ScaledTokens:
    """Inputs of a linear layer whose weights are scaled, as some backends pass them from layer to layer.

    Attributes:
        values: [T, in] e4m3.
        scales: [T, 1] float32, or [T, in / block], rounded up, as the format of the weights has it; those of a block
            are contiguous.
        counters: zeros, int32, for thread blocks to count in; they leave zeros.
        dtype: of what the layer gives.
    """

    values: torch.Tensor
    scales: torch.Tensor
    counters: torch.Tensor
    dtype: torch.dtype


def quantize(x: torch.Tensor, rows: int, columns: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, N] -> e4m3 values of that shape and [M / rows, N / columns] float32 scales, rounded up, of blocks.

    `columns` is None for blocks of whole rows.
    """
    height, width = x.shape
    columns = columns or max(width, 1)
    padded = functional.pad(x.float(), (0, -width % columns, 0, -height % rows))
    blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    scales = (blocks.abs().amax(dim=(1, 3)) * SCALE_OF_ONE).clamp(min=SMALLEST_SCALE)
    values = (blocks / scales[:, None, :, None]).clamp(-LARGEST, LARGEST).to(E4M3)
    return values.flatten(2, 3).flatten(0, 1)[:height, :width], scales


def quantize_by(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """e4m3 values of `x / scales`, whose shapes broadcast. What is too large for the scale is stored as the largest
    number; what is not finite, as NaN."""
    quotients = (x.float() / scales).clamp(-LARGEST, LARGEST)
    return torch.where(x.isfinite(), quotients, torch.nan).to(E4M3)


def dequantized(values: torch.Tensor, scales: torch.Tensor, rows: int, columns: int | None) -> torch.Tensor:
    """What `quantize` made `values` and `scales` of, but for rounding: [M, N] float32."""
    height, width = values.shape
    spread = scales.repeat_interleave(rows, 0)[:height].repeat_interleave(columns or max(width, 1), 1)[:, :width]
    return values.float() * spread
