"""Requests for an engine: prompts, lengths and moments of arrival, and loops that serve them."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from nanovllm import LLM, SamplingParams

Lengths = Callable[[random.Random], int]
MAX_SETTLING_S = 60.0
REQUESTS_OF_A_STREAM = 8
"""Different ones; then they come again."""


def lognormal(mean: float, sigma: float, lowest: int, highest: int) -> Lengths:
    """Lengths with this mean before they are cut to [lowest, highest]."""
    mu = math.log(mean) - sigma**2 / 2
    return lambda rng: min(max(round(rng.lognormvariate(mu, sigma)), lowest), highest)


def between(lowest: int, highest: int) -> Lengths:
    return lambda rng: rng.randint(lowest, highest)


WORKLOADS: dict[str, tuple[Lengths, Lengths]] = {
    "chat": (lognormal(450, 0.8, 16, 4096), lognormal(200, 0.7, 8, 1024)),
    "rag": (between(2048, 8192), between(64, 256)),
    "reason": (between(128, 1024), between(1024, 3072)),
}
"""Lengths of prompts and of outputs."""

FLAWS = ("error", "TTFT", "gaps", "stall")
"""Why a request is not good: it failed, its first token came late, too many gaps are too long, or one far too long."""


@dataclass
class Request:
    """A request and when its tokens came; all times in seconds since the load began."""

    due_s: float
    prompt: list[int]
    params: SamplingParams
    token_times_s: list[float] = field(default_factory=list)
    error: Exception | None = None

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0] - self.due_s

    @property
    def gaps_s(self) -> list[float]:
        return gaps_of(self.token_times_s)

    @property
    def num_tokens(self) -> int:
        return len(self.token_times_s)

    def is_good(self, ttft_limit_s: float, itl_limit_s: float) -> bool:
        """Whether it was answered within the limits: one gap in a hundred, or one, may be longer, none three times."""
        return not self.flaws(ttft_limit_s, itl_limit_s)

    def flaws(self, ttft_limit_s: float, itl_limit_s: float) -> list[str]:
        """Why it is not good, some of FLAWS."""
        if self.error is not None:
            return ["error"]
        too_long = [gap_s for gap_s in self.gaps_s if gap_s > itl_limit_s]
        is_one = {
            "TTFT": self.ttft_s > ttft_limit_s,
            "gaps": len(too_long) > max(len(self.gaps_s) // 100, 1),
            "stall": max(too_long, default=0.0) > 3 * itl_limit_s,
        }
        return [flaw for flaw, is_there in is_one.items() if is_there]


def gaps_of(times_s: Sequence[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times_s)]


def vocab_size_of(llm: LLM) -> int:
    return llm.decode_runner.spec.model_config.vocab_size


def random_prompt(rng: random.Random, vocab_size: int, length: int) -> list[int]:
    return [rng.randrange(vocab_size) for _ in range(length)]


def full_length(num_output: int, temperature: float = 0.7) -> SamplingParams:
    """Parameters of a request that gets so many tokens, whatever they are."""
    return SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=num_output)


def make_load(workload: str, rate: float, duration_s: float, vocab_size: int, longest: int, seed: int) -> list[Request]:
    """Requests of a workload by the time they are due; prompt and output together have at most `longest` tokens."""
    # Tokens are drawn apart, so that arrivals and lengths are the same with any vocabulary.
    rng, token_rng = random.Random(seed), random.Random(f"{seed}, tokens")
    draw_input, draw_output = WORKLOADS[workload]
    requests, due_s = [], rng.expovariate(rate)
    while due_s < duration_s:
        num_input, num_output = draw_input(rng), min(draw_output(rng), longest // 2)
        prompt = random_prompt(token_rng, vocab_size, min(num_input, longest - num_output))
        requests.append(Request(due_s, prompt, full_length(num_output)))
        due_s += rng.expovariate(rate)
    return requests


def make_streams(workload: str, num_streams: int, vocab_size: int, longest: int, seed: int) -> list[list[Request]]:
    """Requests that follow each other, for each of some streams; lengths as in `make_load`."""
    draw_input, draw_output = WORKLOADS[workload]

    def make_request(rng: random.Random) -> Request:
        num_input, num_output = draw_input(rng), min(draw_output(rng), longest // 2)
        prompt = random_prompt(rng, vocab_size, min(num_input, longest - num_output))
        return Request(0.0, prompt, full_length(num_output))

    rngs = [random.Random(f"{seed}, stream {number}") for number in range(num_streams)]
    return [[make_request(rng) for _ in range(REQUESTS_OF_A_STREAM)] for rng in rngs]


def serve_streams(llm: LLM, streams: Sequence[Sequence[Request]], duration_s: float) -> list[Request]:
    """Keeps a request of each stream under way for so long: the next one is due as soon as one has ended.

    Gives them in the order in which they were due, those that began in time to their end. A stream whose request fails
    goes no further.
    """
    turns = [itertools.cycle(stream) for stream in streams]
    running: dict[int, tuple[int, Request]] = {}
    served: list[Request] = []
    started = time.perf_counter()

    def begin(stream: int) -> None:
        request = replace(next(turns[stream]), due_s=time.perf_counter() - started, token_times_s=[])
        running[llm.add_request(request.prompt, request.params)] = stream, request
        served.append(request)

    for stream in range(len(streams)):
        begin(stream)
    while running:
        outputs = llm.step()
        now_s = time.perf_counter() - started
        for output in outputs:
            stream, request = running[output.request_id]
            request.token_times_s += [now_s] * len(output.new_token_ids)
            if output.finished:
                request.error = output.error
                del running[output.request_id]
                if request.error is None and now_s < duration_s:
                    begin(stream)
    return served


class Router(Protocol):
    """Before several engines: says which requests one of them takes."""

    def takes(self, number: int) -> bool: ...

    def has_to_do(self, running: Sequence[Request]) -> None: ...


def serve(
    llm: LLM, requests: Sequence[Request], begin_at: float | None = None, router: Router | None = None
) -> list[Request]:
    """Adds each request when it is due and notes when its tokens come, until all have ended.

    The load begins now, or at this `time.time()`. Returns the requests: those that the router has this engine take, or
    all.
    """
    served: list[Request] = []
    if begin_at is not None:
        time.sleep(max(begin_at - time.time(), 0.0))
    running: dict[int, Request] = {}
    num_added, started = 0, time.perf_counter()
    while num_added < len(requests) or running:
        now_s = time.perf_counter() - started
        while num_added < len(requests) and requests[num_added].due_s <= now_s:
            request = requests[num_added]
            if router is None or router.takes(num_added):
                running[llm.add_request(request.prompt, request.params)] = request
                served.append(request)
            num_added += 1
        if router is not None:
            router.has_to_do([*running.values()])
        if not running and num_added < len(requests):
            time.sleep(min(max(requests[num_added].due_s - now_s, 0.0), 1e-3))
            continue
        outputs = llm.step()
        now_s = time.perf_counter() - started
        for output in outputs:
            request = running[output.request_id]
            request.token_times_s += [now_s] * len(output.new_token_ids)
            if output.finished:
                request.error = output.error
                del running[output.request_id]
    return served


def generate_timed(
    llm: LLM, prompts: Sequence[list[int]], params: SamplingParams | Sequence[SamplingParams]
) -> tuple[int, float]:
    """Answers all prompts; tokens that came, and seconds that it took."""
    started = time.perf_counter()
    answers = llm.generate(prompts, params, use_tqdm=False)
    return sum(len(answer["token_ids"]) for answer in answers), time.perf_counter() - started


def settle(llm: LLM) -> None:
    """Runs the loop until no request is left, nor a step or a copy of one that has ended.

    What these still hold is waited for no longer than MAX_SETTLING_S: whether it is lost is for the caller to say.
    """
    while not llm.is_finished():
        llm.step()
    started = time.perf_counter()
    while llm.metrics()["leases"] and time.perf_counter() - started < MAX_SETTLING_S:
        llm.step()
