"""The options of `LLM` as options of a command, with their help: what `EngineConfig` says of them."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from typing import Any

from nanovllm.config import EngineConfig

KINDS: dict[str, type] = {"int": int, "float": float, "str": str}


def descriptions() -> dict[tuple[str, ...], str]:
    """What the docstring of `EngineConfig` says, by the option or options that it says it of."""
    docstring = inspect.getdoc(EngineConfig) or ""
    arguments = docstring.partition("Args:\n")[2].partition("\nRaises:")[0]
    found: dict[tuple[str, ...], str] = {}
    for entry in re.split(r"\n(?=    \w)", "\n" + arguments.rstrip())[1:]:
        names, _, text = entry.strip().partition(": ")
        found[tuple(names.split(", "))] = " ".join(text.split())
    return found


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Adds an option for every field of `EngineConfig` but the model, such as `--max-num-seqs`."""
    group = parser.add_argument_group("the engine", "The options of LLM.")
    fields = {field.name: field for field in dataclasses.fields(EngineConfig)}
    for names, text in descriptions().items():
        for name in names:
            if name != "model":
                _add(group, fields[name], text)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, as keywords of `LLM`."""
    names = [field.name for field in dataclasses.fields(EngineConfig) if field.name != "model"]
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _add(group: argparse._ArgumentGroup, field: dataclasses.Field[Any], text: str) -> None:
    flag = "--" + field.name.replace("_", "-")
    about = f"{text[0].upper()}{text[1:]} Default: {field.default}.".replace("%", "%%").replace("`", "")
    kind = str(field.type).partition(" |")[0]
    if kind == "bool":
        # Not given is not the same as the default: some options are refused beside others.
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=about)
    else:
        group.add_argument(flag, type=KINDS[kind], default=argparse.SUPPRESS, metavar=kind.upper(), help=about)
