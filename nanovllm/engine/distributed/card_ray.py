"""Cards' processes started by Ray, on any host of its cluster: one actor a card, which starts the process and waits.

Ray reserves the cards, says which process has ended, and starts another one. It carries no token and no KV: a process
speaks with its controller by ZMQ, with the keys that the actor was handed.
"""

from __future__ import annotations

import fcntl
import ipaddress
import logging
import os
import signal
import socket
import struct
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from nanovllm.engine.distributed.card_local import CLOSE_TIMEOUT_S, ONE_HOST, LocalProcess, how_it_ended
from nanovllm.errors import BackendUnavailableError, ClusterError, ConfigError

logger = logging.getLogger(__name__)

RESERVE_TIMEOUT_S = 60.0
"""Seconds within which Ray has to find a place for every card."""
KILL_TIMEOUT_S = 5.0
"""Seconds after which an actor that has not ended its card is ended itself."""
KEEP_VISIBLE_DEVICES = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
"""Every card sees all GPUs of its host: CUDA's memory of other processes is opened by what is visible."""
SIOCGIFADDR, SIOCGIFNETMASK = 0x8915, 0x891B
INFINIBAND = Path("/sys/class/infiniband")


def import_ray() -> Any:
    """The module of Ray.

    Raises:
        BackendUnavailableError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise BackendUnavailableError(
            f"cluster='ray' needs Ray, which cannot be imported ({error}); pip install nanovllm[ray]"
        ) from error
    return ray


class CardActor:
    """A card's process, as its node has it. Ray makes it where the card is."""

    def __init__(self) -> None:
        self._process: LocalProcess | None = None

    def run(self, card: str, contact: bytes, on_gpu: bool, on_one_host: bool) -> int:
        """Starts the process and waits for its end; the exit status.

        Raises:
            ClusterError: it cannot be started.
        """
        ray = import_ray()
        index = visible_index(ray.get_gpu_ids(), os.environ.get("CUDA_VISIBLE_DEVICES")) if on_gpu else None
        environment = ONE_HOST if on_one_host else net_devices(ray.util.get_node_ip_address())
        self._process = LocalProcess(card, contact, environment, device_index=index, ends_with_thread=True)
        return self._process.wait()

    def kill(self) -> None:
        """Ends the process, also one that is stopped or hangs."""
        if self._process is not None:
            self._process.kill()


def visible_index(gpu_ids: list[Any], visible: str | None) -> int:
    """The index by which torch knows the GPU that Ray has given, in a process that sees all those of `visible`."""
    (gpu_id,) = gpu_ids
    return int(gpu_id) if visible is None else visible.split(",").index(str(gpu_id))


def net_devices(address: str) -> dict[str, str]:
    """What UCX may listen on: the interface of this address, and RDMA devices; nothing else of the host.

    Linux is asked for an interface's first address alone. If the node's is another one, the interface is that whose
    first address is in the same network.

    Raises:
        ClusterError: there is neither, and the variable is not set.
    """
    networks = {name: network for name in _interfaces() if (network := _network_of(name)) is not None}
    devices = [name for name, network in networks.items() if str(network.ip) == address]
    devices = devices or [name for name, each in networks.items() if ipaddress.ip_address(address) in each.network]
    devices += [f"{port.parent.parent.name}:{port.name}" for port in sorted(INFINIBAND.glob("*/ports/*"))]
    if not devices and "UCX_NET_DEVICES" not in os.environ:
        raise ClusterError(
            f"no network interface is in the network of {address}, the node's address, and UCX would listen on all of "
            f"them; set UCX_NET_DEVICES where Ray is started on this host, to one of {', '.join(_interfaces())}"
        )
    return {"UCX_NET_DEVICES": ",".join(devices)} if devices else {}


def _interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _network_of(interface: str) -> ipaddress.IPv4Interface | None:
    """The first address of an interface and its network, if it has one."""
    request = struct.pack("256s", interface[:15].encode())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            address, mask = (fcntl.ioctl(asking.fileno(), what, request) for what in (SIOCGIFADDR, SIOCGIFNETMASK))
        except OSError:  # it has none
            return None
    return ipaddress.IPv4Interface(f"{socket.inet_ntoa(address[20:24])}/{socket.inet_ntoa(mask[20:24])}")


