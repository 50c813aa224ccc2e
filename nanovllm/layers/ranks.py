"""What layers know of the ranks that compute a model together. Knows nothing of processes or networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


class Ranks(Protocol):
    """This rank, how many there are, and what they do together: every rank calls the same, in the same order."""

    rank: int
    size: int

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors, on each of them; may be the same tensor."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[N, n] on each rank -> [N, size * n] on all, side by side by rank."""

    def all_reduce_min(self, number: int) -> int:
        """The smallest of all ranks' numbers; however long it takes until all are here."""

    def close(self) -> None:
        """They do nothing together any more."""


class OneRank:
    """A model that one device computes alone."""

    rank = 0
    size = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_reduce_min(self, number: int) -> int:
        return number

    def close(self) -> None:
        return


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
