"""Devices with an index of their own, their events and memory. Knows nothing about models or requests.

`torch.device("cpu", 1)` is the same device as `cpu`; a `Device` keeps its index, so that several logical CPU devices
can stand for several GPUs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nanovllm.errors import ConfigError


class DoneEvent:
    """The event of work on a CPU, which has ended when the call that launched it returns."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return


Event = torch.cuda.Event | DoneEvent

MAX_S_FROM_BASE = 1.0
"""Events give the milliseconds between two of them in float32: over one second, to a tenth of a microsecond."""
NUM_BASE_TRIES = 3
MOST_BASE_WAIT_S, BASE_RETRY_S, MOST_BASE_AGE_S = 0.1e-3, 0.05, 10.0
"""A GPU that does not record a new base at once may not do so before the graph that runs has ended: the host does not
wait for that, and asks again later, unless the base is so old that the clocks may be some tenths of a millisecond
apart."""


def leak_until_exit(*objects: object) -> None:
    """Keeps objects until the process is gone, past the interpreter's end.

    Freeing pinned memory on a lost GPU ends the process: torch raises in a destructor.
    """
    for kept in objects:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))


class Stopwatch:
    """Times what is launched on a device's current stream from its creation to `stop`; does not wait."""

    def __init__(self, device: Device) -> None:
        self._start = self._moment(device)
        self._end: torch.cuda.Event | float | None = None
        self._device = device

    def stop(self) -> None:
        self._end = self._moment(self._device)

    def is_done(self) -> bool:
        """Whether what was timed has ended."""
        return self._end.query() if isinstance(self._end, torch.cuda.Event) else self._end is not None

    def seconds(self) -> float:
        """How long that took, once it has ended."""
        start, end = self._start, self._end
        if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            return start.elapsed_time(end) / 1e3
        assert isinstance(start, float), "a stopwatch is stopped before it is read"
        assert isinstance(end, float), "a stopwatch is stopped before it is read"
        return end - start

    @staticmethod
    def _moment(device: Device) -> torch.cuda.Event | float:
        if not device.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device.index))
        return event


def wait_event(stream: torch.cuda.Stream | None, event: Event | None) -> None:
    """Makes work launched on `stream` from now on run after `event`. Does nothing on a CPU, or without an event."""
    if stream is not None and isinstance(event, torch.cuda.Event):
        stream.wait_event(event)


@dataclass(frozen=True)
class Device:
    """A GPU, or a logical CPU device."""

    kind: str
    index: int

    @property
    def is_cuda(self) -> bool:
        return self.kind == "cuda"

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cuda", self.index) if self.is_cuda else torch.device("cpu")

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}"

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Makes a GPU the current one: Triton and torch launch on the current device's context."""
        if self.is_cuda:
            with torch.cuda.device(self.index):
                yield
        else:
            yield

    def record_event(self) -> Event:
        """An event that is done after everything launched so far on this device's current stream."""
        if not self.is_cuda:
            return DoneEvent()
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.index))
        return event

    def lost_reason(self) -> str | None:
        """Why this GPU will never run anything again in this process; None if it works. Does not wait.

        A kernel error leaves a CUDA context in which every call fails.
        """
        if not self.is_cuda:
            return None
        try:
            torch.cuda.mem_get_info(self.index)
        except RuntimeError as error:
            return str(error).splitlines()[0]
        return None

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """`array` on this device, copied without waiting for work that is running there."""
        tensor = torch.from_numpy(array)
        if not self.is_cuda:
            return tensor
        return tensor.pin_memory().to(self.torch_device, non_blocking=True)

    def memory_info(self) -> tuple[int, int]:
        """Free and total bytes of a GPU, other processes' use counted."""
        assert self.is_cuda, "a CPU device has no memory of its own to measure"
        with self.current():
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info(self.index)
        return free, total