class RayProcess:
    """A card's process on some host of Ray's cluster; a `CardProcess`.

    Args:
        ray: the module.
        actor: the actor that started the process.
        ended: resolves to the process's exit status; raises if the actor is gone.
        timeout_s: seconds within which a process that does not hear its controller ends. If the actor is gone, or its
            host is not to be reached, the process may run for as long.
    """

    def __init__(self, ray: Any, actor: Any, ended: Future[int], timeout_s: float) -> None:
        self._ray, self._actor, self._ended, self._timeout_s = ray, actor, ended, timeout_s
        self._ended_s = self._killed_s = 0.0

    def has_ended(self) -> bool:
        if self._ended.done() and not self._ended_s:
            self._ended_s = time.monotonic()
        return bool(self._ended_s)

    def is_reaped(self) -> bool:
        if not self.has_ended():
            if self._killed_s and time.monotonic() - self._killed_s > KILL_TIMEOUT_S:
                self._killed_s = time.monotonic()
                self._ray.kill(self._actor, no_restart=True)  # it hangs, too
            return False
        return self._ended.exception() is None or time.monotonic() - self._ended_s > self._timeout_s

    def was_killed(self) -> bool:
        return self.has_ended() and self._ended.exception() is None and self._ended.result() < 0

    def how_it_ended(self) -> str:
        error = self._ended.exception()
        if error is None:
            return how_it_ended(self._ended.result())
        cause = getattr(error, "cause", None)
        lines = [line.strip() for line in str(cause or error).splitlines() if line.strip()]
        return f"its actor is gone: {' '.join(lines)[:300]}"

    def kill(self) -> None:
        if not self._killed_s:
            self._killed_s = time.monotonic()
            if self.has_ended():
                self._ray.kill(self._actor, no_restart=True)
            else:
                self._actor.kill.remote()

    def hang_up(self) -> None:
        self.kill()

    def close(self) -> None:
        self.kill()
        deadline_s = time.monotonic() + KILL_TIMEOUT_S + CLOSE_TIMEOUT_S
        while not (self.has_ended() or self.is_reaped()):
            if time.monotonic() > deadline_s:
                logger.error("an actor of Ray does not end; see `ray list actors`")
                break
            time.sleep(5e-3)
        self._ray.kill(self._actor, no_restart=True)


class RayStarter:
    """Starts cards on the hosts of a Ray cluster; a `CardStarter`.

    Connects to the cluster that this process is connected to, else to the one of `RAY_ADDRESS` or of this host, and
    else starts one on this host, which ends with this process.

    Args:
        device: `auto`, `cuda` or `cpu`.
        num_cards: of the cluster.
        card_timeout_s: seconds of silence that end a card.

    Raises:
        BackendUnavailableError: Ray is not installed.
        ConfigError: Ray's cluster has fewer GPUs, or CPUs, than there are cards.
        ClusterError: they are not free.
    """

    def __init__(self, device: str, num_cards: int, card_timeout_s: float) -> None:
        self._ray = ray = import_ray()
        connect(ray)
        resources = ray.cluster_resources()
        self.kind = "cuda" if device == "cuda" or (device == "auto" and resources.get("GPU")) else "cpu"
        self._check_resources(num_cards, resources)
        bundle = {"CPU": 1.0, "GPU": 1.0} if self.kind == "cuda" else {"CPU": 1.0}
        self._group = self._reserve([bundle] * num_cards)
        places = ray.util.placement_group_table(self._group)["bundles_to_node_id"].values()
        here = ray.get_runtime_context().get_node_id()
        self._is_one_host = set(places) == {here}
        self.address = "127.0.0.1" if self._is_one_host else ray.util.get_node_ip_address()
        self.controller_timeout_s = card_timeout_s
        self._actor_class = ray.remote(CardActor)

    def name_of(self, index: int) -> str:
        return f"card {index}"

    def start(self, index: int, card: str, contact: bytes) -> RayProcess:
        strategy = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            self._group, placement_group_bundle_index=index
        )
        actor = self._actor_class.options(
            num_cpus=1,
            num_gpus=1 if self.kind == "cuda" else 0,
            max_restarts=0,  # a new process has new keys, and the controller makes them
            max_concurrency=2,  # it is killed while it runs
            scheduling_strategy=strategy,
            runtime_env={"env_vars": KEEP_VISIBLE_DEVICES},
        ).remote()
        ended = actor.run.remote(card, contact, self.kind == "cuda", self._is_one_host).future()
        return RayProcess(self._ray, actor, ended, self.controller_timeout_s)

    def close(self) -> None:
        self._ray.util.remove_placement_group(self._group)

    def _check_resources(self, num_cards: int, resources: dict[str, float]) -> None:
        unit = "GPU" if self.kind == "cuda" else "CPU"
        if resources.get(unit, 0) < num_cards:
            nodes = sum(1 for node in self._ray.nodes() if node["Alive"])
            raise ConfigError(
                f"{num_cards} cards need {num_cards} {unit}s, and Ray's cluster of {nodes} nodes has "
                f"{resources.get(unit, 0):g} (of CPUs {resources.get('CPU', 0):g}); pass fewer prefill_cards and "
                "decode_cards, or start Ray on more hosts (`ray start --address=...`)"
            )
        if self.kind == "cuda" and not torch.cuda.device_count():
            raise ConfigError(
                "Ray's cluster has GPUs, the host of this process has none; make the engine on one that has"
            )

    def _reserve(self, bundles: list[dict[str, float]]) -> Any:
        """Places for all cards at once, on as few hosts as can be: KV is fastest within one."""
        ray = self._ray
        group = ray.util.placement_group(bundles, strategy="PACK")
        if not group.wait(RESERVE_TIMEOUT_S):
            free = ray.available_resources()
            ray.util.remove_placement_group(group)
            raise ClusterError(
                f"Ray found no place for {len(bundles)} cards of {bundles[0]} within {RESERVE_TIMEOUT_S:.0f} s: free "
                f"are {free.get('GPU', 0):g} GPUs and {free.get('CPU', 0):g} CPUs; end what has them (`ray status`)"
            )
        return group


def connect(ray: Any) -> None:
    """Connects this process to Ray, if it is not; Ray's handler of SIGTERM is not left behind."""
    if ray.is_initialized():
        return
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(include_dashboard=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"Ray cannot be reached or started: {error}") from error
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)
