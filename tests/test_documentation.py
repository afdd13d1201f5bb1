"""What the pages say is what the library does: names, code and numbers."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load

import nde
import nde.solvers

ROOT = Path(__file__).parents[1]
API = sorted((ROOT / "docs" / "api").glob("*.md"))
ENTRY = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)


def public_names(module: ModuleType) -> list[str]:
    """Full names of what a module lists in `__all__`, its public modules opened up."""
    names = []
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, ModuleType):
            names += public_names(value)
        else:
            names.append(f"{module.__name__}.{name}")
    return names


def pages_with(name: str, pages: dict[str, str]) -> list[str]:
    return [page for page, text in pages.items() if name in ENTRY.findall(text)]


def api_pages() -> dict[str, str]:
    return {path.name: path.read_text() for path in API}


# `nde.fit` is `nde.train.fit`, for one; its page shows it under the name a user types.
NAMES = sorted(
    {*public_names(nde), *public_names(nde.solvers)}
    - {"nde.train.fit", "nde.inference.least_squares"}
)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_has_one_page(name):
    assert len(pages_with(name, api_pages())) == 1


def test_a_name_without_a_page_is_seen():
    pages = {"a.md": "# A\n\n::: nde.solvers.A\n", "b.md": "::: nde.solvers.AB\n"}
    assert pages_with("nde.solvers.A", pages) == ["a.md"]
    assert pages_with("nde.solvers.B", pages) == []


@pytest.mark.parametrize("path", API, ids=lambda path: path.name)
def test_every_entry_exists(path):
    for entry in ENTRY.findall(path.read_text()):
        module, _, name = entry.rpartition(".")
        value = getattr(importlib.import_module(module), name)
        assert callable(value) or isinstance(value, ModuleType), entry


def code_of(text: str) -> str:
    """The Python blocks of a page, in order, as one program."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


RUN = [
    "README.md",
    *(f"docs/{page}.md" for page in ("quickstart", "choosing", "coming_from", "extending")),
]


@pytest.mark.parametrize("page", RUN)
def test_the_code_on_a_page_runs(page, tmp_path):
    code = code_of((ROOT / page).read_text())
    assert code
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr


def test_the_numbers_on_the_pages_are_those_of_the_results():
    report = load("benchmarks/report.py")
    for page in report.PAGES:
        text = (ROOT / page).read_text()
        assert text == report.filled(text), f"run `python benchmarks/report.py` to refresh {page}"


def test_a_number_that_was_not_measured_is_seen():
    report = load("benchmarks/report.py")
    page = "<!-- ode_gradient -->\n| 1 ms |\n<!-- /ode_gradient -->\n"
    assert report.filled(page) != page
