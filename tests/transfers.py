"""Transfers that make mistakes visible, or make them on purpose. Each wraps the engine's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nanovllm import LLM
from nanovllm.engine.execution.kv_transfer import KVTransfer, TransferHandle
from nanovllm.engine.scheduling.step import BlockPair
from nanovllm.utils.device import Event


class LazyTransfer:
    """Copies only when it is waited for, a few polls late: a forgotten wait leaves the decode pool without the KV."""

    def __init__(self, inner: KVTransfer, polls: int = 2) -> None:
        self.name = f"lazy {inner.name}"
        self.inner, self.polls = inner, polls

    def send(self, pairs: Sequence[BlockPair], after: Event) -> TransferHandle:
        return LazyHandle(lambda: self.inner.send(pairs, after), self.polls)


class LazyHandle:
    def __init__(self, send: Callable[[], TransferHandle], polls: int) -> None:
        self.send, self.polls = send, polls
        self.sent: TransferHandle | None = None

    def is_done(self) -> bool:
        self.polls -= 1
        return self.polls < 0

    def wait(self) -> None:
        self.sent = handle = self.send()
        while not handle.is_done():
            continue
        handle.wait()

    def moments(self) -> tuple[float, float] | None:
        return None if self.sent is None else self.sent.moments()


class FaultyTransfer:
    """Fails or stalls the sends that `chosen` picks by their number; a stalled one ends when `unstall` is called."""

    def __init__(self, inner: KVTransfer, fault: str, chosen: Callable[[int], bool]) -> None:
        self.name = inner.name
        self.inner, self.fault, self.chosen = inner, fault, chosen
        self.num_sends = self.num_faults = 0
        self.stalled = True

    def unstall(self) -> None:
        self.stalled = False

    def send(self, pairs: Sequence[BlockPair], after: Event) -> TransferHandle:
        number, self.num_sends = self.num_sends, self.num_sends + 1
        if not self.chosen(number):
            return self.inner.send(pairs, after)
        self.num_faults += 1
        if self.fault == "launch":
            raise RuntimeError("injected: the copy could not be launched")
        return FaultyHandle(self, self.inner.send(pairs, after))


class FaultyHandle:
    def __init__(self, transfer: FaultyTransfer, inner: TransferHandle) -> None:
        self.transfer, self.inner = transfer, inner

    def is_done(self) -> bool:
        return self.inner.is_done() and not (self.transfer.fault == "stall" and self.transfer.stalled)

    def wait(self) -> None:
        self.inner.wait()
        if self.transfer.fault == "arrive":
            raise RuntimeError("injected: the copy failed on its way")

    def moments(self) -> tuple[float, float] | None:
        return self.inner.moments()


class SabotagedTransfer:
    """Hands over wrongly: the mistakes that a test of tokens must notice."""

    def __init__(self, inner: KVTransfer, mistake: str) -> None:
        self.name = inner.name
        self.inner, self.mistake = inner, mistake

    def send(self, pairs: Sequence[BlockPair], after: Event) -> TransferHandle:
        if self.mistake == "skip_wait":
            return ForgottenHandle()
        if self.mistake == "skip_block":
            pairs = list(pairs)[:-1]
        if self.mistake == "wrong_slot" and len(pairs) > 1:
            targets = [target for _, target in pairs]
            pairs = [(source, target) for (source, _), target in zip(pairs, targets[1:] + targets[:1], strict=True)]
        return self.inner.send(pairs, after)


class ForgottenHandle:
    """What a lazy transfer's handle is to an engine that never waits: done, and nothing was copied."""

    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        return

    def moments(self) -> None:
        return


def poison_after_handoff(llm: LLM) -> None:
    """Fills the prefill pool's blocks of a request with NaN as soon as its KV is said to be in the decode pool.

    For engines without prefix caching: a cached block stays of use on the prefill device.
    """
    handoff_done = llm.scheduler.handoff_done

    def poison(seq):
        for block in seq.lease.prefill.blocks:
            if seq.lease.prefill.card is llm.scheduler.placement.prefill_card:
                with llm.prefill_runner.on(llm.prefill_runner.stream):
                    llm.prefill_runner.kv_pool[block] = float("nan")
        handoff_done(seq)

    assert not llm.config.enable_prefix_caching
    llm.scheduler.handoff_done = poison
