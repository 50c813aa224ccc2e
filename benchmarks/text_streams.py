"""What the text of a stream costs: microseconds per token after 100 and after 8,000 tokens, by kind of stream.

Needs no GPU. The tokenizer is the bundled model's, or that of `--model`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from lib.arguments import new_parser
from lib.report import report
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.engine.text.request_text import StreamedText, Vocabulary
from nanovllm.engine.text.tokenizer import load_tokenizer

PLACES = (100, 8000)
NUM_TIMED = 200


def streams(tokenizer: Any, text: str) -> dict[str, tuple[list[int], tuple[str, ...]]]:
    """Tokens of each kind of stream, to be repeated, and its stop strings."""
    words = tokenizer.encode(text, add_special_tokens=False)
    special = list(Vocabulary(tokenizer).special)[:3]
    first, *_, last = tokenizer.encode("\N{GRINNING FACE}", add_special_tokens=False) * 2
    many = tuple(f"{text[:40]} and {number}" for number in range(64))
    return {
        "text": (words, ()),
        "text, a stop string": (words, ("no such text",)),
        "text, 64 long stop strings": (words, many),
        "special tokens": (special, ()),
        "special tokens, a stop string of one": (special[:1], (tokenizer.decode(special[-1:]) * 2,)),
        "first bytes of characters": ([first], ()),
        "last bytes of characters": ([last], ("no such text",)),
        "a partial match that grows": (words[:1], (tokenizer.decode(words[:1]) * 20_000 + "?",)),
    }


def us_per_token(vocabulary: Vocabulary, token_ids: list[int], stop: tuple[str, ...], rounds: int) -> list[float]:
    """The least of some rounds, at each of PLACES."""
    best = [float("inf")] * len(PLACES)
    for _ in range(rounds):
        text = StreamedText(vocabulary, stop)
        started_s = 0.0
        for number in range(PLACES[-1] + NUM_TIMED):
            if number in PLACES:
                started_s = time.perf_counter()
            text.add([token_ids[number % len(token_ids)]], may_stop=True)
            if number + 1 - NUM_TIMED in PLACES:
                place = PLACES.index(number + 1 - NUM_TIMED)
                best[place] = min(best[place], (time.perf_counter() - started_s) / NUM_TIMED * 1e6)
        assert not text.stopped, "none of these streams has its stop string"
    return best


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--model", default=DEMO_MODEL_PATH, help="folder of a checkpoint with a tokenizer")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: at least one")

    tokenizer = load_tokenizer(Path(args.model))
    if tokenizer is None:
        parser.error(f"--model {args.model}: it has no tokenizer files")
    questions = json.loads((Path(DEMO_MODEL_PATH) / "questions.json").read_text(encoding="utf-8"))
    text = " ".join(pair["answer"] for pair in questions)
    vocabulary = Vocabulary(tokenizer)
    results = {}
    print(f"{'us per token after':<40}{PLACES[0]:>8}{PLACES[1]:>8}")
    for name, (token_ids, stop) in streams(tokenizer, text).items():
        results[name] = us_per_token(vocabulary, token_ids, stop, args.rounds)
        print(f"{name:<40}{results[name][0]:8.2f}{results[name][1]:8.2f}")
    report("text_streams", {"places": PLACES, "us_per_token": results}, args.output)


if __name__ == "__main__":
    main()
