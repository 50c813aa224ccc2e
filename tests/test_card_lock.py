"""Which tests of cards run at a time, in several processes."""

from __future__ import annotations

import contextlib
import fcntl
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import conftest
from tests.card_lock import lock_folder

HOLD = """
import sys
from pathlib import Path
from types import SimpleNamespace
from tests.card_lock import cards_locked

with cards_locked(Path(sys.argv[1]), alone=sys.argv[2] == "alone"):
    print("holds", flush=True)
    sys.stdin.readline()
"""


class Holder:
    """A process that takes the lock and holds it until it ends."""

    def __init__(self, folder: Path, how: str) -> None:
        self._holds = threading.Event()
        self._process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder), how],
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() == "holds":
            self._holds.set()

    def holds(self, timeout_s: float = 120.0) -> bool:
        return self._holds.wait(timeout_s)

    def let_go(self) -> None:
        self._process.communicate("\n")

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._reader.join()


@pytest.fixture
def holder(tmp_path):
    with contextlib.ExitStack() as started:

        def start(how: str) -> Holder:
            holder = Holder(tmp_path, how)
            started.callback(holder.kill)
            return holder

        yield start


def wait_until_one_waits(folder: Path) -> None:
    deadline_s = time.monotonic() + 120
    with open(folder / "entrance", "w") as entrance:
        while time.monotonic() < deadline_s:
            try:
                fcntl.flock(entrance, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            fcntl.flock(entrance, fcntl.LOCK_UN)
            time.sleep(0.01)
    raise AssertionError("nobody waits")


def test_who_needs_cards_alone_has_them_alone_and_is_not_overtaken(tmp_path, holder):
    first, second = holder("together"), holder("together")
    assert first.holds()
    assert second.holds()
    alone = holder("alone")
    wait_until_one_waits(tmp_path)
    late = holder("together")
    first.let_go()
    assert not alone.holds(0.3)
    assert not late.holds(0.0)
    second.let_go()
    assert alone.holds()
    assert not late.holds(0.3)
    alone.kill()  # one that crashes keeps nothing
    assert late.holds()


def test_all_processes_of_a_user_find_the_same_lock():
    command = [sys.executable, "-c", "from tests.card_lock import lock_folder; print(lock_folder())"]
    run = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(lock_folder())
    assert lock_folder().is_dir()


def is_free(folder: Path, how: int) -> bool:
    with open(folder / "cards", "w") as cards:
        try:
            fcntl.flock(cards, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.mark.parametrize(
    ("marks", "to_share", "to_have_alone"),
    [((), True, True), (("gpu",), True, False), (("two_gpu",), True, False), (("gpu", "whole_card"), False, False)],
)
def test_a_tests_marks_say_how_it_takes_the_cards(tmp_path, monkeypatch, marks, to_share, to_have_alone):
    monkeypatch.setattr(conftest, "num_gpus", lambda: 2)
    monkeypatch.setattr(conftest, "lock_folder", lambda: tmp_path)
    item = SimpleNamespace(get_closest_marker=lambda name: name if name in marks else None)
    running = conftest.pytest_runtest_protocol(item)
    next(running)
    assert (is_free(tmp_path, fcntl.LOCK_SH), is_free(tmp_path, fcntl.LOCK_EX)) == (to_share, to_have_alone)
    with pytest.raises(StopIteration):
        running.send(True)
    assert is_free(tmp_path, fcntl.LOCK_EX)
