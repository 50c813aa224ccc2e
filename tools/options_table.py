"""Makes docs/reference/options.md of `EngineConfig`: prints it, or writes it with `--write`.

The page is checked by tests/test_docs.py, so that options stand in one place: the docstring.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import textwrap
from pathlib import Path

from nanovllm.config import NOT_IN_A_CLUSTER, PIPELINE_OPTIONS, TWO_GPU_OPTIONS, EngineConfig
from nanovllm.entrypoints.engine_options import descriptions

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "options.md"

BEGINNING = """\
# Options of `LLM`

`LLM(model, **options)` takes these. They are the fields of `EngineConfig` (`nanovllm/config.py`), and this page is made
of its docstring by `python tools/options_table.py --write`: change the docstring, not the page.

An option that is unknown, out of range or contradicts another is a `ConfigError`, which names the nearest known option,
what is allowed, or the switch that the option needs. No option is silently ignored. What every option has come to, with
each `auto` and `None` resolved, is one line of the log at level INFO: `resolved options: ...`.
"""

SWITCHES = {"enable_two_gpu_pd": TWO_GPU_OPTIONS, "enable_decode_pipeline": PIPELINE_OPTIONS}


def default_of(field: dataclasses.Field[object]) -> str:
    return "required" if field.default is dataclasses.MISSING else f"`{field.default!r}`"


def type_of(field: dataclasses.Field[object]) -> str:
    written = str(field.type).replace("os.PathLike[str]", "PathLike")
    return f"`{written}`".replace(" | ", "`, `")


def rows(told: dict[tuple[str, ...], str]) -> list[str]:
    """A table of these options."""
    fields = {field.name: field for field in dataclasses.fields(EngineConfig)}
    table = ["| option | type | default | |", "|---|---|---|---|"]
    for names, text in told.items():
        types = ", ".join(dict.fromkeys(type_of(fields[name]) for name in names))
        defaults = ", ".join(dict.fromkeys(default_of(fields[name]) for name in names))
        table.append(f"| {', '.join(f'`{name}`' for name in names)} | {types} | {defaults} | {text} |")
    return table


def page() -> str:
    """The whole page: options of any engine, then those that need a switch, after the switch."""
    told = descriptions()
    listed = [name for names in told for name in names]
    assert sorted(listed) == sorted(field.name for field in dataclasses.fields(EngineConfig)), (
        "an option is not told of"
    )
    switched = {name for options in SWITCHES.values() for name in options}
    lines = [BEGINNING, "## Any engine", ""]
    lines += rows({names: text for names, text in told.items() if not switched.intersection(names)})
    for switch, options in SWITCHES.items():
        refused = f"Each of these is refused without `{switch}=True`."
        if switch == "enable_two_gpu_pd":
            names = ", ".join(f"`{name}`" for name in NOT_IN_A_CLUSTER)
            refused += f" A cluster takes those of them that mean something there: all but {names}."
        lines += ["", f"## With `{switch}=True`", "", textwrap.fill(refused, 120), ""]
        lines += rows({names: text for names, text in told.items() if set(names) <= set(options)})
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} instead of printing it")
    args = parser.parse_args()
    if args.write:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
