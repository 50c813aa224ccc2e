"""Seconds from the start of a process to the first token of a local checkpoint, with a warm and a cold kernel cache.

The checkpoint is written first: random weights of a real shape, the bundled model's small tokenizer. The process
imports the package, loads the checkpoint, captures its graphs and answers a prompt of 100 tokens. The operating system
has just written the weights, so they come from its cache.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

from lib.arguments import add_device, add_shape, new_parser
from lib.checkpoint import write_checkpoint
from lib.report import report
from nanovllm.errors import ends_with_message

CHILD = """
import json, sys, time
from nanovllm import LLM, SamplingParams
imported = time.time()
with LLM(sys.argv[1], device=sys.argv[2]) as llm:
    ready = time.time()
    next(llm.generate_stream([1] * 100, SamplingParams(max_tokens=2)))
    print(json.dumps({"imported": imported, "ready": ready, "first_token": time.time()}))
"""


def time_process(folder: str, device: str, kernel_cache: str | None) -> dict[str, float]:
    """Seconds from the start of a new process to its imports, its engine and its first token."""
    environment = {**os.environ, **({"TRITON_CACHE_DIR": kernel_cache} if kernel_cache else {})}
    started = time.time()
    run = subprocess.run(
        [sys.executable, "-c", CHILD, folder, device], env=environment, check=True, capture_output=True, text=True
    )
    return {name: moment - started for name, moment in json.loads(run.stdout.splitlines()[-1]).items()}


@ends_with_message()
def main() -> None:
    parser = new_parser(__doc__)
    add_shape(parser, "qwen3-0.6b")
    add_device(parser)
    args = parser.parse_args()

    folder = write_checkpoint(args.model_shape)
    with tempfile.TemporaryDirectory() as kernel_cache:
        cold = time_process(folder, args.device, kernel_cache)
        warm = time_process(folder, args.device, kernel_cache)
    shutil.rmtree(folder)
    print(f"{'seconds to':<14}{'cold':>8}{'warm':>8}")
    for name in cold:
        print(f"{name.replace('_', ' '):<14}{cold[name]:8.1f}{warm[name]:8.1f}")
    report("startup", {"model_shape": args.model_shape, "cold_s": cold, "warm_s": warm}, args.output)


if __name__ == "__main__":
    main()
