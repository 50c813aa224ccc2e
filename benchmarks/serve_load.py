"""The loads of online_load.py over HTTP: latency and throughput as clients of `python -m nanovllm serve` see them.

Starts the server on 127.0.0.1 with the same engine, and `--clients` processes, among which the load is divided. They
stream completions of token ids, of a fixed length. Options, loads and figures are those of online_load.py. Differences:

- Texts are those of a tokenizer in which every token is a word, so that each can have an event, and a moment.
  `events_per_token` is below 1 where the server, or a client, was late and several came as one: then ITL is of the
  gaps between events, while `output_tokens` and TPOT count all tokens.
- `busy_share` is of the time in steps, by the server's own metrics. What only a meter in the engine's process sees
  (`idle_share`, `handoff`, `step_time`) is missing.
- `cpu_us_per_token`: CPU time of the server's process, of the engine's and of all clients, divided by the tokens
  that were streamed. `client_busy_share` is that of the busiest client; near 1 it is the clients that are measured.

`--compare` runs online_load.py with the same options in the same sitting, after the server has ended or before it is
started, and prints the ratios, HTTP to in-process.

At the end the server gets a SIGTERM, and the time until it has ended is measured: with nothing under way, or with
`--sigterm-under-load` while as many streams as `--streams` (32 without) go on, each for as long as the model allows.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.arguments import new_parser
from lib.checkpoint import write_tokenizer
from lib.client_processes import Clients, Running, Told
from lib.http_streams import ANSWERED
from lib.loads import Request, full_length
from lib.online import (
    add_service,
    load_of,
    parse_service_args,
    print_latencies,
    print_served,
    service_options,
    shares_beginnings,
    streams_of,
    summarize,
    trace_of,
    warm_up_load,
    what_is_missing,
    with_hit_rate,
)
from lib.report import QUANTILES, report
from lib.server_process import ServerFailedError, ServerProcess
from nanovllm.errors import ends_with_message
from nanovllm.utils.checkpoint import TOKENIZER_FILES

IN_PROCESS = Path(__file__).parent / "online_load.py"
MAX_OPEN_REQUESTS = 100_000
"""The server is to refuse none: a load in the engine's process is not refused either."""
NUM_STREAMS_AT_THE_END = 32
UNDER_LOAD_S = 0.5
"""For how long all streams go on before the SIGTERM."""
BEGIN_TIMEOUT_S = 300.0
ENDLESS_S = 3600.0
QUANTILE_RATIOS = ("ttft_ms", "tpot_ms", "itl_ms")


@dataclass
class StreamedRequest(Request):
    """A request whose `token_times_s` are those of events, with the number of tokens in these."""

    num_streamed: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_streamed


def body_of(request: Request) -> str:
    """Asks for what the request asks an engine for."""
    length = request.params.max_tokens
    asked = {"prompt": request.prompt, "max_tokens": length, "min_tokens": length, "ignore_eos": True}
    asked |= {"temperature": request.params.temperature}
    return json.dumps(asked | {"stream": True, "stream_options": {"include_usage": True}})


def with_answer(request: Request, answer: dict[str, Any]) -> StreamedRequest:
    """A request of the load, with what came of it."""
    made = StreamedRequest(answer["due_s"], request.prompt, request.params, answer["times_s"])
    made.num_streamed = answer["num_tokens"]
    if answer["outcome"] != ANSWERED:
        made.error = RuntimeError(f"{answer['outcome']}: {answer['message']}")
    elif made.num_streamed != request.params.max_tokens:
        made.error = RuntimeError(f"{made.num_streamed} tokens came of {request.params.max_tokens}")
    return made


def busy_share(before: dict[str, Any], after: dict[str, Any], seconds: float) -> dict[str, float]:
    """Share of the time that each card's steps took, by two readings of /metrics."""
    shares: Counter[str] = Counter()
    for labels, busy_s in after["busy_seconds_total"].items():
        (card,) = re.findall(r'card="([^"]*)"', labels)
        shares[card] += (busy_s - before["busy_seconds_total"].get(labels, 0.0)) / seconds
    return dict(shares)


