"""The checkpoint's tokenizer: how it is loaded, what ends a text, and how a prompt becomes tokens."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nanovllm.errors import ModelLoadError, RequestError, short_repr
from nanovllm.utils.checkpoint import TOKENIZER_FILES, find_file, read_json

logger = logging.getLogger(__name__)

VOCABULARY_FILES = ("tokenizer.json", "vocab.json")
UNREAD_FILES = ("tokenizer.model", "tekken.json")
"""Vocabularies that only other packages read: sentencepiece, mistral-common."""
LLAMA_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer")
"""Classes of transformers that take the vocabulary of a tokenizer.json, but split texts in a way of their own."""
NOT_BY_CLASS = ("mistral", "mixtral", "qwen2")
"""Model types of which AutoTokenizer overrules the class that a checkpoint names."""
NEUTRAL_SETTINGS: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "bad_words_ids": [],
    "sequence_bias": {},
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "stop_strings": [],
}
"""What transformers' `generate` follows in a generation_config.json, or without one in config.json, and this engine
ignores: the values without effect."""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint, None if it has no tokenizer files.

    Raises:
        ModelLoadError: the files cannot be read.
    """
    there = {name for name in TOKENIZER_FILES if find_file(folder, name) is not None}
    if not there.intersection(VOCABULARY_FILES):
        unread = [name for name in UNREAD_FILES if find_file(folder, name) is not None]
        if unread:
            logger.warning(
                "%s has %s, but no tokenizer.json: prompts can be token ids alone. To make one, load the tokenizer "
                "with transformers and save it there (save_pretrained)",
                folder,
                " and ".join(unread),
            )
        return None
    try:
        tokenizer = _tokenizer_class(folder).from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many types, all of which mean the same here
        raise ModelLoadError(
            f"the tokenizer of {folder} cannot be loaded ({error}); download its files again"
        ) from error
    if not tokenizer.is_fast:
        raise ModelLoadError(f"{folder} has no tokenizer.json; save its tokenizer with transformers' save_pretrained")
    # Otherwise the first call resets both, which is not thread-safe.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _tokenizer_class(folder: Path) -> Any:
    if (folder / "tokenizer.json").is_file():
        name = _llama_class(folder)
        return PreTrainedTokenizerFast if name is None else getattr(transformers, name)
    # AutoTokenizer converts older files, but importing it takes as long as importing torch.
    from transformers import AutoTokenizer

    return AutoTokenizer


def _llama_class(folder: Path) -> str | None:
    """The one of `LLAMA_CLASSES` that splits texts as AutoTokenizer does, None if tokenizer.json says how.

    The two ways differ after special tokens and at spaces in the beginning. A vocabulary of bytes, as of
    DeepSeek-R1-Distill-Llama, goes by its tokenizer.json, although AutoTokenizer takes such a class for it if it is
    named: that drops all spaces (transformers issue 45488).
    """
    config = read_json(folder, "config.json") or {}
    named = (read_json(folder, "tokenizer_config.json") or {}).get("tokenizer_class") or config.get("tokenizer_class")
    name = str(named).removesuffix("Fast")
    if name not in LLAMA_CLASSES or config.get("model_type") in NOT_BY_CLASS:
        return None
    model = (read_json(folder, "tokenizer.json") or {}).get("model")
    is_of_characters = isinstance(model, dict) and model.get("type") == "BPE" and model.get("byte_fallback") is True
    return name if is_of_characters else None


def end_of_sequence_ids(
    folder: Path, config: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> frozenset[int]:
    """Tokens that end a text: generation_config.json's, without that file config.json's, and the tokenizer's own.

    Ids that the model cannot sample are left out.

    Raises:
        ModelLoadError: an entry is not a token id or a list of them.
    """
    generation = read_json(folder, "generation_config.json")
    listed = (config if generation is None else generation).get("eos_token_id")
    ids = [] if listed is None else listed if isinstance(listed, list) else [listed]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise ModelLoadError(
            f"eos_token_id={short_repr(listed)} in {folder} is not a token id or a list of them; correct it"
        )
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    return frozenset(token for token in ids if token < vocab_size)


def warn_of_generation_settings(folder: Path, config: dict[str, Any]) -> None:
    """Warns of sampling settings in generation_config.json, or without that file in config.json.

    Only `SamplingParams` say how tokens are sampled.
    """
    generation = read_json(folder, "generation_config.json")
    name_of_file, asked = ("config.json", config) if generation is None else ("generation_config.json", generation)
    unfollowed = [
        f"{name}={short_repr(asked[name])}"
        for name, neutral in NEUTRAL_SETTINGS.items()
        if name in asked and asked[name] is not None and asked[name] != neutral
    ]
    if unfollowed:
        logger.warning(
            "%s: settings in %s are ignored: %s; pass SamplingParams", folder, name_of_file, ", ".join(unfollowed)
        )


def check_text(tokenizer: PreTrainedTokenizerBase | None, text: str) -> PreTrainedTokenizerBase:
    """The tokenizer, if it can tokenize this text.

    Raises:
        RequestError: the checkpoint has no tokenizer, or the text is not valid Unicode.
    """
    if tokenizer is None:
        raise RequestError("this checkpoint has no tokenizer files; pass the prompt as a list of token ids")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not valid Unicode ({error}); remove the lone surrogate") from error
    return tokenizer
