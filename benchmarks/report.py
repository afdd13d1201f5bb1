"""Writes the measured tables into the pages that quote them: `python benchmarks/report.py`.

A page marks the place with `<!-- name -->` and `<!-- /name -->`, where `results/name.json` exists.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/choosing.md", "docs/cheap_dynamics.md")
OURS, DEFAULT = "DiscreteAdjoint", "RecursiveCheckpointAdjoint"


def ode_gradient(results: dict) -> str:
    """One row per case: ours, diffrax's default, the scans, and the ratios to the default."""
    lines = [
        "| state, width, batch; steps | `DiscreteAdjoint` | diffrax default | hand-written scan "
        "| without its spare stage | ours / default | compile, ours / default |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in results["cases"]:
        methods = case["methods"]
        scans = [methods.get(name, {}).get("gradient_ms") for name in ("scan", "scan lean")]
        claims = {claim["what"]: claim["value"] for claim in case["claims"]}
        entries = [
            case["title"],
            _milliseconds(methods[OURS]["gradient_ms"]),
            _milliseconds(methods[DEFAULT]["gradient_ms"]),
            *("-" if scan is None else _milliseconds(scan) for scan in scans),
            f"{claims['gradient / diffrax default']:.2f}",
            f"{claims['compile / diffrax default']:.2f}",
        ]
        lines.append(f"| {' | '.join(entries)} |")
    return "\n".join([*lines, "", f"{_machine(results)}, float32. {_command(results)}"])


def regularizers(results: dict) -> str:
    """One row per method of the digits: means over the seeds, and the cost of a training step."""
    digits, steps = results["digits"], results["step"]["methods"]
    lines = [
        "| method | test accuracy | NFE of a prediction | prediction | training | one training step |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in digits["methods"].items():
        mean = {column: values["mean"] for column, values in row.items()}
        entries = [
            name,
            f"{mean['test']:.1%}",
            f"{mean['nfe']:.1f}",
            _milliseconds(mean["prediction_ms"]),
            f"{mean['training_ratio']:.2f}",
            f"{steps[name]['ratio']:.2f}" if name in steps else "",
        ]
        lines.append(f"| {' | '.join(entries)} |")
    about = f"Means of {digits['seeds']} seeds; the last two columns in units of vanilla"
    return "\n".join([*lines, "", f"{about}. {_machine(results)}. {_command(results)}"])


def _machine(results: dict) -> str:
    machine = results["environment"]
    versions = machine["versions"]
    return (
        f"{machine['processor']}, {machine['cores']} cores, jax {versions['jax']}, "
        f"diffrax {versions['diffrax']}, {results['date']}"
    )


def _command(results: dict) -> str:
    return f"`{results['command']}`"


def _milliseconds(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value:.0f} ms"


TABLES = {"ode_gradient": ode_gradient, "regularizers": regularizers}


def filled(page: str) -> str:
    """The text of a page with its tables made anew."""
    for name, table in TABLES.items():
        results = ROOT / "benchmarks" / "results" / f"{name}.json"
        text = table(json.loads(results.read_text()))
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        page = marks.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page)
    return page


def main() -> None:
    """Refreshes every page."""
    for name in PAGES:
        path = ROOT / name
        path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()
