"""Counts the references to each block of one KV pool, and knows which blocks hold KV that requests may share.

Knows nothing about tensors or devices. Each pool has a block manager of its own.
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

    A block is free (no reference) or held. A free block keeps its cached content until it is allocated again; blocks
    without content are allocated first, then those that were freed to be evicted first, then those freed longest ago.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        assert min(num_blocks, block_size) > 0, "a pool has at least one block of at least one token"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.reset(())

    def reset(self, tables: abc.Iterable[abc.Sequence[int]]) -> None:
        """Starts over: the blocks of `tables` are held, all others are free, and the prefix cache is empty."""
        self._ref_counts = [0] * self.num_blocks
        self._empty: OrderedDict[int, None] = OrderedDict.fromkeys(range(self.num_blocks))
        """Free blocks without content."""
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Free blocks with content, in the order in which they are evicted."""
        self._contents: dict[int, CachedBlock] = {}
        self._block_of_hash: dict[int, int] = {}
        for table in tables:
            self.share(table)

    @property
    def num_free_blocks(self) -> int:
        return len(self._empty) + len(self._cached)

    @property
    def num_held_blocks(self) -> int:
        return self.num_blocks - self.num_free_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """Number of blocks that `num_tokens` tokens need; the last one may be partly filled."""
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

    def can_allocate(self, cached: abc.Sequence[int], num_blocks: int) -> bool:
        """Whether `allocate` would find enough free blocks."""
        num_new = num_blocks - len(cached)
        return num_new + sum(self._ref_counts[block] == 0 for block in cached) <= self.num_free_blocks

    def allocate(self, cached: abc.Sequence[int], num_blocks: int) -> list[int]:
        """Takes references to the `cached` blocks, then to new ones: `num_blocks` in all. Call `can_allocate` first."""
        self.share(cached)
        return [*cached, *(self._pop_free() for _ in range(num_blocks - len(cached)))]

    def share(self, blocks: abc.Iterable[int]) -> None:
        """Adds a reference to each block."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del (self._cached if block in self._contents else self._empty)[block]
            self._ref_counts[block] += 1

    def free(self, blocks: abc.Sequence[int], *, evict_first: bool = False) -> None:
        """Drops a reference to each block; the last blocks of a request are the first to be allocated again.

        With `evict_first` its contents are evicted before those of all blocks that are free now: another pool has them.
        """
        for block in blocks if evict_first else reversed(blocks):
            assert self._ref_counts[block] > 0, f"block {block} is freed but has no references"
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                free = self._cached if block in self._contents else self._empty
                free[block] = None
                if evict_first or free is self._empty:
                    free.move_to_end(block, last=False)

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
        """Removes these blocks from the prefix cache; requests that share them already keep them."""
        for block in blocks:
            content = self._contents.pop(block, None)
            if content is not None:
                del self._block_of_hash[content.block_hash]
                if block in self._cached:
                    del self._cached[block]
                    self._empty[block] = None

    def check_integrity(self, tables: abc.Iterable[abc.Sequence[int]]) -> None:
        """Asserts that the block `tables` of all leases account for every reference, and free + held == total."""
        references = Counter(block for table in tables for block in table)
        for block, count in enumerate(self._ref_counts):
            assert count == references[block], (
                f"block {block} counts {count} references, tables have {references[block]}"
            )
            is_free = block in (self._cached if block in self._contents else self._empty)
            assert (count == 0) == is_free, f"block {block} with {count} references: free list is wrong"
        assert not self._cached.keys() & self._empty.keys(), "a block is free twice"
        for block_hash, block in self._block_of_hash.items():
            assert self._contents[block].block_hash == block_hash, f"prefix cache entry of block {block} is stale"
        assert len(self._contents) == len(self._block_of_hash), "a cached block has no hash entry"

    def _pop_free(self) -> int:
        block, _ = (self._empty or self._cached).popitem(last=False)
        content = self._contents.pop(block, None)
        if content is not None:
            del self._block_of_hash[content.block_hash]
        self._ref_counts[block] = 1
        return block

    def _tokens_of(self, seq: HashedTokens, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])
