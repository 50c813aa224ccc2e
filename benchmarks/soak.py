"""Thousands of random requests with aborts and injected faults: is anything lost?

Requests of random lengths and sampling parameters, some with a common beginning, are kept in the engine. Of some, a
forward pass fails whenever they are in it, once (they are recomputed) or twice (they end by name); of some, the handoff
fails; some are aborted at a random moment. At times nothing can be launched on the prefill device for a while, which
is left out then; with a decode pipeline its split is changed by force, and its steps fail. In mode elastic prompts of
SHARED_TOKENS on are shared, however many others there are, and at times a device begins a step late, while the other
waits for its layers. At the end every request must have been answered, aborted or failed as was planned for it, every
block must be free, and neither the device's memory nor the process may have grown. Greedy requests that nothing
happened to are answered again, alone, and must get the same tokens. If not, the exit status is 1.
"""

from __future__ import annotations

import argparse
import collections
import logging
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lib import inside
from lib.arguments import add_mode, add_model, engine_options, new_parser, parse_args
from lib.loads import random_prompt, settle, vocab_size_of
from lib.meters import memory_mib
from lib.report import report
from nanovllm import LLM, RequestOutput, SamplingParams
from nanovllm.engine.execution.kv_transfer import KVTransfer
from nanovllm.engine.execution.step_handle import StepHandle
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduling.card import Card
from nanovllm.engine.scheduling.pipeline_plan import Arrangement, Cut
from nanovllm.engine.scheduling.step import BlockPair, Step
from nanovllm.errors import ends_with_message
from nanovllm.utils.device import Event

MAX_DEVICE_GROWTH_MIB = 64
MAX_PROCESS_GROWTH_MIB = 256
MAX_REPEATED = 500
SHARED_TOKENS = 64
"""Prompts of so many tokens are shared, so that many are."""
MOST_LATE_S = 0.03
MOST_FAILED_LAUNCHES = 24
"""Launches of the prefill card that fail one after the other."""
CYCLES_PER_S = 1.7e9
"""A GPU's clock rate, about."""


class InjectedError(RuntimeError):
    """A fault of the soak's own."""


@dataclass
class Plan:
    """What is to happen to a request."""

    step_faults: int = 0
    """Forward passes that will fail because of it."""
    handoff_faults: int = 0
    is_aborted: bool = False
    hits: int = 0
    """Faults that it has had, its own and those of a card."""

    @property
    def is_untouched(self) -> bool:
        return not (self.step_faults or self.handoff_faults or self.is_aborted or self.hits)


