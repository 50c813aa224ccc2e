"""What it costs to lose a card: gaps in answers when its process is killed, or stopped, amid them.

Cards are processes of their own (`cluster="local"`), elastic unless `--card-roles fixed`. `--streams` requests decode,
then one card is lost. Requests that decode on other cards go on, and those that were decoding on it are recomputed
elsewhere. Shown are the times since the loss until the engine has noticed it, until the first and the last of its
requests had their next token, and until a new process had taken its place; how long the first of these requests takes
to be recomputed on a card that does nothing else; and the largest gap of the others since the loss. In each of
`--rounds` the next card is lost.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import time
from typing import Any

from lib.arguments import add_device, add_model, add_pool, model_options, new_parser
from lib.loads import full_length, gaps_of, random_prompt, vocab_size_of
from lib.report import report
from nanovllm import LLM
from nanovllm.config import CARD_ROLES
from nanovllm.engine.distributed.remote_card import RemoteRunner
from nanovllm.errors import ends_with_message

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
TOKENS_BEFORE = 32
"""Tokens that each request has when the card is lost."""


class Answers:
    """Requests under way, and when each of their tokens came."""

    def __init__(self, llm: LLM, prompts: list[list[int]], num_output: int) -> None:
        self._llm = llm
        self.times_s: dict[int, list[float]] = {}
        self.num_unfinished = len(prompts)
        for prompt in prompts:
            self.times_s[llm.add_request(prompt, full_length(num_output))] = []

    def step(self) -> None:
        outputs = self._llm.step()
        now_s = time.perf_counter()
        for output in outputs:
            if output.error is not None:
                raise output.error
            self.times_s[output.request_id] += [now_s] * len(output.new_token_ids)
            self.num_unfinished -= output.finished

    def next_token_s(self, request_id: int, since_s: float) -> float:
        """Seconds from then until the request had a token."""
        return next(time_s for time_s in self.times_s[request_id] if time_s > since_s) - since_s


def time_prefill(llm: LLM, num_tokens: int) -> float:
    """Seconds until the first token of a prompt while nothing else is under way; the better of two."""
    found = []
    for seed in range(2):
        before_s = llm.metrics()["ttft_s"]["sum"]
        llm.generate([random_prompt(random.Random(seed), vocab_size_of(llm), num_tokens)], full_length(1), False)
        found.append(llm.metrics()["ttft_s"]["sum"] - before_s)
    return min(found)


def lose_card(llm: LLM, number: int, args: argparse.Namespace) -> dict[str, Any]:
    """Ends the process of a card while requests decode on all; serves them to their end, and until the card is back."""
    rng, vocab_size = random.Random(number), vocab_size_of(llm)
    prompts = [random_prompt(rng, vocab_size, args.prompt_len) for _ in range(args.streams)]
    answers = Answers(llm, prompts, args.num_output)
    while min(map(len, answers.times_s.values())) < TOKENS_BEFORE:
        answers.step()
    where = {seq.request_id: seq.lease.decode.card for seq in llm.scheduler.unfinished() if seq.lease is not None}
    decoding = [card for card in llm.scheduler.cards if card in where.values()]
    if not decoding:
        raise RuntimeError(f"all answers ended before a card was lost; raise --num-output ({args.num_output})")
    card = decoding[number % len(decoding)]
    lost = [request_id for request_id, its_card in where.items() if its_card is card]
    runner = next(runner for runner in llm._runners if str(runner.device) == card.name)
    assert isinstance(runner, RemoteRunner), "it is in a process of its own"
    os.kill(runner.pid, SIGNALS[args.how])
    lost_s, noticed_s, back_s = time.perf_counter(), 0.0, 0.0
    while answers.num_unfinished or not card.is_up:
        answers.step()
        if runner.is_out:
            raise RuntimeError(f"{card} cannot be started again: {runner.reason}")
        if not noticed_s and not card.is_up:
            noticed_s = time.perf_counter() - lost_s
        if noticed_s and not back_s and card.is_up:
            back_s = time.perf_counter() - lost_s
    if not noticed_s:
        raise RuntimeError(f"all answers ended before the engine noticed; raise --num-output ({args.num_output})")
    # Until then tokens of steps that had ended may come.
    again_s = sorted(noticed_s + answers.next_token_s(request_id, lost_s + noticed_s) for request_id in lost)
    gaps_s = [
        gap_s
        for request_id in where.keys() - set(lost)
        for gap_s in gaps_of([time_s for time_s in answers.times_s[request_id] if time_s > lost_s])
    ]
    return {
        "card": card.name,
        "num_lost": len(lost),
        "noticed_s": noticed_s,
        "first_token_s": again_s[0],
        "last_token_s": again_s[-1],
        "largest_gap_of_others_s": max(gaps_s, default=0.0),
        "back_s": back_s,
        "prefill_s": time_prefill(llm, args.prompt_len + TOKENS_BEFORE),
    }


@ends_with_message()
def main() -> None:
    parser = new_parser(__doc__)
    add_model(parser, "qwen3-8b")
    parser.add_argument("--prefill-cards", type=int, default=1)
    parser.add_argument("--decode-cards", type=int, default=1)
    parser.add_argument("--card-roles", choices=CARD_ROLES, default="elastic")
    parser.add_argument(
        "--how", choices=SIGNALS, default="kill", help="stop: its process stands still, like a hung one"
    )
    parser.add_argument("--card-timeout-s", type=float, default=10.0, help="until a silent card is taken for lost")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt-len", type=int, default=2048)
    parser.add_argument("--num-output", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    add_device(parser)
    add_pool(parser)
    args = parser.parse_args()
    if args.num_output <= TOKENS_BEFORE:
        parser.error(f"--num-output: more than {TOKENS_BEFORE}, which all have before a card is lost")
    rounds = []
    with LLM(
        **model_options(args),
        device=args.device,
        cluster="local",
        prefill_cards=args.prefill_cards,
        decode_cards=args.decode_cards,
        card_roles=args.card_roles,
        card_timeout_s=args.card_timeout_s,
        num_kvcache_blocks=args.num_kvcache_blocks,
        max_model_len=args.prompt_len + args.num_output,
        enable_prefix_caching=False,
    ) as llm:
        print(f"{'card':<18}{'requests':>9}{'noticed':>9}{'first':>9}{'last':>9}{'back':>9}{'prefill':>9}{'others':>9}")
        for number in range(args.rounds):
            found = lose_card(llm, number, args)
            rounds.append(found)
            names = ("noticed_s", "first_token_s", "last_token_s", "back_s", "prefill_s", "largest_gap_of_others_s")
            columns = "".join(f"{found[name]:8.3f}s" for name in names)
            print(f"{found['card']:<18}{found['num_lost']:>9}{columns}", flush=True)
    report("lost_card", {**vars(args), "rounds": rounds}, args.output)


if __name__ == "__main__":
    main()
