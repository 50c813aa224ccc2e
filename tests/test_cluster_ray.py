"""Cards that Ray starts: the same tokens, whatever becomes of a process, an actor or a host. Without Ray: its parts."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanovllm import LLM, BackendUnavailableError
from nanovllm.errors import ClusterError
from tests import tiny

needs_zmq = pytest.mark.skipif(importlib.util.find_spec("zmq") is None, reason="needs pyzmq")
if importlib.util.find_spec("zmq") is not None:
    from nanovllm.engine.distributed import card_ray
    from nanovllm.engine.distributed.card_clock import CardClock
    from nanovllm.engine.distributed.card_ray import RayProcess, RayStarter, net_devices, visible_index

IN_NAMESPACE = ["unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
"""A network of its own, in which there is this process and nobody else."""


@cache
def reason_to_skip() -> str | None:
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("nixl_cu13") is None:
        return "needs Ray and NIXL: pip install nanovllm[ray]"
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return "needs unshare and ip: Ray binds to addresses of its own choice, and gets a network of its own here"
    tried = subprocess.run([*IN_NAMESPACE, "true"], capture_output=True, text=True)
    return f"network namespaces are not allowed here: {tried.stderr.strip()}" if tried.returncode else None


def run_scenario(name: str, folder: str) -> dict[str, Any]:
    reason = reason_to_skip()
    if reason is not None:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="ray") as ray_folder:  # a short name: it has sockets
        environment = {
            "RAY_TMPDIR": ray_folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": ":".join(filter(None, sys.path)),
        }
        ran = subprocess.run(
            [*IN_NAMESPACE, sys.executable, "-m", "tests.ray_scenarios", name, folder],
            env={**os.environ, **environment},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            timeout=600,
        )
    assert ran.returncode == 0, f"{ran.stdout[-4000:]}\n{ran.stderr[-8000:]}"
    return json.loads(ran.stdout.rstrip().splitlines()[-1])


@pytest.fixture(scope="module")
def expected(checkpoint):
    path, reference = checkpoint("gqa2")
    prompts = {count: tiny.random_prompts(count, seed=61) for count in (6, 24)}
    return path, {
        count: [tiny.reference_tokens(reference, prompt, 40) for prompt in prompts[count]] for count in (6, 24)
    }


@pytest.mark.slow
def test_cards_of_one_host(expected):
    """Processes and actors end; the others go on, with one device's tokens, and nothing is left running."""
    folder, tokens = expected
    found = run_scenario("one_host", folder)
    assert "3 cards need 3 CPUs, and Ray's cluster of 1 nodes has 2" in found["too_many"]
    assert found["endpoint"].startswith("tcp://127.0.0.1:"), "nobody outside of the host gets as far"
    assert found["tokens"] == tokens[6]
    assert found["links"] == ["card 0 to card 1"]
    assert found["tokens_killed"] == found["tokens_actor"] == tokens[24]
    assert "its process has ended by SIGKILL" in found["killed"]
    assert "its actor is gone" in found["actor"]
    assert found["went_with_it"], "an actor that is gone leaves no process on the device"
    assert found["tokens_async"] == tokens[6]
    assert found["left"] == []


@pytest.mark.slow
def test_cards_of_two_hosts(expected):
    """The controller listens on its address; a host that dies takes no request with it, and another one takes over."""
    folder, tokens = expected
    found = run_scenario("two_hosts", folder)
    assert all(endpoint.startswith("tcp://127.0.0.2:") for endpoint in found["endpoints"])
    assert found["tokens"] == found["tokens_back"] == tokens[6]
    assert found["tokens_lost"] == tokens[24]
    (reason,) = filter(None, found["reasons"])
    assert "its actor is gone" in reason or "its process has said nothing" in reason, "Ray may take longer to say so"
    for offset_s, round_trip_s in found["clocks"]:
        assert 0 < round_trip_s < 60.0
        assert abs(offset_s) <= round_trip_s, "the hosts of this test have one clock"


# Its parts


@needs_zmq
def test_without_ray_it_says_what_to_install(tiny_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendUnavailableError, match=r"cluster='ray' needs Ray.*pip install nanovllm\[ray\]"):
        LLM(tiny_path, device="cpu", cluster="ray")


@needs_zmq
def test_a_gpu_is_found_among_those_that_are_visible():
    assert visible_index(["3"], None) == 3
    assert visible_index(["3"], "2,3") == 1


