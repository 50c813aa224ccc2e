"""Reads the tensors of a checkpoint's safetensors into a model's weights. Runs no code of the checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from nanovllm.errors import ModelLoadError
from nanovllm.utils.checkpoint import first_names, is_lfs_pointer, weight_files
from nanovllm.utils.fp8 import E4M3
from nanovllm.utils.upload import Upload
from nanovllm.utils.weight import Weight

PREFIX = "model."
"""Prefix of the base model's names in a causal language model; a checkpoint may have names of either."""
RECOMPUTED = "rotary_emb.inv_freq"
"""Name of a buffer that older checkpoints hold, although config.json implies it."""
COMPARED_BYTES = 64 * 1024**2


@dataclass(frozen=True)
class StoredTensor:
    """The file that has a tensor, and its name in the file."""

    path: Path
    name: str


def load_weights(
    folder: Path,
    targets: Mapping[str, Weight],
    ignored: Iterable[str] = (),
    substitutes: Mapping[str, str] | None = None,
) -> list[str]:
    """Copies every tensor of a checkpoint, or its part, into the weight of its name, converting its type.

    Args:
        folder: the checkpoint's.
        targets: weights by name.
        ignored: names that a checkpoint may have and that are not loaded.
        substitutes: for a name that the checkpoint may lack, the one whose tensor is taken then.

    Returns:
        Names of the tensors that are not loaded, without those that are ignored.

    Raises:
        ModelLoadError: weights are missing, misshapen, truncated, stored twice or not in safetensors.
    """
    instead = substitutes or {}
    known = {*targets, *ignored, *instead.values()}
    stored = _stored_tensors(folder, known)
    sources = {name: name if name in stored else instead.get(name, name) for name in targets}
    unused = sorted(name for name in stored if name not in known and RECOMPUTED not in name)
    _check_all_there(folder, sorted(name for name, source in sources.items() if source not in stored), unused)
    by_path: dict[Path, list[str]] = {}
    for name, source in sources.items():
        by_path.setdefault(stored[source].path, []).append(name)
    devices = {weight.data.device for weight in targets.values()}
    assert len(devices) == 1, "a runner has all of its weights on its own device"
    with Upload(devices.pop()) as upload:
        for path, names in by_path.items():
            with _open(path) as tensors:
                for name in names:
                    targets[name].load(_read(path, stored[sources[name]].name, tensors, targets[name]), upload)
    return unused


def tensors_differ(folder: Path, first: str, second: str) -> bool:
    """Whether a checkpoint has both of these tensors and they differ.

    Raises:
        ModelLoadError: there are no weights, or they cannot be read.
    """
    stored = _stored_tensors(folder, {first, second})
    if first not in stored or second not in stored:
        return False
    with _slice(stored[first]) as one, _slice(stored[second]) as other, torch.device("cpu"):
        shape = one.get_shape()
        if other.get_shape() != shape:
            return True
        num_rows = max(1, COMPARED_BYTES // (8 * max(1, shape[-1])))
        for start in range(0, shape[0], num_rows):
            rows = slice(start, start + num_rows)
            if not torch.equal(one[rows].double(), other[rows].double()):
                return True
    return False


def fill_randomly(targets: Mapping[str, Weight], seed: int) -> None:
    """Random weights in place of a checkpoint's: norms near 1, biases small, the rest normal with deviation 0.02.

    A tensor's values depend only on its name and the seed; a rank's part is a part of the same tensor.
    """
    for name, weight in targets.items():
        own_seed = xxhash.xxh64(name.encode(), seed=seed).intdigest() >> 1
        weight.fill_normal(1.0 if "norm" in name else 0.0, 0.02, own_seed)


def _stored_tensors(folder: Path, known: Collection[str]) -> dict[str, StoredTensor]:
    """The tensors of a folder, by the names that the model has for them."""
    stored: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        with _open(path) as tensors:
            names = list(tensors.keys())
        for own_name in names:
            name = _known_name(own_name, known)
            if name in stored:
                raise ModelLoadError(_twice(folder, name, stored[name], StoredTensor(path, own_name)))
            stored[name] = StoredTensor(path, own_name)
    return stored


def _known_name(own_name: str, known: Collection[str]) -> str:
    shorter = own_name.removeprefix(PREFIX)
    if shorter in known:
        return shorter
    return PREFIX + own_name if PREFIX + own_name in known else own_name


def _twice(folder: Path, name: str, first: StoredTensor, second: StoredTensor) -> str:
    if first.name == second.name:
        files = f"{first.path.name} and {second.path.name}"
        return f"tensor {name!r} is in both {files} of {folder}; take one of them out"
    return f"{folder} has two tensors for {name!r}: {first.name!r} and {second.name!r}; take one of them out"


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """The tensors of a file, to be read in a `torch.device("cpu")` block: they are made on the default device."""
    try:
        tensors = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        if is_lfs_pointer(path):
            raise ModelLoadError(f"{path} is a pointer of Git LFS, not the file itself; run git lfs pull") from error
        raise ModelLoadError(
            f"{path} cannot be read ({error}); it is truncated or damaged, download it again"
        ) from error
    with tensors:
        yield tensors


@contextmanager
def _slice(stored: StoredTensor) -> Iterator[Any]:
    with _open(stored.path) as tensors:
        try:
            yield tensors.get_slice(stored.name)
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(
                f"{stored.path}: tensor {stored.name!r} cannot be read ({error}); download it again"
            ) from error


def _read(path: Path, name: str, tensors: Any, target: Weight) -> torch.Tensor:
    """The values of a weight: a view of the mapped file, whose pages are read as the values are copied."""
    shapes = [list(shape) for shape in target.stored_shapes]
    try:
        stored = tensors.get_slice(name)
        if stored.get_shape() not in shapes:
            raise ModelLoadError(
                f"{path}: tensor {name!r} has shape {stored.get_shape()}, config.json implies {shapes[0]}; "
                "download both again"
            )
        with torch.device("cpu"):  # around no more than this: it slows down every call of torch
            tensor = stored[target.index]
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{path}: tensor {name!r} cannot be read ({error}); download it again") from error
    if tensor.dtype not in target.stored_dtypes:
        if target.stored_dtypes == (E4M3,):
            raise ModelLoadError(
                f"{path}: tensor {name!r} is {tensor.dtype}, quantization_config of config.json implies {E4M3}; "
                "download both again"
            )
        raise ModelLoadError(
            f"{path}: tensor {name!r} is {tensor.dtype}; this weight is served in a float type of 16 bits or "
            "more; convert it, or leave it out of the quantization"
        )
    return tensor


def _check_all_there(folder: Path, missing: list[str], unused: list[str]) -> None:
    if missing:
        near = difflib.get_close_matches(missing[0], unused, n=1)
        hint = f"; is {near[0]!r} meant?" if near else ""
        tensors = f"tensor{'s' if len(missing) > 1 else ''} {first_names(missing)}"
        raise ModelLoadError(
            f"{folder} lacks {tensors}, which config.json implies{hint}; download the checkpoint again"
        )
