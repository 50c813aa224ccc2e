"""Pushes the KV of a prefill step into another runner's pool, layer by layer, while the step runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

import torch


class LayerPush(Protocol):
    """What a prefill step does with the blocks that it hands over."""

    is_on: bool
    """Whether steps push blocks at all."""

    def after_store(self, pushed_blocks: torch.Tensor) -> Callable[[torch.Tensor], None]:
        """The function that each layer calls, in order, once its KV is stored.

        Args:
            pushed_blocks: parts of blocks as in `block_list`, on the device.
        """

    def join(self) -> None:
        """Makes the current stream wait for what was pushed."""


class NoPush:
    """The layer push of runners whose steps push nothing: blocks are copied after the step, or stay where they are."""

    is_on = False

    def after_store(self, pushed_blocks: torch.Tensor) -> Callable[[torch.Tensor], None]:
        raise AssertionError("a step has blocks to push only if there is a pool to push them to")

    def join(self) -> None:
        """There is nothing to wait for."""


class PushToPool:
    """Stores each layer's KV in another runner's pool while the layer attends to it.

    Pushing beside GEMMs instead would delay them by the whole time of the push: each SM has an equal share of a GEMM.

    Args:
        pool: [num_blocks, num_layers, ...], of the other runner.
        copy_stream: a stream of the device that computes the KV; None on a CPU.
    """

    is_on = True

    def __init__(self, pool: torch.Tensor, copy_stream: torch.cuda.Stream | None) -> None:
        self._pool = pool
        self._copy_stream = copy_stream

    def after_store(self, pushed_blocks: torch.Tensor) -> Callable[[torch.Tensor], None]:
        push = self.push_by_layer(pushed_blocks)

        def push_behind_store(kv_cache: torch.Tensor) -> None:
            with self.behind_store():
                push(kv_cache)

        return push_behind_store

    def push_by_layer(self, pushed_blocks: torch.Tensor) -> Callable[[torch.Tensor], None]:
        """The function that pushes each layer's blocks, in order, on the current stream."""
        targets = iter(self._pool.unbind(1))

        def push(kv_cache: torch.Tensor) -> None:
            target = next(targets)
            if self._copy_stream is None:
                for block, target_block, first, end in pushed_blocks[1 : 1 + 4 * int(pushed_blocks[0])].view(-1, 4):
                    target[target_block, :, :, first:end] = kv_cache[block, :, :, first:end]
                return
            # Imported here: a machine without GPUs may lack triton.
            from nanovllm.kernels.triton_transfer import NUM_PROGRAMS_BESIDE, push_blocks

            push_blocks(kv_cache, target, pushed_blocks, NUM_PROGRAMS_BESIDE)

        return push

    @contextlib.contextmanager
    def behind_store(self) -> Iterator[None]:
        """Makes the stream current on which blocks are pushed, behind what the current stream has been given."""
        if self._copy_stream is None:
            yield
            return
        self._copy_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copy_stream):
            yield

    def join(self) -> None:
        if self._copy_stream is not None:
            torch.cuda.current_stream().wait_stream(self._copy_stream)
