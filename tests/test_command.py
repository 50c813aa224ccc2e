"""Commands: every option of the engine is one of `serve`, and what is wrong is told in a line."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nanovllm import ConfigError, __main__
from nanovllm.config import EngineConfig
from nanovllm.entrypoints.engine_options import add_engine_options, descriptions, engine_options

ROOT = Path(__file__).parent.parent


@pytest.fixture
def parser():
    made = argparse.ArgumentParser()
    add_engine_options(made)
    return made


def run(monkeypatch, *arguments):
    """What the command `nanovllm` ends with."""
    monkeypatch.setattr(sys, "argv", ["nanovllm", *arguments])
    with pytest.raises(SystemExit) as caught:
        sys.exit(__main__.main())
    return caught.value.code


def test_every_option_of_the_engine_is_one_of_the_command(parser):
    values = {"int": "3", "float": "0.5", "str": "text"}
    arguments, expected = [], {}
    for field in dataclasses.fields(EngineConfig):
        kind = str(field.type).partition(" |")[0]
        if field.name != "model":
            flag = field.name.replace("_", "-")
            arguments += [f"--no-{flag}"] if kind == "bool" else [f"--{flag}", values[kind]]
            expected[field.name] = {"bool": False, "int": 3, "float": 0.5, "str": "text"}[kind]
    assert engine_options(parser.parse_args(arguments)) == expected
    assert engine_options(parser.parse_args(["--enforce-eager"])) == {"enforce_eager": True}
    assert engine_options(parser.parse_args([])) == {}


def test_help_is_what_the_config_says(parser):
    shown = " ".join(parser.format_help().split())
    said = descriptions()[("max_num_seqs",)]
    assert f"--max-num-seqs INT {said[0].upper()}{said[1:]} Default: 512." in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/folder"], "model path '/no/such/folder' does not exist"),
        (["/no/such/folder", "--dtype", "float8"], "dtype='float8' is not one of"),
        (["/no/such/folder", "--kv-handoff", "copy"], "kv_handoff given without enable_two_gpu_pd=True"),
        (["/no/such/folder", "--host", "300.1.1.1"], "cannot listen at --host 300.1.1.1 --port 0"),
        (["/no/such/folder", "--port", "-1"], "--port -1 is below 0"),
        (["/no/such/folder", "--send-timeout", "-1"], "--send-timeout -1.0 is not a number of seconds up to"),
        (["/no/such/folder", "--send-timeout", "nan"], "--send-timeout nan is not a number of seconds up to"),
        (["/no/such/folder", "--send-timeout", "3e6"], "--send-timeout 3000000.0 is not a number of seconds up to"),
        (["/no/such/folder", "--shutdown-timeout", "nan"], "--shutdown-timeout nan is not a positive number"),
    ],
)
def test_what_is_wrong_with_serve_is_told_in_a_line(monkeypatch, arguments, message):
    pytest.importorskip("zmq", reason="needs the extra `serve`")
    pytest.importorskip("uvicorn", reason="needs the extra `serve`")
    status = run(monkeypatch, "serve", "--port", "0", *arguments)
    assert str(status).startswith("error: ")
    assert message in status
    assert "\n" not in status


def test_options_that_are_no_numbers_or_unknown_are_told_of(monkeypatch, capsys):
    assert run(monkeypatch, "serve", "model", "--max-num-seqs", "many") == 2
    assert "invalid int value: 'many'" in capsys.readouterr().err
    assert run(monkeypatch, "serve", "model", "--max-num-sequences", "5") == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_serve_without_its_packages_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    for name in [name for name in sys.modules if name.startswith("nanovllm.entrypoints.server.")]:
        monkeypatch.delitem(sys.modules, name)
    command = importlib.import_module("nanovllm.entrypoints.server.command")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(ConfigError, match=r"pip install nanovllm\[serve\]"):
        command.run(parser.parse_args(["model", "--port", "0"]))


@pytest.mark.parametrize("script", ["example.py", "benchmarks/online_load.py"])
def test_examples_and_benchmarks_end_with_a_message(script):
    command = [sys.executable, str(ROOT / script), "--model", "/no/such/folder"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: model path '/no/such/folder' does not exist")


def test_connections_send_small_parts_at_once():
    """Else each event of a stream waits for the acknowledgement of the one before it."""
    command = importlib.import_module("nanovllm.entrypoints.server.command")
    with command._listening("127.0.0.1", 0, 0.0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--cluster", "local", "--model", "folder", "--decode-device-id", "1"),
            "--model, --decode-device-id: not with",
        ),
        (("--prefill-cards", "2"), "--prefill-cards: not without --cluster"),
        (("--prefill-device-id", "1"), "two different ids"),
    ],
)
def test_the_doctor_refuses_options_that_it_would_not_use(monkeypatch, capsys, arguments, message):
    assert run(monkeypatch, "doctor", *arguments) == 2
    assert message in capsys.readouterr().err
