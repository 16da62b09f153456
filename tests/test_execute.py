"""book/execute.py: what is stored, what makes a notebook stale, what happens when a cell fails."""

import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tree(tmp_path):
    """A small course: a package of three modules, a data file, one notebook."""
    package = tmp_path / "advcourse"
    (package / "attacks").mkdir(parents=True)
    (package / "weights").mkdir()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "book").mkdir()
    shutil.copy(ROOT / "book" / "execute.py", tmp_path / "book")
    (package / "__init__.py").write_text("")
    (package / "threat.py").write_text("EPS = 0.1\n")
    (package / "unused.py").write_text("")
    (package / "models.py").write_text("")
    (package / "weights" / "a.safetensors").write_bytes(b"1")
    (package / "attacks" / "__init__.py").write_text("from .one_step import fgsm\n")
    (package / "attacks" / "one_step.py").write_text("from ..threat import EPS\ndef fgsm(): return EPS\n")
    write(tmp_path, "import sys; sys.path.insert(0, '..')\nfrom advcourse.attacks import fgsm\nprint(fgsm())")
    return tmp_path


def write(tree, *sources):
    nbformat.write(new_notebook(cells=[new_code_cell(s) for s in sources]), tree / "notebooks" / "01_a.ipynb")


def run(tree, *arguments):
    return subprocess.run([sys.executable, "book/execute.py", *arguments], cwd=tree, capture_output=True, text=True)


def test_executes_once_and_again_when_something_it_reaches_changes(tree):
    path = tree / "notebooks" / "01_a.ipynb"
    assert run(tree, "--check").returncode == 1
    assert run(tree).returncode == 0
    stored = path.read_text()
    assert nbformat.reads(stored, as_version=4).cells[0].outputs[0].text == "0.1\n"
    assert run(tree, "--check").returncode == 0

    (tree / "advcourse" / "unused.py").write_text("X = 1\n")
    (tree / "advcourse" / "weights" / "a.safetensors").write_bytes(b"2")  # models is not imported
    assert run(tree, "--check").returncode == 0

    (tree / "advcourse" / "threat.py").write_text("EPS = 0.2\n")  # two imports away
    assert run(tree, "--check").returncode == 1
    assert run(tree).returncode == 0
    assert "0.2" in path.read_text()

    (tree / "advcourse" / "threat.py").write_text("EPS = 0.1\n")
    assert run(tree).returncode == 0
    assert path.read_text() == stored, "the same sources must give the same file"


def test_weights_count_when_models_is_reached(tree):
    write(tree, "import advcourse\ndef f(): return advcourse.models")
    assert run(tree).returncode == 0 and run(tree, "--check").returncode == 0
    (tree / "advcourse" / "weights" / "a.safetensors").write_bytes(b"2")
    assert run(tree, "--check").returncode == 1


def test_a_failing_cell_leaves_the_file_and_says_so(tree):
    write(tree, "x = 1", "x / 0")
    before = (tree / "notebooks" / "01_a.ipynb").read_bytes()
    result = run(tree)
    assert result.returncode == 1 and "ZeroDivisionError" in result.stderr
    assert (tree / "notebooks" / "01_a.ipynb").read_bytes() == before
    assert [p.name for p in (tree / "notebooks").iterdir()] == ["01_a.ipynb"]


def test_alt_text_and_ids():
    import importlib.util
    spec = importlib.util.spec_from_file_location("execute", ROOT / "book" / "execute.py")
    execute = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(execute)

    def picture(*texts):
        return new_code_cell("f()", outputs=[new_output("display_data", {"image/png": "", "text/plain": t}) for t in texts])

    notebook = new_notebook(cells=[picture("Two\n lines."), new_code_cell("1")])
    notebook.cells[1].metadata = {"mystnb": {"image": {"alt": "old"}}, "collapsed": True}
    execute.normalise(notebook)
    assert [c.id for c in notebook.cells] == ["cell-00", "cell-01"]
    assert notebook.cells[0].metadata == {"mystnb": {"image": {"alt": "Two lines."}}}
    assert notebook.cells[1].metadata == {}
    with pytest.raises(ValueError, match="cell 0: 2 pictures"):
        execute.normalise(new_notebook(cells=[picture("One.", "Two.")]))
    with pytest.raises(ValueError, match="without alt text"):
        execute.normalise(new_notebook(cells=[picture("<Figure size 640x480 with 1 Axes>")]))
