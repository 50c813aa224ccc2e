"""Carries KV blocks from the prefill pool to the decode pool. Is told which blocks; decides nothing about requests.

`KVTransfer` and `TransferHandle` are the interface: an engine takes any other transfer by `llm.kv_transfer = ...`.
"""

from __future__ import annotations

import logging
from collections import abc
from typing import Any, Protocol

import torch

from nanovllm.engine.scheduling.step import BlockPair
from nanovllm.errors import ConfigError, HandoffError
from nanovllm.utils.device import Device, Event, Moment, peer_access

logger = logging.getLogger(__name__)


class PoolOwner(Protocol):
    """What `PeerTransfer` needs of a runner; see `ModelRunner`."""

    def sync_kv_cache_to(
        self, other: Any, pairs: abc.Sequence[BlockPair], *, method: str = "copy", after: Event | None = None
    ) -> Event: ...

    def record_copy_moment(self, after: Event | None = None) -> Moment: ...

    def wait_for(self, event: Event) -> None: ...

    def checksum_blocks(self, blocks: abc.Sequence[int], after: Event) -> torch.Tensor: ...


class TransferHandle(Protocol):
    """Blocks on their way."""

    def is_done(self) -> bool:
        """Whether the copies have ended; does not wait."""

    def wait(self) -> None:
        """Orders the decode device's later work after the copies. Called once, after `is_done` was true.

        Raises:
            HandoffError: the blocks did not arrive as they left.
        """

    def moments(self) -> tuple[float, float] | None:
        """When the copies began and ended, in seconds of `time.perf_counter()`; waits for them.

        None if they were part of the step that computed the blocks.
        """


class KVTransfer(Protocol):
    """One way to carry blocks from the prefill pool to the decode pool.

    Attributes:
        name: how logs and messages name it.
    """

    name: str

    def send(self, pairs: abc.Sequence[BlockPair], after: Event) -> TransferHandle:
        """Sends blocks, on the device after the event of the step that computes them. Returns at once.

        Args:
            pairs: (block of the prefill pool, block of the decode pool). All of them stay held until the handle is
                done.
            after: done when the blocks are computed.
        """


class NoTransfer:
    """The transfer of an engine with one pool, where nothing is ever sent."""

    name = "none"

    def send(self, pairs: abc.Sequence[BlockPair], after: Event) -> TransferHandle:
        raise AssertionError("with one pool there is nothing to send")


class PeerTransfer:
    """Carries blocks from one runner's pool to another's, by `ModelRunner.sync_kv_cache_to`.

    Args:
        source, target: the runners.
        method: `copy`, `push`, `staged` (through pinned host memory), or `direct`: the source pushes blocks in the step
            that computes them.
        verify: compare checksums of every layer of every block on both sides, once the blocks have arrived.
    """

    def __init__(self, source: PoolOwner, target: PoolOwner, method: str, *, verify: bool) -> None:
        self.name = method
        self._source, self._target, self._verify = source, target, verify
        if method == "push":  # the first one compiles the kernel
            source.sync_kv_cache_to(target, (), method=method).synchronize()

    def send(self, pairs: abc.Sequence[BlockPair], after: Event) -> TransferHandle:
        to_verify = pairs if self._verify else ()
        if self.name == "direct":
            return _PeerHandle(self._source, self._target, to_verify, after)
        began = self._source.record_copy_moment(after)
        arrived = self._source.sync_kv_cache_to(self._target, pairs, method=self.name, after=after)
        # Torch runs copies across GPUs on the source's stream.
        ended = (self._target if self.name == "staged" else self._source).record_copy_moment()
        return _PeerHandle(self._source, self._target, to_verify, arrived, began, ended)


class _PeerHandle:
    def __init__(
        self,
        source: PoolOwner,
        target: PoolOwner,
        to_verify: abc.Sequence[BlockPair],
        arrived: Event,
        began: Moment | None = None,
        ended: Moment | None = None,
    ) -> None:
        self._source, self._target, self._to_verify, self._arrived = source, target, to_verify, arrived
        self._began, self._ended = began, ended

    def is_done(self) -> bool:
        return self._arrived.query()

    def wait(self) -> None:
        self._target.wait_for(self._arrived)
        if not self._to_verify:
            return
        # The blocks that were sent are held, and not written again, until the handoff is over.
        sent = self._source.checksum_blocks([block for block, _ in self._to_verify], self._arrived)
        arrived = self._target.checksum_blocks([target_block for _, target_block in self._to_verify], self._arrived)
        wrong = (sent != arrived).nonzero()
        if len(wrong):
            row, layer = wrong[0].tolist()
            block, target_block = self._to_verify[row]
            raise HandoffError(
                f"block {target_block} of the target pool differs in layer {layer} from block {block} of the source "
                f"pool, which was sent there ({len(wrong)} of {sent.numel()} block layers differ)"
            )

    def moments(self) -> tuple[float, float] | None:
        if self._began is None or self._ended is None:
            return None
        return self._began.seconds(), self._ended.seconds()


def resolve_handoff(option: str, source: Device, target: Device) -> str:
    """The `PeerTransfer` method for option `kv_handoff`: as asked for; `auto` takes the fastest that works here.

    Raises:
        ConfigError: `push` or `direct` was asked for on GPUs without peer access.
    """
    reachable = peer_access(source, target)
    if not reachable and (option == "push" or (option == "direct" and source.is_cuda)):
        raise ConfigError(
            f"kv_handoff={option!r} needs two GPUs with peer access, which {source} and {target} have not; "
            "pass 'copy' or 'auto'"
        )
    if source.is_cuda and not reachable:
        logger.warning("%s and %s have no peer access: KV crosses through pinned host memory", source, target)
        return "staged"
    method = option if option != "auto" else "direct" if reachable else "copy"
    logger.info("KV handoff from %s to %s: %s", source, target, method)
    return method
