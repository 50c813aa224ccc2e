"""Reads a Hugging Face checkpoint folder: its JSON files and its safetensors. Runs no code of it, reads no pickles."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from nanovllm.errors import ModelLoadError, shown

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth")


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """The object in `folder/name`, None if there is no such file.

    Raises:
        ModelLoadError: the file is not a JSON object.
    """
    path = folder / name
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} is not valid JSON ({error}); download the checkpoint again") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} holds a {type(value).__name__}, not an object; download the checkpoint again")
    return value


def checkpoint_folder(model: str) -> Path:
    """The folder of a checkpoint with its `config.json`.

    Raises:
        ModelLoadError: it is not there, not a folder, or has no config.
    """
    if not isinstance(model, str) or not model:
        raise ModelLoadError(f"model={shown(model)} is not a path; pass the folder of a Hugging Face checkpoint")
    try:
        folder = Path(model).expanduser()
        exists = folder.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelLoadError(
            f"model path {shown(model)} is not usable ({error}); pass the folder of a checkpoint"
        ) from error
    if not exists:
        raise ModelLoadError(f"model path {model!r} does not exist; pass the folder of a Hugging Face checkpoint")
    if not folder.is_dir():
        raise ModelLoadError(f"model path {model!r} is a file; pass the folder that holds config.json and the weights")
    if not (folder / "config.json").is_file():
        raise ModelLoadError(f"{folder} has no config.json; it is not a Hugging Face checkpoint")
    return folder


class TensorPart(Protocol):
    """Which part of a checkpoint's tensor is wanted."""

    def whole_shape(self, shape: torch.Size) -> torch.Size:
        """Of the tensor of which `shape` is a part's."""

    def index(self, whole_shape: Sequence[int]) -> tuple[slice, ...]:
        """What takes the part out of a whole tensor."""


def load_weights(
    folder: Path,
    targets: dict[str, torch.Tensor],
    ignored: Iterable[str] = (),
    parts: Mapping[str, TensorPart] | None = None,
) -> None:
    """Copies every tensor of a checkpoint, or its part, into the view of its name, converting its type.

    Raises:
        ModelLoadError: weights are missing, unexpected, misshapen, truncated or not in safetensors.
    """
    files = _safetensors_files(folder)
    where: dict[str, Path] = {}
    for path, names in _tensor_names(files).items():
        for name in names:
            if name in where:
                raise ModelLoadError(f"tensor {name!r} is in both {where[name].name} and {path.name} of {folder}")
            where[name] = path
    _check_names(folder, set(where), set(targets), set(ignored))
    for path in files:
        with _open(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                if name in targets:
                    _copy(path, name, tensors, targets[name], (parts or {}).get(name))


def fill_randomly(targets: dict[str, torch.Tensor], seed: int, parts: Mapping[str, TensorPart] | None = None) -> None:
    """Random weights in place of a checkpoint's: norms near 1, biases small, the rest normal with deviation 0.02.

    A tensor's depend on its name and the seed alone, and parts are those of the same tensors.
    """
    for name, view in targets.items():
        part = (parts or {}).get(name)
        whole = view
        if part is not None:
            whole = torch.empty(part.whole_shape(view.shape), dtype=view.dtype, device=view.device)
        own_seed = xxhash.xxh64(name.encode(), seed=seed).intdigest() >> 1
        generator = torch.Generator(view.device).manual_seed(own_seed)
        whole.normal_(1.0 if "norm" in name else 0.0, 0.02, generator=generator)
        if part is not None:
            view.copy_(whole[part.index(whole.shape)])


def _safetensors_files(folder: Path) -> list[Path]:
    index = read_json(folder, "model.safetensors.index.json")
    if index is not None:
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ModelLoadError(f"{folder / 'model.safetensors.index.json'} has no weight_map; download it again")
        names = sorted({str(shard) for shard in shards.values()})
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ModelLoadError(f"the index of {folder} names files outside the folder: {', '.join(outside)}")
        there = {path.name for path in folder.iterdir() if path.is_file()}
        missing = [name for name in names if name not in there]
        if missing:
            raise ModelLoadError(f"the index of {folder} names shards that are not there: {_first(missing)}")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(path.name for pattern in PICKLE_PATTERNS for path in folder.glob(pattern))
    if pickles:
        raise ModelLoadError(
            f"{folder} has pickled weights only ({', '.join(pickles[:3])}), which can run code when read; "
            "convert them to safetensors (transformers: save_pretrained)"
        )
    raise ModelLoadError(f"{folder} has no *.safetensors; load_format='dummy' runs with random weights")


def _tensor_names(files: list[Path]) -> dict[Path, list[str]]:
    names = {}
    for path in files:
        with _open(path) as tensors:
            names[path] = list(tensors.keys())
    return names


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(
            f"{path} cannot be read ({error}); it is truncated or damaged, download it again"
        ) from error


def _copy(path: Path, name: str, tensors: Any, target: torch.Tensor, part: TensorPart | None) -> None:
    shape = list(target.shape if part is None else part.whole_shape(target.shape))
    try:
        stored = tensors.get_slice(name)
        if stored.get_shape() != shape:
            raise ModelLoadError(f"{path}: tensor {name!r} has shape {stored.get_shape()}, config.json implies {shape}")
        tensor = stored[:] if part is None else stored[part.index(shape)]
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{path}: tensor {name!r} cannot be read ({error}); download it again") from error
    if tensor.dtype not in WEIGHT_DTYPES:
        raise ModelLoadError(f"{path}: tensor {name!r} is {tensor.dtype}; quantized weights are not supported")
    target.copy_(tensor)


def _check_names(folder: Path, found: set[str], wanted: set[str], ignored: set[str]) -> None:
    missing, unexpected = sorted(wanted - found), sorted(found - wanted - ignored)
    if missing:
        near = difflib.get_close_matches(missing[0], unexpected, n=1)
        hint = f"; is {near[0]!r} meant?" if near else ""
        raise ModelLoadError(f"{folder} lacks {_some(missing)}, which config.json implies{hint}")
    if unexpected:
        raise ModelLoadError(f"{folder} has {_some(unexpected)}, which no layer of config.json takes")


def _some(names: list[str]) -> str:
    return f"tensor{'s' if len(names) > 1 else ''} {_first(names)}"


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name[:200] for name in names[:3]) + more
