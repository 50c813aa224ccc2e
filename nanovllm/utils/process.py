"""The end of a process."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn


def end_process(status: int) -> NoReturn:
    """Ends this process at once, when all that has to be closed is.

    The interpreter's own end takes 0.1 s with what torch and transformers have loaded, and longer where it frees piece
    by piece what is on a GPU, which the driver takes back anyway.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
