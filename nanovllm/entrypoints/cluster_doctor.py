"""Checks a cluster of cards: whether each is reached, versions, clocks, and how fast KV crosses between each two.

Starts the cards' processes with the demo model, pushes blocks from each to each other, and ends them. Names pairs that
are slow beside the others, and what is different about them.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nanovllm.config import EngineConfig
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.engine.builder import check_cluster_packages, runner_spec
from nanovllm.engine.distributed.cluster import Cluster, make_starter, start_cluster, unlike_versions
from nanovllm.engine.distributed.remote_card import RemotePush, RemoteRunner, RemoteStep, RemoteTransfer
from nanovllm.entrypoints.findings import FAILED, OK, WARNING, Finding
from nanovllm.errors import ClusterError, HandoffError, NanoVLLMError
from nanovllm.utils.checkpoint import checkpoint_folder, read_json
from nanovllm.utils.device import Device

PUSH_BYTES = 256 * 1024**2
BLOCK_TOKENS = 256
NUM_PUSHES = 3
"""Pushes of each pair, of which the fastest counts: the first one also connects the two."""
NUM_ROUND_TRIPS = 20
ANSWER_TIMEOUT_S = 30.0
SLOW = 0.5
"""A pair is slow whose rate is below this share of the median."""


@dataclass(frozen=True)
class Pair:
    """What was measured from one card to another.

    Attributes:
        source, target: the cards.
        bytes_per_s: rate of the fastest push.
        transport: the one that UCX used.
    """

    source: RemoteRunner
    target: RemoteRunner
    bytes_per_s: float
    transport: str

    @property
    def name(self) -> str:
        return f"{self.source.device} to {self.target.device}"

    @property
    def is_within_host(self) -> bool:
        return self.source.ready.host == self.target.ready.host


def examine_cluster(cluster: str, prefill_cards: int, decode_cards: int, device: str = "auto") -> Iterator[Finding]:
    """One finding after another about a cluster that is started for this and ended."""
    options = {"cluster": cluster, "prefill_cards": prefill_cards, "decode_cards": decode_cards, "device": device}
    try:
        began_s = time.perf_counter()
        cards = start_cards(EngineConfig.from_options(DEMO_MODEL_PATH, options))
    except NanoVLLMError as error:
        yield Finding("cluster", FAILED, f"{type(error).__name__}: {error}", "see docs/how-to/cluster.md")
        return
    try:
        took_s = time.perf_counter() - began_s
        yield Finding("cluster", OK, f"{len(cards.runners)} cards were ready after {took_s:.1f} s")
        yield from check_cards(cards.runners)
        yield from check_clocks(cards.runners)
        yield from check_pairs(cards.runners)
    except ClusterError as error:
        yield Finding("cluster", FAILED, str(error), "see the log of the card, above")
    finally:
        cards.close()


def start_cards(config: EngineConfig) -> Cluster:
    """Cards with the demo model, and pools that hold a push twice.

    Raises:
        ConfigError, BackendUnavailableError, ClusterError, ...: as when an engine is made.
    """
    check_cluster_packages()
    starter = make_starter(config)
    try:
        config = dataclasses.replace(config, enforce_eager=True, kvcache_block_size=BLOCK_TOKENS, max_num_seqs=8)
        folder = checkpoint_folder(config.model)
        hf_config = read_json(folder, "config.json") or {}
        spec = runner_spec(config, Path(folder), hf_config, Device(starter.kind, 0))
        num_blocks = 2 * max(PUSH_BYTES // spec.block_bytes, 1)
        config = dataclasses.replace(config, num_kvcache_blocks=num_blocks)
    except BaseException:
        starter.close()
        raise
    return start_cluster(config, spec, starter, explains_transports=True)


def check_cards(runners: list[RemoteRunner]) -> Iterator[Finding]:
    """Where each card is, and whether its versions are those of the first."""
    for runner in runners:
        ready = runner.ready
        unlike = unlike_versions(runners[0].ready.about, ready.about)
        about = ", ".join(f"{name} {value}" for name, value in ready.about.items())
        found = f"process {ready.pid} on {ready.hostname}, {ready.device}; {about}"
        advice = f"unlike {runners[0].device}: {unlike}; install the same versions" if unlike else ""
        yield Finding(str(runner.device), WARNING if unlike else OK, found, advice)


def check_clocks(runners: list[RemoteRunner]) -> Iterator[Finding]:
    """How far each card is in time."""
    for runner in runners:
        for _ in range(NUM_ROUND_TRIPS):
            round_trip(runner)
        clock = runner.clock
        found = f"messages there and back in {clock.round_trip_s * 1e6:.0f} us"
        if not clock.is_ours:
            found += f", its clock is {clock.offset_s:+.6f} s off this host's, which is taken into account"
        yield Finding(f"clock of {runner.device}", OK, found)


def round_trip(runner: RemoteRunner) -> None:
    """Asks a card for its clock, and waits for the answer."""
    before = runner.clock.num_round_trips
    runner.ping()
    _await(runner, lambda: runner.clock.num_round_trips > before)


def check_pairs(runners: list[RemoteRunner]) -> Iterator[Finding]:
    """How fast KV crosses from each card to each other, and what is slow beside the others."""
    pairs, unclear = [], set[RemoteRunner]()
    for source, target in itertools.permutations(runners, 2):
        if unclear & {source, target}:
            found = "not tried: a push of one of them has failed, and may still be writing"
            yield Finding(f"{source.device} to {target.device}", WARNING, found, "see the pair that has failed")
            continue
        try:
            pairs.append(measure(source, target))
        except HandoffError as error:
            unclear |= {source, target}
            advice = "is UCX let through between the two hosts (firewall, UCX_NET_DEVICES, UCX_TLS)?"
            yield Finding(f"{source.device} to {target.device}", FAILED, str(error), advice)
    for pair in pairs:
        reason = reason_for_slow(pair, pairs)
        found = f"{pair.bytes_per_s / 1e9:.2f} GB/s by {pair.transport}, checksums equal"
        yield Finding(pair.name, WARNING if reason else OK, found, reason)


def measure(source: RemoteRunner, target: RemoteRunner) -> Pair:
    """Pushes blocks from one card to another.

    Raises:
        HandoffError: they do not arrive as they left, or not in time.
    """
    num_blocks = source.num_kv_blocks // 2
    blocks = [(index, num_blocks + index) for index in range(num_blocks)]
    times_s = [push(source, target, blocks, verify=False) for _ in range(NUM_PUSHES)]
    push(source, target, blocks[:8], verify=True)
    source.transports = None
    source.ask_transports()
    _await(source, lambda: source.transports is not None)
    place = "intra-node" if source.ready.host == target.ready.host else "inter-node"
    by_place: dict[str, list[str]] = source.transports or {}
    transport = " and ".join(by_place.get(place, [])) or "a transport that UCX does not name"
    return Pair(source, target, num_blocks * source.geometry.block_bytes / min(times_s), transport)


def push(source: RemoteRunner, target: RemoteRunner, blocks: list[tuple[int, int]], *, verify: bool) -> float:
    """Pushes blocks once; the seconds that it took.

    Raises:
        ClusterError: a card is lost.
        HandoffError: they do not arrive as they left, or not in time.
    """
    handle = RemoteTransfer(source, target, verify=verify).send(blocks, RemoteStep(source, 0))
    assert isinstance(handle, RemotePush), "both are cards of a cluster"

    def is_over() -> bool:
        handle.poll()
        return handle.is_done()

    deadline_s = time.monotonic() + ANSWER_TIMEOUT_S
    while not is_over():
        _check_is_there(source)
        _check_is_there(target)
        if time.monotonic() > deadline_s:
            raise HandoffError(f"nothing has arrived within {ANSWER_TIMEOUT_S:.0f} s")
        time.sleep(1e-4)
    handle.wait()
    moments = handle.moments()
    assert moments is not None, "it was sent"
    return moments[1] - moments[0]


def reason_for_slow(pair: Pair, pairs: list[Pair]) -> str:
    """Why a pair is slow beside the others, as far as can be seen; empty if it is not."""
    median = statistics.median(each.bytes_per_s for each in pairs)
    if pair.bytes_per_s >= SLOW * median:
        return ""
    faster = [each for each in pairs if each.bytes_per_s >= median]
    reasons = []
    if pair.transport not in {each.transport for each in faster}:
        others = " or ".join(sorted({each.transport for each in faster}))
        reasons.append(f"UCX takes {pair.transport}, for faster pairs {others}")
    if not pair.is_within_host and any(each.is_within_host for each in faster):
        where = f"{pair.source.ready.hostname} and {pair.target.ready.hostname}"
        reasons.append(f"it crosses the network between {where}: have prefill and decode cards on one host, or RDMA")
    nodes = [runner.ready.about.get("NUMA node") for runner in (pair.source, pair.target)]
    if pair.is_within_host and nodes[0] != nodes[1]:
        reasons.append(f"its GPUs are on NUMA nodes {nodes[0]} and {nodes[1]}: see nvidia-smi topo -m")
    why = "; ".join(reasons) or "nothing that can be seen is different: is the link, or the host, in use?"
    return f"slow, {pair.bytes_per_s / median:.0%} of the median: {why}"


def _check_is_there(runner: RemoteRunner) -> None:
    if runner.is_lost:
        raise ClusterError(f"{runner.device} is lost: {runner.reason}")


def _await(runner: RemoteRunner, is_there: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + ANSWER_TIMEOUT_S
    while not is_there():
        runner.poll()
        _check_is_there(runner)
        if time.monotonic() > deadline_s:
            raise ClusterError(f"{runner.device} has not answered within {ANSWER_TIMEOUT_S:.0f} s")
        time.sleep(1e-5)
