"""What the doctor finds about a cluster: of three processes of the CPU, and of pairs that are made up."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("nixl_cu13") is None, reason="needs nixl-cu13 (Linux)")
if importlib.util.find_spec("zmq") is not None:
    from nanovllm.engine.distributed import card_local
    from nanovllm.engine.distributed.cluster import unlike_versions
    from nanovllm.engine.distributed.kv_nixl import transports_in
    from nanovllm.entrypoints import cluster_doctor
    from nanovllm.entrypoints.cluster_doctor import Pair, examine_cluster, reason_for_slow
    from nanovllm.entrypoints.findings import FAILED, OK

LOG = """
[1795809090.5] [vm:1:0] ucp_worker.c:1997 UCX  INFO    card 0 of start 1 self cfg#0 rma_am(tcp/lo)
[1795809090.5] [vm:1:0]   | card 0 of start 1 self cfg#0                             |
[1795809090.5] [vm:1:0]   | remote memory write by ucp_put* from host memory to host |
[1795809090.5] [vm:1:0]   | Range  | Description |              Config               |
[1795809090.5] [vm:1:0]   | 0..inf | zero-copy   | self/memory                       |
[1795809090.6] [vm:1:0]   | card 0 of start 1 intra-node cfg#1                       |
[1795809090.6] [vm:1:0]   | active message by ucp_am_send* from host memory          |
[1795809090.6] [vm:1:0]   | 0..inf | zero-copy   | tcp/lo                            |
[1795809090.6] [vm:1:0]   | card 0 of start 1 intra-node cfg#1                       |
[1795809090.6] [vm:1:0]   | remote memory write by ucp_put* from cuda/GPU0 to cuda   |
[1795809090.6] [vm:1:0]   | Range  | Description |              Config               |
[1795809090.6] [vm:1:0]   | 0..inf | zero-copy   | cuda_ipc/cuda                     |
[1795809090.7] [vm:1:0]   | card 0 of start 1 inter-node cfg#2                       |
[1795809090.7] [vm:1:0]   | remote memory write by ucp_put* from cuda/GPU0 to cuda   |
[1795809090.7] [vm:1:0]   | 0..8184    | copy-in   | tcp/eth0                        |
[1795809090.7] [vm:1:0]   | 8185..inf  | zero-copy | rc_mlx5/mlx5_0:1                |
"""


def test_transports_are_read_from_the_log_of_ucx():
    assert transports_in(LOG) == {"intra-node": ["cuda_ipc/cuda"], "inter-node": ["tcp/eth0", "rc_mlx5/mlx5_0:1"]}
    assert transports_in("") == {}


def test_a_cluster_of_three_processes(monkeypatch):
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setattr(cluster_doctor, "PUSH_BYTES", 8 * 1024**2)
    monkeypatch.setattr(cluster_doctor, "SLOW", 0.0)  # others compute on the same cores
    found = {finding.check: finding for finding in examine_cluster("local", 2, 1, "cpu")}
    assert {finding.verdict for finding in found.values()} == {OK}, found
    assert found["cluster"].found.startswith("3 cards were ready after ")
    assert "cpu:2; nanovllm " in found["card 2"].found
    assert "there and back in " in found["clock of card 1"].found
    pairs = [check for check in found if " to " in check]
    assert len(pairs) == 6
    for pair in pairs:
        assert found[pair].found.endswith(" GB/s by tcp/lo, checksums equal")


def test_a_cluster_that_does_not_start_is_a_finding(monkeypatch):
    monkeypatch.setattr(card_local, "_command_line", lambda arguments: [sys.executable, "-c", "raise SystemExit(3)"])
    (finding,) = examine_cluster("local", 1, 1, "cpu")
    assert finding.verdict == FAILED
    assert "its process has ended with exit status 3" in finding.found
    (finding,) = examine_cluster("local", 0, 1, "cpu")
    assert "prefill_cards=0 is not a positive integer" in finding.found


def make_runner(name: str, host: str, node: str) -> SimpleNamespace:
    ready = SimpleNamespace(host=host, hostname=f"name of {host}", about={"NUMA node": node})
    return SimpleNamespace(device=name, ready=ready)


def test_a_slow_pair_is_named_with_what_is_different():
    cards = [make_runner("a", "one", "0"), make_runner("b", "one", "0"), make_runner("c", "one", "1")]
    far = make_runner("d", "two", "0")
    fast = [Pair(cards[0], cards[1], 250e9, "cuda_ipc/cuda"), Pair(cards[1], cards[0], 240e9, "cuda_ipc/cuda")]
    by_tcp = Pair(cards[0], far, 2e9, "tcp/eth0")
    across = Pair(cards[0], cards[2], 20e9, "cuda_ipc/cuda")
    alike = Pair(cards[1], cards[0], 30e9, "cuda_ipc/cuda")
    pairs = [*fast, *fast, by_tcp, across, alike]
    assert reason_for_slow(fast[1], pairs) == ""
    assert "UCX takes tcp/eth0, for faster pairs cuda_ipc/cuda" in reason_for_slow(by_tcp, pairs)
    assert "it crosses the network between name of one and name of two" in reason_for_slow(by_tcp, pairs)
    assert reason_for_slow(across, pairs) == (
        "slow, 8% of the median: its GPUs are on NUMA nodes 0 and 1: see nvidia-smi topo -m"
    )
    assert "nothing that can be seen is different" in reason_for_slow(alike, pairs)


def test_unlike_versions_are_named():
    ours = {"nanovllm": "1", "torch": "2.13", "nixl-cu13": "1.5.1", "python": "3.11"}
    assert unlike_versions(ours, {**ours, "python": "3.12"}) == ""
    assert unlike_versions(ours, {**ours, "torch": "2.12"}) == "torch 2.13 and 2.12"
