"""Sphinx extension: let `[text](page.md#key)` point at `<a id="key"></a>` in a Markdown page.

MyST resolves such links to headings only. An HTML anchor also works on GitHub and in JupyterLab, where the notebooks
are read too, so the references page and the lecture map use it.
"""

import re

from docutils import nodes


def add_anchors(app, doctree):
    slugs = app.env.metadata[app.env.docname].setdefault("myst_slugs", {})
    for node in doctree.findall(nodes.raw):
        for key in re.findall(r'<a id="([^"]+)">', node.astext()):
            slugs[key] = (0, key, key)


def setup(app):
    app.connect("doctree-read", add_anchors)
    return {"parallel_read_safe": True, "version": "1"}
