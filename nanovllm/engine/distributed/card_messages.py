"""What a controller and the process of a card tell each other: columns and small records in msgpack, nothing pickled.

A message that is not exactly of one of these types is refused as a whole. Knows nothing of sockets or devices.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from nanovllm.engine.distributed.messages import Failure
from nanovllm.engine.execution.step_handle import NOTHING_SAMPLED, SampledOnHost, StepTokens
from nanovllm.engine.execution.tasks import StepTask
from nanovllm.errors import ClusterError
from nanovllm.version import __version__

VERSION = f"nanovllm {__version__}, cards 2"
"""Both sides have to be of this version; the number is raised with every change of the messages."""

DTYPES = {dtype: np.dtype(dtype) for dtype in ("bool", "int16", "int32", "int64", "float32", "float64")}
MAX_DIMENSIONS = 2


class Contact(msgspec.Struct, array_like=True, frozen=True):
    """What a process needs to reach its controller: ZMQ endpoints, and keys of CURVE in Z85.

    Only the two of them have these keys: whoever else connects can neither speak nor listen. A process ends by itself
    when it has not heard its controller for `controller_timeout_s`, if that is not 0.
    """

    card: str
    messages: str
    heartbeats: str
    controller_key: bytes
    public_key: bytes
    secret_key: bytes
    controller_timeout_s: float
    log_level: int


# From the controller to a card


class Start(msgspec.Struct, array_like=True, frozen=True, tag="start"):
    """The first message: which model to load, with which options of an engine, on which device.

    `agent` is the name by which other cards know this process; that of a process started later is another one. An empty
    `model` is the demo model, wherever the card's host has it. `explains_transports` lets it answer `AskTransports`.
    """

    model: str
    options: dict[str, Any]
    device_kind: str
    device_index: int
    agent: str
    explains_transports: bool


class AddPeer(msgspec.Struct, array_like=True, frozen=True, tag="add peer"):
    """Another card, to which blocks may be pushed from now on: NIXL's metadata of its agent, and where its pool is.

    `host` is that of `Ready`.
    """

    agent: str
    host: str
    metadata: bytes
    pool_address: int
    pool_device: int


class RemovePeer(msgspec.Struct, array_like=True, frozen=True, tag="remove peer"):
    """Another card is gone. Pushes to it, and what is expected from it, have failed."""

    agent: str


class Launch(msgspec.Struct, array_like=True, frozen=True, tag="launch"):
    """A step, which runs behind those before it.

    Numbers only grow. If a step fails, the later ones of the same `batch` are not run: the rows on the device are no
    longer those that they were packed for.
    """

    number: int
    batch: int
    task: StepTask


class Push(msgspec.Struct, array_like=True, frozen=True, tag="push"):
    """Blocks to write into another card's pool, once a step has ended: [2, N] int64, those here and those there."""

    number: int
    after_step: int
    agent: str
    blocks: np.ndarray
    verifies: bool


class Expect(msgspec.Struct, array_like=True, frozen=True, tag="expect"):
    """Blocks of this card's pool, [N] int64, that another card will write by the push of this number."""

    number: int
    agent: str
    blocks: np.ndarray
    verifies: bool


class CancelExpected(msgspec.Struct, array_like=True, frozen=True, tag="cancel expected"):
    """The push of this number has failed on the other side."""

    number: int


class Ping(msgspec.Struct, array_like=True, frozen=True, tag="ping"):
    """Asks for the card's clock; when it was sent, by the controller's."""

    sent_s: float


class AskTransports(msgspec.Struct, array_like=True, frozen=True, tag="ask transports"):
    """Asks how blocks have been pushed from here."""


Command = Start | AddPeer | RemovePeer | Launch | Push | Expect | CancelExpected | Ping | AskTransports


# From a card to the controller


class Hello(msgspec.Struct, array_like=True, frozen=True, tag="hello"):
    """The first message. It stays as it is in all versions."""

    version: str


class Geometry(msgspec.Struct, array_like=True, frozen=True):
    """Sizes of a card's pool and steps, as of `PrefillLayout`, `DecodeRowTable` and `TaskPacker`."""

    num_kv_blocks: int
    block_size: int
    block_bytes: int
    max_prefill_tokens: int
    max_step_tokens: int
    max_num_chunks: int
    max_num_rows: int
    prefill_sizes: list[int]
    mixed_sizes: list[int]


class Heartbeat(msgspec.Struct, array_like=True, frozen=True):
    """The process runs; for how many seconds the thread that runs steps has been in one turn of its loop."""

    stalled_s: float


class Ready(msgspec.Struct, array_like=True, frozen=True, tag="ready"):
    """The model is loaded: the card's geometry, and what others need to reach its pool, as in `AddPeer`.

    `host` names the host as it runs now; `hostname`, `device` and `about`, with versions of packages, are for people.
    """

    geometry: Geometry
    pid: int
    host: str
    hostname: str
    device: str
    about: dict[str, str]
    metadata: bytes
    pool_address: int
    pool_device: int


class Pong(msgspec.Struct, array_like=True, frozen=True, tag="pong"):
    """Answers a `Ping` with its moment, and the card's `time.perf_counter()`."""

    sent_s: float
    card_s: float