@needs_zmq
def test_ucx_listens_where_the_node_is_and_on_rdma(monkeypatch, tmp_path):
    monkeypatch.setattr(card_ray, "INFINIBAND", tmp_path)
    assert net_devices("127.0.0.1") == {"UCX_NET_DEVICES": "lo"}
    assert net_devices("127.0.0.3") == {"UCX_NET_DEVICES": "lo"}, "not its first address, but of its network"
    monkeypatch.delenv("UCX_NET_DEVICES", raising=False)
    with pytest.raises(ClusterError, match=r"no network interface is in the network of 203\.0\.113\.9"):
        net_devices("203.0.113.9")
    (tmp_path / "mlx5_0" / "ports" / "1").mkdir(parents=True)
    assert net_devices("127.0.0.1") == {"UCX_NET_DEVICES": "lo,mlx5_0:1"}


class FakeRay:
    """Says what was killed."""

    def __init__(self, **resources: float) -> None:
        self.killed: list[Any] = []
        self.resources = resources

    def kill(self, actor: Any, *, no_restart: bool) -> None:
        assert no_restart, "a new process needs new keys"
        self.killed.append(actor)

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def nodes(self) -> list[dict[str, bool]]:
        return [{"Alive": True}, {"Alive": False}]


@pytest.fixture
def now_s(monkeypatch) -> list[float]:
    """The time, in seconds, which stands still but for what the test adds."""
    now_s = [1.0]
    monkeypatch.setattr(card_ray, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    return now_s


def make_process(timeout_s: float = 0.1) -> tuple[RayProcess, FakeRay, Future[int], list[str]]:
    ray, ended, asked = FakeRay(), Future(), []
    actor = SimpleNamespace(kill=SimpleNamespace(remote=lambda: asked.append("kill")))
    return RayProcess(ray, actor, ended, timeout_s), ray, ended, asked


@needs_zmq
def test_a_process_that_has_ended_has_left_its_device():
    process, _, ended, _ = make_process(100.0)
    assert not process.has_ended()
    ended.set_result(-9)
    assert process.has_ended()
    assert process.is_reaped()
    assert process.was_killed()
    assert "by SIGKILL" in process.how_it_ended()


@needs_zmq
def test_a_process_whose_actor_is_gone_may_run_until_it_misses_its_controller(now_s):
    """Its host may only be out of reach."""
    process, ray, ended, _ = make_process()
    ended.set_exception(RuntimeError("The actor died\nbecause its node has died."))
    assert process.has_ended()
    assert not process.is_reaped()
    assert not process.was_killed()
    assert process.how_it_ended() == "its actor is gone: The actor died because its node has died."
    process.kill()
    assert len(ray.killed) == 1, "it may be there after all"
    now_s[0] += 0.15
    assert process.is_reaped()


@needs_zmq
def test_an_actor_that_does_not_end_its_process_is_ended(now_s):
    process, ray, _, asked = make_process()
    process.kill()
    process.kill()
    assert asked == ["kill"]
    assert not process.is_reaped()
    assert not ray.killed
    now_s[0] += card_ray.KILL_TIMEOUT_S + 0.1
    assert not process.is_reaped(), "that is known when Ray says so"
    assert len(ray.killed) == 1


@needs_zmq
@pytest.mark.parametrize(
    ("device", "resources", "message"),
    [
        ("auto", {"CPU": 1.0}, r"2 cards need 2 CPUs, and Ray's cluster of 1 nodes has 1"),
        ("auto", {"CPU": 64.0, "GPU": 1.0}, r"2 cards need 2 GPUs, and Ray's cluster of 1 nodes has 1 \(of CPUs 64\)"),
        ("cuda", {"CPU": 64.0}, r"2 cards need 2 GPUs, and Ray's cluster of 1 nodes has 0"),
        ("auto", {"CPU": 64.0, "GPU": 8.0}, r"Ray's cluster has GPUs, the host of this process has none"),
    ],
)
def test_too_small_a_cluster_is_refused(monkeypatch, device, resources, message):
    monkeypatch.setattr(card_ray, "import_ray", lambda: FakeRay(**resources))
    monkeypatch.setattr(card_ray.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=message):
        RayStarter(device, 2, 10.0)


@needs_zmq
def test_a_clock_is_that_of_the_shortest_round_trip():
    clock = CardClock(is_ours=False)
    assert clock.wants_ping(0.0)
    assert not clock.wants_ping(1.0)
    assert clock.wants_ping(11.0)
    clock.learn(0.0, 1000.3, 1.0)
    assert clock.offset_s == pytest.approx(999.8)
    clock.learn(11.0, 1011.001, 11.002)
    assert clock.offset_s == pytest.approx(1000.0)
    clock.learn(21.0, 1021.9, 22.0)
    assert clock.offset_s == pytest.approx(1000.0), "a slow one says less"
    assert not CardClock(is_ours=True).wants_ping(0.0)
