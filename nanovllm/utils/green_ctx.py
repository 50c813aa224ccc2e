"""SM partitions of one GPU (CUDA green contexts): streams whose kernels run on some of its SMs. Driver calls only.

A driver grants SMs in units: on Hopper (driver 580) counts are rounded up to a multiple of 8, 12 to 16 and 100 to 104.
The SMs left over can be a partition, too, whatever their count: 132 SMs split into 32 and 100, 48 and 84, 64 and 68. So
    only one of two counts needs to be such a multiple if both together
are all SMs. Partitions of one split share no SM.

    with torch.cuda.device(0):
        attention, ffn = split_device_green_ctx_by_sm_count(0, [48, 84])
        print(attention.num_sms, ffn.num_sms)                                # 48 84
        stream = torch.cuda.ExternalStream(attention.stream, device=0)
        with torch.cuda.stream(stream):
            ...                                                              # kernels here run on those 48 SMs
        destroy([attention, ffn])                                            # once nothing runs on them

A partition's context must not be made current; its stream is all that is used. Kernels of a CUDA graph that was
captured over such streams stay on their partition when it is replayed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.errors import GreenContextError


@dataclass(frozen=True)
class Partition:
    """Some SMs of a GPU, until it is destroyed.

    Attributes:
        num_sms: number of SMs, as granted.
        stream: handle of a non-blocking stream on them.
    """

    num_sms: int
    stream: int
    _context: Any


def count_sms(device_index: int) -> int:
    """How many SMs the GPU has.

    Raises:
        GreenContextError: the driver or cuda-python does not support SM partitions, or the call failed.
    """
    driver = _driver()
    return int(_sm_resource(driver, device_index)[1].sm.smCount)


def split_device_green_ctx_by_sm_count(device_index: int, sm_counts: Sequence[int]) -> list[Partition]:
    """Disjoint partitions of at least the given numbers of SMs; SMs left over stay idle.

    The device must have been used before, so that it has a primary context. The granted counts may be larger than those
    asked for, up to the next multiple of the unit that the driver grants.

    Args:
        device_index: as CUDA counts devices in this process.
        sm_counts: one for each partition.

    Raises:
        GreenContextError: the counts exceed the device, or the driver refuses; nothing is left behind.
    """
    driver = _driver()
    device, all_sms = _sm_resource(driver, device_index)
    asked = f"{list(sm_counts)} SMs of GPU {device_index}"
    resources = _best_split(driver, all_sms, sm_counts, asked)
    partitions: list[Partition] = []
    try:
        for resource in resources:
            partitions.append(_partition(driver, device, resource))
    except BaseException:
        destroy(partitions)
        raise
    return partitions


def destroy(partitions: Sequence[Partition]) -> None:
    """Gives partitions back, which nothing may be running on or be captured over any more.

    Raises:
        GreenContextError: the driver refuses.
    """
    if not partitions:
        return
    driver = _driver()
    for partition in partitions:
        _checked(driver, "cuStreamDestroy", driver.cuStreamDestroy(partition.stream), f"stream {partition.stream:#x}")
        _checked(driver, "cuGreenCtxDestroy", driver.cuGreenCtxDestroy(partition._context), "a partition")


def _best_split(driver: Any, all_sms: Any, sm_counts: Sequence[int], asked: str) -> list[Any]:
    """Resources with exactly these SM counts if the driver grants them, else with at least these.

    The last resource may have any count, so counts that are not granted in the given order may be in the reverse one.
    """
    found: list[list[Any]] = []
    errors: list[GreenContextError] = []
    for order in (1, -1):
        try:
            resources = _split(driver, all_sms, sm_counts[::order], asked)[::order]
        except GreenContextError as error:
            errors.append(error)
            continue
        if [resource.sm.smCount for resource in resources] == list(sm_counts):
            return resources
        found.append(resources)
    if not found:
        raise errors[0]
    return found[0]


def _split(driver: Any, left: Any, sm_counts: Sequence[int], asked: str) -> list[Any]:
    """Resources of at least these SM counts, split off one after the other."""
    resources: list[Any] = []
    for count in sm_counts:
        if left is None or count > left.sm.smCount:
            free = 0 if left is None else left.sm.smCount
            granted = [resource.sm.smCount for resource in resources]
            raise GreenContextError(f"{asked} were asked for; after {granted} only {free} are left: pass at most these")
        if count == left.sm.smCount:
            resources.append(left)
            left = None
            continue
        call = "cuDevSmResourceSplitByCount"
        groups, _, rest = _checked(driver, call, driver.cuDevSmResourceSplitByCount(1, left, 0, count), asked)
        resources.append(groups[0])
        left = rest if rest.sm.smCount else None
    return resources


def _partition(driver: Any, device: Any, resource: Any) -> Partition:
    about = f"{resource.sm.smCount} SMs"
    description = _checked(driver, "cuDevResourceGenerateDesc", driver.cuDevResourceGenerateDesc([resource], 1), about)
    flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
    context = _checked(driver, "cuGreenCtxCreate", driver.cuGreenCtxCreate(description, device, flags), about)
    try:
        non_blocking = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        created = driver.cuGreenCtxStreamCreate(context, non_blocking, 0)
        stream = _checked(driver, "cuGreenCtxStreamCreate", created, about)
    except BaseException:
        driver.cuGreenCtxDestroy(context)
        raise
    return Partition(int(resource.sm.smCount), int(stream), context)


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise GreenContextError("SM partitions need the cuda-python package: pip install cuda-python") from error
    if not hasattr(driver, "cuDevSmResourceSplitByCount"):
        raise GreenContextError("this version of cuda-python knows no SM partitions; install 13.0 or later")
    return _Driver(driver)


class _Driver:
    """The driver's functions, which raise errors of this package where the driver lacks them or cannot be loaded."""

    def __init__(self, bindings: Any) -> None:
        self._bindings = bindings

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._bindings, name)
        return functools.partial(_called, name, found) if name.startswith("cu") else found


def _called(name: str, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except RuntimeError as error:
        raise GreenContextError(f"{name} cannot be called: {error}") from error


def _sm_resource(driver: Any, device_index: int) -> tuple[Any, Any]:
    """The device, and all its SMs as a resource."""
    about = f"GPU {device_index}"
    _checked(driver, "cuInit", driver.cuInit(0), about)
    device = _checked(driver, "cuDeviceGet", driver.cuDeviceGet(device_index), about)
    kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
    return device, _checked(driver, "cuDeviceGetDevResource", driver.cuDeviceGetDevResource(device, kind), about)


def _checked(driver: Any, call: str, result: tuple[Any, ...], about: str) -> Any:
    """The result of a driver call, without its error code; a tuple if there are several values.

    Raises:
        GreenContextError: the call failed.
    """
    code, *values = result
    if int(code) != 0:
        raise GreenContextError(f"{call} failed for {about}: {getattr(code, 'name', code)} ({int(code)})")
    return values[0] if len(values) == 1 else tuple(values)
