"""CUDA C++ compiled at run time (NVRTC), and the driver calls that launch it. Knows nothing of what a kernel does."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import torch

from nanovllm.errors import BackendUnavailableError
from nanovllm.utils.cuda_driver import call_driver, check_code
from nanovllm.utils.disk_cache import cache_folder, write_whole

logger = logging.getLogger(__name__)

MAX_TENSOR_MAPS = 1024
"""Tensor maps that are kept, since each layer of each step asks for the same ones."""


def compile_source(source: str, name: str, architecture: str) -> bytes:
    """The machine code of a CUDA C++ source, which is kept on disk for the next process. Needs no GPU.

    Args:
        source: without includes, except those that NVRTC has.
        name: name of the source in messages, and of the file.
        architecture: such as `sm_90a`.

    Raises:
        BackendUnavailableError: there is no NVRTC, or it refuses the source; the message has its log.
    """
    try:
        from cuda.bindings import nvrtc

        code, *version = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # the bindings load the library when it is first called
        remedy = "pip install cuda-python nvidia-cuda-nvrtc"
        raise BackendUnavailableError(f"{name} needs NVRTC, which cannot be used ({error}); {remedy}") from error
    check_code("nvrtcVersion", code)
    digest = hashlib.sha256("\n".join([*map(str, version), architecture, source]).encode()).hexdigest()
    try:
        kept = cache_folder("kernels") / f"{name}-{digest[:32]}.cubin"
        return kept.read_bytes()
    except FileNotFoundError:
        compiled = _compiled(source, name, architecture)
    except (OSError, RuntimeError) as error:
        logger.warning("compiled kernels cannot be kept (%s)", error)
        return _compiled(source, name, architecture)
    try:
        write_whole(kept, compiled)
    except OSError as error:
        logger.warning("compiled kernels cannot be kept (%s)", error)
    return compiled


def _compiled(source: str, name: str, architecture: str) -> bytes:
    from cuda.bindings import nvrtc

    code, program = nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], [])
    check_code("nvrtcCreateProgram", code)
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
    (code,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(code):
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        raise BackendUnavailableError(f"NVRTC refuses {name}: {log.decode(errors='replace').strip()}")
    code, size = nvrtc.nvrtcGetCUBINSize(program)
    check_code("nvrtcGetCUBINSize", code)
    cubin = b" " * size
    (code,) = nvrtc.nvrtcGetCUBIN(program, cubin)
    check_code("nvrtcGetCUBIN", code)
    nvrtc.nvrtcDestroyProgram(program)
    return cubin


class Kernel:
    """A kernel of compiled code, loaded for the current device.

    Args:
        cubin: from `compile_source`.
        name: of the kernel, declared `extern "C"`.
        shared_bytes: dynamic shared memory of each thread block.

    Raises:
        BackendUnavailableError: the driver refuses the code.
    """

    def __init__(self, cubin: bytes, name: str, shared_bytes: int) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._shared_bytes = shared_bytes
        torch.cuda.current_stream()  # makes the device's context
        self._module = call_driver("cuModuleLoadData", cubin)
        self._function = call_driver("cuModuleGetFunction", self._module, name.encode())
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        call_driver("cuFuncSetAttribute", self._function, attribute, shared_bytes)

    def launch(
        self,
        num_blocks: int,
        num_threads: int,
        arguments: Sequence[Any],
        *,
        cluster: int = 1,
        overlaps: bool = True,
    ) -> None:
        """Launches on the current stream.

        Args:
            num_blocks, num_threads: of a one-dimensional grid and block.
            arguments: tensors (their addresses), integers and floats (32 bits) and what `tensor_map` gives.
            cluster: thread blocks per cluster.
            overlaps: whether the kernel itself waits for the one before it (programmatic launch).
        """
        values = [_argument(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*[address for address, _ in values])
        config = self._config(num_blocks, num_threads, cluster, overlaps=overlaps)
        call_driver("cuLaunchKernelEx", config, self._function, ctypes.addressof(pointers), 0)

    def max_clusters(self, num_threads: int, cluster: int) -> int:
        """How many clusters of thread blocks run at the same time on the SMs of the current stream."""
        config = self._config(cluster, num_threads, cluster)
        return int(call_driver("cuOccupancyMaxActiveClusters", self._function, config))

    def _config(self, num_blocks: int, num_threads: int, cluster: int, *, overlaps: bool = True) -> Any:
        driver = self._driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = num_blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = num_threads, 1, 1
        config.sharedMemBytes = self._shared_bytes
        config.hStream = torch.cuda.current_stream().cuda_stream
        serialization, clusters = driver.CUlaunchAttribute(), driver.CUlaunchAttribute()
        serialization.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        serialization.value.programmaticStreamSerializationAllowed = int(overlaps)
        clusters.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        clusters.value.clusterDim.x, clusters.value.clusterDim.y, clusters.value.clusterDim.z = cluster, 1, 1
        config.attrs, config.numAttrs = [serialization, clusters], 2
        return config


def tensor_map(matrix: torch.Tensor, box: tuple[int, int]) -> Any:
    """A tensor map, by which TMA fetches swizzled boxes with rows of 128 bytes from a matrix of 16-bit values.

    Args:
        matrix: [rows, columns], rows of a multiple of 16 bytes; a box is filled with zeros beyond them.
        box: rows (up to 256) and columns of a box.
    """
    assert box[1] * matrix.itemsize == 128, "rows of a box are as long as the swizzle"
    rows, columns = matrix.shape
    return _encoded(matrix.data_ptr(), rows, columns, matrix.stride(0) * matrix.itemsize, matrix.dtype, box)


@functools.lru_cache(maxsize=MAX_TENSOR_MAPS)
def _encoded(address: int, rows: int, columns: int, stride_bytes: int, dtype: torch.dtype, box: tuple[int, int]) -> Any:
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    kind = kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    if dtype == torch.float16:
        kind = kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
    code, made = driver.cuTensorMapEncodeTiled(
        kind,
        2,
        address,
        [driver.cuuint64_t(columns), driver.cuuint64_t(rows)],
        [driver.cuuint64_t(stride_bytes)],
        [driver.cuuint32_t(box[1]), driver.cuuint32_t(box[0])],
        [driver.cuuint32_t(1), driver.cuuint32_t(1)],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    check_code("cuTensorMapEncodeTiled", code)
    return made


def _argument(argument: Any) -> tuple[int, Any]:
    """The address of an argument's value, and the object that must be kept alive for it."""
    if isinstance(argument, torch.Tensor):
        address = ctypes.c_uint64(argument.data_ptr())
        return ctypes.addressof(address), address
    if isinstance(argument, int):
        number = ctypes.c_int32(argument)
        return ctypes.addressof(number), number
    if isinstance(argument, float):
        real = ctypes.c_float(argument)
        return ctypes.addressof(real), real
    return argument.getPtr(), argument
