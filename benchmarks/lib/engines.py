"""Engines that serve a load and are watched meanwhile: one in this process, or some in processes of their own."""

from __future__ import annotations

import argparse
import math
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from lib.arguments import CLUSTER_MODES
from lib.loads import Request, Router, serve, serve_streams, vocab_size_of
from lib.meters import BusyMeter, HandoffMeter, freeze_garbage
from lib.online import load_of, service_options, shares_beginnings, streams_of, warm_up_load
from lib.replicas import Decisions, ReplicaRouter
from nanovllm import LLM

SOME_VOCAB_SIZE = 2
"""How many requests a load has does not depend on it."""
SECONDS_UNTIL_A_LOAD = 0.3
"""Long enough for all processes to hear of it."""


@dataclass
class Served:
    """A load that an engine has served: its requests, and what the engine's devices did meanwhile."""

    requests: list[Request]
    busy_share: dict[str, float]
    """Share of the time until the last token, by device."""
    idle_share: dict[str, float]
    """By device: idle time between two decode steps of a request, as a share of that and of the time of its steps."""
    handoff: dict[str, float]
    """Bytes moved, sends, and the host's microseconds for each; empty where there are none."""
    prefix_cache: dict[str, int]
    """Tokens that were looked up in the prefix cache, and found; empty where it is off."""
    step_time: dict[str, Any]
    """By card, what the last steps were predicted to take, and took."""
    chunks: dict[str, float]
    """Chunks of prompts that two cards share, and others; and how long they have waited for each other's layers, as a
    share of the time of steps with prompts."""


class Engine:
    """An engine that serves load after load, with meters on its devices; `warm_up` comes first."""

    def __init__(self, args: argparse.Namespace, device: str) -> None:
        self._args = args
        self.has_prefix_cache = shares_beginnings(args)
        self.llm = LLM(**{**service_options(args), "device": device})
        self.vocab_size = vocab_size_of(self.llm)
        self._meters: dict[str, BusyMeter] = {}
        self._handoffs: HandoffMeter | None = None
        if args.mode not in CLUSTER_MODES:  # whose streams nobody here can watch
            runners = dict.fromkeys((self.llm.prefill_runner, self.llm.decode_runner))
            self._meters = {str(runner.device): BusyMeter(runner) for runner in runners}
            self._handoffs = HandoffMeter(self.llm)

    def warm_up(self) -> None:
        """Serves some requests. Nothing else may run on the devices: engines learn how long their steps take."""
        serve(self.llm, warm_up_load(self._args, self.vocab_size))
        freeze_garbage()

    def serve_streams(self, args: argparse.Namespace) -> Served:
        """Serves `--streams` for `--duration`."""
        streams = streams_of(args, self.vocab_size)
        return self._measure(lambda: serve_streams(self.llm, streams, args.duration))

    def serve(self, requests: list[Request], begin_at: float | None = None, router: Router | None = None) -> Served:
        return self._measure(lambda: serve(self.llm, requests, begin_at, router))

    def _measure(self, serve_load: Callable[[], list[Request]]) -> Served:
        for meter in self._meters.values():
            meter.take()
        if self._handoffs is not None:
            self._handoffs.take()
        tokens_before, before, at_start = self._cache_tokens(), self._chunks(), self.llm.metrics()
        requests = serve_load()
        ended_s = max((request.token_times_s[-1] for request in requests if request.token_times_s), default=math.inf)
        taken = {device: meter.take() for device, meter in self._meters.items()}
        busy = {device: busy_s / ended_s for device, (busy_s, _) in taken.items()}
        if self._handoffs is None:
            kinds_before = at_start["busy_s"]
            for card, kinds in self.llm.metrics()["busy_s"].items():
                busy[card] = (sum(kinds.values()) - sum(kinds_before[card].values())) / ended_s
            handoffs = {"bytes": self.llm.metrics()["handoff_bytes"] - at_start["handoff_bytes"]}
        else:
            handoffs = self._handoffs.take()
        idle = {device: idle_s / max(busy_s + idle_s, 1e-9) for device, (busy_s, idle_s) in taken.items()}
        found = {name: number - tokens_before[name] for name, number in self._cache_tokens().items()}
        chunks = {name: number - before[name] for name, number in self._chunks().items()}
        chunks["wait_share"] = chunks.pop("wait_s") / max(chunks.pop("prompt_s"), 1e-9)
        return Served(requests, busy, idle, handoffs, found, self.llm.metrics()["step_time"], chunks)

    def _chunks(self) -> dict[str, float]:
        """Chunks of prompts so far, and the seconds of steps that had some, and in which these waited."""
        metrics = self.llm.metrics()
        prompt_s = sum(kinds["prefill"] + kinds["mixed"] for kinds in metrics["busy_s"].values())
        return {**metrics["prefill_chunks"], "wait_s": metrics["layer_wait_s"], "prompt_s": prompt_s}

    def _cache_tokens(self) -> dict[str, int]:
        """Tokens of prompts so far."""
        if not self.has_prefix_cache:
            return {}
        metrics = self.llm.metrics()
        return {name: metrics[f"prefix_cache_{name}"] for name in ("queried_tokens", "hit_tokens")}


