"""Sphinx extension of the course: links to HTML anchors, and the table of chapters.

MyST resolves `[text](page.md#key)` to headings only; here `<a id="key"></a>` counts as well. Such anchors also work on
GitHub and in JupyterLab, where the notebooks are read too. `<!-- chapters -->` in a page becomes the table of chapters, with
the minutes their first cell states and the seconds their last execution took.
"""

import json
import re
from pathlib import Path

from docutils import nodes

MARK = "<!-- chapters -->"


def chapter_row(path: Path) -> str:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    first = "".join(notebook["cells"][0]["source"])
    title = re.search(r"^# (.+)$", first, re.MULTILINE)
    minutes = re.search(r"(\d+)\s+min", first)
    seconds = notebook["metadata"].get("advcourse", {}).get("seconds", "")
    exercises = len(set(re.findall(r"\*\*Exercise ([\d.]+)", json.dumps(notebook))))
    return (f"| {int(path.name[:2])} | [{title[1] if title else path.stem}](../notebooks/{path.name}) "
            f"| {minutes[1] if minutes else ''} | {seconds} | {exercises} |")


def insert_chapters(app, docname, source):
    if MARK in source[0]:
        rows = [chapter_row(p) for p in sorted(Path(app.srcdir, "notebooks").glob("[0-9]*.ipynb"))]
        head = ["| | Chapter | Minutes to read | Seconds to run | Exercises |", "| --- | --- | --- | --- | --- |"]
        source[0] = source[0].replace(MARK, "\n".join(head + rows))


def add_anchors(app, doctree):
    slugs = app.env.metadata[app.env.docname].setdefault("myst_slugs", {})
    for node in doctree.findall(nodes.raw):
        for key in re.findall(r'<a id="([^"]+)">', node.astext()):
            slugs[key] = (0, key, key)


def setup(app):
    app.connect("source-read", insert_chapters)
    app.connect("doctree-read", add_anchors)
    return {"parallel_read_safe": True, "version": "1"}
