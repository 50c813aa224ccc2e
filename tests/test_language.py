"""Docstrings say what a thing is or does: they begin with a noun or a verb, not in the middle of a sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "nanovllm"
DANGLING = re.compile(r'"""(Of|Also|That|Or|So|To|From|By|In|Between|At|As|Whoever|Who|Below|Above) ', re.MULTILINE)
ALLOWED = {"Below this many requests"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_docstring_begins_in_the_middle_of_a_sentence(path):
    text = path.read_text(encoding="utf-8")
    found = [text[match.start() + 3 :].split("\n")[0] for match in DANGLING.finditer(text)]
    assert [line for line in found if not any(line.startswith(beginning) for beginning in ALLOWED)] == []
