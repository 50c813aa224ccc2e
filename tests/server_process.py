"""A server in a process of its own, for the tests of what it serves; requests by raw sockets."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from nanovllm.demo import DEMO_MODEL_PATH

ROOT = Path(__file__).parent.parent
QUESTIONS = json.loads((Path(DEMO_MODEL_PATH) / "questions.json").read_text(encoding="utf-8"))
ANSWERS = {pair["question"]: pair["answer"] for pair in QUESTIONS}
PRIMES = "list all prime numbers within 100"
OPTIONS = {"device": "cpu", "num_kvcache_blocks": 2000, "max_num_seqs": 128}


class ServerProcess:
    """`python -m nanovllm serve` on a free port of 127.0.0.1."""

    def __init__(self, folder, *arguments):
        command = [sys.executable, "-m", "nanovllm", "serve", DEMO_MODEL_PATH, "--port", "0"]
        for name, value in OPTIONS.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        self.log = folder / "server.log"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *arguments], stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )

    def await_ready(self):
        line = self.process.stdout.readline()
        assert " at http://127.0.0.1:" in line, self.log.read_text()
        self.port = int(line.rsplit(":", 1)[1])
        return self

    @property
    def engine_pid(self):
        pid = self.process.pid
        (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(child)

    def client(self, **options):
        import openai  # the page's tests do without

        given = {"api_key": "none", "max_retries": 0, "timeout": 60, **options}
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", **given)

    def ask(self, method, path, body=None, headers=()):
        """Status, headers and content of one request."""
        return asyncio.run(ask(self.port, method, path, body, headers))

    def stop(self, sig=signal.SIGTERM, within_s=120.0):
        """The exit status."""
        self.process.send_signal(sig)
        return self.wait(within_s)

    def wait(self, within_s=120.0):
        return self.process.wait(within_s)

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def metric(server, pattern, headers=()):
    """The sum of the metrics whose lines begin like this."""
    status, _, text = server.ask("GET", "/metrics", headers=headers)
    assert status == 200, text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(pattern, line))


def head(method, path, length, headers=()):
    lines = [f"{method} {path} HTTP/1.1", "Host: test", f"Content-Length: {length}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def read_head(reader):
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
    return int(lines[0].split()[1]), headers


async def read_parts(reader):
    """The parts of a body that comes in chunks."""
    while size := int(await reader.readline(), 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def ask(port, method, path, body=None, headers=()):
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head(method, path, len(data), headers) + data)
        status, found = await read_head(reader)
        content = await reader.readexactly(int(found.get("content-length", 0)))
        if found.get("transfer-encoding") == "chunked":
            content = b"".join([part async for part in read_parts(reader)])
        return status, found, content.decode()
    finally:
        writer.close()


async def events(port, path, body=None, headers=(), method="POST"):
    """The data of server-sent events, as they come; closing the generator closes the connection."""
    data = b"" if body is None else json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head(method, path, len(data), headers) + data)
        status, _ = await read_head(reader)
        assert status == 200
        async for part in read_parts(reader):
            for event in part.decode().split("\n\n")[:-1]:
                yield event.removeprefix("data: ")
    finally:
        writer.close()
