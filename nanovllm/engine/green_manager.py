"""The two lanes of a decode device: streams on SM partitions of it, for one split or several."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nanovllm.engine.scheduling.pipeline_plan import Lane, Split
from nanovllm.errors import ConfigError, GreenContextError
from nanovllm.utils import green_ctx
from nanovllm.utils.device import Device

logger = logging.getLogger(__name__)

DEFAULT_ATTENTION_SM = 32
"""SMs of the attention lane where no split is given."""


@dataclass(frozen=True)
class Lanes:
    """A stream for each lane, and how many SMs it has; on a CPU neither."""

    split: Split
    streams: Mapping[Lane, torch.cuda.Stream | None]


class GreenManager:
    """Owns the SM partitions of one device. Nothing here waits for the device but `close`.

    Args:
        device: whose SMs are split; a CPU has lanes without streams, in which the order of a plan can be tried.
        attention_sm, ffn_sm: the split to begin with; None takes what the other leaves, or a default.
        enable_rebalance: whether `rebalance` may be called.

    Raises:
        ConfigError: the counts exceed the GPU.
        GreenContextError: the driver cannot split its SMs so.
    """

    def __init__(
        self, device: Device, attention_sm: int | None, ffn_sm: int | None, enable_rebalance: bool = False
    ) -> None:
        self.device = device
        self.num_sms = green_ctx.count_sms(device.index) if device.is_cuda else 0
        self._enable_rebalance = enable_rebalance
        self._held: dict[Split, tuple[Lanes, list[green_ctx.Partition]]] = {}
        self._num_rebalances = 0
        self.split = self._checked(*self._completed(attention_sm, ffn_sm))

    def allocate(self, split: Split | None = None) -> Lanes:
        """The lanes of a split, by default of the current one; made when first asked for, and kept.

        Raises:
            GreenContextError: the driver refuses, or grants other counts; names the nearest that it grants.
        """
        split = self.split if split is None else self._checked(*split)
        if split not in self._held:
            self._held[split] = self._make(split)
        return self._held[split][0]

    def rebalance(self, attention_sm: int, ffn_sm: int) -> Lanes:
        """Makes another split the current one; the lanes of those before stay until `close`.

        There are not many splits, and the driver (580) does not give all memory of a destroyed partition back: 4 MiB of
        each stay taken. So none is destroyed to be made again.

        Raises:
            GreenContextError: as `allocate`; the split before stays the current one.
        """
        assert self._enable_rebalance, "this manager was made with enable_rebalance=False"
        lanes = self.allocate((attention_sm, ffn_sm))
        self.split = lanes.split
        self._num_rebalances += 1
        return lanes

    def stats(self) -> dict[str, int]:
        """SMs of the device, of each lane and of none, splits held and rebalances so far."""
        attention_sm, ffn_sm = self.split
        return {
            "num_sms": self.num_sms,
            "attention_sm": attention_sm,
            "ffn_sm": ffn_sm,
            "idle_sm": self.num_sms - attention_sm - ffn_sm if self.num_sms else 0,
            "splits_held": len(self._held),
            "rebalances": self._num_rebalances,
        }

    def close(self) -> None:
        """Waits for the device and gives all partitions back."""
        if self._held and self.device.is_cuda:
            torch.cuda.synchronize(self.device.index)
        while self._held:
            _, (_, partitions) = self._held.popitem()
            green_ctx.destroy(partitions)

    def _completed(self, attention_sm: int | None, ffn_sm: int | None) -> Split:
        if not self.num_sms:
            return attention_sm or 0, ffn_sm or 0
        if self.num_sms <= DEFAULT_ATTENTION_SM and attention_sm is None and ffn_sm is None:
            raise GreenContextError(f"{self.device} has {self.num_sms} SMs, few to split; give decode_attention_sm")
        if attention_sm is None:
            attention_sm = DEFAULT_ATTENTION_SM if ffn_sm is None else max(self.num_sms - ffn_sm, 1)
        return attention_sm, max(self.num_sms - attention_sm, 1) if ffn_sm is None else ffn_sm

    def _checked(self, attention_sm: int, ffn_sm: int) -> Split:
        if self.num_sms and attention_sm + ffn_sm > self.num_sms:
            raise ConfigError(
                f"{attention_sm} SMs for attention and {ffn_sm} for the FFN are more than the {self.num_sms} of "
                f"{self.device}; lower decode_attention_sm or decode_ffn_sm"
            )
        return attention_sm, ffn_sm

    def _make(self, split: Split) -> tuple[Lanes, list[green_ctx.Partition]]:
        if not self.device.is_cuda:
            return Lanes(split, dict.fromkeys(Lane)), []
        with self.device.current():
            torch.cuda.current_stream()  # a split needs the primary context
            partitions = green_ctx.split_device_green_ctx_by_sm_count(self.device.index, split)
        granted = tuple(partition.num_sms for partition in partitions)
        if granted != split:
            green_ctx.destroy(partitions)
            raise GreenContextError(
                f"{self.device} was asked for {split[0]} and {split[1]} SMs and grants {granted[0]} and {granted[1]}; "
                "pass these, or None"
            )
        if sum(granted) < self.num_sms:
            logger.warning("%s: %d of %d SMs are idle", self.device, self.num_sms - sum(granted), self.num_sms)
        streams = {
            lane: torch.cuda.ExternalStream(partition.stream, device=self.device.torch_device)
            for lane, partition in zip(Lane, partitions, strict=True)
        }
        return Lanes(split, streams), partitions
