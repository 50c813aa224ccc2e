"""Packs steps into tasks: what the host sends to a device, or to another process, for a step. No device."""

from __future__ import annotations

from collections import abc

from nanovllm.engine.execution.cuda_graph import bucket_for
from nanovllm.engine.execution.model_inputs import sampling_arrays
from nanovllm.engine.execution.prefill_layout import PrefillLayout
from nanovllm.engine.execution.prompt_logprobs import prompt_rows
from nanovllm.engine.execution.row_table import DecodeRowTable
from nanovllm.engine.execution.tasks import DecodeTask, PrefillTask, StepTask
from nanovllm.engine.execution.token_counts import count_tokens
from nanovllm.engine.scheduling.decode_batch import DecodeRows
from nanovllm.engine.scheduling.step import PrefillChunk, Step


class TaskPacker:
    """Packs the steps of one device, in the order of their launch.

    Args:
        layout: of the prefill part.
        table: the rows of the decode part; None for a device that does not decode.
        vocab_size: of the model.
        prefill_sizes, mixed_sizes: tokens of the passes that have graphs, ascending, with chunks alone and with rows
            besides; empty where there are no graphs, and nothing is padded.
        new_report: numbers the report of a step that pushes KV to another device of the same roles, or waits for it;
            None where there is none.
    """

    def __init__(
        self,
        layout: PrefillLayout,
        table: DecodeRowTable | None,
        vocab_size: int,
        *,
        prefill_sizes: abc.Sequence[int],
        mixed_sizes: abc.Sequence[int],
        new_report: abc.Callable[[], int] | None = None,
    ) -> None:
        self._layout = layout
        self._table = table
        self._vocab_size = vocab_size
        self._prefill_sizes = prefill_sizes
        self._mixed_sizes = mixed_sizes
        self._new_report = new_report
        self._prepared: tuple[Step, StepTask] | None = None

    def prepare(self, step: Step) -> None:
        """Packs a step ahead of `pack`, which is called for the same step next."""
        self._prepared = step, self._pack(step)

    def pack(self, step: Step) -> StepTask:
        """The task that has a device, and every rank of it, run the step."""
        prepared, self._prepared = self._prepared, None
        return prepared[1] if prepared is not None and prepared[0] is step else self._pack(step)

    def _pack(self, step: Step) -> StepTask:
        decode = self.pack_rows(step.decode) if step.decode else None
        if not step.chunks:
            return StepTask(None, decode)
        sizes = self._mixed_sizes if decode else self._prefill_sizes
        num_tokens = len(step.decode) + step.num_prefill_tokens
        size = bucket_for(sizes, num_tokens) if sizes else num_tokens
        samples_in_graph = step.chunks_sample_in_graph
        prefill = self.pack_chunks(step.chunks, size, num_rows=len(step.decode), samples_in_graph=samples_in_graph)
        return StepTask(prefill, decode)

    def launched(self, step: Step) -> None:
        """Notes that the task of a step was launched: the device keeps the tokens that its chunks sample."""
        if self._table is not None:
            self._table.expect_tokens(chunk.lease for chunk in step.sampling_chunks)

    def forget(self) -> None:
        """Notes that the rows on the device are in an unknown state: every request is sent again."""
        self._prepared = None
        if self._table is not None:
            self._table.forget()

    def pack_chunks(
        self, chunks: abc.Sequence[PrefillChunk], size: int, *, num_rows: int, samples_in_graph: bool
    ) -> PrefillTask:
        """The prefill part.

        Args:
            chunks: what to run.
            size: number of tokens to pad the pass to.
            num_rows: decode rows whose tokens come before the chunks' in the pass.
            samples_in_graph: whether sampling needs no more than temperature, seed and output index.
        """
        last = [(chunk.seq, chunk.end - chunk.seq.num_prompt_tokens) for chunk in chunks if chunk.is_last]
        sampling = None if samples_in_graph or not last else sampling_arrays(last, self._vocab_size)
        counted = None if sampling is None else count_tokens((index, seq) for index, (seq, _) in enumerate(last))
        number, report = max(chunk.number for chunk in chunks), None
        assert self._new_report is not None or not number, "KV is exchanged by runners that are connected"
        if self._new_report is not None and any(chunk.number or chunk.handoff for chunk in chunks):
            report = self._new_report()
        step_numbers = (number, max(chunk.waits_for for chunk in chunks), report or 0)
        packed = self._layout.pack(chunks, size, num_rows=num_rows, step_numbers=step_numbers)
        return PrefillTask(packed, size, len(last), sampling, counted, prompt_rows(chunks, num_rows), report)

    def pack_rows(self, rows: DecodeRows) -> DecodeTask:
        """The decode part."""
        assert self._table is not None, "this device was made for prefill, it does not decode"
        sampling = None
        if not rows.samples_in_graph:
            sampling = sampling_arrays([(row.seq, row.output_index) for row in rows], self._vocab_size)
        return DecodeTask(self._table.changes(rows), len(rows), rows.num_tokens / len(rows), sampling)
