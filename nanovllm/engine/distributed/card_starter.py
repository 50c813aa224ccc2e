"""The interface to what starts the cards' processes: this host, or Ray on any host."""

from __future__ import annotations

from typing import Protocol


class CardProcess(Protocol):
    """A process that was started for a card. Nothing here waits, but for `close`."""

    def has_ended(self) -> bool:
        """Whether it is known to have ended."""

    def is_reaped(self) -> bool:
        """Whether it, having ended, has left nothing behind on its device."""

    def was_killed(self) -> bool:
        """Whether it, having ended, cannot have said why."""

    def how_it_ended(self) -> str:
        """How it has ended, in words."""

    def kill(self) -> None:
        """Ends it, also if it is stopped or hangs."""

    def hang_up(self) -> None:
        """Tells it to end."""

    def close(self) -> None:
        """Ends it and waits for it, but not for ever. A second call does nothing."""


class CardStarter(Protocol):
    """Starts the processes of a cluster's cards.

    Attributes:
        kind: of the cards' devices: `cuda` or `cpu`.
        address: of this host, where the cards reach their controller.
        controller_timeout_s: seconds after which a card that does not hear its controller ends by itself; 0 where the
            end of the controller reaches it by other ways.
    """

    kind: str
    address: str
    controller_timeout_s: float

    def name_of(self, index: int) -> str:
        """The name of a card in logs and metrics."""

    def start(self, index: int, card: str, contact: bytes) -> CardProcess:
        """Starts a process for the card of this index, and hands over what it needs to reach the controller.

        Raises:
            ClusterError: it cannot be started.
        """

    def close(self) -> None:
        """Gives back what was reserved for the cards, whose processes have ended."""
