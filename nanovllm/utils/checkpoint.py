"""Finds a checkpoint's files, in a folder or through the Hugging Face hub. Knows nothing about tensors.

Which weight files count is as in `transformers`: `model.safetensors`, or else the shards of its index; nothing beside.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # its documentation has it

from nanovllm.errors import ConfigError, ModelLoadError, short_repr

logger = logging.getLogger(__name__)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth")
CONFIG_FILES = ("config.json", "generation_config.json", "adapter_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
DOWNLOADED = (*CONFIG_FILES, *TOKENIZER_FILES, "additional_chat_templates/*.jinja", "*.safetensors", INDEX)
NOT_DOWNLOADED = ("*/*.safetensors", "consolidated*.safetensors", "adapter_model*.safetensors", "*.fp16*.safetensors")
BOTH_WAYS = "pass the folder of a Hugging Face checkpoint, or the name of one on the Hugging Face hub ('org/name')"


def checkpoint_folder(model: str, revision: str | None = None, *, with_weights: bool = True) -> Path:
    """The folder of a checkpoint with its `config.json`: `model` itself, or else what the hub has under this name.

    From the hub, files come out of its local cache or are downloaded: safetensors, tokenizer and config only, or the
    config alone. `HF_HUB_OFFLINE=1` looks into the cache alone.

    Raises:
        ConfigError: a revision of a local folder.
        ModelLoadError: it is neither a folder nor to be had from the hub, or has no config.
    """
    if not isinstance(model, str) or not model:
        raise ModelLoadError(f"model={short_repr(model)} is not a path; {BOTH_WAYS}")
    try:
        folder = Path(model).expanduser()
        exists = folder.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelLoadError(f"model path {short_repr(model)} is not usable ({error}); {BOTH_WAYS}") from error
    if exists and revision is not None:
        raise ConfigError(
            f"revision={revision!r} given, but model {model!r} is a local folder, which has no revisions; "
            "leave revision out, or pass the name of a checkpoint on the Hugging Face hub"
        )
    if not exists:
        if folder.is_symlink():
            raise ModelLoadError(
                f"model path {model!r} links to {os.readlink(folder)}, which is not there; {BOTH_WAYS}"
            )
        if not _may_be_on_hub(model):
            raise ModelLoadError(f"model path {short_repr(model)} does not exist; {BOTH_WAYS}")
        folder = _hub_folder(model, revision, DOWNLOADED if with_weights else CONFIG_FILES)
    if not folder.is_dir():
        raise ModelLoadError(f"model path {model!r} is a file; pass the folder that holds config.json and the weights")
    if find_file(folder, "config.json") is None:
        raise ModelLoadError(f"{folder} has no config.json; it is not a Hugging Face checkpoint{_if_partial(folder)}")
    return folder


def find_file(folder: Path, name: str) -> Path | None:
    """The path of a file, None if there is nothing of this name.

    Raises:
        ModelLoadError: there is something, but no file that can be read.
    """
    path = folder / name
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if not path.is_symlink():
            return None
        raise ModelLoadError(
            f"{path} links to {os.readlink(path)}, which is not there: the checkpoint is half-downloaded; "
            "download it again"
        ) from None
    except ValueError:
        return None  # no file can have this name
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None
        raise ModelLoadError(f"{path} cannot be looked at ({error}); check the folder and its permissions") from error
    if not stat.S_ISREG(mode):
        raise ModelLoadError(f"{path} is a {_kind(mode)}, not a file; put the checkpoint's file in its place")
    if not os.access(path, os.R_OK):
        raise ModelLoadError(f"{path} may not be read by this user; change its permissions (chmod u+r)")
    return path


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """The object in `folder/name`, None if there is no such file.

    Raises:
        ModelLoadError: the file cannot be read, or is not a JSON object.
    """
    path = find_file(folder, name)
    if path is None:
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read ({error}); check the file and its permissions") from error
    except (ValueError, RecursionError) as error:
        if is_lfs_pointer(path):
            raise ModelLoadError(f"{path} is a pointer of Git LFS, not the file itself; run git lfs pull") from error
        raise ModelLoadError(f"{path} is not valid JSON ({error}); download the checkpoint again") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} holds a {type(value).__name__}, not an object; download the checkpoint again")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The whole file of the weights, or else the shards that the index names.

    Raises:
        ModelLoadError: neither is there, the index is damaged, or a file cannot be read.
    """
    if find_file(folder, "adapter_config.json") is not None:
        raise ModelLoadError(
            f"{folder} has an adapter (adapter_config.json), which is not supported; merge it into the weights "
            "(peft: merge_and_unload, save_pretrained), or take the file away to serve the model without it"
        )
    whole = find_file(folder, WEIGHTS)
    if whole is not None:
        return [whole]
    index = read_json(folder, INDEX)
    if index is not None:
        return _shards(folder, index)
    pickles = sorted(path.name for pattern in PICKLE_PATTERNS for path in folder.glob(pattern))
    if pickles:
        raise ModelLoadError(
            f"{folder} has pickled weights only ({', '.join(pickles[:3])}), which can run code when read; "
            "convert them to safetensors (transformers: save_pretrained)"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        raise ModelLoadError(
            f"{folder} has {first_names(others)}, but neither {WEIGHTS} nor {INDEX}, which say what the weights are; "
            "rename a file that is whole, or download the index of shards"
        )
    raise ModelLoadError(
        f"{folder} has no *.safetensors; load_format='dummy' runs with random weights{_if_partial(folder)}"
    )


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what Git LFS leaves in place of one that was not fetched."""
    with open(path, "rb") as file:
        return file.read(24).startswith(b"version https://git-lfs")


def first_names(names: list[str]) -> str:
    """The first three names and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name[:200] for name in names[:3]) + more


