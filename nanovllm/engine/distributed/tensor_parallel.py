"""Tensor parallelism: one process per rank. Starts the workers, sends them every task, notices when one is gone.

Rank 0 is the engine's own process. A task goes to each worker through a private pipe; it has the arrays that the host
would send to its device, and nothing else. All ranks sample the same tokens.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import socket
import struct
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllgatherOptions

from nanovllm.engine.execution.tasks import StepTask
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.errors import BackendUnavailableError, WorkerError
from nanovllm.kernels.cuda_all_reduce import PeerAllReduce
from nanovllm.utils.device import Device, leak_until_exit
from nanovllm.utils.process import call_at_exit, num_threads_of, without_interrupts

logger = logging.getLogger(__name__)

READY = "ready"
START_TIMEOUT_S = 600.0
"""Seconds for all ranks to load their weights and capture their graphs."""
CLOSE_TIMEOUT_S = 5.0
CONNECTED_S = 1.0
"""Seconds for rank 0 to have connected, too, after a worker that had is gone."""
LAST_WORDS_S = 3.0
"""Seconds that a failed worker may take to send its traceback."""

NCCL_ENVIRONMENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "NCCL_SOCKET_IFNAME": "lo",
}
"""Turns off torch's watchdog, which would end the engine's process where a WorkerError is wanted. Keeps NCCL local."""

MakeRunner = Callable[["ProcessRanks"], ModelRunner]


class ProcessRanks:
    """A rank among processes of one host, with a process group of its own: NCCL between GPUs, gloo between CPUs.

    `PeerAllReduce` does small all-reduces between GPUs that can write into each other's memory.

    Args:
        folder: where the ranks find each other; only this user may write to it.
        rank, size: this rank, and the number of ranks.
        device: of this rank.
        timeout_s: seconds after which a collective that has not ended is an error.
    """

    def __init__(self, folder: str, rank: int, size: int, device: Device, timeout_s: float) -> None:
        self.rank, self.size = rank, size
        for name, value in NCCL_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._store = dist.FileStore(  # type: ignore[attr-defined] # it is documented there
            os.path.join(folder, "store"), size
        )
        timeout = datetime.timedelta(seconds=timeout_s)
        self._num_exchanges = 0
        self._group: Any
        self._peers: PeerAllReduce | None = None
        self._lock = threading.Lock()
        self._is_aborted = False
        self._aborting: threading.Thread | None = None
        if device.is_cuda:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = dist.ProcessGroupNCCL(self._store, rank, size, options)
        else:
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined] # it has
            options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
            options._timeout = timeout
            self._group = dist.ProcessGroupGloo(self._store, rank, size, options)
        self._device = device.torch_device
        self._sums, self._gathers = dist.AllreduceOptions(), AllgatherOptions()
        # Collectives run on the current stream, not on one of NCCL's own.
        self._sums.asyncOp = self._gathers.asyncOp = not device.is_cuda

    def connect(self) -> None:
        """Connects to the other ranks; waits for all of them. `abort`, from another thread, ends the wait."""
        nothing = torch.zeros(1, 1, dtype=torch.float32, device=self._device)
        self._exchange("here")  # NCCL would wait for ever for a rank that is gone
        self.all_gather(nothing)  # the first collective connects
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                try:
                    self._peers = PeerAllReduce(self.rank, self.size, self._exchange)
                except BackendUnavailableError as error:
                    logger.warning("all-reduce falls back to NCCL, which is slower for small tensors: %s", error)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        x, group = x.contiguous(), self._live_group()
        if self._peers is not None and self._peers.can_serve(x):
            return self._peers.all_reduce(x)
        _wait(group.allreduce([x], self._sums))
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        num_rows, width = x.shape
        parts = x.new_empty(self.size * num_rows, width)
        _wait(self._live_group()._allgather_base(parts, x.contiguous(), self._gathers))
        return parts.view(self.size, num_rows, width).transpose(0, 1).reshape(num_rows, -1)

    def all_reduce_min(self, number: int) -> int:
        return min(map(int, self._exchange(str(number))))

    def abort(self) -> None:
        """Ends collectives that wait for a rank that is gone, on GPUs for ever otherwise. Returns at once."""
        with self._lock:
            if self._is_aborted:
                return
            self._is_aborted = True
            if self._peers is not None:
                self._peers.give_up()
            if self._device.type == "cuda":
                # NCCL ends its kernels, then waits for as long as a graph has a collective.
                self._aborting = threading.Thread(target=self._group.abort, daemon=True)
                self._aborting.start()

    def close(self) -> None:
        """Destroys the process group. No collective follows, no graph holds one, and the other ranks have ended."""
        self.abort()
        if self._aborting is not None:
            self._aborting.join(CLOSE_TIMEOUT_S)
            if self._aborting.is_alive():
                leak_until_exit(self._group)  # its destructor would wait, too
        if self._peers is not None:
            self._peers.close()
        self._group = self._peers = None

    def _live_group(self) -> Any:
        """The process group, unless it was aborted: then it would reconnect, and wait for ranks that are gone."""
        if self._is_aborted:
            raise RuntimeError("a rank is gone")
        return self._group

    def _exchange(self, text: str) -> list[str]:
        """Gathers a text from each rank, by rank; all ranks call this together."""
        self._num_exchanges += 1
        names = [f"{self._num_exchanges} of {rank}" for rank in range(self.size)]
        self._store.set(names[self.rank], text)
        while not self._store.check(names):
            self._live_group()
            time.sleep(0.002)
        return [self._store.get(name).decode() for name in names]


class Workers:
    """The other ranks of an engine, each in a process that ends when this one does.

    Args:
        size: number of ranks, this one included.
        make_runner: makes a worker's runner, given its `ProcessRanks`; picklable.
        device_of: gives the device of a rank.
        timeout_s: seconds that a collective, or sending a task, may take.

    Raises:
        WorkerError: a rank did not start; the message has its traceback.
    """

    def __init__(
        self, size: int, make_runner: MakeRunner, device_of: Callable[[int], Device], timeout_s: float
    ) -> None:
        self._folder = tempfile.mkdtemp(prefix="nanovllm-")  # nobody else may enter it
        self._timeout_s = timeout_s
        self._failure: str | None = None
        self._closing = False
        self._processes: list[Any] = []
        self._pipes: list[Any] = []
        self._ranks: ProcessRanks | None = None
        self._joining: threading.Thread | None = None
        self._start_timer = threading.Timer(START_TIMEOUT_S, self._give_up_start)
        self._start_timer.daemon = True
        # Before multiprocessing's own end, which would wait for a worker that hangs.
        self._take_back_close = call_at_exit(self.close)
        context = multiprocessing.get_context("spawn")
        try:
            for rank in range(1, size):
                ours, theirs = context.Pipe()
                _bound_sends(ours, timeout_s)
                arguments = (self._folder, rank, size, device_of(rank), timeout_s, make_runner, theirs)
                process = context.Process(target=_work, args=arguments, daemon=True, name=f"nanovllm rank {rank}")
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
            self._start_timer.start()
            self._await_ready()
            self.ranks = self._joined(size, device_of(0))
            sentinels = [process.sentinel for process in self._processes]
            threading.Thread(target=self._abort_when_one_is_gone, args=(sentinels,), daemon=True).start()
        except BaseException:
            self.abandon()
            raise

    def started(self) -> None:
        """Notes that all ranks have loaded and captured what they need; from now on `timeout_s` holds."""
        self._start_timer.cancel()

    @contextlib.contextmanager
    def dispatch(self, task: StepTask) -> Iterator[None]:
        """Sends a task to the workers; the caller runs it within the `with` block."""
        self.check()
        with without_interrupts():
            try:
                for pipe in self._pipes:
                    pipe.send(task)
                yield
            # Some rank ran what others did not: their next collectives would not match.
            except Exception as error:
                raise self.diagnose(error) from error
            except BaseException as error:
                self._failure = self._failure or f"a step of rank 0 was broken off by {type(error).__name__}"
                raise

    def check(self) -> None:
        """Checks that all workers are running; does not wait.

        Raises:
            WorkerError: one is gone; the message has its traceback, if it sent one.
        """
        pairs = list(zip(self._pipes, self._processes, strict=True))
        if self._failure is None and any(_is_gone(*pair) for pair in pairs):
            # The first failure breaks the others' connections: the earliest traceback is the cause.
            words = [_last_words(rank, *pair) for rank, pair in enumerate(pairs, start=1) if _is_gone(*pair)]
            self._failure = min(words)[1]
        if self._failure is not None:
            raise WorkerError(self._failure)

    def diagnose(self, error: BaseException) -> WorkerError:
        """The cause of an error on this rank: often another rank is gone, whose traceback may take a while."""
        deadline_s = time.monotonic() + LAST_WORDS_S
        while time.monotonic() < deadline_s:
            try:
                self.check()
            except WorkerError as failure:
                return failure
            time.sleep(0.01)
        self._failure = f"rank 0 failed ({type(error).__name__}: {error}), and the others are no longer in step with it"
        return WorkerError(self._failure)

    def close(self) -> None:
        """Ends all workers; kills those that do not end by themselves, and after a failure all of them."""
        self._take_back_close()
        self._closing = True
        self._start_timer.cancel()
        deadline_s = time.monotonic() + (CLOSE_TIMEOUT_S if self._failure is None else 0.0)
        try:
            for pipe in self._pipes:
                if self._failure is None:
                    _bound_sends(pipe, CLOSE_TIMEOUT_S)
                    with contextlib.suppress(OSError):
                        pipe.send(None)
                pipe.close()
            for process in self._processes:
                process.join(max(deadline_s - time.monotonic(), 0.0))
        finally:
            for process in self._processes:
                process.kill()
                process.join()
            self._pipes, self._processes = [], []
            if self._failure is not None and self._ranks is not None:
                self._ranks.abort()
            if self._joining is not None:
                # Joined before the files that the thread polls are removed: it would wait for them, and wake up in
                # an interpreter that is shutting down, which aborts the process.
                self._joining.join(CLOSE_TIMEOUT_S)
            shutil.rmtree(self._folder, ignore_errors=True)

    def abandon(self) -> None:
        """Kills all workers and destroys this rank's process group; no graph may hold a collective of it."""
        self._failure = self._failure or "the engine has given up"
        self.close()
        if self._ranks is not None:
            self._ranks.close()

    def _joined(self, size: int, device: Device) -> ProcessRanks:
        """Connects rank 0 to the workers, in a thread, so that a worker that fails meanwhile is noticed."""
        failed: list[Exception] = []

        def join() -> None:
            try:
                self._ranks = ProcessRanks(self._folder, 0, size, device, self._timeout_s)
                if not self._closing:
                    self._ranks.connect()
            except Exception as error:  # noqa: BLE001 - it is raised where it was asked for
                failed.append(error)

        self._joining = thread = threading.Thread(target=join, daemon=True)
        thread.start()
        while thread.is_alive():
            try:
                self.check()
            except WorkerError:
                # It may have failed after both had connected: what it cannot load, rank 0 refuses by name.
                thread.join(CONNECTED_S)
                if thread.is_alive():
                    raise
            thread.join(0.01)
        for error in failed:
            raise self.diagnose(error) from error
        assert self._ranks is not None, "it has not failed"
        return self._ranks

    def _give_up_start(self) -> None:
        self._failure = f"not all ranks have started within {START_TIMEOUT_S:.0f} s"
        for process in self._processes:
            process.kill()

    def _abort_when_one_is_gone(self, sentinels: list[int]) -> None:
        multiprocessing.connection.wait(sentinels)
        if not self._closing:
            self.ranks.abort()

    def _await_ready(self) -> None:
        for rank, (pipe, process) in enumerate(zip(self._pipes, self._processes, strict=True), start=1):
            multiprocessing.connection.wait([pipe, process.sentinel])
            if _received(pipe) != READY:
                _, how = _last_words(rank, pipe, process)
                raise WorkerError(
                    self._failure
                    or f"{how} before it could start, for the reason that it printed; a script that makes an LLM of "
                    'several ranks does so under `if __name__ == "__main__":`, since each rank imports it'
                )


