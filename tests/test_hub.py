"""Models by their name on the Hugging Face hub, without a network: out of a cache as the hub's client lays it out."""

from __future__ import annotations

import fnmatch
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from nanovllm import LLM, ConfigError, ModelLoadError, SamplingParams
from nanovllm.engine.builder import model_memory
from nanovllm.utils.checkpoint import checkpoint_folder
from tests import tiny

NAME = "org/tiny-qwen3"
COMMIT, OLDER = "0123456789abcdef0123456789abcdef01234567", "fedcba9876543210fedcba9876543210fedcba98"
PROMPT = [1, 2, 3]
BOTH_WAYS = r"pass the folder of a Hugging Face checkpoint, or the name of one on the Hugging Face hub \('org/name'\)"


def serve(model: str, **options: Any) -> list[int]:
    with LLM(model, device="cpu", num_kvcache_blocks=8, max_model_len=64, **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=6)
        return llm.generate([list(PROMPT)], params, use_tqdm=False)[0]["token_ids"]


def put_in_cache(cache: Path, folder: str, commit: str, *refs: str) -> Path:
    """A snapshot of links to blobs, and the branches and tags that point to it."""
    repo = cache / "models--org--tiny-qwen3"
    snapshot = repo / "snapshots" / commit
    for made in (repo / "blobs", repo / "refs", snapshot):
        made.mkdir(parents=True, exist_ok=True)
    for path in Path(folder).iterdir():
        shutil.copy(path, repo / "blobs" / f"{commit[:8]}-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/{commit[:8]}-{path.name}")
    for ref in refs:
        (repo / "refs" / ref).write_text(commit)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a hub that is not asked. The constants are read from the environment by the first import."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What the hub's client is asked for; it has nothing."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        calls.append((name, options))
        raise OSError("no route\n  to the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_model_of_the_cache(cache, checkpoint):
    folder, reference = checkpoint("gqa2")
    snapshot = put_in_cache(cache, folder, COMMIT, "main")
    assert checkpoint_folder(NAME) == snapshot
    assert serve(NAME) == tiny.reference_tokens(reference, PROMPT, 6)


def test_the_environment_says_where_and_whether(checkpoint, tmp_path):
    put_in_cache(tmp_path, checkpoint("gqa2")[0], COMMIT, "main")
    code = f"from nanovllm.utils.checkpoint import checkpoint_folder as find; print(find({NAME!r})); find('org/none')"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)},
        check=False,
    )
    assert run.stdout.strip().endswith(f"snapshots/{COMMIT}")
    assert "ModelLoadError: model 'org/none' is neither" in run.stderr
    assert "HF_HUB_OFFLINE is set: unset it to download" in run.stderr


@pytest.mark.parametrize("revision", ["v1", OLDER])
def test_a_revision(cache, checkpoint, revision):
    put_in_cache(cache, checkpoint("gqa2")[0], COMMIT, "main")
    folder, reference = checkpoint("gqa1_tied")
    put_in_cache(cache, folder, OLDER, "v1")
    assert serve(NAME, revision=revision) == tiny.reference_tokens(reference, PROMPT, 6)


def test_a_local_folder_wins(cache, checkpoint, tmp_path):
    put_in_cache(cache, checkpoint("gqa1_tied")[0], COMMIT, "main")
    folder, reference = checkpoint("gqa2")
    shutil.copytree(folder, tmp_path / NAME)
    assert serve(NAME) == tiny.reference_tokens(reference, PROMPT, 6)


def test_what_is_neither(cache):
    with pytest.raises(ModelLoadError, match=f"model 'org/none' is neither.*HF_HUB_OFFLINE is set.*; {BOTH_WAYS}"):
        serve("org/none")


def test_a_revision_that_is_not_there(cache, tiny_path):
    put_in_cache(cache, tiny_path, COMMIT, "main")
    with pytest.raises(ModelLoadError, match=f"'{NAME}' at revision 'v2' is neither"):
        serve(NAME, revision="v2")


