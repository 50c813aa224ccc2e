"""KV of prompts that crosses between two runners that both prefill and decode: each layer's goes to the other pool
within the step that computes it. Of a prompt that the two compute in turns, the other runner's step waits for it there,
layer by layer.

A flag for each layer, in the memory of the runner that waits, says how far the other one is. Flags are compared with a
number that a step is given, and the numbers of chunks only grow, in the order of their launch.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from nanovllm.engine.execution.layer_push import PushToPool
from nanovllm.kernels import LayerHooks
from nanovllm.utils.device import Device

NUM_REPORTS = 256
"""More than a runner has steps in flight, the parts of a step that failed to launch as a whole included."""


@dataclass(frozen=True)
class WaitReport:
    """How a step has waited for the other runner's layers.

    Attributes:
        missed_layer: the first layer whose KV did not come in time, so that what its chunks computed means nothing;
            None if all came.
        waited_s: seconds of the device.
    """

    missed_layer: int | None = None
    waited_s: float = 0.0


NOTHING_WAITED_FOR = WaitReport()


class LayerArrivals:
    """What has arrived in a runner's pool of the other runner's chunks.

    Args:
        device: of the runner whose pool it is.
        num_layers: of the model.
        limit_s: seconds after which a step goes on without a layer's KV.
    """

    def __init__(self, device: Device, num_layers: int, limit_s: float) -> None:
        self._device = device
        self._limit_s = limit_s
        self.num_layers = num_layers
        where, pins = device.torch_device, device.is_cuda
        self._flags, self._stored_ns, self._arrived_ns = torch.zeros(3, num_layers, dtype=torch.int64, device=where)
        self._missed = torch.zeros(1, dtype=torch.int64, device=where)
        self._reports = torch.zeros(NUM_REPORTS, 2, dtype=torch.int64, device="cpu", pin_memory=pins)
        self._given_up = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=pins)
        self._next_report = 0

    @torch.inference_mode()
    def new_report(self) -> int:
        """The report of a step that is about to be launched."""
        number, self._next_report = self._next_report, (self._next_report + 1) % NUM_REPORTS
        self._reports[number] = 0
        return number

    def report(self, number: int) -> WaitReport:
        """What a step that has ended has reported."""
        missed, waited_ns = self._reports[number].tolist()
        return WaitReport(missed - 1 if missed else None, waited_ns * 1e-9)

    @torch.inference_mode()
    def give_up(self) -> None:
        """Ends all waits within a millisecond, now and later; what their steps compute means nothing."""
        self._given_up[0] = 1

    def raise_flag(self, numbers: torch.Tensor, layer: int) -> None:
        """Says that the layer's KV has arrived; for the other runner, behind its push of the layer."""
        if self._device.is_cuda:
            # Imported here: a machine without GPUs needs no NVRTC.
            from nanovllm.kernels.cuda_layer_flags import raise_flag

            raise_flag(self._flags, numbers, layer)
        elif int(numbers[0]):
            self._flags[layer] = numbers[0]

    def wait(self, numbers: torch.Tensor, layer: int) -> None:
        """Has what a step launches on the current stream wait for a layer's KV."""
        if self._device.is_cuda:
            from nanovllm.kernels.cuda_layer_flags import wait_for_flag

            limit_ms = int(self._limit_s * 1e3)
            wait_for_flag(
                self._flags,
                numbers,
                self._missed,
                self._arrived_ns,
                self._reports,
                self._given_up,
                layer,
                limit_ms,
            )
        elif int(self._flags[layer]) < int(numbers[1]) and not int(self._reports[numbers[2], 0]):
            self._reports[numbers[2], 0] = layer + 1

    def note_stored(self, layer: int) -> None:
        """Notes when the step has stored its own KV of the layer: from then on, a late flag delays it.

        The note is taken behind the push of the layer before: where pushes lag behind layers, less is counted.
        """
        if self._device.is_cuda:
            from nanovllm.kernels.cuda_layer_flags import note_stored

            note_stored(self._stored_ns, layer)

    def report_waits(self, numbers: torch.Tensor) -> None:
        """Completes the step's report, behind its last layer."""
        if self._device.is_cuda:
            from nanovllm.kernels.cuda_layer_flags import report_waits

            report_waits(numbers, self._stored_ns, self._arrived_ns, self._reports)


class LayerExchange:
    """Connects a runner to the other one, with which it exchanges KV.

    Args:
        arrivals: of this runner's pool.
        theirs: of the other one's.
        push: stores this runner's KV in the other pool.
        wait_stream: where flags are waited for, a stream of this runner's device; None on a CPU.
    """

    def __init__(
        self,
        arrivals: LayerArrivals,
        theirs: LayerArrivals,
        push: PushToPool,
        wait_stream: torch.cuda.Stream | None,
    ) -> None:
        self.arrivals = arrivals
        self._theirs = theirs
        self._push = push
        self._wait_stream = wait_stream

    def hooks(self, pushed_blocks: torch.Tensor, numbers: torch.Tensor) -> LayerHooks:
        """What the layers of a step call.

        Args:
            pushed_blocks: parts of blocks as in `block_list`, on the device.
            numbers: [3] int64 on the device: the number of the step's last chunk, that of the other runner's chunk for
                which it waits (0 for none of either), and its report.
        """
        push, layers = self._push.push_by_layer(pushed_blocks), itertools.count()
        arrived: torch.cuda.Event | None = None
        awaited = self._await_first(numbers)

        def after_store(kv_cache: torch.Tensor) -> None:
            nonlocal arrived, awaited
            layer, arrived = next(layers), awaited
            with self._push.behind_store():
                self.arrivals.note_stored(layer)
                # Before the push, too: storing its last token, the other runner clears what follows in the block.
                if arrived is None:
                    self.arrivals.wait(numbers, layer)
                else:
                    torch.cuda.current_stream().wait_event(arrived)
                push(kv_cache)
                self._theirs.raise_flag(numbers, layer)
                if layer + 1 == self.arrivals.num_layers:
                    self.arrivals.report_waits(numbers)
            if arrived is not None and layer + 1 < self.arrivals.num_layers:
                awaited = self._await(numbers, layer + 1)

        def before_attend() -> None:
            if arrived is not None:
                torch.cuda.current_stream().wait_event(arrived)

        return LayerHooks(after_store, before_attend)

    def join(self) -> None:
        """Makes the current stream wait for what was pushed."""
        self._push.join()

    def _await_first(self, numbers: torch.Tensor) -> torch.cuda.Event | None:
        """An event for the first layer's KV; None on a CPU, which waits where the KV is stored.

        Flags are waited for beside the step, each as soon as the one before has come: behind the layer's store even a
        flag that has long come would cost the launch of a kernel. Without a graph a layer's wait is launched with the
        layer before it, so that the first layer need not wait for the launches of all.
        """
        if self._wait_stream is None:
            return None
        self._wait_stream.wait_stream(torch.cuda.current_stream())
        return self._await(numbers, 0)

    def _await(self, numbers: torch.Tensor, layer: int) -> torch.cuda.Event:
        with torch.cuda.stream(self._wait_stream):
            self.arrivals.wait(numbers, layer)
            return torch.cuda.current_stream().record_event()
