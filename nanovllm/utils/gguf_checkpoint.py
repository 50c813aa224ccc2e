"""Makes a Hugging Face checkpoint of a GGUF file. Knows nothing of engines, nor where GGUF files come from.

It takes the Llama architecture with SmolLM's tokenizer. What it does not understand it refuses by name, since a field
or a tensor that is left out makes another model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nanovllm.errors import ModelLoadError, short_repr
from nanovllm.utils.checkpoint import WEIGHTS, first_names

if TYPE_CHECKING:
    import gguf

DTYPE = torch.bfloat16
"""What is stored: the type in which such models are published, and finer than any quantized value."""
NORMAL_TOKEN, CONTROL_TOKEN = 1, 3
ABOUT_THE_FILE = ("GGUF.", "general.", "quantize.")
"""Beginnings of fields that describe the file, not the model; of these, only the architecture is read."""
REQUIRED = object()


def check_target(folder: Path) -> None:
    """Says what would keep `convert` from making this folder, before anything else is done.

    Raises:
        ModelLoadError: there is something of this name already, its parent is missing, or `gguf` is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelLoadError("the package gguf is not installed; pip install 'nanovllm[weights]'")
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise ModelLoadError(f"{folder} exists already; name a folder that does not, or take it away")
    if not folder.absolute().parent.is_dir():
        raise ModelLoadError(f"{folder.absolute().parent} is no folder; make it first")


def convert(source: Path, folder: Path) -> None:
    """Makes `folder`: config, bfloat16 weights, tokenizer, chat template and generation config.

    It appears whole or not at all: everything is written beside it first, and renamed in the end.

    Args:
        source: the GGUF file.
        folder: what is made; it may be there already if it is empty.

    Raises:
        ModelLoadError: the folder cannot be made, or the file is damaged or has what is not understood.
    """
    check_target(folder)
    reader = _read(source)
    with _refusing(source):
        if reader.byte_order != "I":
            # gguf reads its fields, but takes its tensors for numbers in this machine's order.
            raise ModelLoadError("its numbers have the other order of bytes than this machine's")
        fields = _Fields(reader)
        vocabulary = fields.texts("tokenizer.ggml.tokens")
        config = _config(fields, len(vocabulary), is_tied=all(t.name != "output.weight" for t in reader.tensors))
        tokenizer = _tokenizer(fields, vocabulary, config)
        fields.check_all_read()
        tensors = _tensors(reader, config)
    with tempfile.TemporaryDirectory(prefix=".nanovllm-", dir=folder.absolute().parent) as beside:
        made = Path(beside) / "checkpoint"  # with the permissions of any new folder, unlike the one around it
        config.save_pretrained(made)
        GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        ).save_pretrained(made)
        tokenizer.save_pretrained(made)
        save_file(tensors, made / WEIGHTS, metadata={"format": "pt"})
        (made / WEIGHTS).chmod((made / "config.json").stat().st_mode)  # safetensors gives it to this user alone
        made.rename(folder)


class _Fields:
    """The metadata of a GGUF: each field is asked for, or refused in the end."""

    def __init__(self, reader: gguf.GGUFReader) -> None:
        self._fields = reader.fields
        self._read: set[str] = set()

    def value(self, name: str, default: Any = REQUIRED) -> Any:
        self._read.add(name)
        if name in self._fields:
            try:
                return self._fields[name].contents()
            except Exception as error:  # as when it is opened: many types, one meaning
                raise ModelLoadError(f"{name} cannot be read ({type(error).__name__}: {error})") from error
        if default is REQUIRED:
            raise ModelLoadError(f"it has no field {name}")
        return default

    def integer(self, name: str, default: Any = REQUIRED, least: int = 1) -> int:
        value = self.value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
            raise ModelLoadError(f"{name}={short_repr(value)} is not an integer from {least} to 2**31 - 1")
        return value

    def number(self, name: str, default: Any = REQUIRED) -> float:
        value = self.value(name, default)
        if not isinstance(value, float) or not 0 < value < 1e30:
            raise ModelLoadError(f"{name}={short_repr(value)} is not a positive number")
        return float(str(np.float32(value)))  # 1e-05 was meant, not what float32 makes of it

    def texts(self, name: str) -> list[str]:
        value = self.value(name)
        if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
            raise ModelLoadError(f"{name} is not a list of texts")
        return value

    def expect(self, name: str, expected: Any, default: Any = REQUIRED) -> None:
        value = self.value(name, default)
        if value != expected:
            raise ModelLoadError(f"{name}={short_repr(value)} is not supported, only {expected!r} is")

    def check_all_read(self) -> None:
        unknown = sorted(
            name for name in self._fields if name not in self._read and not name.startswith(ABOUT_THE_FILE)
        )
        if unknown:
            raise ModelLoadError(f"it has fields that are not understood: {first_names(unknown)}")


@contextlib.contextmanager
def _refusing(source: Path) -> Iterator[None]:
    try:
        yield
    except ModelLoadError as error:
        raise ModelLoadError(f"{source} cannot be converted: {error}") from error


def _read(source: Path) -> gguf.GGUFReader:
    import gguf  # an extra: `check_target` has said what to install

    try:
        return gguf.GGUFReader(source)
    except Exception as error:  # it raises many types, all of which mean the same here
        raise ModelLoadError(f"{source} cannot be read as GGUF ({type(error).__name__}: {error})") from error


