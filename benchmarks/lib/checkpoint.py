"""Checkpoints of random weights of a real shape, for what is measured of files; a tokenizer for a vocabulary."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models

from lib.arguments import write_shape
from nanovllm import LLM
from nanovllm.demo import DEMO_MODEL_PATH


def write_checkpoint(shape: str, device: str = "cpu") -> str:
    """A new folder with config, weights made on `device`, and the bundled model's small tokenizer."""
    folder = write_shape(shape)
    options = {"load_format": "dummy", "device": device, "dtype": "bfloat16", "num_kvcache_blocks": 1}
    with LLM(folder, **options, max_model_len=16, enforce_eager=True) as llm:
        weights = llm.decode_runner.model.checkpoint_tensors()
        save_file(
            {name: weight.data.contiguous() for name, weight in weights.items()}, Path(folder) / "model.safetensors"
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(DEMO_MODEL_PATH) / name, folder)
    return folder


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Writes a tokenizer.json in which each of so many tokens is a word: a stream shows all of them."""
    space = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"  # as byte-level vocabularies write it
    backend = Tokenizer(models.BPE(vocab={f"{space}{number}": number for number in range(vocab_size)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
