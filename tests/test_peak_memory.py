"""The tool that measures what the tests themselves take."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

from tests.processes import cpu_ticks

TOOL = Path(__file__).parent.parent / "tools" / "peak_memory.py"
HOLD = """import sys, time, pathlib
held = bytearray(b'x') * (96 << 20)
folder = pathlib.Path(sys.argv[1])
(folder / sys.argv[2]).touch()
while not (folder / "end").exists(): time.sleep(0.01)
"""


def test_a_commands_children_and_orphans_count(tmp_path):
    """One of 96 MiB below the command, and one whose parent has ended."""
    code = f"""
import subprocess, sys
hold = [sys.executable, "-c", {HOLD!r}, {str(tmp_path)!r}]
forget = f"import subprocess; subprocess.Popen({{[*hold, 'orphan']!r}})"
subprocess.run([sys.executable, "-c", forget])
subprocess.run([*hold, "child"])
sys.exit(7)
"""
    command = [sys.executable, str(TOOL), "--interval", "0.05", sys.executable, "-c", code]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tool:
        try:
            while not all((tmp_path / name).exists() for name in ("orphan", "child")):
                assert tool.poll() is None
                time.sleep(0.01)
            before = cpu_ticks(tool.pid)
            while cpu_ticks(tool.pid) < before + 10:  # which it uses for samples alone
                assert tool.poll() is None
                time.sleep(0.01)
        finally:
            (tmp_path / "end").touch()
        _, said = tool.communicate()
    assert tool.returncode == 7, said
    found = re.search(r"peak (\d+) MiB PSS in (\d+) processes", said)
    assert found
    assert 192 < int(found[1]) < 192 + 100
    assert int(found[2]) == 3
    # A line shows the first 120 characters of a command: long paths leave less of the command itself, hence the start.
    assert len(re.findall(r" -c import sys", said)) == 2
    assert len(re.findall(r" -c \s*import subprocess", said)) == 1


def test_a_command_that_is_killed_shows_in_the_status():
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    run = subprocess.run([sys.executable, str(TOOL), sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 128 + 9
