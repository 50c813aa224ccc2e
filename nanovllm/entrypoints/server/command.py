"""`python -m nanovllm serve MODEL`: the options, and what they make."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import math
import os
import socket
from pathlib import Path

from nanovllm.entrypoints.engine_options import add_engine_options, engine_options
from nanovllm.errors import ConfigError

logger = logging.getLogger(__name__)

INTERRUPTED = 130
"""Exit status after Ctrl-C before the server serves; after that it drains."""

MAX_SEND_TIMEOUT_S = 1_000_000
"""The kernel takes milliseconds, in 31 bits."""

API_KEY_VARIABLE = "NANOVLLM_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", help="folder of a Hugging Face checkpoint, or its name on the hub")
    group = parser.add_argument_group("the server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    group.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    group.add_argument("--served-model-name", help="what clients call the model (default: the last part of its path)")
    group.add_argument(
        "--api-key", help=f"clients send it as Authorization: Bearer; {API_KEY_VARIABLE} does the same (default: none)"
    )
    group.add_argument(
        "--max-queued-requests",
        type=int,
        default=1024,
        help="requests that may wait beside the max_num_seqs that run; more get a 429 (default: %(default)s)",
    )
    group.add_argument(
        "--max-body-bytes", type=int, default=16 * 1024**2, help="largest body of a request (default: %(default)s)"
    )
    group.add_argument(
        "--body-timeout", type=float, default=30.0, help="seconds in which a body has to come (default: %(default)s)"
    )
    group.add_argument(
        "--send-timeout",
        type=float,
        default=60.0,
        help="seconds after which a client that reads nothing is left, its requests aborted; 0 waits for ever "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--shutdown-timeout",
        type=float,
        default=10.0,
        help="seconds that requests have left after SIGTERM or Ctrl-C (default: %(default)s)",
    )
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Serves until a signal; the exit status.

    Raises:
        ConfigError: an option is refused, or the packages of the extra `serve` are missing.
        ModelLoadError, ...: as `LLM`.
    """
    _check(args)
    try:
        from nanovllm.entrypoints.async_llm import AsyncLLM
        from nanovllm.entrypoints.server.app import ServerSettings
        from nanovllm.entrypoints.server.lifetime import serve
    except ImportError as missing:
        raise ConfigError(f"the server needs more packages ({missing}): pip install nanovllm[serve]") from missing
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with _listening(args.host, args.port, args.send_timeout) as listening:
        try:
            llm = AsyncLLM(args.model, **engine_options(args))
        except KeyboardInterrupt:
            return INTERRUPTED
        settings = ServerSettings(
            model_name=args.served_model_name or Path(args.model).name or args.model,
            api_key=args.api_key or os.environ.get(API_KEY_VARIABLE) or None,
            max_body_bytes=args.max_body_bytes,
            body_timeout_s=args.body_timeout,
            max_open_requests=llm.config.max_num_seqs + args.max_queued_requests,
        )
        if settings.api_key is None and not _is_loopback(args.host):
            logger.warning("anybody who reaches %s may use the model; --api-key lets others out", args.host)
        return asyncio.run(serve(llm, settings, listening, shutdown_timeout_s=args.shutdown_timeout))


def _check(args: argparse.Namespace) -> None:
    for name, least in (("max_queued_requests", 0), ("max_body_bytes", 1), ("port", 0)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)} is below {least}")
    for name in ("body_timeout", "shutdown_timeout"):
        if not 0 < getattr(args, name) < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)} is not a positive number of seconds")
    if not 0 <= args.send_timeout <= MAX_SEND_TIMEOUT_S:
        raise ConfigError(f"--send-timeout {args.send_timeout} is not a number of seconds up to {MAX_SEND_TIMEOUT_S}")
    if args.send_timeout and not hasattr(socket, "TCP_USER_TIMEOUT"):
        raise ConfigError("--send-timeout needs TCP_USER_TIMEOUT, which this system lacks; 0 goes without it")


def _listening(host: str, port: int, send_timeout_s: float) -> socket.socket:
    """A socket that listens; before the model is loaded, so that a wrong address does not take minutes to tell.

    The kernel ends a connection on which nothing that was sent has been taken for `send_timeout_s`: it alone sees
    whether the client reads. Connections have their options from the socket that listens, tcp(7).
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen at --host {host} --port {port}: {error}") from error
    # Else an event waits until the client's kernel has acknowledged the one before it, 40 ms at times. asyncio sets
    # this only for sockets that were made with a protocol number.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if send_timeout_s:
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(send_timeout_s * 1e3))
    return listening


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
