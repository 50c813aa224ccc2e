"""Starts the cards of a cluster, and knows what connects them. Decides nothing about requests."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections import abc
from dataclasses import dataclass
from typing import Any

import torch

from nanovllm.config import EngineConfig
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.engine.distributed.card_client import CardSockets
from nanovllm.engine.distributed.card_local import LocalStarter
from nanovllm.engine.distributed.card_starter import CardStarter
from nanovllm.engine.distributed.remote_card import START_TIMEOUT_S, RemoteDevice, RemoteRunner, blocks_of
from nanovllm.engine.execution.runner_spec import RunnerSpec
from nanovllm.errors import ClusterError, ConfigError

logger = logging.getLogger(__name__)

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
        sockets: holds the sockets to them.
        starter: starts their processes.
    """

    prefill: list[RemoteRunner]
    decode: list[RemoteRunner]
    sockets: CardSockets
    starter: CardStarter

    @property
    def runners(self) -> list[RemoteRunner]:
        return [*self.prefill, *self.decode]

    def close(self) -> None:
        """Ends all processes, and waits for them."""
        for runner in self.runners:
            runner.hang_up()
        for runner in self.runners:
            runner.close_workers()
        self.sockets.close()
        self.starter.close()


def make_starter(config: EngineConfig) -> CardStarter:
    """What starts the cards of a cluster: `local` on this host, `ray` on the hosts that Ray has.

    Raises:
        ConfigError: there are fewer devices than cards.
        BackendUnavailableError: Ray is not installed.
        ClusterError: Ray cannot be reached, or has no place for the cards.
    """
    num_cards = config.prefill_cards + config.decode_cards
    if config.cluster == "ray":
        from nanovllm.engine.distributed.card_ray import RayStarter

        return RayStarter(config.device, num_cards, config.card_timeout_s)
    num_gpus = torch.cuda.device_count()
    if config.device == "cpu" or (config.device == "auto" and not num_gpus):
        return LocalStarter("cpu", num_cards)
    if num_cards > num_gpus:
        raise ConfigError(
            f"prefill_cards={config.prefill_cards} and decode_cards={config.decode_cards} are {num_cards} cards, torch "
            f"sees {num_gpus} GPUs; pass fewer, or device='cpu' to try it on processes of the CPU"
        )
    return LocalStarter("cuda", num_cards)


def start_cluster(
    config: EngineConfig, spec: RunnerSpec, starter: CardStarter, *, explains_transports: bool = False
) -> Cluster:
    """Starts a process for each card, and waits until all are ready.

    Takes over the starter: it is closed with the cluster, and if this raises.

    Args:
        config: the engine's options.
        spec: of the model.
        starter: starts the processes.
        explains_transports: whether cards can be asked how they push blocks.

    Raises:
        ConfigError, ModelLoadError, OutOfKVCacheError, ...: what a card could not be made for.
        ClusterError: a process ended without a reason, or cards have unlike blocks.
    """
    options: dict[str, Any] = {name: getattr(config, name) for name in CARD_OPTIONS}
    options["device"] = starter.kind
    model = str(spec.folder.absolute())
    if config.model == DEMO_MODEL_PATH:
        model = ""
    elif config.cluster == "ray" and not os.path.isdir(config.model):  # other hosts have it somewhere else
        model, options["revision"] = config.model, config.revision
    sockets, push_numbers = CardSockets(), itertools.count(1)
    cluster = Cluster([], [], sockets, starter)
    try:
        for index in range(config.prefill_cards + config.decode_cards):
            device = RemoteDevice(starter.kind, index, starter.name_of(index))
            runner = RemoteRunner(
                device,
                spec,
                model,
                options,
                sockets,
                starter,
                push_numbers,
                config.card_timeout_s,
                explains_transports=explains_transports,
            )
            (cluster.prefill if index < config.prefill_cards else cluster.decode).append(runner)
        _await_ready(cluster.runners)
        check_blocks(cluster.runners)
        warn_of_versions(cluster.runners)
        for one, other in itertools.permutations(cluster.runners, 2):
            one.add_peer(other)
    except BaseException:
        cluster.close()
        raise
    return cluster


def _await_ready(runners: list[RemoteRunner]) -> None:
    """Waits for all at once: the error of one is raised when it comes, however long the others take."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while sum(runner.check_start() for runner in runners) < len(runners):
        if time.monotonic() > deadline_s:
            for runner in [runner for runner in runners if not runner.is_up]:
                runner.give_up(f"it was not ready within {START_TIMEOUT_S:.0f} s")
        time.sleep(1e-3)


def warn_of_versions(runners: abc.Sequence[RemoteRunner]) -> None:
    """Warns of cards whose versions of torch or NIXL are not those of the first."""
    for other in runners[1:]:
        unlike = unlike_versions(runners[0].ready.about, other.ready.about)
        if unlike:
            logger.warning("%s and %s have unlike versions: %s", runners[0].device, other.device, unlike)


def unlike_versions(first: abc.Mapping[str, str], other: abc.Mapping[str, str]) -> str:
    """What two cards have in unlike versions, in words; empty for nothing."""
    names = ("nanovllm", "torch", "nixl-cu13", "GPU")
    return ", ".join(
        f"{name} {first.get(name)} and {other.get(name)}" for name in names if first.get(name) != other.get(name)
    )


def check_blocks(runners: abc.Sequence[RemoteRunner]) -> None:
    """Checks that KV of each card is KV of every other.

    Raises:
        ClusterError: the blocks of two cards differ.
    """
    first = runners[0]
    for other in runners[1:]:
        if blocks_of(other.geometry) != blocks_of(first.geometry):
            raise ClusterError(
                f"{first.device} has {blocks_of(first.geometry)}, {other.device} has {blocks_of(other.geometry)}, so "
                "that KV of one means nothing to the other; use GPUs of one kind, or pass dtype and kvcache_block_size"
            )
