"""Draws docs/img/*.png from benchmarks/results/*.json; needs matplotlib."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "img"
PEERS_SHAPE = "qwen3-0.6b"
PEERS_TOKENS_PER_S = {"nano-vllm": 17_982, "vLLM 0.24": 22_205}
"""Offline, the same workload and kind of machine, in other runs."""


def results(benchmark: str, files: str = "*.json") -> list[dict[str, Any]]:
    """The results of one benchmark, by file name."""
    found = [{"file": path.stem, **json.loads(path.read_text())} for path in sorted(RESULTS.glob(files))]
    return [result for result in found if result["benchmark"] == benchmark]


def where(result: dict[str, Any]) -> str:
    return f"{result.get('gpu', result.get('cpu'))}, commit {result['commit']}"


def save(figure: Any, name: str) -> None:
    IMAGES.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(IMAGES / name, dpi=120)
    plt.close(figure)
    print(f"docs/img/{name}")


def draw_offline() -> None:
    ours = [result for result in results("offline_throughput") if result["model_shape"] == PEERS_SHAPE]
    best = max(ours, key=lambda result: result["tokens_per_s"])
    roofline = best["num_output_tokens"] / best["roofline_s"]
    bars = {**PEERS_TOKENS_PER_S, "nanovllm": best["tokens_per_s"]}
    figure, axes = plt.subplots(figsize=(6, 3.2))
    axes.barh(list(bars), list(bars.values()), color=["#9aa5b1", "#9aa5b1", "#1f77b4"])
    axes.axvline(roofline, color="black", linestyle="--", linewidth=1)
    axes.text(roofline, -0.45, " roofline", fontsize=8)
    axes.set_xlabel("output tokens per second")
    axes.set_title(f"{best['num_requests']} requests, {best['model_shape']}\n{where(best)}", fontsize=9)
    axes.set_xlim(right=roofline * 1.15)
    save(figure, "offline_throughput.png")


def draw_decode_latency() -> None:
    result = max(results("decode_latency"), key=lambda result: len(result["rows"]))
    figure, axes = plt.subplots(figsize=(6, 4))
    for color, context in zip(("#1f77b4", "#d62728"), sorted({row["context"] for row in result["rows"]}), strict=False):
        rows = [row for row in result["rows"] if row["context"] == context]
        batches = [row["batch"] for row in rows]
        axes.plot(batches, [row["step_ms"] for row in rows], "o-", color=color, label=f"context {context}")
        axes.plot(batches, [row["floor_ms"] for row in rows], "--", color=color, label=f"floor, context {context}")
    axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="ms per decode step")
    axes.set_title(f"{result['model_shape']}, {where(result)}", fontsize=9)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    save(figure, "decode_latency.png")


def draw_online() -> None:
    """TTFT and ITL of single loads; of loads at several rates, ITL and goodput against the rate, a line per mode."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6))
    sweeps: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results("online_load"):
        if len(result["loads"]) > 1:
            sweeps.setdefault((result["model_shape"], result["workload"]), []).append(result)
            continue
        (load,) = result["loads"]
        label = f"{result['mode']}, {result['model_shape']}, {result['workload']}, {load['rate']:g}/s"
        if result["mode"] != "pd":
            label += f", chunks of {result['prefill_chunk_tokens']}"
        for axes, name in zip(panels, ("ttft_ms", "itl_ms"), strict=True):
            axes.plot(list(load[name]), list(load[name].values()), "o-", label=label)
    for axes, title in zip(panels, ("TTFT", "ITL"), strict=True):
        axes.set(yscale="log", ylabel="ms")
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3, which="both")
    panels[0].legend(fontsize=7)
    figure.suptitle("; ".join(sorted({where(result) for result in results("online_load")})), fontsize=8)
    save(figure, "online_load.png")
    for (shape, workload), sweep in sweeps.items():
        draw_sweep(shape, workload, sweep)


