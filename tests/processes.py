"""What the system says of a process, for the tests of processes that end, stop or sleep."""

from __future__ import annotations

from pathlib import Path


def process_state(pid: int) -> str | None:
    """One letter: `T` of a stopped process, `Z` of one that has ended; None of one that is gone."""
    try:
        return _fields(pid)[0]
    except OSError:
        return None


def cpu_ticks(pid: int) -> int:
    """The CPU time that a process has used, in ticks of the system's clock."""
    fields = _fields(pid)
    return int(fields[11]) + int(fields[12])


def _fields(pid: int) -> list[str]:
    """Those of /proc/PID/stat behind the program's name, which may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