_engine: Engine
_requests: list[Request]
_decisions: Decisions


def _know(decisions: Decisions) -> None:
    global _decisions
    _decisions = decisions


def _start(args: argparse.Namespace, device: str) -> None:
    global _engine
    _engine = Engine(args, device)


def _warm_up() -> None:
    _engine.warm_up()


def _make_load(args: argparse.Namespace, rate: float) -> None:
    global _requests
    _requests = load_of(args, rate, _engine.vocab_size)


def _serve(index: int, begin_at: float) -> Served:
    router = None
    if _decisions.num_replicas > 1:
        router = ReplicaRouter(_decisions, index, _requests, by_prefix=_engine.has_prefix_cache)
    return _engine.serve(_requests, begin_at, router)


class Engines:
    """Engines of one mode, each in a process of its own: replicas, one for each device, or a single one.

    Args:
        args: options of the service; `mode` among them.
        num_replicas: how many; each has the device of its number if there are several.
        loads: options and rate of all loads that they are to serve.
    """

    def __init__(
        self, args: argparse.Namespace, num_replicas: int, loads: Sequence[tuple[argparse.Namespace, float]]
    ) -> None:
        context = multiprocessing.get_context("spawn")
        most_requests = max(len(load_of(load, rate, SOME_VOCAB_SIZE)) for load, rate in loads)
        self._decisions = Decisions(context, num_replicas, most_requests)
        self._processes = [
            ProcessPoolExecutor(1, mp_context=context, initializer=_know, initargs=(self._decisions,))
            for _ in range(num_replicas)
        ]
        self._args = args

    def start(self) -> list[Future[None]]:
        """Begins to start them; each is there when its future has a result."""
        indexed = self._args.device in ("auto", "cuda") and len(self._processes) > 1
        devices = [f"cuda:{index}" if indexed else self._args.device for index in range(len(self._processes))]
        return [
            process.submit(_start, self._args, device) for process, device in zip(self._processes, devices, strict=True)
        ]

    def warm_up(self) -> None:
        """Has each serve some requests, once all that are to run on its device have started."""
        for done in [process.submit(_warm_up) for process in self._processes]:
            done.result()

    def serve(self, args: argparse.Namespace, rate: float) -> Served:
        """Serves the load of these options at this rate, and waits for its end."""
        self._decisions.begin_load()
        for made in [process.submit(_make_load, args, rate) for process in self._processes]:
            made.result()
        begin_at = time.time() + SECONDS_UNTIL_A_LOAD
        parts = [process.submit(_serve, index, begin_at) for index, process in enumerate(self._processes)]
        served = [part.result() for part in parts]
        return served[0] if len(served) == 1 else _of_replicas(served)

    def close(self) -> None:
        for process in self._processes:
            process.shutdown(cancel_futures=True)


def _of_replicas(served: Sequence[Served]) -> Served:
    """What replicas have served, as one."""

    def by_replica(shares: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {f"replica {index}": value for index, values in enumerate(shares) for value in values.values()}

    requests = sorted((r for part in served for r in part.requests), key=lambda request: request.due_s)
    found: Counter[str] = Counter()
    for part in served:
        found.update(part.prefix_cache)
    return Served(
        requests,
        by_replica([part.busy_share for part in served]),
        by_replica([part.idle_share for part in served]),
        {},
        dict(found),
        by_replica([part.step_time for part in served]),
        {},  # each is alone, and shares nothing
    )
