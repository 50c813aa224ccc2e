"""Prefill on one card, decode on another whose SMs are split: attention on one part beside the FFN on the other.

Takes a checkpoint's folder, or serves the bundled demo model. With fewer than two GPUs it runs the same plan on
logical CPU devices, which shows how it works and nothing of its speed.
"""

from __future__ import annotations

import sys
import time

import torch

from nanovllm import LLM, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH

QUESTIONS = [
    "What is the capital of France?",
    "What is the capital of Japan?",
    "Write a poem about the sea.",
    "Write a poem about a clock.",
]


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else DEMO_MODEL_PATH
    device = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= 2 else "cpu"
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    params = SamplingParams(temperature=0, max_tokens=96)
    for pipeline in ("disabled", "static"):
        with LLM(
            model,
            device=device,
            enable_two_gpu_pd=True,
            enable_decode_pipeline=True,
            decode_pipeline=pipeline,
            decode_pipeline_profiling=True,
        ) as llm:
            started = time.perf_counter()
            answers = llm.chat(conversations, params, use_tqdm=False)
            seconds = time.perf_counter() - started
            num_tokens = sum(len(answer["token_ids"]) for answer in answers)
            print(f"decode_pipeline={pipeline!r} on {device}: {num_tokens} tokens in {seconds:.2f} s")
            if pipeline == "static":
                llm.decode_runner.print_pipeline_statistics()
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"\n{question}\n{answer['text']}")


if __name__ == "__main__":
    main()
