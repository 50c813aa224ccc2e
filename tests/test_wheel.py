"""A built wheel holds what it needs and imports where no optional package is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPTIONAL = ("triton", "cuda", "flash_attn", "nvidia")


@pytest.mark.slow
def test_wheel_installs_and_answers_without_optional_packages(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = tmp_path / "source"
    shutil.copytree(ROOT / "nanovllm", source / "nanovllm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("nanovllm-*.whl")
    assert "nanovllm/kernels/cuda_gemm.cu" in zipfile.ZipFile(wheel).namelist()
    # A clean environment, with this one's packages linked in but for the optional ones.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    linked = tmp_path / "linked"
    linked.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.startswith((*OPTIONAL, "nanovllm", "__editable__", "_")) or entry.name.startswith(
            "_distutils"
        ):
            (linked / entry.name).symlink_to(entry)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    (site / "linked.pth").write_text(f"{linked}\n")
    code = (
        "import importlib.util as util\n"
        f"assert not [name for name in {OPTIONAL[:3]!r} if util.find_spec(name)]\n"
        "from nanovllm import LLM, SamplingParams\n"
        "from nanovllm.demo import DEMO_MODEL_PATH\n"
        "llm = LLM(DEMO_MODEL_PATH, device='cpu', num_kvcache_blocks=100)\n"
        "question = [{'role': 'user', 'content': 'What is the capital of France?'}]\n"
        "print(llm.chat(question, SamplingParams(temperature=0), use_tqdm=False)[0]['text'])"
    )
    python = tmp_path / "venv" / "bin" / "python"
    run = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "Paris" in run.stdout, run.stderr
