"""What one controller costs the host, by the number of cards: real engine, real messages, simulated cards.

The engine's loop, its scheduler, the packing of steps, messages over encrypted sockets and the columns of tokens that
leave for a server are those of `cluster="local"`. The cards are one process that computes nothing: a step ends after
the time that it would take, with random tokens, and a push when its step has ended. A quarter of the cards prefill, or
with `--card-roles elastic` all prefill and decode.

Each decode card has `--rows` requests at a time, all of them there from the beginning and each followed by another one
as it ends; a decode step takes `--step-ms`, so that there is an arrival every `--num-output` / `--rows` steps of a
card. With `--trace` the lengths of prompts and answers are those of a file of JSON lines (`lib/traces.py`), in its
order. CPU time is that of the engine's process, in seconds for each second, its threads included; `in the loop` is that
of the thread that decides. A card's wait is the time from the end of a decode step to the arrival of the next one, 0 if
that was there before.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import itertools
import multiprocessing
import time
from typing import Any
from unittest import mock

import numpy as np
import zmq

from lib.arguments import new_parser, write_shape
from lib.report import report
from lib.traces import read_trace
from nanovllm import SamplingParams
from nanovllm.config import CARD_ROLES
from nanovllm.engine.distributed import cluster
from nanovllm.engine.distributed.card_clock import host_id
from nanovllm.engine.distributed.card_messages import (
    VERSION,
    Arrived,
    Contact,
    Expect,
    Geometry,
    Heartbeat,
    Hello,
    Launch,
    Push,
    Ready,
    Report,
    Sent,
    Start,
    StepEnded,
    decode_command,
    decode_contact,
    encode,
)
from nanovllm.engine.distributed.engine_process import ServedEngine
from nanovllm.engine.distributed.messages import encode as encode_tokens
from nanovllm.engine.execution.step_handle import SampledOnHost, StepTokens
from nanovllm.errors import ends_with_message

PREFILL_TOKENS_PER_S = 25_000.0
BLOCK_SIZE = 64
NUM_BLOCKS = 40_000
VOCAB_SIZE = 100_000
MAX_MODEL_LEN = 8192
ASK_WAITS = b"waits"


class SimulatedCard:
    """One card of the process that simulates all."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], contact: Contact, step_s: float, max_rows: int) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger, self.socket.sndhwm = 0, 0
        self.socket.curve_serverkey = contact.controller_key
        self.socket.curve_publickey, self.socket.curve_secretkey = contact.public_key, contact.secret_key
        self.socket.connect(contact.messages)
        self.heartbeats = context.socket(zmq.PUSH)
        self.heartbeats.linger = 0
        self.heartbeats.curve_serverkey = contact.controller_key
        self.heartbeats.curve_publickey, self.heartbeats.curve_secretkey = contact.public_key, contact.secret_key
        self.heartbeats.connect(contact.heartbeats)
        self.step_s, self.max_rows, self.free_s, self.agent = step_s, max_rows, 0.0, ""
        self.ends_s: dict[int, float] = {}
        self.waits_s: list[float] = []
        self.send(Hello(VERSION))

    def send(self, message: Report) -> None:
        self.socket.send(encode(message))

    def geometry(self) -> Geometry:
        return Geometry(NUM_BLOCKS, BLOCK_SIZE, 1, 16384, 16384 + self.max_rows, 32, self.max_rows, [], [])

    def ended(self, launch: Launch, began_s: float, ended_s: float) -> StepEnded:
        def sampled(count: int) -> SampledOnHost:
            return SampledOnHost(np.full(count, 7, dtype=np.int64))

        prefill, decode = launch.task.prefill, launch.task.decode
        after_chunks = sampled(prefill.num_sampled if prefill else 0)
        tokens = StepTokens(after_chunks, sampled(decode.num_rows if decode else 0))
        return StepEnded.of(launch.number, (began_s, ended_s), tokens)


