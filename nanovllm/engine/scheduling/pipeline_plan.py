"""The decode pipeline as data: which pieces of a layer run on which lane, in which order, and what they wait for.

A layer is five pieces, `project_qkv`, `store_kv`, `attend`, `project_out` and `feed_forward`. Two lanes take turns with
micro-batches: while one attends for a micro-batch, the other runs the GEMMs of another. No torch here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

PIECES = ("project_qkv", "store_kv", "attend", "project_out", "feed_forward")


class Lane(Enum):
    ATTENTION = "attention"
    FFN = "ffn"


class Cut(Enum):
    """How the pieces of a layer are divided between the lanes: the value lists those that the attention lane runs."""

    STAGES = ("project_qkv", "store_kv", "attend", "project_out")
    """The attention stage on one lane, the FFN stage on the other: one change of lanes per stage."""
    GEMMS = ("store_kv", "attend")
    """All GEMMs on the FFN lane; the attention lane works with KV."""
    REST = ("attend",)
    """All but attention on the FFN lane; the attention lane only reads KV."""

    def lane_of(self, piece: str) -> Lane:
        return Lane.ATTENTION if piece in self.value else Lane.FFN


Split = tuple[int, int]
"""SMs for attention and for the FFN."""


@dataclass(frozen=True)
class Arrangement:
    """How a decode step is arranged on two lanes; on a CPU a split has no SMs."""

    split: Split
    cut: Cut

    def __str__(self) -> str:
        return f"{self.split[0]}:{self.split[1]} {self.cut.name}"

    @classmethod
    def parse(cls, text: str) -> Arrangement:
        """The arrangement with this `str`."""
        split, cut = text.split(" ")
        attention_sm, ffn_sm = map(int, split.split(":"))
        return cls((attention_sm, ffn_sm), Cut[cut])


@dataclass(frozen=True)
class PlanStep:
    """Pieces, each of a layer, that one lane runs for one micro-batch without changing lanes.

    Attributes:
        lane: the lane that runs the step.
        pieces: (layer, piece) in order.
        micro_batch: index of the micro-batch.
        wait_for: steps of the other lane, by their index in the plan, that must have ended.
    """

    lane: Lane
    pieces: tuple[tuple[int, str], ...]
    micro_batch: int
    wait_for: tuple[int, ...]

    @property
    def named_pieces(self) -> str:
        return ", ".join(f"{piece}({layer})" for layer, piece in self.pieces)

    def __str__(self) -> str:
        waits = f" after {', '.join(map(str, self.wait_for))}" if self.wait_for else ""
        return f"{self.lane.value:<10} micro-batch {self.micro_batch}: {self.named_pieces}{waits}"


def make_plan(num_layers: int, num_micro_batches: int, cut: Cut) -> list[PlanStep]:
    """All layers of a decode step, layer by layer and micro-batch by micro-batch.

    Within a lane steps run in the order of the plan. A step waits for the one before it of its micro-batch, which ran
    on the other lane, and for nothing else.
    """
    runs = _runs(num_layers, cut)
    plan: list[PlanStep] = []
    last_of: dict[int, int] = {}
    for lane, pieces in runs:
        for micro_batch in range(num_micro_batches):
            before = last_of.get(micro_batch)
            last_of[micro_batch] = len(plan)
            plan.append(PlanStep(lane, pieces, micro_batch, () if before is None else (before,)))
    return plan


def check_plan(plan: Sequence[PlanStep], num_layers: int, num_micro_batches: int) -> None:
    """Asserts that every piece of every layer runs once for each micro-batch, in order, without deadlock.

    Lanes run their steps in the order of the plan, so there is no deadlock if every step waits only for earlier ones.
    """
    expected = [(layer, piece) for layer in range(num_layers) for piece in PIECES]
    for micro_batch in range(num_micro_batches):
        of_it = [index for index, step in enumerate(plan) if step.micro_batch == micro_batch]
        pieces = [piece for index in of_it for piece in plan[index].pieces]
        assert pieces == expected, f"micro-batch {micro_batch} runs {pieces}"
        for before, index in itertools.pairwise(of_it):
            same_lane = plan[before].lane is plan[index].lane
            assert same_lane or before in plan[index].wait_for, f"step {index} does not wait for step {before}"
    for index, step in enumerate(plan):
        assert all(earlier < index for earlier in step.wait_for), f"step {index} waits for a later one: {step}"


def draw(plan: Sequence[PlanStep], num_columns: int = 12) -> str:
    """The first steps of both lanes, a row for each lane and a column for each turn, if all steps took equally long."""
    free_at = dict.fromkeys(Lane, 0)
    begins: list[int] = []
    for step in plan:
        begin = max([free_at[step.lane], *(begins[earlier] + 1 for earlier in step.wait_for)])
        begins.append(begin)
        free_at[step.lane] = begin + 1
    lines = []
    for lane in Lane:
        cells = ["·" * 5] * num_columns
        for begin, step in zip(begins, plan, strict=True):
            if step.lane is lane and begin < num_columns:
                cells[begin] = f"{chr(ord('A') + step.micro_batch)}{step.pieces[0][0]}".center(5)
        lines.append(f"{lane.value:<10}|" + "|".join(cells) + "|")
    return "\n".join(lines)


def _runs(num_layers: int, cut: Cut) -> list[tuple[Lane, tuple[tuple[int, str], ...]]]:
    """The pieces of all layers, grouped into runs on one lane."""
    runs: list[tuple[Lane, tuple[tuple[int, str], ...]]] = []
    for layer in range(num_layers):
        for piece in PIECES:
            lane = cut.lane_of(piece)
            if runs and runs[-1][0] is lane:
                runs[-1] = (lane, (*runs[-1][1], (layer, piece)))
            else:
                runs.append((lane, ((layer, piece),)))
    return runs
