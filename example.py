"""Asks a model a few questions. Without --model it is the bundled demo model, which knows only its training set."""

import argparse

from nanovllm import LLM, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.errors import ends_with_message

QUESTIONS = [
    "introduce yourself",
    "What is the capital of France?",
    "list all prime numbers within 100",
    "Write a short poem about AI",
]


@ends_with_message()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEMO_MODEL_PATH, help="folder of a Qwen3 checkpoint")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-tokens", type=int, default=256)
    args = parser.parse_args()

    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    with LLM(args.model) as llm:
        answers = llm.chat(conversations, params)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"\n> {question}\n{answer['text']}")


if __name__ == "__main__":
    main()
