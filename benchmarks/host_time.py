"""The host's own work in a turn of the loop: microseconds a turn, over a runner that computes nothing.

Needs no GPU. A turn forms a decode step of so many rows, or one of rows and a chunk of a prompt, as large as the model
of step times says. It packs what the device would be sent, takes in the tokens of the steps, which are there at once,
and emits them. The tokenizer is the bundled model's.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from lib.arguments import new_parser
from lib.report import report
from nanovllm import LLM, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.engine.execution.step_handle import NOTHING_SAMPLED, SampledOnHost, StepTokens
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduling.step import Step
from nanovllm.utils.device import DoneEvent

PROMPT_TOKENS = 100
MAX_MODEL_LEN = 2048
CHUNK_TOKENS = 64
ROWS, MIXED = "rows", "rows and a chunk"
STEP_S = 0.01
"""What each mixed step is said to have taken."""


class InstantHandle:
    """A step that has ended, with random tokens that end no request."""

    stream = None
    event = DoneEvent()
    ran_in_launch = True

    def __init__(self, tokens: StepTokens) -> None:
        self._tokens = tokens

    def is_done(self) -> bool:
        return True

    def collect(self) -> StepTokens:
        return self._tokens

    def moments(self) -> tuple[float, float]:
        return 0.0, 0.0


def compute_nothing(runner: ModelRunner, token_ids: list[int]) -> None:
    """Has the runner pack its steps, and give random ones of these tokens for them."""
    rng, choices = np.random.default_rng(0), np.array(token_ids)

    def sampled(count: int) -> SampledOnHost:
        return SampledOnHost(rng.choice(choices, count)) if count else NOTHING_SAMPLED

    def launch(step: Step) -> InstantHandle:
        runner.packer.pack(step)
        return InstantHandle(StepTokens(sampled(len(step.sampling_chunks)), sampled(len(step.decode))))

    runner.launch = launch  # type: ignore[method-assign,assignment]


class Stages:
    """Seconds within some functions, their callees that are timed too left out."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inner_s = [0.0]

    def watch(self, owner: Any, method: str, name: str) -> None:
        function = getattr(owner, method)

        def timed(*args: Any, **options: Any) -> Any:
            started_s = time.perf_counter()
            self._inner_s.append(0.0)
            try:
                return function(*args, **options)
            finally:
                took_s = time.perf_counter() - started_s
                self.seconds[name] += took_s - self._inner_s.pop()
                self._inner_s[-1] += took_s

        setattr(owner, method, timed)


def tokens_of_answers(llm: LLM) -> list[int]:
    """Tokens as a model writes them: random ones of the vocabulary would be parts of characters mostly."""
    pairs = json.loads((Path(DEMO_MODEL_PATH) / "questions.json").read_text(encoding="utf-8"))
    assert llm.tokenizer is not None, "the bundled model has a tokenizer"
    return [token for pair in pairs for token in llm.tokenizer.encode(pair["answer"], add_special_tokens=False)]


def serve(rows: int, what: str, num_turns: int, measure: Callable[[LLM, int], Any]) -> Any:
    """What `measure` finds over an engine in which so many streamed requests decode, and one may be prefilled."""
    options: dict[str, Any] = {"num_kvcache_blocks": 40 * (rows + 4), "max_num_seqs": rows + 2}
    options |= {"prefill_chunk_tokens": CHUNK_TOKENS}
    if what == MIXED:
        options |= {"itl_target_ms": 2e3 * STEP_S}
    with LLM(DEMO_MODEL_PATH, device="cpu", kvcache_block_size=64, max_model_len=MAX_MODEL_LEN, **options) as llm:
        step_took = llm.scheduler.step_took
        llm.scheduler.step_took = lambda step, *_, **__: step_took(step, STEP_S)  # type: ignore[method-assign]
        words = tokens_of_answers(llm)
        compute_nothing(llm.decode_runner, words)
        rng = random.Random(0)
        lasting = SamplingParams(temperature=0, max_tokens=MAX_MODEL_LEN - PROMPT_TOKENS, ignore_eos=True)
        for _ in range(rows):
            llm.add_request([rng.choice(words) for _ in range(PROMPT_TOKENS)], lasting)
        while llm.metrics()["requests"]["decoding"] < rows:
            llm.step()
        if what != ROWS:  # prompts without end, one after another, whose one token is not decoded
            once = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
            length = CHUNK_TOKENS * (MAX_MODEL_LEN // CHUNK_TOKENS - 1)
            for _ in range(2 * num_turns * CHUNK_TOKENS // length + 2):
                llm.add_request([rng.choice(words) for _ in range(length)], once)
            llm.step()
        return measure(llm, num_turns)


def time_turns(llm: LLM, num_turns: int) -> dict[str, float]:
    """Microseconds of `step()`: the median, and the least."""
    times_s = []
    for _ in range(num_turns):
        started_s = time.perf_counter()
        llm.step()
        times_s.append(time.perf_counter() - started_s)
    return {"median_us": median(times_s) * 1e6, "least_us": min(times_s) * 1e6}


def divide_turns(llm: LLM, num_turns: int) -> dict[str, float]:
    """Where a turn's microseconds go. Timing each stage costs some itself."""
    stages, runner = Stages(), llm.decode_runner
    stages.watch(llm, "step", "calls, mail, waiting outputs")
    stages.watch(llm.scheduler, "schedule", "form steps")
    stages.watch(llm.scheduler, "step_took", "learn how long steps take")
    stages.watch(runner.packer, "pack_chunks", "pack chunks")
    stages.watch(runner.packer, "pack_rows", "pack decode rows")
    stages.watch(runner, "launch", "the runner that computes nothing")
    stages.watch(llm._loop, "collect_steps", "collect")
    stages.watch(llm._outputs, "take_decoded_tokens", "tokens, texts, outputs")
    for _ in range(num_turns):
        llm.step()
    return {
        name: seconds / num_turns * 1e6 for name, seconds in sorted(stages.seconds.items(), key=lambda stage: -stage[1])
    }


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--turns", type=int, default=400)
    args = parser.parse_args()
    if args.turns < 1 or min(args.rows) < 1:
        parser.error("--rows and --turns: at least one")
    results = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache  # the times of steps are made up: no other engine may go on from them
        for rows in args.rows:
            for what in (ROWS, MIXED):
                found = serve(rows, what, args.turns, time_turns)
                stages = serve(rows, what, args.turns, divide_turns)
                results.append({"rows": rows, "what": what, **found, "stages_us": stages})
                print(f"{rows} streamed {what}: {found['median_us']:.0f} us a turn, least {found['least_us']:.0f}")
                for name, us in stages.items():
                    print(f"    {us:7.1f} {name}")
    report("host_time", {"turns": args.turns, "results": results}, args.output)


if __name__ == "__main__":
    main()
