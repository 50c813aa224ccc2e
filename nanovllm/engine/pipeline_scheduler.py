"""Executes a plan: the layers of a decode step on two lanes at a time, or one after another.

Embedding, output head and sampling are not part of the plan.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from nanovllm.engine.green_manager import GreenManager
from nanovllm.engine.observability.pipeline_statistics import LaneClock
from nanovllm.engine.scheduling.pipeline_plan import Arrangement, Cut, Lane, PlanStep, check_plan, make_plan
from nanovllm.kernels import AttentionMetadata
from nanovllm.models.decoder import CausalLM, DecoderLayer


@dataclass
class MicroBatch:
    """Some rows of a decode step on their way through the layers; [B, ...] tensors."""

    positions: torch.Tensor
    metadata: AttentionMetadata
    hidden: torch.Tensor | None
    residual: torch.Tensor | None = None
    heads: torch.Tensor | None = None
    """Query, key and value heads after `project_qkv`, query heads after `store_kv`, attended ones after `attend`."""
    kept: dict[Lane, list[torch.Tensor]] = field(default_factory=lambda: {lane: [] for lane in Lane})
    """Tensors that the other lane may still read, by the lane that made them."""

    def run(self, step: PlanStep, layers: Sequence[DecoderLayer], kv_pool: torch.Tensor, num_sms: int | None) -> None:
        """Runs the pieces of a plan step on the current stream, which has `num_sms` SMs and waits for earlier steps."""
        # Tensors of this lane's last step were read by the step of the other lane that this one waits for. Only now may
        # their memory be used again, by what this lane launches next.
        self.kept[step.lane].clear()
        for layer, piece in step.pieces:
            getattr(self, f"_{piece}")(layers[layer], kv_pool[:, layer], num_sms)
        made = (self.hidden, self.residual, self.heads)
        self.kept[step.lane] += [tensor for tensor in made if tensor is not None]

    def _project_qkv(self, layer: DecoderLayer, kv_cache: torch.Tensor, num_sms: int | None) -> None:
        assert self.hidden is not None, "a layer begins with its input"
        self.heads, self.residual = layer.project_qkv(self.hidden, self.residual, num_sms)
        self.hidden = None

    def _store_kv(self, layer: DecoderLayer, kv_cache: torch.Tensor, num_sms: int | None) -> None:
        assert self.heads is not None, "keys and values follow their projection"
        self.heads = layer.store_kv(self.heads, self.positions, kv_cache, self.metadata)

    def _attend(self, layer: DecoderLayer, kv_cache: torch.Tensor, num_sms: int | None) -> None:
        assert self.heads is not None, "attention follows the projection of its heads"
        self.heads = layer.attend(self.heads, kv_cache, self.metadata)

    def _project_out(self, layer: DecoderLayer, kv_cache: torch.Tensor, num_sms: int | None) -> None:
        assert self.heads is not None, "the output projection follows attention"
        self.hidden, self.heads = layer.project_out(self.heads, num_sms), None

    def _feed_forward(self, layer: DecoderLayer, kv_cache: torch.Tensor, num_sms: int | None) -> None:
        assert self.hidden is not None, "the FFN follows the attention stage"
        assert self.residual is not None, "a layer that has begun has a residual"
        self.hidden, self.residual = layer.feed_forward(self.hidden, self.residual, num_sms, self.metadata)


class PipelineScheduler:
    """The decode pipeline of one model on the lanes of one device.

    Args:
        model: whose layers run.
        green_manager: makes the lanes.
        enable_profiling: time all steps of the plan, not only those of some layers; changes no token.
        num_micro_batches: parts of a batch that take turns; no more than it has rows.
        cut: which pieces run on which lane.
        in_order: run the plan on the current stream alone, step by step: the reference for tests of the lanes.
    """

    def __init__(
        self,
        model: CausalLM,
        green_manager: GreenManager,
        enable_profiling: bool = False,
        *,
        num_micro_batches: int = 2,
        cut: Cut = Cut.GEMMS,
        in_order: bool = False,
    ) -> None:
        self.model = model
        self.green_manager = green_manager
        self.num_micro_batches = num_micro_batches
        self.cut = cut
        self.in_order = in_order
        where = green_manager.device.torch_device
        self.clock = LaneClock(where, enable_profiling)
        self._eager_lane = Lane.FFN
        self._plans: dict[tuple[int, Cut], list[PlanStep]] = {}

    def decode_token(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_pool: torch.Tensor,
        metadata: AttentionMetadata,
        arrangement: Arrangement | None = None,
    ) -> torch.Tensor:
        """Runs all layers of one decode step; equal to the model's `forward` with one token of each of B requests.

        Args:
            input_ids, positions: [B] int64.
            kv_pool: [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim].
            metadata: of the step.
            arrangement: the lanes and what runs on them, by default the manager's current split and this cut.

        Returns:
            Hidden states [B, hidden_size] after the final norm.

        Raises:
            GreenContextError: the driver refuses the lanes.
        """
        layers = self.model.model.layers
        lanes = self.green_manager.allocate(None if arrangement is None else arrangement.split)
        num_sms = {lane: sms or None for lane, sms in zip(Lane, lanes.split, strict=True)}
        micro_batches = self._micro_batches(input_ids, positions, metadata, kv_pool[:, 0], num_sms[Lane.ATTENTION])
        plan = self._plan(len(layers), len(micro_batches), self.cut if arrangement is None else arrangement.cut)
        self.clock.begin(plan, len(layers))

        def run(index: int) -> None:
            step = plan[index]
            self.clock.stamp(index, ends=False)
            micro_batches[step.micro_batch].run(step, layers, kv_pool, num_sms[step.lane])
            self.clock.stamp(index, ends=True)

        if self.in_order:
            for index in range(len(plan)):
                run(index)
        elif lanes.streams[Lane.FFN] is None:
            self._eager_lane = Lane.FFN if self._eager_lane is Lane.ATTENTION else Lane.ATTENTION
            _run_on_logical_lanes(plan, self._eager_lane, run)
        else:
            _run_on_streams(plan, lanes.streams, run)
        hidden = torch.cat([micro_batch.hidden for micro_batch in micro_batches])  # type: ignore[misc] # all have one
        residual = torch.cat([micro_batch.residual for micro_batch in micro_batches])  # type: ignore[misc]
        return self.model.model.norm(hidden, residual)[0]

    def _plan(self, num_layers: int, num_micro_batches: int, cut: Cut) -> list[PlanStep]:
        if (num_micro_batches, cut) not in self._plans:
            plan = make_plan(num_layers, num_micro_batches, cut)
            check_plan(plan, num_layers, num_micro_batches)
            self._plans[num_micro_batches, cut] = plan
        return self._plans[num_micro_batches, cut]

    def _micro_batches(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        metadata: AttentionMetadata,
        kv_cache: torch.Tensor,
        num_sms: int | None,
    ) -> list[MicroBatch]:
        """The rows in micro-batches of nearly equal size, each with attention metadata of its own."""
        num_rows = len(input_ids)
        num_parts = min(self.num_micro_batches, num_rows)
        ends = [num_rows * part // num_parts for part in range(num_parts + 1)]
        embedded = self.model.model.embed_tokens(input_ids)
        parts = []
        for first, last in itertools.pairwise(ends):
            rows = slice(first, last)
            of_part = dataclasses.replace(
                metadata,
                slot_mapping=metadata.slot_mapping[rows],
                block_tables=metadata.block_tables[rows],
                context_lens=metadata.context_lens[rows],
                query_starts=metadata.query_starts[: last - first + 1],
                work_split=None,
                num_sms=num_sms,
            )
            backend = self.model.model.layers[0].attention.backend
            split = backend.split_work(of_part, self.model.config.num_attention_heads, kv_cache)
            of_part = dataclasses.replace(of_part, work_split=split)
            parts.append(MicroBatch(positions[rows], of_part, embedded[rows]))
        return parts


def _run_on_streams(
    plan: Sequence[PlanStep], streams: Mapping[Lane, torch.cuda.Stream | None], run: Callable[[int], None]
) -> None:
    """Runs each step on its lane's stream, ordered by events; lanes start and end with the current stream."""
    current = torch.cuda.current_stream()
    done: dict[int, torch.cuda.Event] = {}
    waited_for = {index for step in plan for index in step.wait_for}
    for stream in streams.values():
        assert stream is not None, "lanes of a GPU have streams"
        stream.wait_stream(current)
    try:
        for index, step in enumerate(plan):
            stream = streams[step.lane]
            assert stream is not None, "lanes of a GPU have streams"
            for earlier in step.wait_for:
                stream.wait_event(done[earlier])
            with torch.cuda.stream(stream):
                run(index)
            if index in waited_for:
                done[index] = stream.record_event()
    finally:  # a capture cannot end with lanes that have not joined
        for stream in streams.values():
            assert stream is not None, "lanes of a GPU have streams"
            current.wait_stream(stream)


def _run_on_logical_lanes(plan: Sequence[PlanStep], eager_lane: Lane, run: Callable[[int], None]) -> None:
    """Runs a step of `eager_lane` whenever one need not wait, else one of the other lane.

    Streams may take this order, too. It runs a step that does not wait for all that it needs too early, which shows.
    """
    lanes = sorted(Lane, key=lambda lane: lane is not eager_lane)
    queues = {lane: deque(index for index, step in enumerate(plan) if step.lane is lane) for lane in lanes}
    ended: set[int] = set()
    while any(queues.values()):
        ready = (queue for queue in queues.values() if queue and ended.issuperset(plan[queue[0]].wait_for))
        queue = next(ready, None)
        assert queue is not None, "each lane waits for the other"
        index = queue.popleft()
        run(index)
        ended.add(index)
