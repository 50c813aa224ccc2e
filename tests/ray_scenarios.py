"""What `tests/test_cluster_ray.py` has run in a network namespace of its own: Ray listens where it likes.

`python -m tests.ray_scenarios NAME FOLDER` prints one line of JSON: what came of it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
import zmq
from ray.cluster_utils import Cluster

from nanovllm import LLM, AsyncLLM, ConfigError, SamplingParams
from nanovllm.engine.distributed import card_clock, remote_card
from nanovllm.entrypoints.cluster_doctor import examine_cluster
from tests import tiny

OPTIONS = {"device": "cpu", "cluster": "ray", "num_kvcache_blocks": 200, "verify_kv_handoff": True}
GREEDY = SamplingParams(temperature=0, max_tokens=40)


def tokens_of(llm: LLM, count: int) -> list[list[int]]:
    answers = llm.generate(tiny.random_prompts(count, seed=61), GREEDY, use_tqdm=False)
    assert not [answer["error"] for answer in answers if answer["error"]]
    return [answer["token_ids"] for answer in answers]


def await_loss(llm: LLM, runners: list[Any]) -> None:
    """Until one of these was lost, and all cards are up again."""
    deadline_s = time.monotonic() + 200
    while (
        not any(runner.reason for runner in runners)
        or not all(card.is_up for card in llm.scheduler.cards)
        or llm._handoffs.under_way
    ):
        assert time.monotonic() < deadline_s, "a card does not come back"
        llm.step()
        time.sleep(0.01)


def after(seconds: float, call: Callable[..., Any], *arguments: Any) -> threading.Timer:
    timer = threading.Timer(seconds, call, arguments)
    timer.start()
    return timer


def one_host(folder: str) -> dict[str, Any]:
    """Cards on one host; a card's process is killed, then an actor."""
    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="WARNING")
    found: dict[str, Any] = {}
    try:
        LLM(folder, **OPTIONS, prefill_cards=2)
    except ConfigError as error:
        found["too_many"] = str(error)
    with LLM(folder, **OPTIONS, card_timeout_s=10) as llm:
        first, second = (next(runner for runner in llm._runners if runner.device.index == index) for index in (0, 1))
        found["endpoint"] = second._client._messages.getsockopt_string(zmq.LAST_ENDPOINT)
        found["tokens"] = tokens_of(llm, 6)
        found["links"] = list(llm.metrics()["handoff_bytes_by_link"])
        timer = after(0.1, os.kill, second.pid, signal.SIGKILL)
        found["tokens_killed"] = tokens_of(llm, 24)
        timer.join()
        await_loss(llm, [second])
        found["killed"] = second.reason
        pid = first.pid
        timer = after(0.1, ray.kill, first._client._process._actor)
        found["tokens_actor"] = tokens_of(llm, 24)
        timer.join()
        await_loss(llm, [first])
        found["actor"], found["went_with_it"] = first.reason, not os.path.exists(f"/proc/{pid}")
        pids = [runner.pid for runner in llm._runners]
    found["tokens_async"] = asyncio.run(served(folder))
    found["left"] = [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
    return found


async def served(folder: str) -> list[list[int]]:
    """Tokens of an engine in a process of its own, as the server has it, which starts its own Ray."""
    async with AsyncLLM(folder, **OPTIONS) as llm:

        async def tokens(prompt: list[int]) -> list[int]:
            return [token async for output in llm.generate(prompt, GREEDY) for token in output.new_token_ids]

        return await asyncio.gather(*(tokens(prompt) for prompt in tiny.random_prompts(6, seed=61)))


def two_hosts(folder: str) -> dict[str, Any]:
    """Cards on hosts of different addresses, one of which dies; clocks are measured."""
    # The hosts of this test are one, whose name all processes know.
    remote_card.host_id = lambda: "the controller's"
    assert card_clock.host_id() != "the controller's"
    cluster = Cluster()
    cluster.add_node(num_cpus=1, node_ip_address="127.0.0.2", include_dashboard=False)
    second = cluster.add_node(num_cpus=1, node_ip_address="127.0.0.3")
    ray.init(address=cluster.address, logging_level="WARNING", _node_ip_address="127.0.0.2")
    found: dict[str, Any] = {}
    with LLM(folder, **OPTIONS, card_timeout_s=10) as llm:
        runners = list(llm._runners)
        found["endpoints"] = [runner._client._messages.getsockopt_string(zmq.LAST_ENDPOINT) for runner in runners]
        found["tokens"] = tokens_of(llm, 6)
        found["clocks"] = [(runner.clock.offset_s, runner.clock.round_trip_s) for runner in runners]
        cluster.add_node(num_cpus=1, node_ip_address="127.0.0.4")
        timer = after(0.2, lambda: cluster.remove_node(second, allow_graceful=False))
        found["tokens_lost"] = tokens_of(llm, 24)
        timer.join()
        await_loss(llm, runners)
        found["reasons"] = [runner.reason for runner in runners]
        found["tokens_back"] = tokens_of(llm, 6)
    return found


def gpus(folder: str) -> dict[str, Any]:
    """Two GPUs of one host."""
    ray.init("local", include_dashboard=False, logging_level="WARNING")
    options = {**OPTIONS, "device": "cuda", "dtype": "float32", "kvcache_block_size": 16}
    found: dict[str, Any] = {}
    with LLM(folder, **options) as llm:
        found["tokens"] = tokens_of(llm, 6)
        found["devices"] = [runner.ready.device for runner in llm._runners]
    findings = list(examine_cluster("ray", 1, 1, "cuda"))
    found["pairs"] = [finding.found for finding in findings if " to " in finding.check]
    return found


if __name__ == "__main__":
    scenario = {"one_host": one_host, "two_hosts": two_hosts, "gpus": gpus}[sys.argv[1]]
    sys.stdout.write(f"\n{json.dumps(scenario(sys.argv[2]))}\n")
    sys.stdout.flush()
