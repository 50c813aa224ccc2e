"""The runner of each card, in this process or another, and whether an error means that a device is lost."""

from __future__ import annotations

from collections import abc

from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduling.card import Card
from nanovllm.errors import DeviceError, WorkerError


class Runners:
    """One runner for each card.

    Args:
        by_card: runners, in the order in which cards are given work; those of a cluster are `RemoteRunner`, which have
            what the loop needs of one.
    """

    def __init__(self, by_card: abc.Mapping[Card, ModelRunner]) -> None:
        self._by_card = by_card

    def __getitem__(self, card: Card) -> ModelRunner:
        return self._by_card[card]

    def __iter__(self) -> abc.Iterator[ModelRunner]:
        return iter(self._by_card.values())

    def check_workers(self) -> None:
        """Raises WorkerError if another rank is gone."""
        for runner in self:
            runner.check_workers()

    def lost_device(self, error: BaseException) -> DeviceError | WorkerError | None:
        """The error to end all requests with if `error` means that a device is lost, else None."""
        if isinstance(error, (DeviceError, WorkerError)):
            return error
        if not isinstance(error, Exception):
            return None
        for runner in self:
            reason = runner.device.lost_reason()
            if reason is not None:
                return DeviceError(f"{runner.device} is lost: {reason}")
        return None

    def raise_if_lost(self, error: Exception) -> None:
        """Raises DeviceError or WorkerError if `error` means that a device is lost."""
        lost = self.lost_device(error)
        if lost is not None:
            raise lost from error
