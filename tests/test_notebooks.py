"""What every committed notebook must be: executed in order, without errors, fresh, and readable on its own."""

import ast
import importlib.util
import re
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
KEYS = set(re.findall(r"^@\w+\{([^,]+),", (ROOT / "book" / "references.bib").read_text(encoding="utf-8"), re.MULTILINE))

spec = importlib.util.spec_from_file_location("execute", ROOT / "book" / "execute.py")
execute = importlib.util.module_from_spec(spec)
spec.loader.exec_module(execute)

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [c for c in read(path).cells if c.cell_type == "code" and c.source.strip()]


def prose(path):
    return "\n\n".join(c.source for c in read(path).cells if c.cell_type == "markdown")


def without_code(markdown):
    return re.sub(r"```.*?```|`[^`\n]*`", "", markdown, flags=re.DOTALL)


def test_executed_in_order_without_errors(path):
    cells = code_cells(path)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    assert any(c.outputs for c in cells)
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error" or "raises-exception" in cell.metadata.get("tags", [])
            assert output.get("name") != "stderr", f"{cell.id} prints to stderr: {output.text[:200]}"


def test_fresh(path):
    assert not execute.is_stale(path), "run: python book/execute.py"


def test_normalised(path):
    notebook = read(path)
    assert [c.id for c in notebook.cells] == [f"cell-{k:02d}" for k in range(len(notebook.cells))]
    assert set(notebook.metadata) <= {"kernelspec", "language_info", "advcourse", "widgets"}
    assert "version" not in notebook.metadata.language_info


def test_no_machine_paths(path):
    outputs = str([c.outputs for c in code_cells(path)])
    assert not re.search(r"/(root|home|tmp|work|Users)/", outputs)


def test_opens_with_title_promise_and_setup(path):
    cells = read(path).cells
    assert re.match(r"# \S", cells[0].source)
    assert re.search(r"\d+\s+min", cells[0].source) and re.search(r"\d+\s+s(econds)?\b", cells[0].source)
    url = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    setup, first = cells[1], read(NOTEBOOKS[0]).cells[1]
    assert setup.cell_type == "code" and setup.source == first.source
    assert f'"git+{url}"' in setup.source
    assert {"hide-input", "nbval-ignore-output"} <= set(setup.metadata.tags)


def test_ends_with_take_away(path):
    assert re.findall(r"^## (.+)$", without_code(prose(path)), re.MULTILINE)[-1].strip() == "Take-away"


def test_exercises_have_hint_and_solution(path):
    text = prose(path)
    starts = [m.start() for m in re.finditer(r"\*\*Exercise \d+\.\d+", text)]
    assert len(starts) >= 3
    for start, end in zip(starts, starts[1:] + [len(text)], strict=True):
        exercise = text[start:end]
        assert re.search(r"\(\d+ min, ★{1,3}\)", exercise), exercise[:80]
        assert re.search(r"<summary>Hint", exercise) and re.search(r"<summary>Solution", exercise), exercise[:80]
    numbers = re.findall(r"\*\*Exercise (\d+)\.(\d+)", text)
    assert numbers == [(str(int(path.name[:2])), str(k + 1)) for k in range(len(numbers))]
    assert text.count("<details>") == text.count("</details>")


def test_says_what_is_not_shown(path):
    assert "What this does not show" in prose(path)


def test_pictures_have_alt_text(path):
    for cell in code_cells(path):
        pictures = [o for o in cell.outputs if any(kind.startswith("image/") for kind in o.get("data", {}))]
        if pictures:
            assert len(pictures) == 1, cell.id
            alt = cell.metadata.mystnb.image.alt
            assert alt == " ".join(pictures[0].data["text/plain"].split())
            assert len(alt.split()) >= 5 and alt.endswith("."), alt


def test_markdown_only(path):
    text = without_code(prose(path))
    assert not re.search(r"^:::|^\(\S+\)=\s*$|\{[a-z:-]+\}$", text, re.MULTILINE), "MyST syntax"
    assert not re.search(r"^```\{|\{(cite|eq|ref|numref|doc|term)[:a-z]*\}`", prose(path), re.MULTILINE), "MyST syntax"


def test_code_fits_the_page(path):
    for cell in code_cells(path):
        assert "hide-input" in cell.metadata.get("tags", []) or max(map(len, cell.source.splitlines())) <= 75, cell.id
        assert len(cell.source.splitlines()) <= 40, cell.id
        if not cell.source.startswith("%"):
            ast.parse(cell.source)


def test_links_resolve(path):
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(prose(path)))
    for link in links:
        if re.match(r"https?:|mailto:", link):
            continue
        file, _, anchor = link.partition("#")
        assert not file or (path.parent / file).is_file(), link
        if file.endswith("references.md"):
            assert anchor in KEYS, link
