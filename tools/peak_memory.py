"""Runs a command and prints the most memory that it and all processes below it held at one moment, which they were, and
the CPU time that all of them took.

    python tools/peak_memory.py make test

The figure is PSS: a page that several processes share counts once, divided among them. Knows nothing about tests or
engines; needs Linux (`/proc/*/smaps_rollup`). A process whose parent has ended is still counted: the command's orphans
become children of this one.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # include/uapi/linux/prctl.h
MIB = 1 << 20


@dataclass(frozen=True)
class Process:
    pid: int
    depth: int  # below the command, which is 0
    pss_bytes: int
    command_line: str


def list_parents() -> dict[int, int]:
    """Every process's parent, by process id."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
            except OSError:
                continue  # it ended while we looked
            # The name, in brackets, may hold spaces and brackets: what follows the last one is plain.
            parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    return parents


def read_pss_bytes(pid: int) -> int:
    """A process's PSS; 0 for one that has ended, or is about to."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def read_command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def list_below(root: int) -> list[Process]:
    """The processes below `root`, each after its parent."""
    children: dict[int, list[int]] = {}
    for pid, parent in list_parents().items():
        children.setdefault(parent, []).append(pid)
    found: list[Process] = []

    def walk(parent: int, depth: int) -> None:
        for pid in sorted(children.get(parent, [])):
            found.append(Process(pid, depth, read_pss_bytes(pid), read_command_line(pid)))
            walk(pid, depth + 1)

    walk(root, 0)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Peak PSS of a command with all its processes.")
    parser.add_argument("--interval", type=float, default=0.5, help="seconds between two samples (default: 0.5)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run, with its arguments")
    arguments = parser.parse_args()
    if not arguments.command:
        parser.error("a command is needed: python tools/peak_memory.py make test")
    if not Path("/proc/self/smaps_rollup").exists():
        parser.error("this system has no /proc/self/smaps_rollup: Linux 4.14 or later is needed")
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    started = time.monotonic()
    command = subprocess.Popen(arguments.command)
    peak: list[Process] = []
    peak_bytes, peak_at_s, samples = 0, 0.0, 0
    while True:
        try:
            processes = list_below(os.getpid())
            samples += 1
            total = sum(process.pss_bytes for process in processes)
            if total > peak_bytes:
                peak, peak_bytes, peak_at_s = processes, total, time.monotonic() - started
            for orphan in processes:
                if orphan.depth == 0 and orphan.pid != command.pid:
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(orphan.pid, os.WNOHANG)
            command.wait(timeout=arguments.interval)
            break
        except subprocess.TimeoutExpired:
            continue
        except KeyboardInterrupt:
            continue  # the command has had it too, and ends as it sees fit
    elapsed_s = time.monotonic() - started
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = [process for process in peak if process.pss_bytes]
    print(
        f"peak {peak_bytes / MIB:.0f} MiB PSS in {len(peak)} processes, {peak_at_s:.1f} s after the start; "
        f"{elapsed_s:.1f} s in all, {used.ru_utime + used.ru_stime:.1f} s of CPU, {samples} samples",
        file=sys.stderr,
    )
    for process in peak:
        print(
            f"{process.pss_bytes / MIB:8.0f} MiB  {'  ' * process.depth}{process.pid} {process.command_line[:120]}",
            file=sys.stderr,
        )
    return command.returncode if command.returncode >= 0 else 128 - command.returncode


if __name__ == "__main__":
    sys.exit(main())
