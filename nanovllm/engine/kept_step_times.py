"""Step times that engines learn, kept on disk from one to the next."""

from __future__ import annotations

from typing import Any

from nanovllm.engine.scheduling import measurement_cache
from nanovllm.engine.scheduling.step_time import StepTimeModel


class KeptStepTimes:
    """The step-time models of an engine and what they hold for.

    Args:
        models: each with its fingerprint.
    """

    def __init__(self, models: list[tuple[StepTimeModel, dict[str, Any]]]) -> None:
        self._models = models

    def restore(self) -> None:
        """Has each model go on from what was kept, if anything was."""
        for model, fingerprint in self._models:
            measurement_cache.load(fingerprint, model.restore)

    def keep(self) -> None:
        """Writes what was learned to disk; if that fails, the next engine learns anew."""
        for model, fingerprint in self._models:
            if model.has_learned:
                measurement_cache.keep(fingerprint, model.state())