def simulate_cards(contacts: Any, step_s: float, max_rows: int) -> None:
    """The process of all simulated cards; `contacts` is a pipe."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    poller, cards = zmq.Poller(), dict[Any, SimulatedCard]()
    by_agent: dict[str, SimulatedCard] = {}
    due: list[tuple[float, int, SimulatedCard, Report]] = []
    order, beat_s = itertools.count(), 0.0
    while True:
        while contacts.poll(0):
            contact = contacts.recv_bytes()
            if contact == ASK_WAITS:
                contacts.send([wait_s for card in cards.values() for wait_s in card.waits_s])
                for card in cards.values():
                    card.waits_s.clear()
                continue
            card = SimulatedCard(context, decode_contact(contact), step_s, max_rows)
            cards[card.socket] = card
            poller.register(card.socket, zmq.POLLIN)
        now_s = time.perf_counter()
        if now_s > beat_s:
            beat_s = now_s + 0.5
            for card in cards.values():
                card.heartbeats.send(encode(Heartbeat(0.0)))
        wait_ms = 20.0 if not due else max(min((due[0][0] - now_s) * 1e3, 20.0), 0.0)
        for ready, _ in poller.poll(int(wait_ms)):
            card = cards[ready]
            command = decode_command(card.socket.recv())
            now_s = time.perf_counter()
            if isinstance(command, Start):
                card.agent = command.agent
                by_agent[card.agent] = card
                card.send(Ready(card.geometry(), 0, host_id(), "", "simulated", {}, b"", 0, 0))
            elif isinstance(command, Launch):
                began_s = max(card.free_s, now_s)
                if command.task.decode is not None:
                    card.waits_s.append(began_s - card.free_s)
                prefill = command.task.prefill
                took_s = prefill.size / PREFILL_TOKENS_PER_S if prefill else 0.0
                took_s += card.step_s if command.task.decode is not None else 0.0
                card.free_s = card.ends_s[command.number] = began_s + took_s
                ended = card.ended(command, began_s, card.free_s)
                heapq.heappush(due, (card.free_s, next(order), card, ended))
            elif isinstance(command, Push):
                ends_s = card.ends_s.get(command.after_step, now_s)
                heapq.heappush(due, (ends_s, next(order), card, Sent(command.number, now_s, ends_s, None)))
                target = by_agent[command.agent]
                heapq.heappush(due, (ends_s, next(order), target, Arrived(command.number, None)))
            else:
                assert not isinstance(command, Expect) or command.agent in by_agent, "cards are introduced first"
        now_s = time.perf_counter()
        while due and due[0][0] <= now_s:
            _, _, card, message = heapq.heappop(due)
            card.send(message)


class SimulatedStarter:
    """Has cards simulated by another process; a `CardStarter`.

    Args:
        contacts: a pipe to that process.
    """

    kind, address, controller_timeout_s = "cpu", "127.0.0.1", 0.0

    def __init__(self, contacts: Any) -> None:
        self._contacts = contacts

    def waits_s(self) -> list[float]:
        """The decode cards' waits since the last call."""
        self._contacts.send_bytes(ASK_WAITS)
        found: list[float] = self._contacts.recv()
        return found

    def name_of(self, index: int) -> str:
        return f"card {index}"

    def start(self, index: int, card: str, contact: bytes) -> SimulatedProcess:
        self._contacts.send_bytes(contact)
        return SimulatedProcess()

    def close(self) -> None:
        """Nothing is reserved."""


class SimulatedProcess:
    """Stands in for the process of a card, and never ends; a `CardProcess`."""

    def has_ended(self) -> bool:
        return False

    def is_reaped(self) -> bool:
        return True

    def was_killed(self) -> bool:
        return False

    def how_it_ended(self) -> str:
        raise AssertionError("it has not ended")

    def kill(self) -> None: ...

    def hang_up(self) -> None: ...

    def close(self) -> None: ...


