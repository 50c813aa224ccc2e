"""What one controller costs the host, by the number of cards: real engine, real messages, simulated cards.

The engine's loop, its scheduler, the packing of steps, messages over encrypted sockets and the columns of tokens that
leave for a server are those of `cluster="local"`. The cards are one process that computes nothing: a step ends after
the time that it would take, with random tokens, and a push when its step has ended. A quarter of the cards prefill.

Each decode card has `--rows` requests at a time, all of them there from the beginning and each followed by another one
as it ends; a decode step takes `--step-ms`, so that there is an arrival every `--num-output` / `--rows` steps of a
card. CPU time is that of the engine's process, in seconds for each second, its threads included.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import multiprocessing
import random
import time
from typing import Any

import numpy as np
import zmq

from lib.arguments import new_parser, write_shape
from lib.report import report
from nanovllm import SamplingParams
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
from nanovllm.engine.distributed.messages import tokens_of
from nanovllm.engine.execution.step_handle import NOTHING_SAMPLED, SampledOnHost
from nanovllm.errors import ends_with_message

PREFILL_TOKENS_PER_S = 25_000.0
BLOCK_SIZE = 64
NUM_BLOCKS = 40_000
VOCAB_SIZE = 100_000


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
        self.send(Hello(VERSION))

    def send(self, message: Report) -> None:
        self.socket.send(encode(message))

    def geometry(self) -> Geometry:
        return Geometry(NUM_BLOCKS, BLOCK_SIZE, 1, 16384, 16384 + self.max_rows, 32, self.max_rows, [], [])

    def ended(self, launch: Launch, began_s: float, ended_s: float) -> StepEnded:
        def sampled(count: int) -> SampledOnHost:
            return SampledOnHost(np.full(count, 7, dtype=np.int64)) if count else NOTHING_SAMPLED

        prefill, decode = launch.task.prefill, launch.task.decode
        after_chunks = sampled(prefill.num_sampled if prefill else 0)
        return StepEnded(
            launch.number, began_s, ended_s, after_chunks, sampled(decode.num_rows if decode else 0), NOTHING_SAMPLED
        )


def simulate_cards(contacts: Any, step_s: float, max_rows: int) -> None:
    """The process of all simulated cards; `contacts` is a pipe."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    poller, cards = zmq.Poller(), dict[Any, SimulatedCard]()
    by_agent: dict[str, SimulatedCard] = {}
    due: list[tuple[float, int, SimulatedCard, Report]] = []
    order, beat_s = itertools.count(), 0.0
    while True:
        while contacts.poll(0):
            card = SimulatedCard(context, decode_contact(contacts.recv_bytes()), step_s, max_rows)
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
                prefill = command.task.prefill
                took_s = prefill.size / PREFILL_TOKENS_PER_S if prefill else card.step_s
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
    """

    def __init__(self, args: argparse.Namespace, num_cards: int, folder: str) -> None:
        self.num_prefill = max(num_cards // 4, 1)
        self.num_decode = num_cards - self.num_prefill
        self.args, self.rng = args, random.Random(0)
        num_requests = args.rows * self.num_decode
        self.engine = ServedEngine(
            folder,
            device="cpu",
            load_format="dummy",
            kvcache_block_size=BLOCK_SIZE,
            max_num_seqs=2 * num_requests,
            max_handoff_backlog=num_requests,
            enable_prefix_caching=False,
            cluster="local",
            prefill_cards=self.num_prefill,
            decode_cards=self.num_decode,
            card_timeout_s=60,
        )
        for _ in range(num_requests):
            self.add(self.rng.randrange(1, args.num_output + 1))

    def add(self, num_output: int) -> None:
        prompt = [self.rng.randrange(VOCAB_SIZE) for _ in range(self.args.num_input)]
        self.engine.add_request(prompt, SamplingParams(max_tokens=num_output, ignore_eos=True, temperature=0.7))

    def run(self, seconds: float) -> dict[str, float]:
        """Serves so long; what it cost, and what came of it."""
        counters, tokens = self.engine.counters, 0
        steps = counters.decode_steps + counters.prefill_steps
        decode_steps, began_s, began_cpu_s = counters.decode_steps, time.perf_counter(), time.process_time()
        while time.perf_counter() - began_s < seconds:
            outputs = self.engine.step()
            if outputs:
                encode_tokens(tokens_of(outputs))
                tokens += sum(len(output.new_token_ids) for output in outputs)
                for output in outputs:
                    if output.finished:
                        assert output.finish_reason == "length", output.error
                        self.add(self.args.num_output)
        took_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
        num_steps = counters.decode_steps + counters.prefill_steps - steps
        return {
            "cpu_share": cpu_s / took_s,
            "cpu_us_per_step": cpu_s / max(num_steps, 1) * 1e6,
            "steps_per_s": num_steps / took_s,
            "decode_steps_per_s_and_card": (counters.decode_steps - decode_steps) / took_s / self.num_decode,
            "tokens_per_s": tokens / took_s,
            "decoding": self.engine.metrics()["requests"]["decoding"],
        }


def read_options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--cards", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--rows", type=int, default=64, help="requests of a decode card")
    parser.add_argument("--step-ms", type=float, default=20.0, help="what a decode step takes")
    parser.add_argument("--num-input", type=int, default=512)
    parser.add_argument("--num-output", type=int, default=640)
    parser.add_argument("--warm-up", type=float, default=10.0, help="seconds until all decode")
    parser.add_argument("--duration", type=float, default=10.0)
    return parser.parse_args()


def measure(args: argparse.Namespace, num_cards: int, folder: str) -> dict[str, Any]:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    cards = multiprocessing.get_context("spawn").Process(
        target=simulate_cards, args=(theirs, args.step_ms * 1e-3, 2 * args.rows), daemon=True
    )
    cards.start()
    vars(cluster)["make_starter"] = lambda config: SimulatedStarter(ours)
    try:
        controller = Controller(args, num_cards, folder)
        with controller.engine:
            controller.run(args.warm_up)
            found = controller.run(args.duration)
    finally:
        cards.kill()
        cards.join()
    return {"cards": num_cards, "prefill_cards": controller.num_prefill, **found}


@ends_with_message()
def main() -> None:
    args, results = read_options(), []
    folder = write_shape("qwen3-8b")
    print(f"{'cards':>6}{'CPU of a core':>15}{'us per step':>13}{'steps/s':>10}{'decode steps/s, card':>22}")
    for num_cards in args.cards:
        found = measure(args, num_cards, folder)
        results.append(found)
        print(
            f"{num_cards:>6}{found['cpu_share']:>15.0%}{found['cpu_us_per_step']:>13.0f}{found['steps_per_s']:>10.0f}"
            f"{found['decode_steps_per_s_and_card']:>22.1f}",
            flush=True,
        )
    report("controller", {**vars(args), "results": results}, args.output)


if __name__ == "__main__":
    main()
