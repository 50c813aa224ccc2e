"""Checks in some seconds what a machine can do: packages, GPUs, links, SM partitions, memory, a handoff of KV.

Each check says what it found, whether that is as it should be, and what to do if not. `missing` is what a machine may
do without; `failed` is broken, and makes the exit status 1.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch

from nanovllm import LLM, NanoVLLMError, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.engine.builder import model_memory
from nanovllm.engine.green_manager import GreenManager
from nanovllm.entrypoints.findings import FAILED, MISSING, OK, WARNING, Finding
from nanovllm.kernels import BACKENDS, BackendRequirements, unsupported_reasons
from nanovllm.utils.device import Device, copy_bandwidth, driver_version, peer_access
from nanovllm.version import __version__

GIB = 1024**3
NVLINK_BYTES_PER_S = 200e9
"""Bytes per second between those of PCIe 5 and of NVLink 4."""
PACKAGES = {
    "torch": "pip install torch",
    "transformers": "pip install transformers",
    "triton": "pip install triton; without it the torch backend serves",
    "cuda-bindings": "pip install cuda-python; without it there is no decode pipeline",
    "flash-attn": "not needed; attention_backend='flash_attn' is",
    "prometheus-client": "pip install nanovllm[metrics] to serve metrics",
}
QUESTION = "What is the capital of France?"


def run(found: Iterator[Finding], *, as_json: bool) -> int:
    """Prints all findings as they come; the exit status."""
    logging.getLogger("nanovllm").setLevel(logging.ERROR)  # what it would say is found anyway
    findings = []
    for finding in found:
        findings.append(finding)
        if not as_json:
            _print(finding)
    if as_json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    return int(any(finding.verdict == FAILED for finding in findings))


def examine(model: str | None, prefill_device_id: int, decode_device_id: int) -> Iterator[Finding]:
    """One finding after another, as they are made."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = [Device("cuda", index) for index in (prefill_device_id, decode_device_id)]
    devices = [device for device in wanted if device.index < num_gpus]
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("packages", check_packages),
        ("GPUs", lambda: check_gpus(num_gpus)),
        ("environment", lambda: check_environment(os.environ)),
        ("attention backends", lambda: check_backends("cuda" if devices else "cpu")),
    ]
    if len(devices) == 2 and devices[0] != devices[1]:
        checks.append(("link", lambda: check_link(*devices)))
    else:
        checks.append(("link", lambda: _missing("link", "fewer than two GPUs of those ids", "one card serves alone")))
    checks.append(("green contexts", lambda: check_green_contexts(devices[-1] if devices else None)))
    if model is not None:
        checks.append(("model", lambda: check_model(model, devices)))
    checks.append(("handoff", lambda: check_handoff(len(devices) == 2, prefill_device_id, decode_device_id)))
    for name, check in checks:
        try:
            yield from check()
        except Exception as error:  # noqa: BLE001 - one check that breaks is a finding, and the others go on
            yield Finding(name, FAILED, f"{type(error).__name__}: {error}", "report this with the line above")


def examine_cluster(
    cluster: str, prefill_cards: int = 1, decode_cards: int = 1, device: str = "auto"
) -> Iterator[Finding]:
    """The findings about a cluster, given by options of `LLM`."""
    try:
        from nanovllm.entrypoints import cluster_doctor
    except ImportError as error:
        yield Finding("packages", FAILED, f"{error.name} is not installed", "pip install nanovllm[cluster]")
        return
    yield from cluster_doctor.examine_cluster(cluster, prefill_cards, decode_cards, device)


def check_packages() -> Iterator[Finding]:
    yield Finding("python", OK, f"{platform.python_version()}, nanovllm {__version__}")
    for name, remedy in PACKAGES.items():
        try:
            yield Finding(name, OK, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, MISSING, "not installed", remedy)


def check_gpus(num_gpus: int) -> Iterator[Finding]:
    if not num_gpus:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Finding(
            "GPUs", MISSING, f"none; {built}", "device='cpu' works; for GPUs check nvidia-smi and the torch build"
        )
        return
    yield Finding("CUDA", OK, f"driver {driver_version() or 'unknown'}, torch built for {torch.version.cuda}")
    for index in range(num_gpus):
        about = torch.cuda.get_device_properties(index)
        free, total = Device("cuda", index).memory_info()
        found = f"{about.name}, sm_{about.major}{about.minor}, {about.multi_processor_count} SMs, "
        found += f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
        in_use = free < 0.9 * total
        advice = "other processes hold memory: gpu_memory_utilization counts it as used" if in_use else ""
        yield Finding(f"GPU {index}", WARNING if in_use else OK, found, advice)


def check_environment(environment: os._Environ[str] | dict[str, str]) -> Iterator[Finding]:
    advice: dict[str, Callable[[str], str]] = {
        "CUDA_VISIBLE_DEVICES": lambda value: "" if "," in value else "torch sees at most one GPU",
        "CUDA_DEVICE_MAX_CONNECTIONS": lambda value: (
            "" if int(value) >= 8 else "raise it: lanes would wait for each other"
        ),
        "CUDA_LAUNCH_BLOCKING": lambda value: (
            "" if value == "0" else "unset it: nothing overlaps, and nothing can be captured"
        ),
        "NCCL_DEBUG": lambda value: "",
        "PYTORCH_CUDA_ALLOC_CONF": lambda value: "",
        "PYTORCH_ALLOC_CONF": lambda value: "",
        "TRITON_INTERPRET": lambda value: "" if value == "0" else "unset it: kernels would run on the CPU",
    }
    for name, judge in advice.items():
        value = environment.get(name)
        if value is None:
            continue
        try:
            next_step = judge(value)
        except ValueError:
            next_step = "not a number"
        yield Finding(name, WARNING if next_step else OK, value, next_step)