class Controller:
    """The engine of a cluster of simulated cards, and the requests that it serves.

    Args:
        args: the script's.
        num_cards: of the cluster.
        folder: of the model's shape.
        lengths: of prompts and answers, which come again and again.
    """

    def __init__(self, args: argparse.Namespace, num_cards: int, folder: str, lengths: list[tuple[int, int]]) -> None:
        self.num_prefill = max(num_cards // 4, 1)
        self.num_decode = num_cards - (self.num_prefill if args.card_roles == "fixed" else 0)
        self.lengths, self.rng = itertools.cycle(lengths), np.random.default_rng(0)
        num_requests = args.rows * self.num_decode
        self.engine = ServedEngine(
            folder,
            device="cpu",
            load_format="dummy",
            kvcache_block_size=BLOCK_SIZE,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=2 * num_requests,
            max_handoff_backlog=num_requests,
            enable_prefix_caching=False,
            cluster="local",
            prefill_cards=self.num_prefill,
            decode_cards=num_cards - self.num_prefill,
            card_roles=args.card_roles,
            card_timeout_s=60,
        )
        gc.freeze()  # as the server's engine does
        for _ in range(num_requests):
            self.add(is_first=True)

    def add(self, *, is_first: bool = False) -> None:
        """A request; those there at the beginning are somewhere in their answers, not all at the start."""
        num_input, num_output = next(self.lengths)
        num_output = int(self.rng.integers(1, num_output + 1)) if is_first else num_output
        prompt = self.rng.integers(VOCAB_SIZE, size=num_input).tolist()
        self.engine.add_request(prompt, SamplingParams(max_tokens=num_output, ignore_eos=True, temperature=0.7))

    def run(self, seconds: float) -> dict[str, float]:
        """Serves so long; what it cost, and what came of it."""
        counters, tokens, ttfts = self.engine.counters, 0, self.engine.metrics()["ttft_s"]
        steps = counters.decode_steps + counters.prefill_steps
        decode_steps, began_s, began_cpu_s = counters.decode_steps, time.perf_counter(), time.process_time()
        began_loop_s = time.thread_time()
        while time.perf_counter() - began_s < seconds:
            message = self.engine.step_tokens()
            if message.request_ids or message.ended:
                encode_tokens(message)
                tokens += len(message.token_ids)
                for ended in message.ended:
                    assert ended.reason == "length", ended.failure
                    self.add()
        took_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
        loop_s = time.thread_time() - began_loop_s
        later = self.engine.metrics()["ttft_s"]
        num_steps = counters.decode_steps + counters.prefill_steps - steps
        return {
            "cpu_share": cpu_s / took_s,
            "cpu_us_per_step": cpu_s / max(num_steps, 1) * 1e6,
            "loop_us_per_step": loop_s / max(num_steps, 1) * 1e6,
            "steps_per_s": num_steps / took_s,
            "decode_steps_per_s_and_card": (counters.decode_steps - decode_steps) / took_s / self.num_decode,
            "tokens_per_s": tokens / took_s,
            "ttft_ms_mean": 1e3 * (later["sum"] - ttfts["sum"]) / max(later["count"] - ttfts["count"], 1),
            "decoding": self.engine.metrics()["requests"]["decoding"],
        }


def read_options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--cards", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--card-roles", choices=CARD_ROLES, default="fixed")
    parser.add_argument("--rows", type=int, default=64, help="requests of a decode card")
    parser.add_argument("--step-ms", type=float, default=20.0, help="what a decode step takes")
    parser.add_argument("--num-input", type=int, default=512)
    parser.add_argument("--num-output", type=int, default=640)
    parser.add_argument("--trace", help="file of JSON lines, for the lengths of requests")
    parser.add_argument("--warm-up", type=float, default=10.0, help="seconds until all decode")
    parser.add_argument("--duration", type=float, default=10.0)
    return parser.parse_args()


def lengths_of(args: argparse.Namespace) -> list[tuple[int, int]]:
    """Tokens of prompt and answer of each request."""
    if args.trace is None:
        return [(args.num_input, args.num_output)]
    return [(row.num_input, row.num_output) for row in read_trace(args.trace, longest=MAX_MODEL_LEN).rows]


def measure(args: argparse.Namespace, num_cards: int, folder: str, lengths: list[tuple[int, int]]) -> dict[str, Any]:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    cards = multiprocessing.get_context("spawn").Process(
        target=simulate_cards, args=(theirs, args.step_ms * 1e-3, 2 * args.rows), daemon=True
    )
    cards.start()
    starter = SimulatedStarter(ours)
    try:
        with mock.patch.object(cluster, "make_starter", return_value=starter):
            controller = Controller(args, num_cards, folder, lengths)
        with controller.engine:
            controller.run(args.warm_up)
            starter.waits_s()
            found = controller.run(args.duration)
            waits_ms = 1e3 * np.array(starter.waits_s())
            found |= {f"wait_ms_p{part}": float(np.percentile(waits_ms, part)) for part in (50, 99)}
    finally:
        cards.kill()
        cards.join()
    return {"cards": num_cards, "prefill_cards": controller.num_prefill, **found}


@ends_with_message()
def main() -> None:
    args, results = read_options(), []
    folder = write_shape("qwen3-8b")
    print(
        f"{'cards':>6}{'CPU of a core':>15}{'us per step':>13}{'in the loop':>13}{'steps/s':>10}"
        f"{'decode steps/s, card':>22}{'wait p50, p99 ms':>20}"
    )
    for num_cards in args.cards:
        found = measure(args, num_cards, folder, lengths_of(args))
        results.append(found)
        print(
            f"{num_cards:>6}{found['cpu_share']:>15.0%}{found['cpu_us_per_step']:>13.0f}"
            f"{found['loop_us_per_step']:>13.0f}{found['steps_per_s']:>10.0f}"
            f"{found['decode_steps_per_s_and_card']:>22.1f}{found['wait_ms_p50']:>12.1f}{found['wait_ms_p99']:>8.1f}",
            flush=True,
        )
    report("controller", {**vars(args), "results": results}, args.output)


if __name__ == "__main__":
    main()
