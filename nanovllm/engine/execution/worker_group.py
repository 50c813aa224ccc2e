"""The other ranks of a model, as the first one sees them."""

from __future__ import annotations

import contextlib
from typing import Protocol

from nanovllm.engine.execution.tasks import StepTask


class WorkerGroup(Protocol):
    """The other ranks, which do what this one does."""

    def dispatch(self, task: StepTask) -> contextlib.AbstractContextManager[None]:
        """Tells them of a task, which is run within: all do it, or none of them is of use any more.

        Raises:
            WorkerError: they are not.
        """

    def check(self) -> None:
        """Asks whether all are there.

        Raises:
            WorkerError: one is not.
        """

    def diagnose(self, error: BaseException) -> BaseException:
        """What an error of this rank means, such as that another is gone."""

    def close(self) -> None:
        """Ends them."""


class NoWorkers:
    """The worker group of a model that one rank computes alone."""

    def dispatch(self, task: StepTask) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def check(self) -> None:
        return

    def diagnose(self, error: BaseException) -> BaseException:
        return error

    def close(self) -> None:
        return
