"""Tracks who holds which block of one KV pool, and which blocks hold KV that others may share.

Knows nothing about tensors or devices: each pool has a manager of its own.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, abc
from dataclasses import dataclass
from typing import Protocol


class HashedTokens(Protocol):
    """A request's tokens, and the hashes by which equal beginnings are found."""

    token_ids: list[int]

    @property
    def num_tokens(self) -> int: ...

    def block_hash(self, index: int, block_size: int) -> int:
        """64-bit hash of full block `index` and all tokens before it."""


@dataclass(frozen=True)
class CachedBlock:
    """What a shareable block holds: its chained hash and the tokens themselves, compared on a hit."""

    block_hash: int
    token_ids: tuple[int, ...]


class BlockManager:
    """Reference counts and prefix cache of one pool.

    A block is free (no holder) or held. A free block keeps its cached content until it is given out anew; blocks
    without content are given out first, then those freed longest ago.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        assert min(num_blocks, block_size) > 0, "a pool has at least one block of at least one token"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.reset(())

    def reset(self, tables: abc.Iterable[abc.Sequence[int]]) -> None:
        """Starts anew: `tables` hold their blocks, all others are free, and no content is known."""
        self._holders = [0] * self.num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(self.num_blocks))
        self._contents: dict[int, CachedBlock] = {}
        self._block_of_hash: dict[int, int] = {}
        for table in tables:
            self.share(table)

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def num_held_blocks(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def match_prefix(self, seq: HashedTokens, max_tokens: int) -> list[int]:
        """Blocks that already hold the KV of the first full blocks of `seq`, covering at most `max_tokens` tokens."""
        matched: list[int] = []
        if not self.enable_prefix_caching:
            return matched
        for index in range(min(max_tokens, seq.num_tokens) // self.block_size):
            block = self._block_of_hash.get(seq.block_hash(index, self.block_size))
            if block is None or self._contents[block].token_ids != self._tokens_of(seq, index):
                break
            matched.append(block)
        return matched

    def can_take(self, cached: abc.Sequence[int], num_blocks: int) -> bool:
        """Whether `take` would find enough free blocks."""
        num_new = num_blocks - len(cached)
        return num_new + sum(self._holders[block] == 0 for block in cached) <= len(self._free)

    def take(self, cached: abc.Sequence[int], num_blocks: int) -> list[int]:
        """Holds the `cached` blocks and new ones, `num_blocks` in all, in that order; `can_take` was asked before."""
        self.share(cached)
        return [*cached, *(self._take_free() for _ in range(num_blocks - len(cached)))]

    def share(self, blocks: abc.Iterable[int]) -> None:
        """Adds a holder to each block."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._free[block]
            self._holders[block] += 1

    def free(self, blocks: abc.Sequence[int]) -> None:
        """Takes a holder from each block; the last blocks of a request are the first to be given out again."""
        for block in reversed(blocks):
            assert self._holders[block] > 0, f"block {block} is freed but nobody holds it"
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free[block] = None
                if block not in self._contents:
                    self._free.move_to_end(block, last=False)

    def cache(self, seq: HashedTokens, table: abc.Sequence[int], start: int, end: int) -> None:
        """Makes the full blocks of `seq` that cover tokens [start, end) shareable; their KV must be in the pool."""
        if not self.enable_prefix_caching:
            return
        for index in range(start // self.block_size, end // self.block_size):
            block, block_hash = table[index], seq.block_hash(index, self.block_size)
            if block not in self._contents and block_hash not in self._block_of_hash:
                self._contents[block] = CachedBlock(block_hash, self._tokens_of(seq, index))
                self._block_of_hash[block_hash] = block

    def forget(self, blocks: abc.Iterable[int]) -> None:
        """What these blocks hold is found no more; whoever shares them already goes on doing so."""
        for block in blocks:
            content = self._contents.pop(block, None)
            if content is not None:
                del self._block_of_hash[content.block_hash]

    def check_integrity(self, tables: abc.Iterable[abc.Sequence[int]]) -> None:
        """Asserts that `tables`, all there are, account for every holder, and that free + held == total."""
        holders = Counter(block for table in tables for block in table)
        for block, count in enumerate(self._holders):
            assert count == holders[block], f"block {block} counts {count} holders, tables show {holders[block]}"
            assert (count == 0) == (block in self._free), f"block {block} with {count} holders: free list is wrong"
        for block_hash, block in self._block_of_hash.items():
            assert self._contents[block].block_hash == block_hash, f"prefix cache entry of block {block} is stale"
        assert len(self._contents) == len(self._block_of_hash), "a cached block has no hash entry"

    def _take_free(self) -> int:
        block, _ = self._free.popitem(last=False)
        content = self._contents.pop(block, None)
        if content is not None:
            del self._block_of_hash[content.block_hash]
        self._holders[block] = 1
        return block

    def _tokens_of(self, seq: HashedTokens, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])
