"""What layers know of the ranks that compute a model together. Knows nothing of processes or networks."""

from __future__ import annotations

from typing import Protocol

import torch

from nanovllm.utils.weight import Part


class Ranks(Protocol):
    """This rank, the number of ranks, and their collectives, which all ranks call in the same order."""

    rank: int
    size: int

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors, on each rank; may be computed in place."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[N, n] on each rank -> [N, size * n] on all, side by side by rank."""

    def all_reduce_min(self, number: int) -> int:
        """The smallest of all ranks' numbers; waits without limit until all ranks call it."""

    def close(self) -> None:
        """Ends the collectives: none may follow."""


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


def part_of(ranks: Ranks, dim: int) -> Part | None:
    """This rank's part of a tensor that is divided along `dim`; None, for all of it, if there is one rank."""
    return None if ranks.size == 1 else Part(dim, ranks.rank, ranks.size)