class Faults:
    """Makes forward passes and handoffs of an engine fail as planned, and its prefill device and lanes at times.

    Args:
        llm: the engine.
        chaos_share: of the engine's turns, those in which something happens to a device.
        rng: decides when, and what. How often it is asked hangs on how fast the machine is, so that the requests and
            what is planned for them come from another.
    """

    def __init__(self, llm: LLM, chaos_share: float, rng: random.Random) -> None:
        self.plans: dict[int, Plan] = {}
        self.injected: collections.Counter[str] = collections.Counter()
        self._llm = llm
        self._chaos_share = chaos_share
        self.rng = rng
        self._launches_to_fail = 0
        """Launches of the prefill card, from the next one on."""
        self._is_elastic = llm.scheduler.placement.shares_prompts
        self._late: ModelRunner | None = None
        """Begins its next step late."""
        self._due: set[str] = set()
        paths = llm.decode_runner.decode.paths
        self._paths = paths
        if paths.rebalancer is not None:
            self._watch_lanes()
        for runner in dict.fromkeys((llm.prefill_runner, llm.decode_runner)):
            self._watch_launches(runner)
        for (card, _), transfer in llm._loop._handoffs.transfers.items():
            self._watch_sends(card, transfer)

    def _watch_launches(self, runner: ModelRunner) -> None:
        launch = runner.launch

        def faulty_launch(step: Step) -> StepHandle:
            plans = [self.plans[seq.request_id] for seq in step.seqs if seq.request_id in self.plans]
            due = [plan for plan in plans if plan.step_faults > 0]
            if due:
                # The engine halves the step until the request stands alone: only then has it failed once.
                if step.num_requests == 1:
                    due[0].step_faults -= 1
                    due[0].hits += 1
                    self.injected["step"] += 1
                raise InjectedError("injected into a forward pass")
            if runner is self._late:
                self._late = None
                self.injected["late step"] += 1
                self._be_late(runner)
            is_apart = runner is not self._llm.decode_runner
            if is_apart and self._launches_to_fail:
                self._launches_to_fail -= 1
                if step.num_requests == 1:
                    plans[0].hits += 1
                    self.injected["card"] += 1
                raise InjectedError("injected into a card")
            return launch(step)

        runner.launch = faulty_launch  # type: ignore[method-assign]

    def _be_late(self, runner: ModelRunner) -> None:
        """Keeps the device from the step that is about to be launched, or on a CPU the host."""
        late_s = self.rng.uniform(0.0, MOST_LATE_S)
        if runner.stream is None:
            time.sleep(late_s)
            return
        with runner.on(runner.stream):
            torch.cuda._sleep(int(late_s * CYCLES_PER_S))

    def _watch_sends(self, card: Card, transfer: KVTransfer) -> None:
        send = transfer.send

        def faulty_send(pairs: Sequence[BlockPair], after: Event) -> Any:
            blocks = {block for block, _ in pairs}
            for seq in self._llm.scheduler.unfinished():
                plan = self.plans.get(seq.request_id)
                is_of_it = seq.lease and blocks.intersection(seq.lease.allocation_on(card).blocks)
                if plan and plan.handoff_faults and is_of_it:
                    plan.handoff_faults -= 1
                    plan.hits += 1
                    self.injected["handoff"] += 1
                    raise InjectedError("injected into a handoff")
            return send(pairs, after)

        transfer.send = faulty_send  # type: ignore[method-assign]

    def _watch_lanes(self) -> None:
        """More than one way to arrange the lanes is made ready, each of which fails when it is due."""
        paths, runner = self._paths, self._llm.decode_runner
        assert paths.pipeline is not None, "what has a rebalancer has lanes"
        num_sms = paths.pipeline.green_manager.num_sms
        with inside.on_stream(runner):
            for split in ((32, num_sms - 32), (48, num_sms - 48)) if num_sms else ((1, 3), (2, 2)):
                arrangement = Arrangement(split, Cut.GEMMS)
                if arrangement not in paths.steps:
                    paths.steps[arrangement] = inside.make_steps(paths, paths.sizes, arrangement)
            runner.forget_device_batch()
        for path, steps in paths.steps.items():
            if path is not None:
                steps.replay = self._faulty("lane", steps.replay)  # type: ignore[method-assign]
        manager = paths.pipeline.green_manager
        manager.rebalance = self._faulty("rebalance", manager.rebalance)  # type: ignore[method-assign]

    def _faulty(self, what: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            if what in self._due:
                self._due.remove(what)
                self.injected[what] += 1
                raise InjectedError(f"injected into a {what}")
            return function(*args)

        return call

    def take_turn(self) -> None:
        """Before a turn of the engine: at times something breaks, or the split is changed by force."""
        if self.rng.random() >= self._chaos_share:
            return
        runners = (self._llm.prefill_runner, self._llm.decode_runner)
        kinds = [] if runners[0] is runners[1] else ["late"] if self._is_elastic else ["card"]
        if self._paths.rebalancer is not None:
            kinds += ["force"] * 4 + ["lane", "rebalance"]
        kind = self.rng.choice(kinds) if kinds else None
        if kind == "late":
            self._late = self.rng.choice(runners)
        elif kind == "card":
            self._launches_to_fail = self.rng.randint(1, MOST_FAILED_LAUNCHES)
        elif kind == "force":
            self._paths.force(self.rng.choice(list(self._paths.steps)))
        elif kind is not None:
            self._due.add(kind)


def random_request(rng: random.Random, vocab_size: int, longest: int, beginnings: list[list[int]]) -> Any:
    """A prompt and parameters of any kind; one in three prompts begins like others."""
    beginning = rng.choice(beginnings) if rng.random() < 0.3 else []
    num_input = min(int(rng.lognormvariate(4.5, 1.2)) + 1, longest // 2)
    prompt = (beginning + random_prompt(rng, vocab_size, num_input))[: longest // 2]
    params = SamplingParams(
        temperature=rng.choice([0.0, 0.6, 1.0]),
        top_p=rng.choice([1.0, 1.0, 0.9]),
        top_k=rng.choice([-1, -1, 20]),
        logprobs=rng.choice([None, None, None, 2]),
        max_tokens=rng.randint(1, min(128, longest // 2)),
        ignore_eos=rng.random() < 0.5,
    )
    return prompt, params


def soak(llm: LLM, faults: Faults, num_requests: int, args: argparse.Namespace, rng: random.Random) -> dict[str, Any]:
    """Serves them all; counts by outcome, and what went otherwise than planned."""
    vocab_size = vocab_size_of(llm)
    longest = llm.decode_runner.spec.max_model_len
    beginnings = [random_prompt(rng, vocab_size, longest // 4) for _ in range(5)]
    running: dict[int, Plan] = {}
    requests: dict[int, tuple[list[int], SamplingParams]] = {}
    tokens: collections.defaultdict[int, list[int]] = collections.defaultdict(list)
    to_repeat: list[tuple[list[int], SamplingParams, list[int]]] = []
    outcomes: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    num_added = 0
    has_handoffs = llm.prefill_runner is not llm.decode_runner
    while num_added < num_requests or running:
        while num_added < num_requests and len(running) < args.concurrency:
            prompt, params = random_request(rng, vocab_size, longest, beginnings)
            plan = Plan(is_aborted=rng.random() < args.abort_share)
            if rng.random() < args.fault_share:
                if has_handoffs and params.max_tokens > 1 and rng.random() < 0.3:
                    plan.handoff_faults = 1
                else:
                    plan.step_faults = rng.choice([1, 2])
            request_id = llm.add_request(prompt, params)
            running[request_id] = faults.plans[request_id] = plan
            requests[request_id] = prompt, params
            num_added += 1
        to_abort = [request_id for request_id, plan in running.items() if plan.is_aborted]
        if to_abort and faults.rng.random() < 0.2:
            llm.abort(faults.rng.choice(to_abort))
        faults.take_turn()
        for output in llm.step():
            tokens[output.request_id] += output.new_token_ids
            if output.finished:
                plan = running.pop(output.request_id)
                del faults.plans[output.request_id]
                outcome = _outcome(output)
                outcomes[outcome] += 1
                wrong += _complaints(output, outcome, plan)
                request, got = requests.pop(output.request_id), tokens.pop(output.request_id)
                if plan.is_untouched and request[1].temperature == 0:
                    to_repeat.append((*request, got))
    if args.check_tokens:
        wrong += _check_tokens(llm, to_repeat[:MAX_REPEATED])
    return {"requests": num_added, **outcomes, "repeated": min(len(to_repeat), MAX_REPEATED), "wrong": wrong}


def _check_tokens(llm: LLM, to_repeat: Sequence[tuple[list[int], SamplingParams, list[int]]]) -> list[str]:
    """Answers requests again while nothing breaks; what differs."""
    prompts, params, expected = zip(*to_repeat, strict=True)
    answers = llm.generate(prompts, params, use_tqdm=False)
    return [
        f"greedy tokens of {prompt} differ: {got} amid faults, {answer['token_ids']} without"
        for prompt, got, answer in zip(prompts, expected, answers, strict=True)
        if got != answer["token_ids"]
    ]


def _outcome(output: RequestOutput) -> str:
    return {"abort": "aborted", "error": "failed"}.get(str(output.finish_reason), "answered")


def _complaints(output: RequestOutput, outcome: str, plan: Plan) -> list[str]:
    """What is wrong with how a request ended, if anything."""
    about = f"request {output.request_id}, {plan}, ended as {output.finish_reason}"
    if outcome == "failed" and not isinstance(output.error, InjectedError):
        return [f"{about}: {output.error!r} was not injected"]
    if outcome == "failed" and plan.hits < 2:
        return [f"{about}: it failed before its second fault"]
    if outcome == "aborted" and not plan.is_aborted:
        return [f"{about}: nobody aborted it"]
    return []


@ends_with_message()
def main() -> None:
    parser = new_parser(__doc__)
    add_mode(parser, "pd", ("single", "pd", "elastic"))
    add_model(parser, "qwen3-0.6b")
    parser.add_argument("--num-requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--abort-share", type=float, default=0.05)
    parser.add_argument("--fault-share", type=float, default=0.01)
    parser.add_argument(
        "--chaos-share", type=float, help="of turns, on two devices, when one breaks or is late; 0.01 if not given"
    )
    parser.add_argument("--check-tokens", action="store_true", help="of untouched greedy requests; with float32")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    args = parse_args(parser)
    if args.chaos_share is not None and args.mode == "single":
        parser.error("--chaos-share is of two devices: one cannot do without itself")
    chaos_share = 0.01 if args.chaos_share is None else args.chaos_share

    logging.getLogger("nanovllm").setLevel(logging.ERROR)  # it warns of every fault
    rng = random.Random(args.seed)
    with LLM(
        **engine_options(args),
        dtype=args.dtype,
        max_model_len=args.max_model_len,
    ) as llm:
        if args.mode == "elastic":
            placement = llm.scheduler.placement
            placement.least_shared_tokens = placement.least_shared_when_gathered = SHARED_TOKENS
            placement.most_other_prompts = args.num_requests
        faults = Faults(llm, chaos_share, random.Random(args.seed + 1))
        started = time.perf_counter()
        early_counts = soak(llm, faults, args.num_requests // 10, args, rng)
        early = memory_mib(llm)
        counts = soak(llm, faults, args.num_requests - args.num_requests // 10, args, rng)
        seconds = time.perf_counter() - started
        settle(llm)
        late = memory_mib(llm)
        llm.scheduler.check_integrity()
        held = {
            "prefill": llm.scheduler.placement.prefill_card.block_manager.num_held_blocks,
            "decode": llm.scheduler.placement.decode_card.block_manager.num_held_blocks,
        }
        metrics = llm.metrics()
    wrong = early_counts.pop("wrong") + counts.pop("wrong")
    counts = {
        name: counts.get(name, 0) + early_counts.get(name, 0)
        for name in ("requests", "answered", "aborted", "failed", "repeated")
    }
    if counts["requests"] != counts["answered"] + counts["aborted"] + counts["failed"]:
        wrong.append(f"{counts} do not add up")
    wrong += [f"{number} blocks of the {pool} pool are still held" for pool, number in held.items() if number]
    for name, most in (("process", MAX_PROCESS_GROWTH_MIB), ("device", MAX_DEVICE_GROWTH_MIB)):
        growth = late.get(name, 0.0) - early.get(name, 0.0)
        if growth > most:
            wrong.append(f"memory of the {name} has grown by {growth:.0f} MiB")
    print(f"{args.mode}, {seconds:.0f} s: " + ", ".join(f"{name} {number}" for name, number in counts.items()))
    names = ("preemptions", "rebalances", "pipeline_steps", "fallbacks", "recoveries", "prefill_chunks")
    chaos = {name: metrics[name] for name in names}
    print("faults injected: " + ", ".join(f"{kind} {number}" for kind, number in faults.injected.items()))
    print(", ".join(f"{name} {number}" for name, number in chaos.items()))
    print(
        "MiB, after a tenth and at the end: "
        + ", ".join(f"{name} {early[name]:.0f}, {late[name]:.0f}" for name in late)
    )
    for complaint in wrong:
        print(f"WRONG: {complaint}")
    result = {"mode": args.mode, "seconds": seconds, **counts, "faults": dict(faults.injected), "wrong": wrong}
    report("soak", {**result, **chaos, "early_mib": early, "late_mib": late}, args.output)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