class Transports(msgspec.Struct, array_like=True, frozen=True, tag="transports"):
    """Answers `AskTransports`: the transports by which UCX writes blocks to processes on this host (`intra-node`)
    and on others (`inter-node`)."""

    by_place: dict[str, list[str]]


class StepEnded(msgspec.Struct, array_like=True, frozen=True, tag="ended"):
    """A step has ended: when it began and ended, in seconds of the card's `time.perf_counter()`, and what it sampled.

    The parts are those of `StepTokens`, None for nothing.
    """

    number: int
    began_s: float
    ended_s: float
    after_chunks: SampledOnHost | None
    after_decode: SampledOnHost | None
    in_prompts: SampledOnHost | None

    @classmethod
    def of(cls, number: int, moments: tuple[float, float], tokens: StepTokens) -> StepEnded:
        parts = (tokens.after_chunks, tokens.after_decode, tokens.in_prompts)
        return cls(number, *moments, *(part if len(part.token_ids) else None for part in parts))

    def tokens(self) -> StepTokens:
        return StepTokens(
            self.after_chunks or NOTHING_SAMPLED,
            self.after_decode or NOTHING_SAMPLED,
            self.in_prompts or NOTHING_SAMPLED,
        )


class StepFailed(msgspec.Struct, array_like=True, frozen=True, tag="failed"):
    """A step could not be run; the later ones of its batch will not be."""

    number: int
    failure: Failure


class Sent(msgspec.Struct, array_like=True, frozen=True, tag="sent"):
    """A push has ended here: its blocks may be written to again. When it began and ended, and checksums if asked for.

    Checksums are [N, num_layers] int64.
    """

    number: int
    began_s: float
    ended_s: float
    checksums: np.ndarray | None


class SendFailed(msgspec.Struct, array_like=True, frozen=True, tag="send failed"):
    """A push has failed here, and touches its blocks no more."""

    number: int
    reason: str


class Arrived(msgspec.Struct, array_like=True, frozen=True, tag="arrived"):
    """The blocks of a push are all there; with checksums if asked for."""

    number: int
    checksums: np.ndarray | None


class ArrivalFailed(msgspec.Struct, array_like=True, frozen=True, tag="arrival failed"):
    """The blocks of a push will not come, and nobody writes to them any more."""

    number: int
    reason: str


class InvalidMessage(msgspec.Struct, array_like=True, frozen=True, tag="invalid message"):
    """A message from the controller was not understood; nothing of it was done."""

    reason: str


class CardFailed(msgspec.Struct, array_like=True, frozen=True, tag="card failed"):
    """The process ends for this reason."""

    failure: Failure


Report = (
    Hello
    | Ready
    | Pong
    | Transports
    | StepEnded
    | StepFailed
    | Sent
    | SendFailed
    | Arrived
    | ArrivalFailed
    | InvalidMessage
    | CardFailed
)


def _as_columns(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.name, value.shape, value.tobytes()
    raise NotImplementedError(f"a message has no {type(value).__name__}")


def _as_array(kind: type, value: Any) -> Any:
    """The array of a triple of type, shape and bytes. A copy, since steps write to theirs."""
    if kind is not np.ndarray:
        raise NotImplementedError(f"a message has no {kind.__name__}")
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError("an array is its type, its shape and its bytes")
    name, shape, data = value
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError("an array is of a type that messages have")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not isinstance(data, bytes):
        raise ValueError("an array has at most two dimensions, and bytes")
    if not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError("the lengths of an array are integers")
    size = DTYPES[name].itemsize
    for length in shape:
        size *= length
    if len(data) != size:
        raise ValueError(f"an array of shape {shape} of {name} has {size} bytes, not {len(data)}")
    return np.frombuffer(bytearray(data), dtype=DTYPES[name]).reshape(shape)


_encode = msgspec.msgpack.Encoder(enc_hook=_as_columns).encode
_decode_command = msgspec.msgpack.Decoder(Command, dec_hook=_as_array).decode
_decode_report = msgspec.msgpack.Decoder(Report, dec_hook=_as_array).decode
_decode_contact = msgspec.msgpack.Decoder(Contact).decode
_decode_heartbeat = msgspec.msgpack.Decoder(Heartbeat).decode


def encode(message: Command | Report | Contact | Heartbeat) -> bytes:
    return _encode(message)


def decode_command(data: bytes) -> Command:
    """The command that a card was sent.

    Raises:
        ClusterError: it is none of this version.
    """
    try:
        return _decode_command(data)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ClusterError(f"{len(data)} bytes from the controller are no command of {VERSION!r}: {error}") from None


def decode_report(data: bytes) -> Report:
    """The report of a card.

    Raises:
        ClusterError: it is none of this version.
    """
    try:
        return _decode_report(data)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ClusterError(f"{len(data)} bytes from a card are no report of {VERSION!r}: {error}") from None


def decode_contact(data: bytes) -> Contact:
    return _decode_contact(data)


def decode_heartbeat(data: bytes) -> Heartbeat:
    """A card's heartbeat.

    Raises:
        ClusterError: it is none of this version.
    """
    try:
        return _decode_heartbeat(data)
    except msgspec.DecodeError as error:
        raise ClusterError(f"{len(data)} bytes from a card are no heartbeat of {VERSION!r}: {error}") from None
