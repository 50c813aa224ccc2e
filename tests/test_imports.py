"""Imports go one way, decisions do without torch, and optional packages stay optional."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "nanovllm"
LEVELS = ["__main__", "entrypoints", "llm", "engine", "models", "layers", "kernels", "utils", "errors"]
LEAVES = {"config", "sampling_params", "outputs", "errors", "version"}
WITHOUT_TORCH = [
    "scheduler",
    "sequence",
    "block_manager",
    "callers",
    "observability.metrics",
    "step_listeners",
    "observability.trace",
    *(f"scheduling.{path.stem}" for path in sorted((PACKAGE / "engine" / "scheduling").glob("*.py"))),
]


# Within engine/, a module imports those of its own line and of lines above, never below; so there is no circle.
ENGINE_LAYERS = [
    {"scheduling.timeline", "scheduling.circuit_breaker", "scheduling.step_time", "block_manager"},
    {"scheduling.card"},
    {"scheduling.shared_prompt"},
    {"scheduling.lease", "output_rows"},
    {"sequence", "callers", "text"},
    {"scheduling"},
    {"scheduler"},
    {"observability"},
    {"green_manager"},
    {"pipeline_scheduler"},
    {"execution"},
    {"model_runner"},
    {"distributed", "runners", "in_flight", "requests"},
    {"observer", "mailbox", "step_listeners", "streamed_rows", "kept_step_times"},
    {"output_processor", "builder"},
    {"handoffs", "launch_times", "card_watch", "distributed.card_process"},
    {"recovery", "loop"},
    {"llm_engine"},
    {"distributed.engine_process"},
    {"distributed.engine_client"},
]


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def level_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "nanovllm" and len(parts) > 1 else None


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    targets = {level for module in imported_modules(path) if (level := level_of(module)) and level != own}
    if own == "__init__" or own == "demo":
        return
    if own in LEAVES:
        assert targets <= LEAVES
        return
    for target in targets & set(LEVELS):
        assert LEVELS.index(target) >= LEVELS.index(own), f"{own} imports {target}"
    if own not in ("__main__", "entrypoints", "llm", "engine"):
        assert not targets & {"config", "sampling_params"}, f"{own} reads an engine's options"


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_decisions_import_no_torch(module):
    code = f"import sys; sys.modules['torch'] = None; import importlib.util as u; import nanovllm.engine.{module}"
    # The package's own __init__ imports torch; the module is run with the package's folder alone on the path.
    code = (
        "import sys, types; sys.modules['torch'] = None\n"
        "package = types.ModuleType('nanovllm'); "
        f"package.__path__ = [{str(PACKAGE)!r}]; sys.modules['nanovllm'] = package\n"
        f"import nanovllm.engine.{module}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


IMPORTED_BY = {
    "triton": ("kernels/triton_",),
    "flash_attn": ("kernels/flash_attn",),
    "cuda": ("utils/",),
    "zmq": ("engine/distributed/engine_", "engine/distributed/card_"),
    "msgspec": ("engine/distributed/messages", "engine/distributed/card_messages", "entrypoints/server/"),
    "nixl_cu13": ("engine/distributed/kv_nixl",),
    "ray": ("engine/distributed/card_ray",),
    "starlette": ("entrypoints/server/",),
    "uvicorn": ("entrypoints/server/",),
}


@pytest.mark.parametrize("package", IMPORTED_BY)
def test_only_its_own_modules_import_an_optional_package(package):
    importing = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == package for name in imported_modules(path))
    ]
    assert importing
    assert [path for path in importing if not path.startswith(IMPORTED_BY[package])] == []


def test_runs_without_optional_packages(tiny_path):
    code = (
        "import sys\n"
        "for name in ('triton', 'cuda', 'flash_attn'): sys.modules[name] = None\n"
        "from nanovllm import LLM, SamplingParams\n"
        f"llm = LLM({tiny_path!r}, device='cpu', num_kvcache_blocks=100)\n"
        "print(llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3), use_tqdm=False)[0]['token_ids'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert run.stdout.startswith("[")


def test_asynchronous_use_without_its_packages_says_what_to_install():
    code = (
        "import sys\n"
        "sys.modules['zmq'] = None\n"
        "import nanovllm\n"
        "try:\n"
        "    from nanovllm import AsyncLLM\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert "pip install nanovllm[serve]" in run.stdout


def engine_layer(module: str) -> int:
    """The line of a module of engine/, or of the folder that it is in."""
    for depth in (2, 1):
        name = ".".join(module.split(".")[:depth])
        for layer, names in enumerate(ENGINE_LAYERS):
            if name in names:
                return layer
    raise AssertionError(f"engine/{module} has no place among the layers; give it one")


ENGINE = PACKAGE / "engine"


@pytest.mark.parametrize("path", sorted(ENGINE.rglob("*.py")), ids=lambda path: str(path.relative_to(ENGINE)))
def test_imports_within_the_engine_go_one_way(path):
    own = ".".join(path.relative_to(ENGINE).with_suffix("").parts)
    if own.endswith("__init__"):
        assert imported_modules(path) == set(), "a folder imports nothing"
        return
    known = {".".join(other.relative_to(ENGINE).with_suffix("").parts) for other in ENGINE.rglob("*.py")}
    imported = {name.removeprefix("nanovllm.engine.") for name in imported_modules(path)} & known
    for target in imported:
        assert engine_layer(target) <= engine_layer(own), f"engine/{own} imports engine/{target}, which is above it"


def test_there_is_no_circle_within_the_engine():
    known = {".".join(path.relative_to(ENGINE).with_suffix("").parts): path for path in ENGINE.rglob("*.py")}
    imports = {
        own: {name.removeprefix("nanovllm.engine.") for name in imported_modules(path)} & known.keys()
        for own, path in known.items()
    }
    while imports:
        leaves = {own for own, targets in imports.items() if not targets & imports.keys()}
        assert leaves, f"these import each other: {', '.join(sorted(imports))}"
        imports = {own: targets for own, targets in imports.items() if own not in leaves}
