"""The tool that measures what the tests themselves take."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parent.parent / "tools" / "peak_memory.py"
HOLD = "import time; held = bytearray(b'x') * (96 << 20); time.sleep(1)"


def test_a_commands_children_and_orphans_count(tmp_path):
    """One of 96 MiB below the command, and one whose parent has ended."""
    code = f"""
import subprocess, sys
hold = [sys.executable, "-c", {HOLD!r}]
forget = f"import subprocess; subprocess.Popen({{hold!r}})"
subprocess.run([sys.executable, "-c", forget])
subprocess.run(hold)
sys.exit(7)
"""
    command = [sys.executable, str(TOOL), "--interval", "0.05", sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 7, run.stderr
    found = re.search(r"peak (\d+) MiB PSS in (\d+) processes", run.stderr)
    assert found
    assert 192 < int(found[1]) < 192 + 100
    assert int(found[2]) == 3
    # A line shows the first 120 characters of a command: long paths leave less of the command itself, hence the start.
    assert len(re.findall(r" -c import time", run.stderr)) == 2
    assert len(re.findall(r" -c \s*import subprocess", run.stderr)) == 1


def test_a_command_that_is_killed_shows_in_the_status():
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    run = subprocess.run([sys.executable, str(TOOL), sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 128 + 9
