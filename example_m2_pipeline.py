"""Prefill on one card, decode on another whose SMs are split: attention on one part beside the FFN on the other.

With fewer than two GPUs it runs the same plan on logical CPU devices: that shows how it works and nothing of its speed.
"""

from __future__ import annotations

import argparse
import time

import torch

from nanovllm import LLM, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.errors import ends_with_message

QUESTIONS = [
    "What is the capital of France?",
    "What is the capital of Japan?",
    "Write a short poem about the sea",
    "Write a short poem about AI",
]


@ends_with_message()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEMO_MODEL_PATH, help="folder of a Qwen3 checkpoint")
    args = parser.parse_args()
    num_gpus = torch.cuda.device_count()
    if num_gpus < 2:
        print(f"torch sees {num_gpus} GPUs: running on two logical CPU devices")
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    for pipeline in ("disabled", "static"):
        with LLM(
            args.model,
            device="cuda" if num_gpus >= 2 else "cpu",
            enable_two_gpu_pd=True,
            enable_decode_pipeline=True,
            decode_pipeline=pipeline,
            decode_pipeline_profiling=True,
        ) as llm:
            started = time.perf_counter()
            answers = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=256), use_tqdm=False)
            seconds = time.perf_counter() - started
            num_tokens = sum(len(answer["token_ids"]) for answer in answers)
            print(f"decode_pipeline={pipeline!r}: {num_tokens} tokens in {seconds:.2f} s")
            if pipeline == "static":
                llm.decode_runner.print_pipeline_statistics()
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"\n> {question}\n{answer['text']}")


if __name__ == "__main__":
    main()
