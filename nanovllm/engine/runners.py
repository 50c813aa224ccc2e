"""The runners of all cards, and what an error means for them."""

from __future__ import annotations

from collections import abc

from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduling.card import Card
from nanovllm.errors import DeviceError, WorkerError


class Runners:
    """One runner for each card.

    Args:
        by_card: in the order in which cards are given work.
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
        """What an error of work on the devices means if one of them will never run anything again."""
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
        """Raises DeviceError or WorkerError if an error means that nothing will run any more."""
        lost = self.lost_device(error)
        if lost is not None:
            raise lost from error
