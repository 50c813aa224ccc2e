"""Where files are kept from one process to the next, and how they are written. Knows nothing of what is in them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder(name: str) -> Path:
    """`$XDG_CACHE_HOME/nanovllm/<name>`, by default `~/.cache/nanovllm/<name>`; it need not exist.

    Raises:
        RuntimeError: there is no home directory.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanovllm" / name


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file, and its folder if there is none. Whoever reads it meanwhile sees no file, the old one or the new.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hosts that share the folder may have a process of the same number.
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".tmp")
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise
