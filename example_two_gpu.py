"""Prefill on one GPU, decode on another, in one process. With fewer than two GPUs: on two logical CPU devices."""

import argparse

import torch

from nanovllm import LLM, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.errors import ends_with_message

QUESTIONS = ["introduce yourself", "Explain quantum computing in simple terms", "Write a short poem about AI"]


@ends_with_message()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEMO_MODEL_PATH, help="folder of a Qwen3 checkpoint")
    parser.add_argument("--prefill-device-id", type=int, default=0)
    parser.add_argument("--decode-device-id", type=int, default=1)
    parser.add_argument("--kv-handoff", default="auto", choices=["auto", "copy", "push", "direct"])
    args = parser.parse_args()

    num_gpus = torch.cuda.device_count()
    if num_gpus < 2:
        print(f"torch sees {num_gpus} GPUs: running on two logical CPU devices")
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    with LLM(
        args.model,
        enable_two_gpu_pd=True,
        card_roles="fixed",
        prefill_device_id=args.prefill_device_id,
        decode_device_id=args.decode_device_id,
        kv_handoff=args.kv_handoff,
        device="cuda" if num_gpus >= 2 else "cpu",
    ) as llm:
        answers = llm.chat(conversations, SamplingParams(temperature=0.0, max_tokens=256))
        print(f"prefill on {llm.prefill_runner.device}, decode on {llm.decode_runner.device}, ", end="")
        print(f"{llm.counters.handoff_blocks} KV blocks handed over by {llm.kv_transfer.name!r}")
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"\n> {question}\n{answer['text']}\n(first token after {answer['ttft_s'] * 1e3:.0f} ms)")


if __name__ == "__main__":
    main()
