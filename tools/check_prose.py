"""Checks that the prose of the Markdown pages is at most 120 columns wide; `--write` wraps what is not.

Paragraphs and list items are prose. Headings, tables, code blocks, images and lines without a place to break are not:
a code span or a link stays on one line.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAX_COLUMNS = 120

LIST_ITEM = re.compile(r"(\s*)([-*+]|\d+[.)])(\s+)(?=\S)")
NOT_PROSE = re.compile(r"\s*(#|\||!\[|<!--|>|---)")
UNBREAKABLE = re.compile(r"(?:`[^`]*`|\[[^\]]*\]\([^)]*\)|\S)+")
MARKER = re.compile(r"[-*+>#|]+|\d+[.)]|```.*")
"""What would begin something else than a paragraph if it began a line."""


@dataclass(frozen=True)
class Block:
    """Lines that belong together, from 1-based line `first` on; wrapped as one if they are prose."""

    first: int
    lines: list[str]
    is_prose: bool


def pages(root: Path = ROOT) -> list[Path]:
    """The project's Markdown files."""
    return [*sorted(root.glob("*.md")), *sorted((root / "docs").rglob("*.md"))]


def blocks(text: str) -> Iterator[Block]:
    """The page in parts: paragraphs, list items, and everything else line by line."""
    prose: list[str] = []
    first, in_code = 0, False
    for number, line in enumerate(text.splitlines(), start=1):
        is_fence = line.lstrip().startswith("```")
        is_other = in_code or is_fence or not line.strip() or NOT_PROSE.match(line) is not None
        if prose and (is_other or LIST_ITEM.match(line)):
            yield Block(first, prose, is_prose=True)
            prose = []
        if is_other:
            yield Block(number, [line], is_prose=False)
        else:
            first = first if prose else number
            prose.append(line)
        in_code ^= is_fence
    if prose:
        yield Block(first, prose, is_prose=True)


def wrapped(lines: list[str]) -> list[str]:
    """A paragraph or list item, filled to the width; what follows a list marker is indented to its text."""
    item = LIST_ITEM.match(lines[0])
    if item is None:
        start = indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    else:
        start, indent = item.group(0), " " * len(item.group(0))
    words = UNBREAKABLE.findall(" ".join(line.strip() for line in lines).removeprefix(start.strip()).strip())
    filled: list[list[str]] = [[]]
    for word in words:
        taken = len(indent) + sum(len(each) + 1 for each in filled[-1])
        if filled[-1] and taken + len(word) > MAX_COLUMNS:
            filled.append([filled[-1].pop()] if MARKER.fullmatch(word) and len(filled[-1]) > 1 else [])
        filled[-1].append(word)
    return [(indent if place else start) + " ".join(line) for place, line in enumerate(filled)]


def rewrapped(text: str) -> str:
    """The page with every paragraph and list item wrapped."""
    found: list[str] = []
    for block in blocks(text):
        found += wrapped(block.lines) if block.is_prose else block.lines
    return "\n".join(found) + "\n"


def too_wide(text: str) -> list[int]:
    """1-based numbers of the lines of prose that are too wide and could be broken."""
    return [
        block.first + place
        for block in blocks(text)
        if block.is_prose
        for place, line in enumerate(block.lines)
        if len(line) > MAX_COLUMNS and len(UNBREAKABLE.findall(line)) > 1 + bool(LIST_ITEM.match(line))
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="wrap the pages instead of checking them")
    args = parser.parse_args()
    num_wide = 0
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if args.write:
            page.write_text(rewrapped(text), encoding="utf-8")
            continue
        for number in too_wide(text):
            num_wide += 1
            print(f"{page.relative_to(ROOT)}:{number}: more than {MAX_COLUMNS} columns")
    if num_wide:
        print("python tools/check_prose.py --write wraps them")
    return int(num_wide > 0)


if __name__ == "__main__":
    sys.exit(main())
