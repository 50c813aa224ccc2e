"""One card's process and the controller's end of it: how each of them ends, and what is made of it. No model."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import itertools
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from nanovllm import ClusterError, ConfigError, HandoffError
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.scheduling.card import Card
from nanovllm.engine.scheduling.decode_batch import NO_DECODE_ROWS
from nanovllm.utils import process
from nanovllm.utils.process import await_end

pytestmark = pytest.mark.skipif(importlib.util.find_spec("zmq") is None, reason="needs pyzmq")
if importlib.util.find_spec("zmq") is not None:
    from nanovllm.engine.distributed import card_client, card_local, remote_card
    from nanovllm.engine.distributed.card_client import CardClient, CardSockets
    from nanovllm.engine.distributed.card_local import LocalStarter
    from nanovllm.engine.distributed.card_messages import CardFailed, Geometry, Ready, Start
    from nanovllm.engine.distributed.cluster import check_blocks
    from nanovllm.engine.distributed.kv_nixl import KVAgent
    from nanovllm.engine.distributed.remote_card import RemoteDevice, RemoteRunner

FAILING = (
    f"import sys; sys.path[:] = {sys.path!r}\n"
    "from nanovllm.engine.distributed import card_process\n"
    "from nanovllm.errors import ConfigError\n"
    "def fail(messages, progress, device_index):\n"
    "    raise ConfigError('no such card')\n"
    "card_process._serve = fail\n"
    "card_process.LAST_MESSAGE_MS = 60_000\n"
    "card_process.main()\n"
)
"""A card that cannot be made."""


@pytest.fixture
def sockets() -> Iterator[CardSockets]:
    made = CardSockets()
    yield made
    made.close()


@pytest.fixture
def runs(monkeypatch) -> Callable[[str], None]:
    """Has cards' processes run other code."""

    def run(code: str) -> None:
        monkeypatch.setattr(card_local, "_command_line", lambda arguments: [sys.executable, "-c", code])

    return run


def make_client(sockets: CardSockets) -> CardClient:
    return CardClient(
        "card 0",
        "card 0 of start 1",
        Start("model", {}, "cpu", 0, "card 0 of start 1", False),
        sockets,
        LocalStarter("cpu", 1),
    )


def make_runner(sockets: CardSockets) -> RemoteRunner:
    return RemoteRunner(
        RemoteDevice("cpu", 0, "card 0"), None, "model", {}, sockets, LocalStarter("cpu", 1), itertools.count(1), 60.0
    )