def check_backends(device_type: str) -> Iterator[Finding]:
    dtype = torch.bfloat16 if device_type == "cuda" else torch.float32
    for name in BACKENDS:
        reasons = unsupported_reasons(name, BackendRequirements(device_type, dtype, 128))
        found = "; ".join(reasons) or f"serves {dtype} on {device_type}"
        yield Finding(f"backend {name}", MISSING if reasons else OK, found)


def check_link(first: Device, second: Device) -> Iterator[Finding]:
    for source, target in ((first, second), (second, first)):
        name = f"link {source} to {target}"
        if not peer_access(source, target):
            advice = "KV crosses through host memory; see nvidia-smi topo -m, and whether the machine is virtualised"
            yield Finding(name, WARNING, "no peer access", advice)
            continue
        bandwidth = copy_bandwidth(source, target)
        is_slow = bandwidth < NVLINK_BYTES_PER_S
        advice = "below NVLink: prompts take longer to cross; see nvidia-smi nvlink --status" if is_slow else ""
        yield Finding(name, WARNING if is_slow else OK, f"peer access, copies at {bandwidth / 1e9:.0f} GB/s", advice)


def check_green_contexts(device: Device | None) -> Iterator[Finding]:
    if device is None:
        yield from _missing("green contexts", "no GPU", "the decode pipeline needs one")
        return
    with device.current():
        torch.zeros(1, device=device.torch_device)  # a primary context
        manager = GreenManager(device, None, None)
        try:
            lanes = manager.allocate()
            found = f"granted {lanes.split[0]} and {lanes.split[1]} of {manager.num_sms} SMs"
            # It needs triton, which a machine without GPUs may lack.
            from nanovllm.kernels.triton_stamps import sms_of_streams

            streams = [stream for stream in lanes.streams.values() if stream is not None]
            for how, captured in (("eagerly", False), ("in a graph", True)):
                used = sms_of_streams(streams, captured=captured)
                shared = used[0] & used[1]
                verdict = FAILED if shared else OK
                advice = "SMs of two partitions are the same: do not use the decode pipeline" if shared else ""
                yield Finding(f"green contexts {how}", verdict, f"{found}, {len(shared)} SMs in both", advice)
        except NanoVLLMError as error:
            yield Finding("green contexts", MISSING, str(error), "decode is plain without them")
        finally:
            manager.close()


def check_model(model: str, devices: list[Device]) -> Iterator[Finding]:
    try:
        weight_bytes, token_bytes = model_memory(model, devices=devices)
    except NanoVLLMError as error:
        yield Finding(
            "model",
            FAILED,
            str(error),
            "pass the folder of a checkpoint of a family that is served, or its name on the hub",
        )
        return
    yield Finding("model", OK, f"{weight_bytes / GIB:.2f} GiB of weights, {token_bytes / 1024:.0f} KiB of KV per token")
    for device in devices:
        free, total = device.memory_info()
        left = int(0.9 * total) - (total - free) - weight_bytes
        fits = left > 1024 * token_bytes
        advice = "" if fits else "free memory on this card, or take a smaller model"
        yield Finding(
            f"model on {device}",
            OK if fits else FAILED,
            f"room for about {max(left, 0) // token_bytes:,} tokens of KV",
            advice,
        )


def check_handoff(on_gpus: bool, prefill_device_id: int, decode_device_id: int) -> Iterator[Finding]:
    """The demo model answers a question on two devices, and each block that crosses is compared by checksum."""
    options = {"prefill_device_id": prefill_device_id, "decode_device_id": decode_device_id} if on_gpus else {}
    device = "cuda" if on_gpus else "cpu"
    with LLM(
        DEMO_MODEL_PATH,
        device=device,
        enable_two_gpu_pd=True,
        card_roles="fixed",  # each prompt's KV crosses
        verify_kv_handoff=True,
        enforce_eager=True,
        max_num_seqs=8,
        num_kvcache_blocks=256,
        **options,
    ) as llm:
        (answer,) = llm.chat([{"role": "user", "content": QUESTION}], SamplingParams(temperature=0), use_tqdm=False)
        blocks = llm.counters.handoff_blocks
    is_right = answer["error"] is None and "Paris" in answer["text"]
    found = f"{blocks} blocks between two {'GPUs' if on_gpus else 'logical CPU devices'}, checksums equal"
    if not is_right:
        found = f"answered {answer['text']!r}, {answer['error']}"
    yield Finding("handoff", OK if is_right else FAILED, found, "" if is_right else "see docs/how-to/two_gpus.md")


def _missing(check: str, found: str, next_step: str) -> Iterator[Finding]:
    yield Finding(check, MISSING, found, next_step)


def _print(finding: Finding) -> None:
    sys.stdout.write(f"{finding.check:<28}{finding.verdict:<9}{finding.found}\n")
    if finding.next_step:
        sys.stdout.write(f"{'':<28}{'':<9}-> {finding.next_step}\n")
    sys.stdout.flush()
