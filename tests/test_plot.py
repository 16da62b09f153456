"""Tables and figures carry their words with them."""

import pytest

from advcourse import plot


def test_table_names_its_columns_and_rows(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    plot.table(["attack", "success"], [["A <1>", "50%"]], "One row.")
    html = shown[0].data
    assert '<th scope="col">success</th>' in html and '<th scope="row">A &lt;1&gt;</th><td>50%</td>' in html
    assert "<caption>One row.</caption>" in html


@pytest.mark.parametrize("rows, caption, message", [([["a"]], "Words.", "row 0 has 1 cells"), ([["a", "b"]], " ", "caption")])
def test_table_refuses(rows, caption, message):
    with pytest.raises(ValueError, match=message):
        plot.table(["x", "y"], rows, caption)


def test_a_figure_needs_words():
    with pytest.raises(ValueError, match="alt"):
        plot.show(None, alt=" ")