def draw_sweep(shape: str, workload: str, sweep: list[dict[str, Any]]) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6))
    for result in sweep:
        rates = [load["rate"] for load in result["loads"]]
        panels[0].plot(rates, [load["goodput_per_s"] for load in result["loads"]], "o-", label=result["mode"])
        for axes, name in ((panels[1], "itl_ms"), (panels[2], "ttft_ms")):
            axes.plot(rates, [load[name]["p99"] for load in result["loads"]], "o-", label=result["mode"])
    limits = f"TTFT {sweep[0]['ttft_limit_ms']:g} ms, ITL {sweep[0]['itl_limit_ms']:g} ms"
    panels[0].set(xlabel="requests per second", ylabel=f"good requests per second\n({limits})")
    panels[1].set(xlabel="requests per second", ylabel="ITL p99, ms")
    panels[2].set(xlabel="requests per second", ylabel="TTFT p99, ms")
    panels[1].set_ylim(bottom=0)
    panels[2].set_ylim(bottom=0)
    for axes in panels:
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.suptitle(f"{shape}, {workload}\n{'; '.join(sorted({where(result) for result in sweep}))}", fontsize=9)
    save(figure, f"online_{shape}_{workload}.png")


def draw_two_cards() -> None:
    """Good share and TTFT against the rate, a line for each mode; a row of panels for each load."""
    for result in results("two_cards"):
        steady = [row for row in result["loads"] if "+" not in row["load"]]
        names = list(dict.fromkeys(row["load"].rpartition(":")[0] for row in steady))
        figure, panels = plt.subplots(len(names), 2, figsize=(9, 3.4 * len(names)), squeeze=False)
        for name, (good, ttft) in zip(names, panels, strict=True):
            for mode in result["modes"]:
                rows = [row for row in steady if row["load"].rpartition(":")[0] == name and row["mode"] == mode]
                rows.sort(key=lambda row: float(row["load"].rpartition(":")[2]))
                rates = [float(row["load"].rpartition(":")[2]) for row in rows]
                good.plot(rates, [row["good_share"] for row in rows], "o-", label=mode)
                ttft.plot(rates, [row["ttft_ms"]["p50"] for row in rows], "o-", label=mode)
            limits = f"TTFT {result['ttft_limit_ms']:g} ms, ITL {result['itl_limit_ms']:g} ms"
            good.set(xlabel="requests per second", ylabel=f"share of good requests\n({limits})", ylim=(0, 1.05))
            ttft.set(xlabel="requests per second", ylabel="TTFT p50, ms")
            ttft.set_ylim(bottom=0)
            good.set_title(Path(name).stem, fontsize=9)
            for axes in (good, ttft):
                axes.grid(alpha=0.3)
                axes.legend(fontsize=8)
        figure.suptitle(f"{result['model_shape']}, {where(result)}", fontsize=9)
        save(figure, f"{result['file']}.png")


def draw_handoff() -> None:
    """Bandwidth by bytes of each method that copies; what each method adds to a prompt's prefill, by its length."""
    (result,) = results("handoff")
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6))
    for method in dict.fromkeys(row["method"] for row in result["copies"]):
        rows = [row for row in result["copies"] if row["method"] == method]
        rates = [row["bytes"] / row["seconds"] / 1e9 for row in rows]
        panels[0].plot([row["bytes"] / 2**20 for row in rows], rates, "o-", label=method)
    alone = {row["prompt_len"]: row["prefill_s"] for row in result["exposure"] if row["method"] == "push"}
    for method in dict.fromkeys(row["method"] for row in result["exposure"]):
        rows = [row for row in result["exposure"] if row["method"] == method]
        lengths = [row["prompt_len"] for row in rows]
        exposed = [row["exposed_s"] * 1e3 for row in rows]
        panels[1].plot(lengths, exposed, "o-", label=f"{method}: after the prefill")
        if method == "direct":
            slower = [(row["prefill_s"] - alone[row["prompt_len"]]) * 1e3 for row in rows]
            panels[1].plot(lengths, slower, "o--", label="direct: what the prefill takes longer")
    panels[0].set(xscale="log", xlabel="MiB", ylabel="GB/s")
    panels[1].set(xlabel="tokens of the prompt", ylabel="ms")
    for axes in panels:
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.suptitle(f"{result['model_shape']}, {where(result)}", fontsize=9)
    save(figure, "handoff.png")


