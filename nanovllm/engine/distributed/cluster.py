"""Starts the cards of a cluster, and knows what connects them. Decides nothing about requests."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from nanovllm.config import EngineConfig
from nanovllm.engine.distributed.card_client import Doorkeeper
from nanovllm.engine.distributed.remote_card import RemoteDevice, RemoteRunner
from nanovllm.engine.execution.runner_spec import RunnerSpec

CARD_OPTIONS = (
    "max_num_batched_tokens",
    "max_num_seqs",
    "max_model_len",
    "gpu_memory_utilization",
    "enforce_eager",
    "kvcache_block_size",
    "num_kvcache_blocks",
    "dtype",
    "quantization",
    "kv_cache_dtype",
    "load_format",
    "attention_backend",
    "seed",
    "step_timeout_s",
)
"""Options of an engine that its cards' processes are given."""


@dataclass(frozen=True)
class Cluster:
    """The cards of one engine, each in a process of its own.

    Attributes:
        prefill, decode: their runners, by role.
        doorkeeper: holds the sockets to them.
    """

    prefill: list[RemoteRunner]
    decode: list[RemoteRunner]
    doorkeeper: Doorkeeper

    @property
    def runners(self) -> list[RemoteRunner]:
        return [*self.prefill, *self.decode]

    def close(self) -> None:
        """Ends all processes."""
        for runner in self.runners:
            runner.close_workers()
        self.doorkeeper.close()


def start_cluster(config: EngineConfig, spec: RunnerSpec, kind: str) -> Cluster:
    """Starts a process for each card, and waits until all are ready.

    Raises:
        ConfigError, ModelLoadError, OutOfKVCacheError, ...: what a card could not be made for.
        ClusterError: a process ended without a reason.
    """
    options: dict[str, Any] = {name: getattr(config, name) for name in CARD_OPTIONS}
    options["device"] = kind
    doorkeeper, push_numbers = Doorkeeper(), itertools.count(1)
    cluster = Cluster([], [], doorkeeper)
    try:
        for index in range(config.prefill_cards + config.decode_cards):
            device = RemoteDevice(kind, index)
            runner = RemoteRunner(
                device, spec, str(spec.folder), options, doorkeeper, push_numbers, config.card_timeout_s
            )
            (cluster.prefill if index < config.prefill_cards else cluster.decode).append(runner)
        for runner in cluster.runners:
            runner.await_ready()
        for one, other in itertools.permutations(cluster.runners, 2):
            one.meet(other)
    except BaseException:
        cluster.close()
        raise
    return cluster