def _config(fields: _Fields, vocab_size: int, *, is_tied: bool) -> LlamaConfig:
    fields.expect("general.architecture", "llama")
    fields.expect("llama.vocab_size", vocab_size, vocab_size)
    hidden_size = fields.integer("llama.embedding_length")
    num_heads = fields.integer("llama.attention.head_count")
    if hidden_size % num_heads:
        raise ModelLoadError(f"llama.embedding_length={hidden_size} is not a multiple of {num_heads} heads")
    head_dim = fields.integer("llama.attention.key_length", hidden_size // num_heads)
    if head_dim % 2:
        raise ModelLoadError(f"heads have {head_dim} dimensions; rotary embedding needs pairs")
    fields.expect("llama.attention.value_length", head_dim, head_dim)
    fields.expect("llama.rope.dimension_count", head_dim, head_dim)
    special = _special_tokens(fields)
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype=DTYPE,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("llama.feed_forward_length"),
        num_hidden_layers=fields.integer("llama.block_count"),
        num_attention_heads=num_heads,
        num_key_value_heads=fields.integer("llama.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        hidden_act="silu",
        max_position_embeddings=fields.integer("llama.context_length"),
        rms_norm_eps=fields.number("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": fields.number("llama.rope.freq_base", 10000.0)},
        tie_word_embeddings=is_tied,
        bos_token_id=special["bos"],
        eos_token_id=special["eos"],
        pad_token_id=special["pad"],
    )


def _tokenizer(fields: _Fields, vocabulary: list[str], config: LlamaConfig) -> PreTrainedTokenizerFast:
    """Byte-level BPE, each digit a token of its own; transformers' conversion of GGUF would keep digits together."""
    fields.expect("tokenizer.ggml.model", "gpt2")
    fields.expect("tokenizer.ggml.pre", "smollm")
    for name in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        fields.expect(f"tokenizer.ggml.{name}", False, False)
    types = fields.value("tokenizer.ggml.token_type")
    if not isinstance(types, list) or len(types) != len(vocabulary):
        raise ModelLoadError(f"tokenizer.ggml.token_type is not a list of {len(vocabulary)} types, one for each token")
    if not {*types} <= {NORMAL_TOKEN, CONTROL_TOKEN}:
        raise ModelLoadError("tokenizer.ggml.token_type has other types than normal (1) and control (3) tokens")
    template = fields.value("tokenizer.chat_template", None)
    if template is not None and not isinstance(template, str):
        raise ModelLoadError(f"tokenizer.chat_template={short_repr(template)} is not a text")
    if len({*vocabulary}) != len(vocabulary):
        raise ModelLoadError("tokenizer.ggml.tokens has a token twice")
    merges = [merge.partition(" ") for merge in fields.texts("tokenizer.ggml.merges")]
    try:
        bpe = models.BPE(
            vocab={token: index for index, token in enumerate(vocabulary)},
            merges=[(first, second) for first, _, second in merges],
        )
    except Exception as error:  # tokenizers raises nothing narrower
        raise ModelLoadError(f"tokenizer.ggml.merges do not fit the tokens ({error})") from error
    made = Tokenizer(bpe)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(vocabulary, types, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    special = _special_tokens(fields)
    outside = [f"{name} {index}" for name, index in special.items() if index >= len(vocabulary)]
    if outside:
        raise ModelLoadError(f"{', '.join(outside)}: the vocabulary has {len(vocabulary)} tokens")
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        chat_template=template,
        **{f"{name}_token": vocabulary[index] for name, index in special.items()},
    )


def _special_tokens(fields: _Fields) -> dict[str, int]:
    eos = fields.integer("tokenizer.ggml.eos_token_id", least=0)
    return {
        "bos": fields.integer("tokenizer.ggml.bos_token_id", least=0),
        "eos": eos,
        "pad": fields.integer("tokenizer.ggml.padding_token_id", eos, least=0),
        "unk": fields.integer("tokenizer.ggml.unknown_token_id", eos, least=0),
    }


def _tensors(reader: gguf.GGUFReader, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """All tensors by their names in transformers, which knows from the config which there are and their shapes."""
    import gguf

    stored = {tensor.name: tensor for tensor in reader.tensors}
    num_layers = len({name.split(".")[1] for name in stored if name.startswith("blk.")})
    # First, since making a model of any number of layers may take for ever.
    if num_layers != config.num_hidden_layers:
        raise ModelLoadError(f"llama.block_count={config.num_hidden_layers}, but it has tensors of {num_layers} layers")
    with torch.device("meta"):
        expected = LlamaForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    sources = {name: names.get_name(name, try_suffixes=(".weight",)) for name in expected}
    missing = sorted(str(source) for source in sources.values() if source not in stored)
    if missing:
        raise ModelLoadError(f"it lacks tensors: {first_names(missing)}")
    unknown = sorted(stored.keys() - sources.values())
    if unknown:
        raise ModelLoadError(f"it has tensors that are not understood: {first_names(unknown)}")
    made = {}
    for name, source in sources.items():
        values = _dequantized(stored[source])
        if values.shape != expected[name].shape:
            shapes = f"{list(values.shape)}, not {list(expected[name].shape)}"
            raise ModelLoadError(f"{source} has the shape {shapes}, which the fields imply")
        num_heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            name.split(".")[-2]
        )
        made[name] = (values if num_heads is None else _in_halves(values, num_heads)).to(DTYPE)
    return made


def _dequantized(tensor: gguf.ReaderTensor) -> torch.Tensor:
    import gguf

    try:
        return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
    except NotImplementedError as error:
        raise ModelLoadError(f"{tensor.name} is of type {tensor.tensor_type.name}, which gguf cannot read") from error


def _in_halves(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Puts back rows of q or k, [num_heads * head_dim, hidden_size].

    The rotary embedding turns pairs of a head's rows. A GGUF has the two of a pair side by side, transformers has the
    first of all pairs and then the second of all.
    """
    pairs = weight.view(num_heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)
