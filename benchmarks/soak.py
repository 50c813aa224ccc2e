"""Thousands of random requests with aborts and injected faults: is anything lost?

Requests of random lengths and sampling parameters, some with a common beginning, are kept in the engine. Of some, a
forward pass fails whenever they are in it, once (they are recomputed) or twice (they end by name); of some, the handoff
fails; some are aborted at a random moment. At the end every request must have been answered, aborted or failed as was
planned for it, every block must be free, and neither the device's memory nor the process may have grown. If not, the
exit status is 1.
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

from common import SHAPES, check_kv_handoff, mode_options, model_options, report
from memory import memory_mib

from nanovllm import LLM, RequestOutput, SamplingParams
from nanovllm.engine.model_runner import ModelRunner, StepHandle
from nanovllm.engine.scheduler import BlockPair, Step
from nanovllm.utils.device import Event

MOST_DEVICE_GROWTH_MIB = 64
MOST_PROCESS_GROWTH_MIB = 256


class InjectedError(RuntimeError):
    """A fault of the soak's own."""


@dataclass
class Plan:
    """What is to happen to a request."""

    step_faults: int = 0
    """Forward passes that fail because of it."""
    handoff_faults: int = 0
    is_aborted: bool = False

    @property
    def num_faults(self) -> int:
        return self.step_faults + self.handoff_faults


class Faults:
    """Makes forward passes and handoffs of an engine fail as planned."""

    def __init__(self, llm: LLM) -> None:
        self.plans: dict[int, Plan] = {}
        self.num_injected = 0
        self._llm = llm
        for runner in dict.fromkeys((llm.prefill_runner, llm.decode_runner)):
            self._watch_launches(runner)
        if llm.prefill_runner is not llm.decode_runner:
            self._watch_sends()

    def _watch_launches(self, runner: ModelRunner) -> None:
        launch = runner.launch

        def faulty_launch(step: Step) -> StepHandle:
            plans = [self.plans[row.seq.request_id] for row in step.rows if row.seq.request_id in self.plans]
            due = [plan for plan in plans if plan.step_faults > 0]
            if due:
                # The engine halves the step until the request stands alone: only then has it failed once.
                if len(step.rows) == 1:
                    due[0].step_faults -= 1
                    self.num_injected += 1
                raise InjectedError("injected into a forward pass")
            return launch(step)

        runner.launch = faulty_launch  # type: ignore[method-assign]

    def _watch_sends(self) -> None:
        transfer = self._llm.kv_transfer
        send = transfer.send

        def faulty_send(pairs: Sequence[BlockPair], after: Event) -> Any:
            blocks = {block for block, _ in pairs}
            for seq in self._llm.scheduler._running:
                plan = self.plans.get(seq.request_id)
                if plan and plan.handoff_faults and seq.lease and blocks.intersection(seq.lease.prefill_table):
                    plan.handoff_faults -= 1
                    self.num_injected += 1
                    raise InjectedError("injected into a handoff")
            return send(pairs, after)

        transfer.send = faulty_send  # type: ignore[method-assign]