def _work(
    folder: str,
    rank: int,
    size: int,
    device: Device,
    timeout_s: float,
    make_runner: MakeRunner,
    pipe: multiprocessing.connection.Connection,
) -> None:
    """The main function of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the engine decides what an interrupt ends
    threading.Thread(target=_leave_if_orphaned, args=(folder, None), daemon=True).start()
    if not device.is_cuda and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(num_threads_of(size))
    status = 0
    try:
        pipe.send(READY)
        ranks = ProcessRanks(folder, rank, size, device, timeout_s)
        ranks.connect()
        runner = make_runner(ranks)
        while (task := pipe.recv()) is not None:
            runner.run(task)
        runner.synchronize()  # the others wait for this one's part of what was launched
    except BaseException:  # noqa: BLE001 - whatever it is, the engine tells of it
        status = 1
        with contextlib.suppress(OSError):
            pipe.send((time.monotonic(), traceback.format_exc()))
        _leave_if_orphaned(folder, wait_s=0.1)  # the engine being gone may be the cause
    # Not a normal exit: the interpreter would wait for collectives that will not end.
    os._exit(status)


def _wait(work: Any) -> None:
    """Waits for a collective, unless it runs on the current stream (`work` is None)."""
    if work is not None:
        work.wait()


def _leave_if_orphaned(folder: str, wait_s: float | None) -> None:
    """Ends this process and removes the folder if the engine's process ends within `wait_s`, None for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    parent.join(wait_s)
    if not parent.is_alive():
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)


def _is_gone(pipe: Any, process: Any) -> bool:
    """Whether a worker has ended or is about to: a running worker sends nothing."""
    return pipe.poll() or process.exitcode is not None


def _received(pipe: Any) -> Any:
    """What a worker has sent, None if nothing."""
    try:
        return pipe.recv() if pipe.poll() else None
    except (EOFError, OSError):
        return None


def _last_words(rank: int, pipe: Any, process: Any) -> tuple[float, str]:
    """When a worker failed, and a message with its traceback; a worker that sent none was killed, and comes first."""
    said = _received(pipe)
    process.join(LAST_WORDS_S)
    how = f"rank {rank} is gone (exit status {process.exitcode})"
    return (0.0, how) if said is None else (said[0], f"{how}:\n{said[1]}")


def _bound_sends(pipe: Any, timeout_s: float) -> None:
    """Bounds how long a send may block: a worker that no longer reads is an error."""
    with socket.socket(fileno=os.dup(pipe.fileno())) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", max(int(timeout_s), 1), 0))