def num_ended(metrics: dict[str, Any]) -> float:
    """Requests that have ended, by a reading of /metrics."""
    return sum(metrics.get("requests_ended_total", {}).values())


def chunks_between(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """What `online_load.py` says of chunks, by two readings of /metrics."""

    def grown(metric: str, part: str = "") -> float:
        values = (
            (after[metric][labels], before[metric].get(labels, 0.0)) for labels in after[metric] if part in labels
        )
        return sum(now - then for now, then in values)

    prompt_s = sum(grown("busy_seconds_total", f'kind="{kind}"') for kind in ("prefill", "mixed"))
    chunks: dict[str, float] = {
        kind: round(grown("prefill_chunks_total", f'kind="{kind}"')) for kind in ("shared", "single")
    }
    return {**chunks, "wait_share": grown("layer_wait_seconds_total") / max(prompt_s, 1e-9)}


class Service:
    """A server that is ready and warm, and the clients that load it."""

    def __init__(self, args: argparse.Namespace, server: ServerProcess, vocab_size: int) -> None:
        self.args, self._server, self._vocab_size = args, server, vocab_size
        self._clients = Clients(server.port, args.clients)
        self._check(self._serve(warm_up_load(args, vocab_size))[0])

    def measure(self, rate: float) -> dict[str, Any]:
        """Serves the load of a rate, of the trace or of `--streams`; its summary.

        Raises:
            ServerFailedError: no request was answered.
        """
        args = self.args
        load = [] if args.streams is not None else load_of(args, rate, self._vocab_size)
        cpu_before, before = self._server.cpu_s(), self._server.metrics()
        requests, told = self._serve(load) if args.streams is None else self._serve_streams()
        cpu_after, after = self._server.cpu_s(), self._server.metrics()
        errors = self._check(requests)
        summary = summarize(args, requests)
        cpu_s = {name: cpu_after[name] - cpu_before[name] for name in cpu_after} | {"clients": told.cpu_s}
        num_events = sum(len(request.token_times_s) for request in requests if request.error is None)
        return summary | {
            "rate": rate,
            "busy_share": busy_share(before, after, summary["seconds"]),
            "chunks": chunks_between(before, after),
            "prefix_cache": with_hit_rate(self._cache_tokens(before, after)),
            "trace": what_is_missing(trace_of(args)),
            "errors": dict(Counter(errors).most_common(3)),
            "events_per_token": num_events / summary["output_tokens"],
            "cpu_s": cpu_s,
            "cpu_us_per_token": {name: seconds / summary["output_tokens"] * 1e6 for name, seconds in cpu_s.items()},
            "client_busy_share": told.busy_share,
        }

    def stop(self) -> dict[str, Any]:
        """Sends SIGTERM, with streams under way if that is asked for; how the server ended, and what the streams saw.

        Raises:
            ServerFailedError: no stream was under way, or the server did not end.
        """
        running = self._begin_endless() if self.args.sigterm_under_load else None
        sent_at, began = time.time(), time.perf_counter()
        self._server.terminate()
        status = self._server.wait()
        ended: dict[str, Any] = {"seconds": time.perf_counter() - began, "exit_status": status}
        if running is None:
            return ended
        sent_s, answers = sent_at - running.begin_at, self._clients.finish(running).answers
        under_way = [each for each in answers if each["times_s"] and each["times_s"][0] < sent_s < each["ended_s"]]
        if not under_way:
            raise ServerFailedError("no stream was under way at the SIGTERM; raise --max-model-len")
        outcomes = dict(Counter(answer["outcome"] for answer in under_way))
        last_s = max(answer["ended_s"] for answer in under_way) - sent_s
        return ended | {"under_way": len(under_way), "outcomes": outcomes, "last_stream_ended_s": last_s}

    def _begin_endless(self) -> Running:
        """Streams of requests that take all the room there is, with one token for a prompt; when all have decoded some
        time, or the first one has ended."""
        request = Request(0.0, [0], full_length(self.args.max_model_len - 1))
        num_streams = self.args.streams or NUM_STREAMS_AT_THE_END
        ended_before = num_ended(self._server.metrics())
        running = self._clients.begin({"streams": [[body_of(request)]] * num_streams}, duration_s=ENDLESS_S)
        deadline_s = time.monotonic() + BEGIN_TIMEOUT_S
        while True:
            found = self._server.metrics()
            if num_ended(found) > ended_before or found["requests"]['state="decoding"'] >= num_streams:
                break
            if time.monotonic() > deadline_s:
                raise ServerFailedError(f"not all of {num_streams} streams decode within {BEGIN_TIMEOUT_S:g} s")
            time.sleep(0.01)
        time.sleep(UNDER_LOAD_S)
        return running

    def _check(self, requests: Sequence[Request]) -> list[str]:
        """What went wrong; raises ServerFailedError if that is everything."""
        errors = [str(request.error) for request in requests if request.error is not None]
        if errors and len(errors) == len(requests):
            raise ServerFailedError(f"no request was answered; the first one: {errors[0]}\n{self._server.log}")
        return errors

    def _serve(self, load: Sequence[Request]) -> tuple[list[StreamedRequest], Told]:
        timed = [(request.due_s, body_of(request)) for request in load]
        told = self._clients.finish(self._clients.begin({"timed": timed}))
        return [with_answer(load[answer["place"][0]], answer) for answer in told.answers], told

    def _serve_streams(self) -> tuple[list[StreamedRequest], Told]:
        streams = streams_of(self.args, self._vocab_size)
        bodies = [[body_of(request) for request in stream] for stream in streams]
        told = self._clients.finish(self._clients.begin({"streams": bodies}, self.args.duration))
        requests = [streams[stream][turn] for stream, turn in (answer["place"] for answer in told.answers)]
        return [with_answer(request, answer) for request, answer in zip(requests, told.answers, strict=True)], told

    def _cache_tokens(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, int]:
        if not shares_beginnings(self.args):
            return {}
        names = {name: f"prefix_cache_{name}_total" for name in ("queried_tokens", "hit_tokens")}
        return {name: round(after[metric][""] - before[metric][""]) for name, metric in names.items()}


def ratio(one: float, other: float) -> float | None:
    """None where there is nothing to compare with, as the throughput of a load that is due all at once."""
    return one / other if other else None


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def ratios_of(loads: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures of each load over HTTP, divided by those of the same load in the engine's process."""
    found = []
    for load, other in zip(loads, others, strict=True):
        rates = ("tokens_per_s", "saturated_tokens_per_s")
        ratios: dict[str, Any] = {name: ratio(load[name], other[name]) for name in rates}
        for name in QUANTILE_RATIOS:
            ratios[name] = {quantile: ratio(load[name][quantile], other[name][quantile]) for quantile in QUANTILES}
        found.append(ratios)
    return found


def run_in_process(arguments: Sequence[str]) -> list[dict[str, Any]]:
    """The loads of online_load.py with these arguments, whose tables are shown."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "loads.json"
        command = [sys.executable, str(IN_PROCESS), *arguments, "--output", str(output)]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        print("in the engine's process:", *run.stdout.splitlines()[:-1], sep="\n", flush=True)
        loads: list[dict[str, Any]] = json.loads(output.read_text())["loads"]
    return loads


def print_cost(summary: dict[str, Any]) -> None:
    """What it cost the host, and whether that hides something."""
    costs = ", ".join(f"{name} {us:.0f}" for name, us in summary["cpu_us_per_token"].items())
    print(f"CPU us per token     {costs}; the busiest client {summary['client_busy_share']:.0%} busy")
    print(f"events               {summary['events_per_token']:.3f} per token")
    for error, count in summary["errors"].items():
        print(f"failed, {count} times      {error}")


def print_shutdown(ended: dict[str, Any]) -> None:
    seen = "nothing under way"
    if "under_way" in ended:
        outcomes = ", ".join(f"{count} {name}" for name, count in ended["outcomes"].items())
        last = f"the last one after {ended['last_stream_ended_s']:.2f} s"
        seen = f"{ended['under_way']} streams under way: {outcomes}, {last}"
    print(f"SIGTERM              ended after {ended['seconds']:.2f} s with status {ended['exit_status']}, {seen}")


def print_ratios(ratios: dict[str, Any], order: str) -> None:
    print(f"HTTP to in-process, {order}")
    arriving = shown(ratios["saturated_tokens_per_s"])
    print(f"output               {shown(ratios['tokens_per_s'])}, while arriving {arriving}")
    print(f"{'':<8}" + "".join(f"{name:>10}" for name in QUANTILES))
    for name in QUANTILE_RATIOS:
        print(f"{name[:-3].upper():<8}" + "".join(f"{shown(ratios[name][quantile]):>10}" for quantile in QUANTILES))


def add_own(parser: argparse.ArgumentParser) -> None:
    """Adds the options that online_load.py does not have."""
    parser.add_argument("--clients", type=int, default=1, help="processes among which the load is divided")
    parser.add_argument(
        "--compare",
        nargs="?",
        const="after",
        choices=("after", "before"),
        help="serve the same load in an engine's process, after the server (if not given) or before it",
    )
    parser.add_argument("--shutdown-timeout", type=float, default=10.0, help="seconds that the server may drain")
    parser.add_argument("--sigterm-under-load", action="store_true", help="the SIGTERM comes while streams go on")


def read_options() -> tuple[argparse.Namespace, list[str]]:
    """The options, and those of them that online_load.py has too, as they were given."""
    parser = new_parser(__doc__)
    add_service(parser, ("single", "pd", "elastic"))
    add_own(parser)
    args = parse_service_args(parser)
    if args.clients < 1:
        parser.error(f"--clients {args.clients}: at least one")
    if args.model and not (Path(args.model) / "config.json").is_file():
        parser.error(f"--model {args.model} is not the folder of a checkpoint")
    own = new_parser(None)
    add_own(own)
    return args, own.parse_known_args()[1]


def make_words(model: Path, folder: Path) -> int:
    """Links to a checkpoint's files, beside a tokenizer of words; the size of its vocabulary."""
    for file in model.iterdir():
        if file.name not in TOKENIZER_FILES:
            (folder / file.name).symlink_to(file.resolve())
    vocab_size: int = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    write_tokenizer(folder, vocab_size)
    return vocab_size


def serve_loads(args: argparse.Namespace) -> dict[str, Any]:
    """Starts the server, has it serve all loads, and ends it."""
    options = service_options(args)
    limits = ["--max-queued-requests", str(MAX_OPEN_REQUESTS), "--shutdown-timeout", str(args.shutdown_timeout)]
    with tempfile.TemporaryDirectory() as folder:
        vocab_size = make_words(Path(options.pop("model")), Path(folder))
        return _serve_loads(args, ServerProcess(folder, options, limits), vocab_size)


def _serve_loads(args: argparse.Namespace, starting: ServerProcess, vocab_size: int) -> dict[str, Any]:
    with starting as server:
        print(f"ready                {server.start_to_ready_s:.1f} s after its start", flush=True)
        service = Service(args, server, vocab_size)
        loads = []
        for rate in args.rate:
            loads.append(service.measure(rate))
            print_served(args, loads[-1])
            print_cost(loads[-1])
            print_latencies(loads[-1])
        ended = service.stop()
        print_shutdown(ended)
        return {"start_to_ready_s": server.start_to_ready_s, "loads": loads, "shutdown": ended}


@ends_with_message()
def main() -> None:
    args, shared = read_options()
    most_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))  # each request has a connection
    others = run_in_process(shared) if args.compare == "before" else []
    result = serve_loads(args)
    if args.compare == "after":
        others = run_in_process(shared)
    if args.compare:
        order = f"the latter {args.compare} the former"
        result |= {"in_process": others, "order": order, "ratios": ratios_of(result["loads"], others)}
        for ratios in result["ratios"]:
            print_ratios(ratios, order)
    options = {name: value for name, value in vars(args).items() if name != "rate"}
    report("serve_load", {**options, **result}, args.output)


if __name__ == "__main__":
    main()
