"""Execute notebooks and store their outputs, so that the book renders what really ran.

    python book/execute.py                    the stale ones among notebooks/*.ipynb
    python book/execute.py --all              all of them
    python book/execute.py notebooks/04_*.ipynb
    python book/execute.py --check            name the stale ones, exit 1 if there are any

A notebook is stale when its digest is not the one recorded in its metadata. The digest covers its cells, every
`advcourse` module it can reach by imports, and the weights and data sets when the modules that read them are reached.
A notebook that fails is left as it was; the traceback is printed and the exit code is 1.
"""

import argparse
import ast
import hashlib
import json
import math
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "advcourse"
READS = {"advcourse.data": "datasets", "advcourse.models": "weights"}  # module -> the folder it reads
KEPT_CELL_METADATA = ("tags", "mystnb", "nbgrader")
TIMEOUT = 300  # seconds a cell


# ---------------------------------------------------------------- which sources a notebook depends on

@cache
def module_file(name: str) -> Path | None:
    """Source file of a module of the package, None if there is no such module."""
    path = ROOT.joinpath(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def imported_names(tree: ast.AST, inside: str = "") -> set[str]:
    """Dotted names of the package that the code imports or reaches as `advcourse.x`; `inside`: the code's package."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = inside.split(".")[:len(inside.split(".")) - node.level + 1] if node.level else []
            base = ".".join(above + ([node.module] if node.module else []))
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == PACKAGE:
            names.add(f"{PACKAGE}.{node.attr}")
    return {n for n in names if n.split(".")[0] == PACKAGE}


@cache
def module_imports(name: str) -> frozenset[str]:
    """Names imported by one module of the package."""
    path = module_file(name)
    assert path is not None
    inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return frozenset(imported_names(ast.parse(path.read_text(encoding="utf-8")), inside))


def closure(names: set[str]) -> list[str]:
    """Every module of the package that importing `names` can execute, parents included, sorted."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        parts = todo.pop().split(".")
        for name in (".".join(parts[:k + 1]) for k in range(len(parts))):
            if name not in found and module_file(name):
                found.add(name)
                todo.extend(module_imports(name))
    return sorted(found)


@cache
def folder_digest(folder: str) -> str:
    """SHA-256 over the names and bytes of the files the package ships in a folder; notes in Markdown do not count."""
    total = hashlib.sha256()
    top = ROOT / PACKAGE / folder
    for path in sorted(p for p in top.rglob("*") if p.is_file() and p.suffix not in {".md", ".py", ".pyc"}):
        total.update(f"{path.relative_to(top).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def digest(notebook) -> str:
    """SHA-256 of the notebook's cells and of everything in the package that they can reach."""
    from IPython.core.inputtransformer2 import TransformerManager
    total = hashlib.sha256()
    names: set[str] = set()
    for cell in notebook.cells:
        total.update(f"{cell.cell_type} {','.join(cell.metadata.get('tags', []))}\n{cell.source}\n\0".encode())
        if cell.cell_type == "code":
            names |= imported_names(ast.parse(TransformerManager().transform_cell(cell.source)))
    for name in closure(names):
        total.update(f"{name}\n{module_file(name).read_text(encoding='utf-8')}\0".encode())  # type: ignore[union-attr]
        if name in READS:
            total.update(f"{READS[name]} {folder_digest(READS[name])}\0".encode())
    return total.hexdigest()


def is_stale(path: Path) -> bool:
    import nbformat
    notebook = nbformat.read(path, as_version=4)
    return notebook.metadata.get(PACKAGE, {}).get("digest") != digest(notebook)


# ---------------------------------------------------------------- what is stored

def image_text(cell) -> str | None:
    """Alt text of the cell's picture, None without one; ValueError for two pictures or one without words."""
    pictures = [o.data for o in cell.get("outputs", [])
                if "data" in o and any(kind.startswith("image/") for kind in o.data)]
    if not pictures:
        return None
    if len(pictures) > 1:
        raise ValueError(f"{len(pictures)} pictures in one cell: one picture a cell, so that each has its own alt text")
    alt = " ".join(pictures[0].get("text/plain", "").split())
    if not alt or alt.startswith("<"):
        raise ValueError("a picture without alt text: show it with advcourse.plot.show(fig, alt=…)")
    return alt


def normalise(notebook) -> None:
    """Keep what two runs share: fixed cell ids, minimal metadata, alt text where MyST-NB looks for it."""
    widgets = notebook.metadata.get("widgets")
    shows_widget = any("widget-view" in kind for c in notebook.cells for o in c.get("outputs", [])
                       for kind in o.get("data", {}))
    notebook.metadata = type(notebook.metadata)({
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "pygments_lexer": "ipython3"}})
    if shows_widget and widgets:
        notebook.metadata["widgets"] = widgets
    for k, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{k:02d}"
        cell.metadata = type(cell.metadata)({key: cell.metadata[key] for key in KEPT_CELL_METADATA
                                             if key in cell.metadata})
        if cell.cell_type != "code":
            continue
        try:
            alt = image_text(cell)
        except ValueError as error:
            raise ValueError(f"cell {k}: {error}") from None
        cell.metadata.get("mystnb", {}).pop("image", None)
        if alt:
            cell.metadata.setdefault("mystnb", {})["image"] = {"alt": alt}
        elif "mystnb" in cell.metadata and not cell.metadata["mystnb"]:
            del cell.metadata["mystnb"]
        if any(o.output_type == "stream" and o.name == "stderr" for o in cell.outputs):
            print(f"  note: cell {k} writes to stderr; the book is built with warnings as errors", file=sys.stderr)


def to_text(notebook) -> str:
    """The notebook as JSON, with the random ids of widget models replaced by their order of creation."""
    import nbformat
    nbformat.validate(notebook)
    text = nbformat.writes(notebook)
    for bundle in notebook.metadata.get("widgets", {}).values():
        for k, model_id in enumerate(bundle.get("state", {})):
            text = text.replace(model_id, f"{k:032x}")
    return json.dumps(json.loads(text), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def write(path: Path, text: str) -> None:
    """Replace the file in one step: a reader sees the old one or the new one."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(text)
    try:
        os.chmod(file.name, path.stat().st_mode)
        os.replace(file.name, path)
    except OSError:
        os.unlink(file.name)
        raise


def execute(path: Path) -> bool:
    """Run one notebook and store it; False, and the file untouched, when a cell fails."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellControlSignal, CellExecutionError, DeadKernelError
    notebook = nbformat.read(path, as_version=4)
    before = digest(notebook)
    client = NotebookClient(notebook, kernel_name="python3", timeout=TIMEOUT, record_timing=False,
                            coalesce_streams=True,
                            extra_arguments=["--IPKernelApp.log_level=ERROR"],
                            resources={"metadata": {"path": str(path.parent)}})
    start = time.monotonic()
    try:
        client.execute()
        seconds = time.monotonic() - start
        normalise(notebook)
    except (CellControlSignal, CellExecutionError, DeadKernelError, ValueError) as error:
        print(f"FAILED {path}\n{error}", file=sys.stderr)
        return False
    notebook.metadata[PACKAGE] = {"digest": before, "seconds": 5 * math.ceil(seconds / 5)}
    write(path, to_text(notebook))
    print(f"{path.name}: {seconds:.1f} s", flush=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks (default: the stale ones of notebooks/)")
    parser.add_argument("--all", action="store_true", help="execute every notebook")
    parser.add_argument("--check", action="store_true", help="name the stale notebooks; execute nothing")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="notebooks at a time")
    options = parser.parse_args()

    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", JUPYTER_PREFER_ENV_PATH="1",
                      PYDEVD_DISABLE_FILE_VALIDATION="1")
    paths = options.paths or sorted((ROOT / "notebooks").glob("*.ipynb"))
    for path in paths:
        if not path.is_file():
            parser.error(f"no such notebook: {path}")
    if not (options.all or (options.paths and not options.check)):
        paths = [p for p in paths if is_stale(p)]
    if options.check:
        print("\n".join(f"stale: {p.name}" for p in paths) or "every notebook is fresh")
        return 1 if paths else 0
    with ThreadPoolExecutor(max(1, options.jobs)) as pool:
        results = list(pool.map(execute, [p.resolve() for p in paths]))
    if not paths:
        print("every notebook is fresh")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
