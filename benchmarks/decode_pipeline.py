"""The decode pipeline against plain decode: ms per step by batch, context, split of the SMs, and cut of the layers.

Each point is one decode step of a model on one device, in a CUDA graph at steady clocks, with random KV of its own for
every request; plain and pipelined steps take turns of a third of a second in one run. What reads the KV is on the
attention lane; a cut says what else is. Of each point the best is shown beside plain decode, `decode_pipeline="auto"`
as it runs in an engine (the mean of its steps, what it tries now and then included), and a bound: the KV read once and
the weights once for each micro-batch, at the streaming bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

from lib import inside
from lib.arguments import add_device, add_model, add_pool, model_options, new_parser, sm_split
from lib.ceilings import head_parameters, kv_bytes_per_token, weight_bytes
from lib.report import report
from nanovllm.config import EngineConfig
from nanovllm.engine.builder import runner_spec
from nanovllm.engine.execution.cuda_graph import EagerSteps, StepGraphs, StepOutput
from nanovllm.engine.execution.decode_paths import DecodePaths
from nanovllm.engine.execution.runner_spec import PipelineOptions
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.observability.pipeline_statistics import LaneTimes
from nanovllm.engine.scheduling.pipeline_plan import Arrangement, Cut, Split
from nanovllm.utils.checkpoint import checkpoint_folder, read_json
from nanovllm.utils.device import Event, Stopwatch, resolve_device

NUM_REPLAYS = 10
"""Steps before contexts begin anew."""
NUM_TURNS = 3
WARM_S = 0.15
"""So long the GPU's clocks take, more or less, to become those of what it now runs."""
TIMED_S = 0.2
STEPS_AHEAD = 2
"""As an engine launches them."""


def make_runner(args: argparse.Namespace) -> ModelRunner:
    """A decode runner that chooses for itself, its KV random."""
    options = model_options(args)
    folder = checkpoint_folder(options.pop("model"))
    longest = max(*args.contexts, args.grow[2] if args.grow else 0) + 2 * NUM_REPLAYS
    most_requests = max(*args.batches, args.grow[0] if args.grow else 0)
    config = EngineConfig(
        model=str(folder),
        max_model_len=longest,
        max_num_seqs=most_requests,
        num_kvcache_blocks=args.num_kvcache_blocks,
        **options,
    )
    device = resolve_device(args.device)
    spec = runner_spec(config, folder, read_json(folder, "config.json") or {}, device)
    pipeline = PipelineOptions(adaptive=True)
    runner = ModelRunner(spec, device, is_decode_runner=True, max_prefill_tokens=64, pipeline=pipeline)
    with inside.on_stream(runner):
        runner.kv_pool.normal_()
    return runner


def time_turn(runner: ModelRunner, batch: int, context: int, run: Callable[[int], object]) -> float:
    """Seconds per step, each of which `run` launches with its context; launched ahead, once the GPU's clocks are those
    of such steps."""
    num_steps, timed_s, started = 0, 0.0, time.perf_counter()
    while time.perf_counter() - started < WARM_S + TIMED_S or not num_steps:
        runner.decode.rows.fill_with_dummies(batch, context)  # each step moves on by a token
        stopwatch = Stopwatch(runner.device)
        for step in range(NUM_REPLAYS):
            run(context + step)
        stopwatch.stop()
        runner.synchronize(copies=False)
        if time.perf_counter() - started > WARM_S:
            num_steps += NUM_REPLAYS
            timed_s += stopwatch.seconds()
    return timed_s / num_steps


def time_in_turns(
    runner: ModelRunner, batch: int, context: int, ways: dict[Any, Callable[[int], object]]
) -> dict[Any, float]:
    """Seconds per step by each way, which take turns, in another order each time; the mean of the turns."""
    times = dict.fromkeys(ways, 0.0)
    with inside.on_stream(runner):
        for turn in range(NUM_TURNS):
            names = list(ways)
            for name in names[turn:] + names[:turn]:
                times[name] += time_turn(runner, batch, context, ways[name]) / NUM_TURNS
    return times


def replays_of(steps: dict[Any, StepGraphs | EagerSteps], batch: int) -> dict[Any, Callable[[int], object]]:
    def replay_of(of_way: StepGraphs | EagerSteps) -> Callable[[int], object]:
        return lambda context: of_way.replay(batch)

    return {way: replay_of(of_way) for way, of_way in steps.items()}


def auto_of(paths: DecodePaths, batch: int) -> Callable[[int], object]:
    return lambda context: paths.replay(batch, context)


def lanes_of(output: StepOutput) -> LaneTimes:
    """When the lanes of a step were busy that has just run."""
    assert output.lane_moments is not None, "an arrangement is of lanes"
    return output.lane_moments.times(output.lane_moments.moments.cpu().numpy())


def time_growing(
    runner: ModelRunner, paths: DecodePaths, grow: list[int], arrangements: list[Arrangement]
) -> dict[str, float]:
    """Seconds in which a batch's contexts grow: by `auto`, plain, and by each arrangement; the best of two rounds."""
    batch, first, last = grow
    with inside.on_stream(runner):
        steps: dict[Any, StepGraphs | EagerSteps]
        steps = {str(one or "plain"): inside.make_steps(paths, [batch], one) for one in (None, *arrangements)}
        runs = {"auto": auto_of(paths, batch), **replays_of(steps, batch)}
        times: dict[str, float] = {}
        time_turn(runner, batch, first, auto_of(paths, batch))  # to warm up
        for name in [*runs] * 2:
            runner.decode.rows.fill_with_dummies(batch, first)
            launched: collections.deque[Event] = collections.deque()
            stopwatch = Stopwatch(runner.device)
            for context in range(first, last):
                runs[name](context)
                launched.append(runner.device.record_event())
                if len(launched) > STEPS_AHEAD:
                    launched.popleft().synchronize()
            stopwatch.stop()
            runner.synchronize(copies=False)
            times[name] = min(stopwatch.seconds(), times.get(name, math.inf))
    return times


