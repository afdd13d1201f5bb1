"""The page of benchmarks, made of `benchmarks/results/*.json` when the site is built. A hook of MkDocs.

A results file holds, anywhere in it, `claims`: what was measured, its value, and at most what was wanted.
The page gives the first sentence of the script, the machine, and all claims of the last run.
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
INTRODUCTION = """# What was measured

Every number here comes from a file in `benchmarks/results/`, written by the command above its table:
medians, ours and the peer's in turn in the same run. Most are ratios to the peer, and less is better.
*Wanted* is what was aimed at, reached or not; where it stands empty, nothing was promised.
"""


def on_files(files, *, config):
    """Called by MkDocs: add the page."""
    from mkdocs.structure.files import File

    paths = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    results = [(path.stem, json.loads(path.read_text())) for path in paths]
    sections = [section(name, found) for name, found in results if any(claims(found))]
    content = "\n".join([INTRODUCTION, *sections])
    files.append(File.generated(config, "benchmarks.md", content=content))
    return files


def section(name: str, found: dict) -> str:
    """One file: what it is about, where it was measured, and a row per claim."""
    about = found["environment"]
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items() if v)
    machine = f"{about['processor']}, {about['cores']} cores, {about['device']}; {versions}"
    rows = [
        f"| {case} | {claim['what']} | {claim['value']:.3g} | {wanted(claim['at_most'])} |"
        for case, claim in claims(found)
    ]
    return "\n".join(
        [
            f"## {name}\n",
            f"{title(name)} {machine}; {found['date']}.\n",
            f"`{found['command']}`\n",
            "| case | measured | value | wanted |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def title(name: str) -> str:
    """The first sentence of the script that made the results."""
    scripts = sorted((ROOT / "benchmarks").glob("*.py"), key=lambda path: -len(path.stem))
    script = next((s for s in scripts if name == s.stem or name.startswith(f"{s.stem}_")), None)
    text = ast.get_docstring(ast.parse(script.read_text())) if script else None
    return (text or "").partition("\n\n")[0].replace("\n", " ")


def claims(part: Any, case: str = "") -> Iterator[tuple[str, dict]]:
    """Every claim in a part of the results, with the name of its case."""
    if isinstance(part, dict):
        case = name_of(part) or case
        yield from ((case, claim) for claim in part.get("claims") or [])
        for name, inner in part.items():
            if name != "claims":
                yield from claims(inner, name if isinstance(inner, dict) and not case else case)
    elif isinstance(part, list):
        for inner in part:
            yield from claims(inner, case)


def name_of(part: dict) -> str:
    """The title of a case, or the numbers that tell it apart."""
    given = part.get("title") or part.get("case") or part.get("kind") or part.get("what") or ""
    if isinstance(given, dict):
        given = ", ".join(f"{name} {value}" for name, value in given.items())
    return str(given).replace("|", "/")


def wanted(most: float | None) -> str:
    """At most so much."""
    return "" if most is None else f"{most:.3g}"
