"""Turns on the GPUs among test processes. Knows nothing about GPUs: a lock on files of the system's temporary folder.

A test that needs the memory or the time of a card to itself takes the lock alone, others that use a GPU take it
together, in whichever process they run: workers of pytest-xdist, or a second pytest.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def lock_folder() -> Path:
    """One for all of this user's test processes."""
    folder = Path(tempfile.gettempdir()) / f"nanovllm-tests-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@contextlib.contextmanager
def cards_locked(folder: Path, *, alone: bool) -> Iterator[None]:
    """Holds the cards, alone or with others that are not; waits for that. A process that ends gives them up."""
    with open(folder / "entrance", "w") as entrance, open(folder / "cards", "w") as cards:
        # Who waits for the cards stands in the entrance: else those that share them would follow one another for ever.
        fcntl.flock(entrance, fcntl.LOCK_EX)
        fcntl.flock(cards, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(entrance, fcntl.LOCK_UN)
        yield