def _shards(folder: Path, index: dict[str, Any]) -> list[Path]:
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelLoadError(f"{folder / INDEX} has no weight_map; download it again")
    names = sorted({str(shard) for shard in shards.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ModelLoadError(
            f"the index of {folder} names files outside the folder: {', '.join(outside)}; download the index again"
        )
    files = [find_file(folder, name) for name in names]
    missing = [name for name, file in zip(names, files, strict=True) if file is None]
    if missing:
        raise ModelLoadError(
            f"the index of {folder} names shards that are not there: {first_names(missing)}{_if_partial(folder)}"
        )
    return [file for file in files if file is not None]


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "fifo", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def _may_be_on_hub(model: str) -> bool:
    if model.count("/") != 1:
        return False
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True


def _hub_folder(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    is_offline = huggingface_hub.is_offline_mode()
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(NOT_DOWNLOADED),
            local_files_only=is_offline,  # else a commit in the cache is looked up on the hub
        )
    except Exception as error:  # of the network, the hub, the cache or the disk: the checkpoint is not to be had
        partial = "it is half-downloaded; " if type(error).__name__ == "IncompleteSnapshotError" else ""
        offline = " is set: unset it to download" if is_offline else "=1 looks into the local cache alone"
        wanted = f"{name!r}" if revision is None else f"{name!r} at revision {revision!r}"
        reason = " ".join(str(error).split())
        raise ModelLoadError(
            f"model {wanted} is neither a folder here nor to be had from the Hugging Face hub "
            f"({type(error).__name__}: {reason[:500]}); {partial}HF_HUB_OFFLINE{offline}; {BOTH_WAYS}"
        ) from error
    logger.info("%s from the Hugging Face hub is in %s", name, folder)
    return Path(folder)


def _if_partial(folder: Path) -> str:
    # Where huggingface_hub puts what it downloads; it makes a link when a file is complete.
    is_cached = folder.parent.name == "snapshots"
    return "; it is half-downloaded: download it again, or unset HF_HUB_OFFLINE" if is_cached else ""
