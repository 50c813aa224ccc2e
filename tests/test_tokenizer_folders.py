"""Tokenizer folders as published with the models that are served: the tokens of transformers' AutoTokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nanovllm.engine.text.tokenizer import load_tokenizer
from nanovllm.models import FAMILIES
from tests.tokenizers_made import byte_fallback, byte_level, metaspace

TEXTS = [
    "the cat sat.",
    " the cat",
    "   the  cat \n sat",
    "the<|end|>cat<|im_start|>the <|im_end|> cat",
    "<think>the cat",
    "日本 é 🙂",
    "",
]
TEMPLATE = "{% for message in messages %}{{ bos_token + message['content'] + eos_token }}{% endfor %}"
CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": " sat"}]
SETTINGS = {"bos_token": "<|im_start|>", "eos_token": "<|end|>", "chat_template": TEMPLATE}
LLAMA = {**SETTINGS, "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>"}
QWEN = {**SETTINGS, "tokenizer_class": "Qwen2Tokenizer", "unk_token": "<|end|>", "pad_token": "<|im_end|>"}


def of_characters() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 2's: it puts a space before every piece of text, and a token at the beginning."""
    tokenizer = byte_fallback()
    with_beginning(tokenizer)
    return tokenizer


def with_beginning(tokenizer: PreTrainedTokenizerFast) -> None:
    first = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A {first} $B:1", special_tokens=[(first, tokenizer.vocab[first])]
    )


def spaces_first() -> PreTrainedTokenizerFast:
    """A tokenizer like Mistral's from v0.3 on: it puts a space before the first piece of text alone."""
    tokenizer = of_characters()
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def of_bytes() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 3's: bytes, and a token at the beginning."""
    tokenizer = byte_level()
    with_beginning(tokenizer)
    return tokenizer


def write(folder: Path, tokenizer: PreTrainedTokenizerFast, model_type: str, settings: dict[str, Any] | None) -> None:
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the engine takes from a tokenizer."""
    return {
        "tokens": [tokenizer.encode(text) for text in TEXTS],
        "tokens of a template": [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS],
        "texts": [tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) for text in TEXTS],
        "chat": tokenizer.apply_chat_template(CHAT, tokenize=False) if tokenizer.chat_template else None,
        "end": tokenizer.eos_token_id,
        "size": len(tokenizer),
    }


@pytest.mark.parametrize(
    ("model_type", "make", "settings"),
    [
        ("llama", of_characters, {**LLAMA, "legacy": False, "add_bos_token": True, "add_eos_token": False}),
        ("llama", of_characters, {**LLAMA, "tokenizer_class": "LlamaTokenizerFast", "legacy": True}),
        ("llama", of_characters, LLAMA),
        ("llama", of_characters, {**LLAMA, "add_bos_token": False, "add_eos_token": True}),
        ("llama", of_characters, {**LLAMA, "add_prefix_space": False}),
        ("llama", of_characters, {**LLAMA, "tokenizer_class": "CodeLlamaTokenizer"}),
        ("llama", of_characters, {**SETTINGS, "tokenizer_class": "PreTrainedTokenizerFast"}),
        ("llama", of_characters, {**SETTINGS, "tokenizer_class": "UnheardOfTokenizer"}),
        ("llama", of_characters, SETTINGS),
        ("llama", of_characters, None),
        ("llama", spaces_first, {**LLAMA, "legacy": False}),
        ("llama", spaces_first, {**LLAMA, "legacy": True}),
        ("llama", of_bytes, {**SETTINGS, "tokenizer_class": "PreTrainedTokenizerFast"}),
        ("llama", byte_level, {**SETTINGS, "tokenizer_class": "GPT2Tokenizer", "unk_token": "<|end|>"}),
        ("mistral", of_characters, {**LLAMA, "legacy": True}),
        ("mistral", spaces_first, {**LLAMA, "legacy": False, "add_prefix_space": None}),
        ("mistral", of_bytes, {**SETTINGS, "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}),
        ("qwen2", byte_level, {**QWEN, "add_prefix_space": False, "add_bos_token": False}),
        ("qwen3", byte_level, {**QWEN, "add_prefix_space": False, "add_bos_token": True}),
        ("qwen3", of_characters, {**LLAMA, "legacy": False}),
        ("smollm3", of_bytes, {**SETTINGS, "tokenizer_class": "PreTrainedTokenizerFast"}),
        ("smollm3", of_characters, LLAMA),
    ],
)
def test_tokens_equal_those_of_auto_tokenizer(tmp_path, model_type, make, settings):
    write(tmp_path, make(), model_type, settings)
    ours = load_tokenizer(tmp_path)
    assert ours is not None
    assert facts(ours) == facts(AutoTokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_a_named_class_counts_for_the_families_for_which_auto_tokenizer_takes_it(tmp_path, family):
    """For others it takes the class of the model type, whatever the checkpoint names."""
    write(tmp_path, of_characters(), family.model_type, LLAMA)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), LlamaTokenizer) == isinstance(theirs, LlamaTokenizer)


def test_the_class_may_be_in_the_config(tmp_path):
    write(tmp_path, of_characters(), "llama", SETTINGS)
    config = {"model_type": "llama", "tokenizer_class": "LlamaTokenizer"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert facts(load_tokenizer(tmp_path)) == facts(AutoTokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("model_type", "make"), [("llama", of_bytes), ("qwen3", byte_level), ("llama", metaspace), ("qwen2", of_characters)]
)
def test_a_class_that_does_not_fit_the_vocabulary_is_passed_over(tmp_path, model_type, make):
    """DeepSeek-R1-Distill-Llama is such a checkpoint; AutoTokenizer drops its spaces, or finds no tokens at all."""
    write(tmp_path, make(), model_type, LLAMA)
    ours, stored = load_tokenizer(tmp_path), Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert ours is not None
    for text in TEXTS:
        assert ours.encode(text) == stored.encode(text).ids
        assert ours.decode(ours.encode(text)) == stored.decode(stored.encode(text).ids, skip_special_tokens=False)