def best_arrangements(rows: list[dict[str, Any]], batch: int) -> list[Arrangement]:
    """Those that were best with some contexts of a batch that was swept, of the default number of micro-batches."""
    bests = [min(row["points"], key=lambda point: point["s"]) for row in rows if row["batch"] == batch]
    return sorted({Arrangement(best["split"], Cut[best["cut"]]) for best in bests}, key=str)


def bound_s(runner: ModelRunner, batch: int, context: int, bandwidth: float, num_micro_batches: int) -> float:
    """KV read once, layers' weights once per micro-batch, the output head once."""
    spec = runner.spec
    kv_bytes = batch * context * kv_bytes_per_token(spec)
    head_bytes = head_parameters(spec.model_config) * spec.dtype.itemsize
    layer_bytes = weight_bytes(spec, batch / num_micro_batches) - head_bytes
    return float((kv_bytes + head_bytes + num_micro_batches * layer_bytes) / bandwidth)


def sweep(runner: ModelRunner, args: argparse.Namespace, bandwidth: float) -> list[dict[str, Any]]:
    rows = []
    paths = runner.decode.paths
    if paths.pipeline is None:
        raise SystemExit(f"no decode pipeline on {runner.device}: {'; '.join(paths.counters.fallbacks)}")
    default_parts = paths.pipeline.num_micro_batches
    splits: list[Split] = args.splits if runner.device.is_cuda else [(0, 0)]
    print(f"{'batch':>6}{'context':>9}{'plain ms':>10}{'best ms':>9}{'gain':>7}{'auto':>7}  best; auto; bound ms")
    for batch, context in itertools.product(args.batches, args.contexts):
        if batch * (context + 2 * NUM_REPLAYS) > runner.num_kv_blocks * runner.block_size:
            print(f"{batch:6}{context:9}  does not fit into the pool")
            continue
        ways = [*itertools.product(args.micro_batches, splits, args.cuts)]
        steps: dict[Any, StepGraphs | EagerSteps] = {}
        with inside.on_stream(runner):
            steps["plain"] = inside.make_steps(paths, [batch], None)
            for parts, split, cut in ways:
                paths.pipeline.num_micro_batches = parts
                steps[parts, split, cut] = inside.make_steps(paths, [batch], Arrangement(split, cut))
            paths.pipeline.num_micro_batches = default_parts
        times = time_in_turns(runner, batch, context, {"auto": auto_of(paths, batch), **replays_of(steps, batch)})
        points = []
        for way in ways:
            with inside.on_stream(runner):
                lanes = lanes_of(steps[way].replay(batch))
            point = {"split": way[1], "cut": way[2].name, "parts": way[0], "s": times[way]}
            points.append({**point, "attention_s": lanes.attention_s, "ffn_s": lanes.ffn_s})
        plain_s, auto_s, chosen = times["plain"], times["auto"], paths.current
        best = min(points, key=lambda point: point["s"])
        bound = bound_s(runner, batch, context, bandwidth, best["parts"])
        auto = {"chosen": str(chosen or "plain"), "s": auto_s}
        rows.append(
            {"batch": batch, "context": context, "plain_s": plain_s, "bound_s": bound, "auto": auto, "points": points}
        )
        name = f"{best['split'][0]}:{best['split'][1]} {best['cut']} x{best['parts']}"
        print(
            f"{batch:6}{context:9}{plain_s * 1e3:10.2f}{best['s'] * 1e3:9.2f}{plain_s / best['s']:7.3f}"
            f"{plain_s / auto_s:7.3f}  {name}; {auto['chosen']}; {bound * 1e3:.2f}"
        )
    return rows


def main() -> None:
    parser = new_parser(__doc__)
    add_model(parser, "qwen3-8b")
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 512, 768, 1024])
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 384, 512, 1024])
    parser.add_argument("--splits", type=sm_split, nargs="+", default=[(28, 104), (32, 100), (36, 96), (64, 68)])
    cuts = [Cut.GEMMS, Cut.REST]
    parser.add_argument("--cuts", type=Cut.__getitem__, nargs="+", default=cuts, help="of STAGES, GEMMS and REST")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[2])
    parser.add_argument(
        "--grow",
        type=int,
        nargs=3,
        metavar=("BATCH", "FROM", "TO"),
        help="also a batch of those swept whose contexts grow",
    )
    add_device(parser)
    add_pool(parser)
    args = parser.parse_args()
    if args.grow and args.grow[0] not in args.batches:
        parser.error(f"--grow is of a batch that is swept, which {args.grow[0]} is not; add it to --batches")
    runner = make_runner(args)
    bandwidth = 1e10
    if runner.device.is_cuda:
        from lib.streaming import streaming_bandwidth  # needs triton

        bandwidth = streaming_bandwidth()
    rows = sweep(runner, args, bandwidth)
    grown: dict[str, float] = {}
    if args.grow:
        arrangements = best_arrangements(rows, args.grow[0])
        grown = time_growing(runner, runner.decode.paths, args.grow, arrangements)
        print(f"{args.grow[0]} requests, contexts from {args.grow[1]} to {args.grow[2]}, seconds: ", end="")
        print(", ".join(f"{name} {seconds:.3f}" for name, seconds in grown.items()))
    result = {"model_shape": args.model or args.model_shape, "bytes_per_s": bandwidth, "rows": rows, "grown_s": grown}
    report("decode_pipeline", result, args.output)


if __name__ == "__main__":
    main()