def random_request(rng: random.Random, vocab_size: int, longest: int, beginnings: list[list[int]]) -> Any:
    """A prompt and parameters of any kind; one in three prompts begins like others."""
    beginning = rng.choice(beginnings) if rng.random() < 0.3 else []
    num_input = min(int(rng.lognormvariate(4.5, 1.2)) + 1, longest // 2)
    prompt = (beginning + [rng.randrange(vocab_size) for _ in range(num_input)])[: longest // 2]
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
    vocab_size = llm.decode_runner.spec.model_config.vocab_size
    longest = llm.decode_runner.spec.max_model_len
    beginnings = [[rng.randrange(vocab_size) for _ in range(longest // 4)] for _ in range(5)]
    running: dict[int, Plan] = {}
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
            num_added += 1
        to_abort = [request_id for request_id, plan in running.items() if plan.is_aborted]
        if to_abort and rng.random() < 0.2:
            llm.abort(rng.choice(to_abort))
        for output in llm.step():
            if output.finished:
                plan = running.pop(output.request_id)
                del faults.plans[output.request_id]
                outcome = _outcome(output)
                outcomes[outcome] += 1
                wrong += _complaints(output, outcome, plan)
    return {"requests": num_added, **outcomes, "wrong": wrong}


def _outcome(output: RequestOutput) -> str:
    return {"abort": "aborted", "error": "failed"}.get(str(output.finish_reason), "answered")


def _complaints(output: RequestOutput, outcome: str, plan: Plan) -> list[str]:
    """What is wrong with how a request ended, if anything."""
    about = f"request {output.request_id}, {plan}, ended as {output.finish_reason}"
    if outcome == "failed" and not isinstance(output.error, InjectedError):
        return [f"{about}: {output.error!r} was not injected"]
    if outcome == "failed" and plan.num_faults:
        return [f"{about}: it failed before its second fault"]
    if outcome == "aborted" and not plan.is_aborted:
        return [f"{about}: nobody aborted it"]
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mode", choices=["single", "pd"], default="pd", help="one device, or prefill and decode apart"
    )
    parser.add_argument("--model-shape", choices=SHAPES, default="qwen3-0.6b", help="random weights of this shape")
    parser.add_argument("--model", help="folder of a checkpoint to serve instead of random weights")
    parser.add_argument("--num-requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--abort-share", type=float, default=0.05)
    parser.add_argument("--fault-share", type=float, default=0.01)
    parser.add_argument("--num-kvcache-blocks", type=int, help="few of them make requests lose their blocks to others")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--kv-handoff", help="of mode pd, auto if not given")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="file for the JSON line")
    args = parser.parse_args()
    check_kv_handoff(parser, args)

    logging.getLogger("nanovllm").setLevel(logging.ERROR)  # it warns of every fault
    rng = random.Random(args.seed)
    with LLM(
        **model_options(args.model, args.model_shape),
        device=args.device,
        max_model_len=args.max_model_len,
        num_kvcache_blocks=args.num_kvcache_blocks,
        **mode_options(args),
    ) as llm:
        faults = Faults(llm)
        started = time.perf_counter()
        early_counts = soak(llm, faults, args.num_requests // 10, args, rng)
        early = memory_mib(llm)
        counts = soak(llm, faults, args.num_requests - args.num_requests // 10, args, rng)
        seconds = time.perf_counter() - started
        while llm._in_flight or llm._handoffs:  # steps and copies of requests that have ended
            llm.step()
        late = memory_mib(llm)
        llm.scheduler.check_integrity()
        held = {
            "prefill": llm.scheduler.prefill_pool.num_held_blocks,
            "decode": llm.scheduler.decode_pool.num_held_blocks,
        }
        num_preemptions = llm.scheduler.num_preemptions
    wrong = early_counts.pop("wrong") + counts.pop("wrong")
    counts = {
        name: counts.get(name, 0) + early_counts.get(name, 0) for name in ("requests", "answered", "aborted", "failed")
    }
    if counts["requests"] != counts["answered"] + counts["aborted"] + counts["failed"]:
        wrong.append(f"{counts} do not add up")
    wrong += [f"{number} blocks of the {pool} pool are still held" for pool, number in held.items() if number]
    for name, most in (("process", MOST_PROCESS_GROWTH_MIB), ("device", MOST_DEVICE_GROWTH_MIB)):
        growth = late.get(name, 0.0) - early.get(name, 0.0)
        if growth > most:
            wrong.append(f"memory of the {name} has grown by {growth:.0f} MiB")
    print(f"{args.mode}, {seconds:.0f} s: " + ", ".join(f"{name} {number}" for name, number in counts.items()))
    print(f"faults injected {faults.num_injected}, preemptions {num_preemptions}")
    print(
        "MiB, after a tenth and at the end: "
        + ", ".join(f"{name} {early[name]:.0f}, {late[name]:.0f}" for name in late)
    )
    for complaint in wrong:
        print(f"WRONG: {complaint}")
    result = {"mode": args.mode, "seconds": seconds, **counts, "faults": faults.num_injected, "wrong": wrong}
    report("soak", {**result, "preemptions": num_preemptions, "early_mib": early, "late_mib": late}, args.output)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
