"""A checkpoint's tensor in its place: the data that a layer computes with, and which part of the tensor they are.

Whatever reads, fills, copies or counts weights does so through it, and knows nothing of how a layer holds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Part:
    """Which part of a checkpoint's tensor a rank holds: the `rank`th of `size` equal ones along `dim`."""

    dim: int
    rank: int
    size: int

    def whole_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of the whole tensor of which `shape` is a part's."""
        return torch.Size(n * self.size if dim == self.dim else n for dim, n in enumerate(shape))

    def index(self, whole_shape: Sequence[int]) -> tuple[slice, ...]:
        """What takes the part out of a whole tensor."""
        length = whole_shape[self.dim] // self.size
        return (*[slice(None)] * self.dim, slice(self.rank * length, (self.rank + 1) * length))


@dataclass(frozen=True)
class Weight:
    """A checkpoint's tensor, or this rank's part of it, where a layer has it.

    Attributes:
        data: view of the layer's parameter; what is stored there is converted to its type.
        part: which part of the tensor they are, None for all of it.
    """

    data: torch.Tensor
    part: Part | None = None

    @property
    def nbytes(self) -> int:
        """Memory that it takes on this rank, in bytes."""
        return self.data.nbytes

    @property
    def whole_shape(self) -> torch.Size:
        """The shape that the checkpoint's tensor has."""
        return self.data.shape if self.part is None else self.part.whole_shape(self.data.shape)

    @property
    def index(self) -> tuple[slice, ...]:
        """What takes the data out of the checkpoint's tensor."""
        return (slice(None),) if self.part is None else self.part.index(self.whole_shape)

    def store(self, values: torch.Tensor) -> None:
        """Converts and copies values of the shape of the data, from any device."""
        self.data.copy_(values)

    def copy_from(self, other: Weight) -> None:
        """Takes over what the same weight of another runner holds."""
        self.data.copy_(other.data)

    def fill_normal(self, mean: float, deviation: float, seed: int) -> None:
        """Draws the whole tensor, of which each rank keeps its part."""
        generator = torch.Generator(self.data.device).manual_seed(seed)
        if self.part is None:
            self.data.normal_(mean, deviation, generator=generator)
            return
        whole = torch.empty(self.whole_shape, dtype=self.data.dtype, device=self.data.device)
        self.store(whole.normal_(mean, deviation, generator=generator)[self.index])
