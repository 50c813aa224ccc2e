"""KV blocks from one card's pool into another's by NIXL, between processes: one agent a card. Pushes and notifications.

Knows nothing of requests or leases: which blocks may be written to is the controller's to know.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import abc
from typing import Any

import numpy as np
import torch

from nanovllm.errors import BackendUnavailableError, HandoffError
from nanovllm.utils.device import Device

logger = logging.getLogger(__name__)

PLACES = ("intra-node", "inter-node")
"""How UCX names where another process is."""


def import_nixl() -> Any:
    """The module of NIXL's agents.

    Raises:
        BackendUnavailableError: it is not installed.
    """
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    try:
        from nixl_cu13 import _api
    except ImportError as error:
        raise BackendUnavailableError(
            f"a cluster transfers KV by NIXL, which cannot be imported ({error}); pip install nanovllm[cluster]"
        ) from error
    logging.getLogger("nixl").setLevel(logging.WARNING)
    return _api


def log_transports(file: str) -> None:
    """Has UCX write into a file which transports it chooses; for agents that are made after this."""
    os.environ.update(UCX_PROTO_INFO="y", UCX_LOG_LEVEL="info", UCX_LOG_FILE=file)


def transports_in(log: str) -> dict[str, list[str]]:
    """The transports by which UCX writes into other processes' memory, read from its log.

    Returns:
        For `intra-node` and `inter-node`, as far as there were such writes, the transports, each once.
    """
    found: dict[str, list[str]] = {}
    place: str | None = None
    is_write = False
    for line in log.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 1:
            if "cfg#" in cells[0]:
                place, is_write = next((each for each in PLACES if each in cells[0]), None), False
            elif place is not None:
                is_write = cells[0].startswith("remote memory write by ucp_put")
        elif len(cells) == 3 and is_write and place is not None and cells[0] != "Range":
            transports = found.setdefault(place, [])
            if cells[2] not in transports:
                transports.append(cells[2])
    return found


class NixlPush:
    """A push under way."""

    def __init__(self, agent: Any, handle: Any) -> None:
        self._agent = agent
        self._handle = handle
        self.began_s = time.perf_counter()

    def is_done(self) -> bool:
        """Whether all blocks have left; does not wait.

        Raises:
            HandoffError: the push has failed.
        """
        try:
            state = self._agent.check_xfer_state(self._handle)
        except Exception as error:
            self.end()
            raise HandoffError(f"NIXL: {type(error).__name__}: {error}") from error
        if state == "PROC":
            return False
        self.end()
        if state != "DONE":
            raise HandoffError(f"NIXL: the transfer ended in state {state}")
        return True

    def end(self) -> None:
        """Gives the transfer up, or its handle back."""
        handle, self._handle = self._handle, None
        if handle is not None:
            with contextlib.suppress(Exception):  # of a transfer whose peer is gone
                self._agent.release_xfer_handle(handle)


class KVAgent:
    """The NIXL agent of a card.

    Args:
        name: of the agent, which no other agent has.
        kv_pool: [num_blocks, ...], registered whole.
        device: where the pool is.

    Attributes:
        metadata: what other agents need to reach this one.
        pool_address, pool_device: where the pool is.

    Raises:
        BackendUnavailableError: NIXL is not installed.
    """

    def __init__(self, name: str, kv_pool: torch.Tensor, device: Device) -> None:
        api = import_nixl()
        self._agent = api.nixl_agent(name, api.nixl_agent_config(backends=["UCX"], enable_prog_thread=True))
        self._agent.register_memory(kv_pool)
        self._memory = "VRAM" if device.is_cuda else "DRAM"
        self._block_bytes = kv_pool[0].numel() * kv_pool.element_size()
        self.pool_address = kv_pool.data_ptr()
        self.pool_device = device.index if device.is_cuda else 0
        self.metadata: bytes = self._agent.get_agent_metadata()
        self._peers: dict[str, tuple[int, int]] = {}

    def add_peer(self, name: str, metadata: bytes, pool_address: int, pool_device: int) -> None:
        """Makes another card's pool, of the same geometry, one that blocks can be pushed into.

        Raises:
            HandoffError: the card cannot be reached.
        """
        try:
            self._agent.add_remote_agent(metadata)
        except Exception as error:
            raise HandoffError(f"NIXL cannot reach {name}: {type(error).__name__}: {error}") from error
        self._peers[name] = pool_address, pool_device

    def remove_peer(self, name: str) -> None:
        """Another card is gone: what is pushed to it has to be ended before."""
        if self._peers.pop(name, None) is not None:
            with contextlib.suppress(Exception):  # that it is gone may be known here already
                self._agent.remove_remote_agent(name)

    def push(self, number: int, name: str, blocks: np.ndarray) -> NixlPush:
        """Writes blocks into another card's pool, which is then notified with the number. Returns at once.

        Args:
            number: of the push.
            name: of the other agent.
            blocks: [2, N] int64, those here and those there.

        Raises:
            HandoffError: the card is not known, or cannot be reached.
        """
        if name not in self._peers:
            raise HandoffError(f"{name} is not known, or gone")
        address, device = self._peers[name]
        try:
            here = self._descriptors(self.pool_address, self.pool_device, blocks[0])
            there = self._descriptors(address, device, blocks[1])
            notification = str(number).encode()
            handle = self._agent.initialize_xfer("WRITE", here, there, name, notification)
            push = NixlPush(self._agent, handle)
            try:
                self._agent.transfer(handle)
            except BaseException:
                push.end()
                raise
        except Exception as error:
            raise HandoffError(f"NIXL cannot push to {name}: {type(error).__name__}: {error}") from error
        return push

    def arrived(self) -> abc.Iterator[int]:
        """The numbers of the pushes of others that have arrived whole since the last call."""
        for name, notifications in self._agent.get_new_notifs().items():
            for text in notifications:
                try:
                    number = int(text)
                except ValueError:
                    logger.warning("%s notifies of %r, which is no number of a push, and is ignored", name, text[:40])
                    continue
                yield number

    def _descriptors(self, address: int, device: int, blocks: np.ndarray) -> Any:
        rows = np.empty((len(blocks), 3), dtype=np.uint64)
        rows[:, 0] = address + blocks.astype(np.uint64) * np.uint64(self._block_bytes)
        rows[:, 1], rows[:, 2] = self._block_bytes, device
        return self._agent.get_xfer_descs(rows, mem_type=self._memory)