def wait_until(holds: Callable[[], bool], timeout_s: float = 240.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(2e-3)


def test_the_end_of_a_process_is_seen_through_any_descriptor(sockets, runs):
    """Through one that `select` cannot take, too."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], 2048), limits[1]))
    with contextlib.ExitStack() as opened:
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        for _ in range(1100):
            opened.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        runs("raise SystemExit(3)")
        client = make_client(sockets)
        assert client._process._link.fileno() > 1023
        wait_until(client.is_gone)
        client.close()


def test_a_process_that_fails_says_why_and_ends_by_itself(sockets, runs):
    runs(FAILING)
    client, heard = make_client(sockets), []
    wait_until(lambda: bool(heard) or bool(heard.extend(client.receive()) or heard))
    (words,) = heard
    assert isinstance(words, CardFailed)
    assert words.failure.kind == "ConfigError"
    wait_until(client.is_reaped)
    assert "with exit status 1" in client.how_it_ended()
    client.close()


def test_last_messages_that_come_after_the_end_are_heard(sockets, runs, monkeypatch):
    """What the process has said may be on its way when its end is seen."""
    monkeypatch.setattr(card_client, "LAST_MESSAGES_S", 60.0)
    runs("raise SystemExit(1)")
    runner = make_runner(sockets)
    client, late = runner._client, remote_card.CardFailed(remote_card.Failure("ConfigError", "no such card"))
    wait_until(client.is_gone)
    runner.poll()
    assert not runner.is_lost, "it waits for last messages"
    monkeypatch.setattr(client, "has_messages", lambda: True)
    monkeypatch.setattr(client, "receive", lambda: [late])
    with pytest.raises(ConfigError, match="no such card"):
        runner.check_start()
    runner.close_workers()


def test_a_process_that_does_not_end_is_killed(sockets, runs, monkeypatch):
    monkeypatch.setattr(card_local, "CLOSE_TIMEOUT_S", 0.2)
    runs("import time; time.sleep(100)")
    client = make_client(sockets)
    client.close()
    assert client.is_reaped()
    client.close()


def test_a_process_that_cannot_be_killed_is_not_waited_for(caplog):
    def wait(timeout_s: float) -> None:
        raise subprocess.TimeoutExpired("card", timeout_s)

    killed = []
    await_end(SimpleNamespace(wait=wait, kill=lambda: killed.append(True), pid=17), "the process of card 0", 1.0)
    assert killed
    assert "the process of card 0 (process 17) was killed and does not end" in caplog.text


def test_starts_that_fail_are_counted_and_put_off(sockets, runs, monkeypatch):
    """A process may end at once, or the system not start it. The pauses double."""
    monkeypatch.setattr(remote_card, "FIRST_PAUSE_S", 1.0)
    runs("raise SystemExit(3)")
    started_s, runner = time.monotonic(), make_runner(sockets)
    for program, pause_s in (("/no/such/program", 0.0), (sys.executable, 1.0)):
        wait_until(lambda: runner.poll() or runner.is_lost)
        assert started_s + pause_s <= runner._restart_at_s <= time.monotonic() + pause_s
        runner.note_loss()
        wait_until(lambda: runner.may_restart)
        assert time.monotonic() >= runner._restart_at_s
        monkeypatch.setattr(
            card_local, "_command_line", lambda arguments, program=program: [program, "-c", "raise SystemExit"]
        )
        started_s = time.monotonic()
        runner.restart()
        if program != sys.executable:
            assert "a process for card 0 cannot be started: " in runner.reason
    assert not runner.is_out
    wait_until(lambda: runner.poll() or runner.is_lost)
    assert runner.is_out
    assert started_s + 2.0 <= runner._restart_at_s <= time.monotonic() + 2.0, "twice the pause before"
    runner.close_workers()


STUCK = (
    f"import sys; sys.path[:] = {sys.path!r}\n"
    "import time\n"
    "from nanovllm.engine.distributed import card_process\n"
    "def hang(messages, progress, device_index):\n"
    "    progress.turned()\n"
    "    time.sleep(100)\n"
    "card_process._serve = hang\n"
    "card_process.main()\n"
)
"""A card whose main thread begins a turn that does not end."""


def test_a_card_that_runs_and_stands_still_is_lost(sockets, runs):
    """No step of it is under way that would be late: it may be stuck in a library."""
    runs(STUCK)
    runner = make_runner(sockets)
    runner.spec = SimpleNamespace(step_timeout_s=0.5)
    wait_until(lambda: runner.poll() or runner._client.stalled_s > 0)
    assert not runner.is_lost, "until it is up, it may take its time"
    runner.state = remote_card.CardState.UP
    wait_until(lambda: runner.poll() or runner.is_lost)
    assert "its process runs, and has stood still for " in runner.reason
    runner.close_workers()


def test_a_card_ends_when_its_controller_is_gone_from_the_network(sockets, runs, monkeypatch):
    """The end of the connection is enough: whoever started the card may still be there."""
    runs(STUCK)
    monkeypatch.setattr(LocalStarter, "controller_timeout_s", 1.0)
    client = make_client(sockets)
    wait_until(lambda: client.is_gone() or client.silence_s == 0.0)
    wait_until(lambda: bool(client._messages.poll(100)))
    client._heartbeats.close()
    wait_until(client.is_reaped)
    assert "with exit status 0" in client.how_it_ended()
    client.close()


def geometry(num_blocks: int, block_bytes: int) -> Geometry:
    return Geometry(num_blocks, 16, block_bytes, 64, 64, 8, 8, [], [])


def test_cards_of_unlike_blocks_are_refused():
    cards = [SimpleNamespace(device=f"card {index}", geometry=geometry(10 + index, 512)) for index in range(3)]
    check_blocks(cards)  # the pools may be of different sizes
    cards[2].geometry = geometry(10, 1024)
    with pytest.raises(ClusterError, match=r"card 0 has blocks of 16 tokens in 512 bytes, card 2 has .* 1024 bytes"):
        check_blocks(cards)


@pytest.mark.parametrize("other", [(10, 1024), (11, 512)])
def test_a_card_that_comes_back_with_another_pool_is_refused(sockets, runs, other):
    runs("import time; time.sleep(100)")
    runner = make_runner(sockets)
    runner._geometry = geometry(10, 512)
    with pytest.raises(ClusterError, match=r"card 0 had 10 blocks of 16 tokens in 512 bytes, and has "):
        runner._came_up(Ready(geometry(*other), 1, "host", "name", "cpu:0", {}, b"", 0, 0))
    assert not runner.is_up
    runner.give_up("the test ends")
    runner.close_workers()


def make_agent(**calls) -> KVAgent:
    agent = object.__new__(KVAgent)
    agent._agent = SimpleNamespace(get_xfer_descs=lambda rows, mem_type: rows, **calls)
    agent._peers, agent._block_bytes, agent._memory = {"card 1": (0, 0)}, 512, "DRAM"
    agent.pool_address = agent.pool_device = 0
    return agent


def test_a_notification_that_is_no_number_is_ignored(caplog):
    agent = make_agent(get_new_notifs=lambda: {"card 1": [b"7", b"\xffnonsense", b"", b"8"]})
    assert list(agent.arrived()) == [7, 8]
    assert "card 1 notifies of b'\\xffnonsense'" in caplog.text


def test_a_push_that_cannot_begin_gives_its_handle_back():
    def fail(handle: str) -> None:
        raise OSError("unreachable")

    released = []
    agent = make_agent(initialize_xfer=lambda *_: "handle", transfer=fail, release_xfer_handle=released.append)
    with pytest.raises(HandoffError, match="unreachable"):
        agent.push(1, "card 1", np.zeros((2, 1), dtype=np.int64))
    assert released == ["handle"]


def test_streamed_rows_are_kept_for_each_card():
    """Two cards that take turns do not have them made anew in each step."""
    outputs, cards = OutputProcessor(None, None), [Card(name, name, None, 16) for name in ("card 0", "card 1")]
    batches = [copy.copy(NO_DECODE_ROWS.batch) for _ in cards]
    made = [outputs._streamed_rows(card, batch) for card, batch in zip(cards, batches, strict=True)]
    assert [outputs._streamed_rows(card, batch) for card, batch in zip(cards, batches, strict=True)] == made
    assert outputs._streamed_rows(cards[0], batches[1]) is not made[0]
    assert len(outputs._streamed) == 2, "the latest batch of each card, and no more"


@pytest.mark.parametrize(("given", "expected"), [({}, "2"), ({"OMP_NUM_THREADS": "3"}, "3")])
def test_cards_of_a_cpu_divide_its_cores(monkeypatch, given, expected):
    """Threads that spin on each other's cores would take fifty times as long; a number that is given is kept."""
    started = []
    monkeypatch.setattr(card_local.subprocess, "Popen", lambda *_, env, **__: started.append(env))
    monkeypatch.setattr(process.os, "sched_getaffinity", lambda _: set(range(9)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    LocalStarter("cpu", 4).start(0, "card 0", b"").hang_up()
    assert started[0]["OMP_NUM_THREADS"] == expected
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    LocalStarter("cuda", 4).start(0, "card 0", b"").hang_up()
    assert "OMP_NUM_THREADS" not in started[1]