def test_no_network(asked):
    with pytest.raises(ModelLoadError, match=rf"is neither .* hub \(OSError: no route to the hub\); .*; {BOTH_WAYS}"):
        serve(NAME)
    assert len(asked) == 1


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_a_link_without_its_blob(cache, tiny_path, name):
    snapshot = put_in_cache(cache, tiny_path, COMMIT, "main")
    (snapshot / name).resolve().unlink()
    with pytest.raises(ModelLoadError, match=rf"{name} links to .*, which is not there: .*half-downloaded"):
        serve(NAME)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_was_not_downloaded(cache, tiny_path, name):
    snapshot = put_in_cache(cache, tiny_path, COMMIT, "main")
    (snapshot / name).unlink()
    with pytest.raises(ModelLoadError, match=r"has no (config.json|\*.safetensors).*; it is half-downloaded"):
        serve(NAME)


def test_shards_that_were_not_downloaded(cache, checkpoint, tmp_path):
    folder = tiny.save(checkpoint("gqa2")[1], tmp_path / "sharded", max_shard_size="60KB")
    snapshot = put_in_cache(cache, folder, COMMIT, "main")
    shard = sorted(snapshot.glob("model-*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(ModelLoadError, match=f"shards that are not there: {shard.name}; it is half-downloaded"):
        serve(NAME)


def test_a_snapshot_that_the_cache_knows_to_be_incomplete(monkeypatch):
    from huggingface_hub.errors import IncompleteSnapshotError

    def snapshot_download(name: str, **options: Any) -> str:
        raise IncompleteSnapshotError("1 file(s) are missing (model.safetensors)", snapshot_path="/nowhere")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelLoadError, match=r"model.safetensors\)\); it is half-downloaded; "):
        serve(NAME)


def chosen(names: list[str], options: dict[str, Any]) -> list[str]:
    def matches(name: str, patterns: list[str]) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    return [
        name
        for name in names
        if matches(name, options["allow_patterns"]) and not matches(name, options["ignore_patterns"])
    ]


WANTED = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
]
UNWANTED = [
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.gguf",
    "modeling.py",
    "README.md",
    "LICENSE",
    ".gitattributes",
    "figures/speed.png",
    "onnx/config.json",
    "onnx/model.onnx",
    "original/consolidated.safetensors",
    "consolidated.safetensors",
    "model.fp16.safetensors",
    "tf_model.h5",
]


def test_what_is_downloaded(asked, cache):
    with pytest.raises(ModelLoadError):
        serve(NAME, revision="v1")
    name, options = asked.pop()
    assert (name, options["revision"]) == (NAME, "v1")
    assert chosen(WANTED + UNWANTED, options) == WANTED
    with pytest.raises(ModelLoadError):
        model_memory(NAME)
    assert chosen(WANTED + UNWANTED, asked.pop()[1]) == WANTED[:2]


@pytest.mark.parametrize(
    "model",
    [
        *("no-such-folder", "/no/such/folder", "./no/folder", "../models", "~/models", "a/b/c", "org/", "/name"),
        *("org/na me", "org/a--b", "org/x.git", ".org/name", "org\\name", "https://hub/org/name", "org/na\0me"),
        "org/" + "x" * 97,
    ],
)
def test_what_cannot_be_a_name_is_not_asked_for(asked, cache, model):
    with pytest.raises(ModelLoadError, match=BOTH_WAYS):
        serve(model)
    assert not asked


def test_revision_of_a_local_folder(asked, tiny_path):
    with pytest.raises(ConfigError, match=r"revision='main' given, but model .* is a local folder.*leave revision out"):
        serve(tiny_path, revision="main")
    assert not asked


@pytest.mark.parametrize("revision", ["", 1, b"main"])
def test_what_is_no_revision(asked, revision):
    with pytest.raises(ConfigError, match=r"revision=.* is not a branch, tag or commit"):
        serve(NAME, revision=revision)
    assert not asked
