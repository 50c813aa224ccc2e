"""The other ranks of a model, as the first one sees them."""

from __future__ import annotations

import contextlib
from typing import Protocol

from nanovllm.engine.execution.tasks import StepTask


class WorkerGroup(Protocol):
    """The other ranks, which run the same tasks as rank 0."""

    def dispatch(self, task: StepTask) -> contextlib.AbstractContextManager[None]:
        """Sends a task to the other ranks; the caller runs it within the `with` block.

        Raises:
            WorkerError: a rank is gone, or the task failed on this one: the ranks no longer agree, and are of no use.
        """

    def check(self) -> None:
        """Checks that all ranks are running; does not wait.

        Raises:
            WorkerError: one is gone.
        """

    def diagnose(self, error: BaseException) -> BaseException:
        """The cause of an error on this rank, such as that another rank is gone."""

    def close(self) -> None:
        """Ends the other ranks."""


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
