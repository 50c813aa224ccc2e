"""A checkpoint's tensor, or a rank's part of it, where a layer has it.

All code that reads, fills, copies or counts weights uses `Weight`, and knows nothing of how a layer stores them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nanovllm.utils.fp8 import E4M3, ScaledWeight
from nanovllm.utils.upload import Upload

WIDE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
QUANTIZED_ROWS = 1024
"""Rows that are quantized at a time, to take little memory: whole blocks of any format."""


@dataclass(frozen=True)
class Part:
    """The part of a checkpoint's tensor that a rank has: number `rank` of `size` equal parts along `dim`."""

    dim: int
    rank: int
    size: int

    def whole_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of the whole tensor, given the shape of a part."""
        return torch.Size(n * self.size if dim == self.dim else n for dim, n in enumerate(shape))

    def index(self, whole_shape: Sequence[int]) -> tuple[slice, ...]:
        """The index of the part in the whole tensor."""
        length = whole_shape[self.dim] // self.size
        return (*[slice(None)] * self.dim, slice(self.rank * length, (self.rank + 1) * length))


@dataclass(frozen=True)
class Weight:
    """A checkpoint's tensor, or this rank's part of it, where a layer has it.

    Attributes:
        data: view of the layer's parameter; what is stored there is converted to its type.
        part: which part of the tensor the data is, None for all of it.
    """

    data: torch.Tensor
    part: Part | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the data on this rank."""
        return self.data.nbytes

    @property
    def stored_dtypes(self) -> tuple[torch.dtype, ...]:
        """The types that the checkpoint's tensor may have."""
        return (E4M3,) if self.data.dtype == E4M3 else WIDE_DTYPES

    @property
    def whole_shape(self) -> torch.Size:
        """The shape that the checkpoint's tensor has."""
        return self.data.shape if self.part is None else self.part.whole_shape(self.data.shape)

    @property
    def stored_shapes(self) -> tuple[torch.Size, ...]:
        """The shapes that the checkpoint's tensor may have; `whole_shape` comes first."""
        return (self.whole_shape,)

    @property
    def index(self) -> tuple[slice, ...]:
        """The index of the data in the checkpoint's tensor."""
        return (slice(None),) if self.part is None else self.part.index(self.whole_shape)

    def load(self, values: torch.Tensor, upload: Upload) -> None:
        """Converts and copies the checkpoint's values of the data, which are there when the upload has ended."""
        upload.copy(values, self.data)

    def copy_from(self, other: Weight) -> None:
        """Copies the same weight of another runner."""
        self.data.copy_(other.data)

    def fill_normal(self, mean: float, deviation: float, seed: int) -> None:
        """Draws normal values of the whole tensor, of which each rank keeps its part."""
        generator = torch.Generator(self.data.device).manual_seed(seed)
        if self.part is None:
            self.data.normal_(mean, deviation, generator=generator)
            return
        whole = torch.empty(self.whole_shape, dtype=self.data.dtype, device=self.data.device)
        self.data.copy_(whole.normal_(mean, deviation, generator=generator)[self.index])


@dataclass(frozen=True)
class SharedScale(Weight):
    """One number in the checkpoint that a layer has once for each of its KV heads, those of all ranks."""

    @property
    def whole_shape(self) -> torch.Size:
        return torch.Size([1])

    @property
    def stored_shapes(self) -> tuple[torch.Size, ...]:
        return self.whole_shape, torch.Size([])

    @property
    def index(self) -> tuple[slice, ...]:
        return ()

    def load(self, values: torch.Tensor, upload: Upload) -> None:
        upload.copy(values.reshape(1).expand(self.data.shape), self.data)


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight(Weight):
    """A tensor in a wide type, or this rank's part of it, that a layer has in FP8: quantized as it is loaded or drawn.

    The scales are those of the rank's part: where inputs are divided among ranks, each has scales for its own inputs.

    Attributes:
        data: the values of `scaled`.
        scaled: view of the layer's weights.
        dtype: the type in which random numbers are drawn, that of the model.
    """

    scaled: ScaledWeight
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scaled.scales.nbytes

    @property
    def stored_dtypes(self) -> tuple[torch.dtype, ...]:
        return WIDE_DTYPES

    def load(self, values: torch.Tensor, upload: Upload) -> None:
        for rows in self._rows():
            wide = torch.empty(values[rows].shape, dtype=values.dtype, device=self.data.device)
            upload.copy(values[rows], wide)
            self.scaled.rows(rows).quantize(wide)

    def copy_from(self, other: Weight) -> None:
        assert isinstance(other, QuantizedWeight), "both runners have a model of the same format"
        self.data.copy_(other.data)
        self.scaled.scales.copy_(other.scaled.scales)

    def fill_normal(self, mean: float, deviation: float, seed: int) -> None:
        generator = torch.Generator(self.data.device).manual_seed(seed)
        whole = torch.empty(self.whole_shape, dtype=self.dtype, device=self.data.device)
        own = whole.normal_(mean, deviation, generator=generator)[self.index]
        for rows in self._rows():
            self.scaled.rows(rows).quantize(own[rows])

    def _rows(self) -> list[slice]:
        total = len(self.data)
        return [slice(start, min(start + QUANTIZED_ROWS, total)) for start in range(0, total, QUANTIZED_ROWS)]
