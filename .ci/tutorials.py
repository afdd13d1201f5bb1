"""Tutorials: scripts that are run when the site is built. A hook of MkDocs.

A script `docs/tutorials/NN_name.py` is a row of cells, each opened by `# %%` (code) or `# %% [markdown]`
(text, in comments). It becomes a page with what its cells print and draw, and a notebook to download.
A cell that raises, such as by an `assert`, stops the build.

Pages are kept in `build/tutorials/` under a hash of the script, of the packages and of this file, so
that a build runs what has changed. `python .ci/tutorials.py SCRIPT FOLDER` runs one script.
"""

import ast
import contextlib
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
CELL = re.compile(r"^# %%(?P<kind>.*)$", re.MULTILINE)
SECONDS = 300  # a script that takes longer is stuck; it should take one minute


def on_files(files, *, config):
    """Called by MkDocs: add the pages, pictures and notebooks of all scripts."""
    from mkdocs.structure.files import File

    scripts = sorted((ROOT / "docs" / "tutorials").glob("*.py"))
    with ThreadPoolExecutor(2) as at_once:  # a script is compiled on one core for most of its time
        folders = list(at_once.map(results, scripts))
    for folder in folders:
        for made in sorted(folder.iterdir()):
            uri = f"tutorials/{made.name}"
            files.append(File.generated(config, uri, content=made.read_bytes()))
    return files


def results(script: Path) -> Path:
    """The folder with what a script makes, run if it or the packages have changed."""
    folder = ROOT / "build" / "tutorials" / f"{script.stem}-{fingerprint(script)}"
    if not folder.exists():
        for old in folder.parent.glob(f"{script.stem}-*"):
            shutil.rmtree(old)
        partial = folder.with_name(f"partial-{script.stem}")
        shutil.rmtree(partial, ignore_errors=True)
        subprocess.run([sys.executable, __file__, script, partial], check=True, timeout=SECONDS)
        partial.rename(folder)
    return folder


def fingerprint(script: Path) -> str:
    """Changes with the script, the packages and this file."""
    sources = [p for folder in ("nde", "solvers") for p in sorted((ROOT / folder).rglob("*.py"))]
    digest = hashlib.sha256()
    for path in [Path(__file__), script, *sources]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cells(text: str) -> list[tuple[bool, str]]:
    """Whether a cell is text, and what stands in it."""
    marks = list(CELL.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    found = []
    for mark, end in zip(marks, ends, strict=True):
        body = text[mark.end() : end].strip("\n")
        is_text = "[markdown]" in mark["kind"]
        found.append((is_text, re.sub(r"^# ?", "", body, flags=re.MULTILINE) if is_text else body))
    return found


def run(script: Path, folder: Path) -> None:
    """Write the page, the pictures and the notebook of a script."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True)
    found = cells(script.read_text())
    page, space = [], {"__name__": "__main__"}
    for number, (is_text, body) in enumerate(found):
        if is_text:
            page.append(body)
            continue
        page.append(f"```python\n{body}\n```")
        printed = printed_by(body, space, f"{script.name}, cell {number}")
        if printed.strip():
            page.append(f"```text\n{printed.rstrip()}\n```")
        page += pictures(folder, f"{script.stem}_{number}")
    page.insert(1, f"[Notebook]({script.stem}.ipynb) · [Script]({script.name})")
    (folder / f"{script.stem}.md").write_text("\n\n".join(page) + "\n")
    (folder / f"{script.stem}.ipynb").write_text(json.dumps(notebook(found), indent=1))


def printed_by(body: str, space: dict, name: str) -> str:
    """Run a cell; what it prints, and the value of its last line if that is an expression."""
    import matplotlib.pyplot as plt

    tree = ast.parse(body, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            exec(compile(tree, name, "exec"), space)
            value = eval(compile(ast.Expression(last.value), name, "eval"), space) if last else None
        except BaseException:
            sys.stderr.write(out.getvalue())
            raise
    shown = value is not None and not plt.get_fignums()  # a picture says what its parts are
    return out.getvalue() + (f"{value!r}\n" if shown else "")


def pictures(folder: Path, name: str) -> list[str]:
    """Save and close the open figures; their links, named by the titles of the figures."""
    import matplotlib.pyplot as plt

    links = []
    for number in plt.get_fignums():
        figure = plt.figure(number)
        titles = [ax.get_title() or ax.get_ylabel() for ax in figure.axes]
        path = folder / f"{name}_{number}.png"
        figure.savefig(path, dpi=120)
        links.append(f"![{', '.join(t for t in titles if t) or 'Figure'}]({path.name})")
    plt.close("all")
    return links


def notebook(found: list[tuple[bool, str]]) -> dict:
    """The cells as a notebook, not yet run."""
    code = {"cell_type": "code", "outputs": [], "execution_count": None}
    made = [
        {**({"cell_type": "markdown"} if is_text else code), "id": f"cell-{i}"}
        | {"metadata": {}, "source": body.splitlines(keepends=True)}
        for i, (is_text, body) in enumerate(found)
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {
        "cells": made,
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]))