def draw_interference() -> None:
    """ITL alone and while prefill is saturated, by mode."""
    figure, axes = plt.subplots(figsize=(6, 3.6))
    found = sorted(results("interference"), key=lambda result: result["mode"])
    for place, result in enumerate(found):
        before, flooded, after = (third["itl_ms"]["p99"] for third in result["thirds"])
        # Contexts grow by as much before the middle third as after it.
        bars = (("alone", (before + after) / 2, "#9aa5b1"), ("while prefill is saturated", flooded, "#1f77b4"))
        for offset, (name, itl, color) in zip((-0.2, 0.2), bars, strict=True):
            axes.bar(place + offset, itl, 0.38, color=color, label=name if place == 0 else None)
            axes.text(place + offset, itl, f"{itl:.1f}", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(found)), [result["mode"] for result in found])
    axes.set_ylabel("ITL p99, ms")
    axes.set_title(
        f"{found[0]['model_shape']}, {found[0]['num_decoding']} requests decoding, {where(found[0])}", fontsize=9
    )
    axes.legend(fontsize=8)
    save(figure, "interference.png")


def draw_pipeline() -> None:
    """The best gain of the decode pipeline by batch and context, a map for each run that had all splits."""
    runs = results("decode_pipeline", "decode_pipeline_qwen3-*.json")
    found = [result for result in runs if len(result["rows"]) > 1]
    figure, maps = plt.subplots(1, len(found), figsize=(5.2 * len(found), 3.6), squeeze=False)
    for axes, result in zip(maps[0], found, strict=True):
        gains = {
            (row["batch"], row["context"]): row["plain_s"] / min(point["s"] for point in row["points"])
            for row in result["rows"]
        }
        batches, contexts = (sorted(set(values)) for values in zip(*gains, strict=True))
        grid = [[gains.get((batch, context), float("nan")) for context in contexts] for batch in batches]
        axes.imshow(grid, cmap="RdBu", vmin=0.6, vmax=1.4, origin="lower", aspect="auto")
        for row, column in ((row, column) for row in range(len(batches)) for column in range(len(contexts))):
            gain = grid[row][column]
            text = "does not fit" if gain != gain else f"{gain:.2f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(contexts)), contexts)
        axes.set_yticks(range(len(batches)), batches)
        axes.set_xlabel("context")
        axes.set_ylabel("batch")
        axes.set_title(f"plain / pipelined step, {result['model_shape']}\n{where(result)}", fontsize=9)
    save(figure, "decode_pipeline.png")


def draw_controller() -> None:
    """Host time for each step by the number of cards, and what each decode card gets of the steps that it could run."""
    found = results("controller")
    if not found:
        return
    figure, (costs, rates) = plt.subplots(1, 2, figsize=(9, 3.6))
    for result in found:
        rows = result["results"]
        cards = [row["cards"] for row in rows]
        label = "lengths of a trace" if result["trace"] else f"{result['num_input']} + {result['num_output']} tokens"
        label += ", elastic cards" if result["card_roles"] == "elastic" else ""
        costs.plot(cards, [row["loop_us_per_step"] for row in rows], "o-", label=label)
        most = 1e3 / result["step_ms"]
        rates.plot(cards, [row["decode_steps_per_s_and_card"] / most for row in rows], "o-", label=label)
    costs.set(xscale="log", ylabel="us of the loop per step", ylim=(0, None))
    rates.set(xscale="log", ylabel="share of the steps that a card could run", ylim=(0, 1.05))
    counts = sorted({row["cards"] for result in found for row in result["results"]})
    for axes in (costs, rates):
        axes.set_xlabel("cards")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(f"one controller, {found[0]['rows']} rows a card, {where(found[0])}", fontsize=9)
    save(figure, "controller.png")


if __name__ == "__main__":
    draw_offline()
    draw_decode_latency()
    draw_online()
    draw_two_cards()
    draw_handoff()
    draw_interference()
    draw_pipeline()
    draw_controller()