class DeviceClock:
    """Tells when work on a device begins or ends, in seconds of `time.perf_counter()`.

    A GPU event gives its time since another event, the base, whose time the host knows. The clocks of host and GPU
    drift apart, so there is a new base about every second, for which the host waits some microseconds.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._base: torch.cuda.Event | None = None
        self._base_s = 0.0
        if device.is_cuda:
            # Nothing else runs on this stream, so that an event there is mostly done as soon as the GPU reads it.
            self._stream = torch.cuda.Stream(device.index, priority=-1)
            self._renew_base(math.inf)
        self._renew_at_s = self._base_s + MAX_S_FROM_BASE

    def record_moment(self) -> Moment:
        """The moment when the device's current stream has run everything launched so far; on a CPU, now."""
        if not self._device.is_cuda:
            return Moment(self, time.perf_counter())
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device.index))
        return Moment(self, event)

    def seconds_of(self, event: torch.cuda.Event) -> float:
        """The time of an event, in seconds of `time.perf_counter()`; waits for the event."""
        event.synchronize()
        if time.perf_counter() > self._renew_at_s:
            is_old = time.perf_counter() - self._base_s > MOST_BASE_AGE_S
            has_renewed = self._renew_base(math.inf if is_old else MOST_BASE_WAIT_S)
            self._renew_at_s = time.perf_counter() + (MAX_S_FROM_BASE if has_renewed else BASE_RETRY_S)
        return self._seconds_by_base(event)

    def _seconds_by_base(self, event: torch.cuda.Event) -> float:
        assert self._base is not None, "events are a GPU's"
        return self._base_s + self._base.elapsed_time(event) / 1e3

    def _renew_base(self, most_wait_s: float) -> bool:
        """Takes a new base, unless the GPU keeps the host waiting for longer. Returns whether it did."""
        tightest: tuple[float, float, float, torch.cuda.Event] | None = None
        for _ in range(NUM_BASE_TRIES):
            event = torch.cuda.Event(enable_timing=True)
            began_s = before_s = asked_s = time.perf_counter()
            event.record(self._stream)
            while not (is_done := event.query()) and asked_s - began_s <= most_wait_s:
                before_s, asked_s = asked_s, time.perf_counter()
            if not is_done:
                break
            after_s = time.perf_counter()  # it was done between these
            if tightest is None or after_s - before_s < tightest[0]:
                tightest = (after_s - before_s, before_s, after_s, event)
            most_wait_s = min(most_wait_s, MOST_BASE_WAIT_S)
        if tightest is None:
            return False
        _, before_s, after_s, event = tightest
        # The time by the old base is kept as far as possible, so that consecutive steps stay consecutive.
        guess_s = (before_s + after_s) / 2 if self._base is None else self._seconds_by_base(event)
        self._base, self._base_s = event, min(max(guess_s, before_s), after_s)
        return True


@dataclass(frozen=True)
class Moment:
    """When work on a device began or ended."""

    clock: DeviceClock
    _when: torch.cuda.Event | float

    @property
    def event(self) -> Event:
        """An event that is done after the moment."""
        return DoneEvent() if isinstance(self._when, float) else self._when

    def seconds(self) -> float:
        """The moment in seconds of `time.perf_counter()`; waits for it."""
        return self._when if isinstance(self._when, float) else self.clock.seconds_of(self._when)


def peer_access(source: Device, target: Device) -> bool:
    """Whether kernels of `source` may read and write `target`'s memory."""
    if not (source.is_cuda and target.is_cuda):
        return False
    return torch.cuda.can_device_access_peer(source.index, target.index)


def driver_version() -> str | None:
    """Version of NVIDIA's kernel module, such as `580.159.03`; None where there is none."""
    try:
        about = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\d+(\.\d+)+", about)
    return found.group() if found else None


def copy_bandwidth(source: Device, target: Device, num_bytes: int = 2**28) -> float:
    """Bytes per second of copies from one GPU's memory to another's, the best of five."""
    here = torch.empty(num_bytes, dtype=torch.uint8, device=source.torch_device)
    there = torch.empty(num_bytes, dtype=torch.uint8, device=target.torch_device)
    best_ms = float("inf")
    with source.current():
        for _ in range(5):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            there.copy_(here, non_blocking=True)
            end.record()
            end.synchronize()
            best_ms = min(best_ms, start.elapsed_time(end))
    return num_bytes / best_ms * 1e3


@functools.cache
def enable_peer_access(source: Device, target: Device) -> None:
    """Lets kernels of `source` write to `target`'s memory: torch enables that with the first copy between the two."""
    torch.zeros(1, device=source.torch_device).to(target.torch_device)


def resolve_device_pair(option: str, first: int, second: int) -> tuple[Device, Device]:
    """Two GPUs by their ids, or two logical CPU devices if `option` is `cpu`.

    Raises:
        ConfigError: there are fewer than two GPUs, or one of the ids does not exist.
    """
    if option == "cpu":
        return Device("cpu", first), Device("cpu", second)
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_gpus < 2:
        raise ConfigError(
            f"enable_two_gpu_pd needs two GPUs and torch sees {num_gpus}; leave it out to use one device, or pass "
            "device='cpu' to try it on two logical CPU devices"
        )
    for index in (first, second):
        if index >= num_gpus:
            raise ConfigError(f"device id {index} does not exist; torch sees GPUs 0 to {num_gpus - 1}")
    return Device("cuda", first), Device("cuda", second)


def resolve_device(option: str) -> Device:
    """The device that an option `auto`, `cuda`, `cuda:N` or `cpu` names.

    Raises:
        ConfigError: the GPU does not exist.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if option == "cpu" or (option == "auto" and num_gpus == 0):
        return Device("cpu", 0)
    if num_gpus == 0:
        raise ConfigError(f"device={option!r}, but torch sees no GPU; pass device='cpu' or 'auto'")
    index = int(option.split(":")[1]) if ":" in option else torch.cuda.current_device()
    if index >= num_gpus:
        raise ConfigError(f"device={option!r} does not exist; torch sees GPUs 0 to {num_gpus - 1}")
    return Device("cuda", index)
