"""The prose pages keep their promises: every row of the lecture has its section, every link its target."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
PAGES = sorted(BOOK.glob("*.md"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
TABLE_1 = ["L-BFGS", "FGSM", "BIM & ILCM", "JSMA", "One-pixel", "C&W", "DeepFool", "Universal perturbations", "UPSET",
           "ANGRI", "Houdini", "ATNs"]


def slug(heading):
    """The anchor MyST gives a heading."""
    from myst_parser.mdit_to_docutils.base import default_slugify
    return default_slugify(re.sub(r"[`*$]|\[([^]]*)\]\([^)]*\)", r"\1", heading))


def anchors(path):
    """What a link to a page or notebook may name behind its #."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return {slug(h) for h in re.findall(r"^#{1,3} (.+)$", text, re.MULTILINE)} | set(re.findall(r'<a id="([^"]+)">', text))


def links(text):
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:|mailto:", link)]


def chapter_rows():
    """Rows of the lecture map as (chapter, cells)."""
    rows, chapter = [], None
    for line in (BOOK / "lecture-map.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            chapter = None
        elif match := re.match(r"<!-- chapter: (\w+) -->", line):
            chapter = match[1]
        elif line.startswith("|") and not re.match(r"\| (On the slides|Row|---)", line):
            rows.append((chapter, [cell.strip() for cell in line.strip("|").split(" | ")]))
    return rows


def check_section(cell, chapter=None):
    """A link to a section of a notebook, or the word "planned" for a chapter that does not exist."""
    if cell == "planned":
        assert chapter is None or not (ROOT / "notebooks" / f"{chapter}.ipynb").exists(), f"{chapter} exists"
        return
    targets = [link for link in links(cell) if "notebooks/" in link]
    assert targets, f"no section: {cell!r}"
    for link in targets:
        file, _, anchor = link.partition("#")
        assert anchor and anchor in anchors((BOOK / file).resolve()), link
    if chapter:
        assert any(Path(link.partition("#")[0]).stem == chapter for link in targets), f"{cell} is not in {chapter}"


def test_every_row_of_the_lecture_has_its_section():
    rows = chapter_rows()
    assert len({chapter for chapter, _ in rows if chapter}) == 20
    for chapter, cells in rows:
        assert len(cells) == 3, cells
        check_section(cells[2], chapter)


def test_table_1_is_complete():
    rows = [cells for chapter, cells in chapter_rows() if chapter is None]
    assert [cells[0] for cells in rows] == TABLE_1
    from advcourse import attacks, losses
    for _, code, section in rows:
        if section != "planned":
            for module, name in re.findall(r"`(attacks|losses)\.(\w+)`", code):
                assert hasattr({"attacks": attacks, "losses": losses}[module], name), name


def test_every_slip_has_its_witness():
    text = (BOOK / "errata.md").read_text(encoding="utf-8")
    slips = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    assert [int(s.split(".")[0]) for s in slips] == list(range(1, len(slips) + 1)) and len(slips) >= 17
    for slip in slips:
        witness = slip.split("**Witness.**")[1].split("\n## ")[0].strip()
        if witness.startswith("Planned"):
            number = int(re.search(r"\(chapter (\d+)\)\.$", witness)[1])
            assert not any(p.name.startswith(f"{number:02d}_") for p in NOTEBOOKS), f"chapter {number} exists: {slip[:40]}"
        elif not witness.startswith("None: "):
            check_section(witness)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "ARCHITECTURE.md"], ids=lambda p: p.stem)
def test_links_resolve(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in links(text):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or target.suffix not in (".md", ".ipynb") or anchor in anchors(target), link


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_links_name_headings(notebook):
    text = "\n\n".join("".join(c["source"]) for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"]
                       if c["cell_type"] == "markdown")
    for link in links(re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)):
        file, _, anchor = link.partition("#")
        target = (notebook.parent / file).resolve() if file else notebook
        assert not anchor or anchor in anchors(target), link


def test_references_are_in_step_with_the_bibliography():
    assert subprocess.run([sys.executable, BOOK / "make_references.py", "--check"]).returncode == 0, \
        "run: python book/make_references.py"


def test_table_of_contents_lists_every_page_once():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    listed = [toc["root"]] + [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    there = [f"book/{p.stem}" for p in PAGES] + [f"notebooks/{p.stem}" for p in NOTEBOOKS]
    assert sorted(listed) == sorted(there)
    assert [f for f in listed if f.startswith("notebooks/")] == sorted(f for f in listed if f.startswith("notebooks/"))


def test_nothing_from_another_host():
    """Styles, scripts and pages load nothing from elsewhere (links to elsewhere are for the reader to follow)."""
    for path in [*BOOK.glob("static/*.*"), *PAGES]:
        assert not re.search(r"""(src=|url\(|@import\s)["']?https?:""", path.read_text(encoding="utf-8")), path.name


def test_readme_shows_the_shipped_models():
    """The block between the two comments is what the command in the first one prints."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- begin: python -m advcourse models -->\n(.*?)<!-- end -->", text, re.DOTALL)[1]
    printed = subprocess.run([sys.executable, "-m", "advcourse", "models"], capture_output=True, text=True, check=True).stdout
    assert block.strip() == printed.strip(), "run: python book/make_readme.py"


@pytest.mark.parametrize("page", [ROOT / "README.md", BOOK / "how-to-use.md"], ids=lambda p: p.stem)
def test_code_in_prose_runs(page, capsys):
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        exec(compile(block, page.name, "exec"), {})
    assert capsys.readouterr().out.strip()
