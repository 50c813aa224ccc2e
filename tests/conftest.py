from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from transformers import Qwen3ForCausalLM

from nanovllm.engine import model_runner
from tests import tiny

torch.set_num_threads(1)

# One run is like the next; `pytest --hypothesis-profile=search tests/test_scheduler.py` looks for what they all miss.
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, max_examples=150, stateful_step_count=60
)
hypothesis.settings.register_profile(
    "search", deadline=None, max_examples=5000, stateful_step_count=60, print_blob=True
)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="fail, instead of skip, tests whose GPUs are missing")


def pytest_runtest_setup(item: pytest.Item) -> None:
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    needed = 2 if item.get_closest_marker("two_gpu") else 1 if item.get_closest_marker("gpu") else 0
    if num_gpus < needed:
        reason = f"needs {needed} CUDA GPU{'s' if needed > 1 else ''}, torch sees {num_gpus}"
        if item.config.getoption("--require-gpu"):
            pytest.fail(reason)
        pytest.skip(reason)


TEST_POOL_BYTES = 8 * 1024**2
"""512 blocks of the tiny checkpoint: more than its tests' requests take."""


@pytest.fixture(scope="session", autouse=True)
def default_pool_bytes() -> Iterator[int]:
    """Engines that do not say how large their KV pool is have a small one; gives the size that users get.

    Some stay until the process ends, as those do whose devices were lost. Ranks take the least of what they find, so
    that this holds for worker processes too; a script that a test starts sees nothing of it and names a size.
    """
    with pytest.MonkeyPatch.context() as patch:
        of_users = model_runner.CPU_POOL_BYTES
        patch.setattr(model_runner, "CPU_POOL_BYTES", TEST_POOL_BYTES)
        yield of_users


@pytest.fixture(autouse=True)
def no_calibration_kept(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What another test, or the user, has measured is not found."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, Qwen3ForCausalLM]]:
    """A tiny checkpoint of a variant of `tiny.VARIANTS`: its folder and transformers' model."""
    made: dict[str, tuple[str, Qwen3ForCausalLM]] = {}

    def make(variant: str) -> tuple[str, Qwen3ForCausalLM]:
        if variant not in made:
            model = tiny.make_reference(seed=len(variant), **tiny.VARIANTS[variant])
            made[variant] = tiny.save(model, tmp_path_factory.mktemp(variant)), model
        return made[variant]

    return make


@pytest.fixture(scope="session")
def tiny_path(checkpoint: Any) -> str:
    return str(checkpoint("gqa2")[0])


@pytest.fixture
def tiny_copy(tiny_path: str, tmp_path: Path) -> Path:
    """A copy of a checkpoint that a test may damage."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in Path(tiny_path).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder
