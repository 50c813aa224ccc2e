"""The pages: their links, the files that they name, the tables that are made of code, and what the README promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanovllm import LLM, errors
from nanovllm.demo import DEMO_MODEL_PATH
from tools import check_prose, options_table

ROOT = Path(__file__).parent.parent
PAGES = check_prose.pages()
README = ROOT / "README.md"
TOUR = ROOT / "docs" / "tour.md"

CODE_SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH_LIKE = re.compile(r"(?<![\w/.$~*-])[\w.*-]+(?:/[\w.*-]+)*\.(?:py|md|cu|png|jinja|toml|txt)\b(?:::(\w+))?")
FOLDERS = ("", "nanovllm", "benchmarks")
"""What a path in a page may be relative to."""
NO_FILES_OF_OURS = {"file.py"}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code_blocks(page: Path) -> str:
    return re.sub(r"(?ms)^ *```.*?^ *```", "", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the page's headings."""
    headings = re.findall(r"(?m)^#+ (.+)$", without_code_blocks(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def named_files(text: str) -> list[tuple[str, str | None]]:
    """Paths in code spans, each with the test that it names by `::`."""
    spans = CODE_SPAN.findall(text)
    return [(found[0].partition("::")[0], found[1]) for span in spans for found in PATH_LIKE.finditer(span)]


def files_named(path: str) -> list[Path]:
    """The project's files that a path in a page means; a bare name means any file of that name."""
    if "/" in path:
        return [found for folder in FOLDERS for found in (ROOT / folder).glob(path)]
    tracked = [ROOT, *(ROOT / folder for folder in ("nanovllm", "benchmarks", "docs", "tests", "tools"))]
    return [found for folder in tracked for found in (folder.glob(path) if folder == ROOT else folder.rglob(path))]


def lines_of(path: str) -> int:
    return len((ROOT / path).read_text(encoding="utf-8").splitlines())


def core_files(page: Path) -> list[str]:
    """The files that a page's tables have in their first or second column, in code spans, in order."""
    return re.findall(r"(?m)^\| (?:\d \| )?`(nanovllm/[\w/]+\.py)` \|", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page):
    for target in LINK.findall(without_code_blocks(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target} does not exist"
        if anchor:
            assert anchor in anchors(linked), f"{target}: {relative(linked)} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_named_files_and_tests_exist(page):
    for path, test in named_files(without_code_blocks(page)):
        found = files_named(path)
        assert found, f"`{path}` is not a file of this project"
        if test is not None:
            names = [
                re.search(rf"(?m)^ *((def|class) {test}\b|{test} = )", file.read_text(encoding="utf-8"))
                for file in found
            ]
            assert any(names), f"{path} has no {test}"


def test_the_tests_above_would_notice():
    assert named_files("see `engine/gone.py`, `pytest tests/test_docs.py::test_gone -k x` and not.py") == [
        ("engine/gone.py", None),
        ("tests/test_docs.py", "test_gone"),
    ]
    assert not files_named("engine/gone.py")
    assert files_named("layers/*.py")
    assert files_named("engine/scheduler.py") == [ROOT / "nanovllm" / "engine" / "scheduler.py"]
    assert "what-each-feature-needs" in anchors(README)


def test_every_page_is_reached_from_the_readme():
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in LINK.findall(README.read_text("utf-8"))}
    assert {page for page in PAGES if page != README} <= linked


def test_prose_fits():
    wide = [f"{relative(page)}:{line}" for page in PAGES for line in check_prose.too_wide(page.read_text("utf-8"))]
    assert not wide, "python tools/check_prose.py --write wraps them"


def test_wrapping_changes_prose_alone():
    words = "word " * 40
    code = f"```\n{words}\n```"
    table = f"| {words} |"
    item = f"- {words}`a span that stays together {'x' * 30}` end\n  and its second line"
    page = f"# A page\n\n{words}\n\n{code}\n\n{table}\n\n{item}\n- next\n"
    assert check_prose.too_wide(page) == [3, 11]
    wrapped = check_prose.rewrapped(page)
    assert not check_prose.too_wide(wrapped)
    assert wrapped.split() == page.split()
    assert code in wrapped
    assert table in wrapped
    assert f"`a span that stays together {'x' * 30}`" in wrapped
    assert check_prose.rewrapped(wrapped) == wrapped


def test_no_line_begins_like_something_else():
    """A number and a dot at a line's beginning would be a list."""
    wrapped = check_prose.rewrapped("x" * 115 + " in 2026. - Then\n")
    assert [line for line in wrapped.splitlines() if re.match(r"(-|\d+\.) ", line)] == []


def test_the_check_fails_where_prose_is_too_wide(tmp_path, monkeypatch, capsys):
    (tmp_path / "README.md").write_text("word " * 40, encoding="utf-8")
    monkeypatch.setattr(check_prose, "ROOT", tmp_path)
    monkeypatch.setattr(check_prose, "pages", lambda: [tmp_path / "README.md"])
    monkeypatch.setattr(sys, "argv", ["check_prose.py"])
    assert check_prose.main() == 1
    assert "README.md:1" in capsys.readouterr().out


def test_the_page_of_options_is_made_of_them():
    made = options_table.PAGE.read_text(encoding="utf-8")
    assert made == options_table.page(), "python tools/options_table.py --write"


def test_options_stand_in_one_table():
    row = re.compile(r"(?m)^\| `gpu_memory_utilization`")
    assert [page for page in PAGES if row.search(page.read_text(encoding="utf-8"))] == [options_table.PAGE]


def test_every_error_and_metric_is_in_the_reference(tiny_path):
    reference = ROOT / "docs" / "reference"
    told = (reference / "errors.md").read_text(encoding="utf-8")
    assert [name for name in errors.__all__ if name != "NanoVLLMError" and f"| `{name}` |" not in told] == []
    told = (reference / "metrics.md").read_text(encoding="utf-8")
    with LLM(tiny_path, device="cpu") as llm:
        assert [name for name in llm.metrics() if f"`{name}`" not in told] == []


def test_the_core_is_as_long_as_the_readme_says():
    rows = re.findall(r"(?m)^\| `(nanovllm/[\w/]+\.py)` \| ([\d,]+) \|", README.read_text(encoding="utf-8"))
    assert len(rows) == 8
    counts = {path: lines_of(path) for path, _ in rows}
    wrong = {
        path: counts[path]
        for path, said in rows
        if abs(int(said.replace(",", "")) - counts[path]) > 0.05 * counts[path]
    }
    assert not wrong, f"the README is more than 5 % off: {wrong}"
    assert [path for path, _ in rows] == core_files(TOUR)[:8], "the tour reads other files, or in another order"


def test_the_package_is_as_long_as_the_readme_says():
    (said,) = re.findall(r"some (\d+),000 lines", README.read_text(encoding="utf-8"))
    total = sum(lines_of(relative(path)) for path in (ROOT / "nanovllm").rglob("*.py"))
    assert int(said) == round(total / 1000), f"it has {total} lines"


def test_commands_of_the_readme_exist():
    text = README.read_text(encoding="utf-8")
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8")))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) <= targets
    scripts = re.findall(r"(?m)^\.venv/bin/python (\S+\.py)", text)
    assert scripts == ["example.py", "example_two_gpu.py"]
    for script in scripts:
        assert (ROOT / script).exists()


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_python_of_the_pages_compiles(page):
    for block in re.findall(r"(?ms)^```python\n(.*?)^```", page.read_text(encoding="utf-8")):
        compile(block, str(page), "exec")


def test_code_of_the_how_to_for_families_is_that_of_the_files():
    page = (ROOT / "docs" / "how-to" / "add-a-model-family.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", page)
    assert len(blocks) == 2
    code = (ROOT / "nanovllm" / "models" / "smollm3.py").read_text(encoding="utf-8")
    assert [block for block in blocks if block not in code] == []


def test_the_quick_start_runs():
    """Word for word, but for the model: the bundled one; tests/test_weights.py has the real one."""
    (code,) = re.findall(r"(?ms)^```python\n(.*?)^```", README.read_text(encoding="utf-8"))
    assert code.count('LLM("smollm2")') == 1
    code = code.replace('"smollm2"', f"{str(DEMO_MODEL_PATH)!r}, device='cpu', num_kvcache_blocks=64")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout) > 100


def test_the_architecture_has_a_line_for_every_module():
    told = without_code_blocks(ROOT / "docs" / "explanation" / "architecture.md").partition("## Files")[2]
    listed = {file for path, _ in named_files(told) for file in files_named(path)}
    modules = {path for path in (ROOT / "nanovllm").rglob("*.py") if path.name != "__init__.py"}
    assert sorted(map(relative, modules - listed - {ROOT / "nanovllm" / "version.py"})) == []
