"""The one-way rule: examples, tests, benchmarks -> nde -> nde.solvers -> diffrax and kin -> jax.

The checks read the imports of every file from its syntax tree. Each is shown to fail on a line of
code that breaks it: a check that cannot fail proves nothing.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Where each module of `nde` stands. It may import what stands lower, or beside it; models (1) do
# not import each other: what two of them share moves down.
FLOORS = {
    **dict.fromkeys(["_inputs", "_times", "_model", "_solve", "_recurrence", "_saving"], 0),
    **dict.fromkeys(["_initial_value", "_controlled", "_stochastic", "_steps", "_latent"], 0),
    **dict.fromkeys(["_parameters", "fields", "paths"], 0),
    **dict.fromkeys(["_coordinates", "_dosing", "_errors", "_experiments"], 0),
    "cde": 1,
    "cnf": 1,
    "hybrid": 1,
    "implicit": 1,
    "latent_ode": 1,
    "latent_sde": 1,
    "linear_cde": 1,
    "log_cde": 1,
    "measured": 1,
    "mechanics": 1,
    "ode": 1,
    "odernn": 1,
    "sde": 1,
    "symbolic": 1,
    **dict.fromkeys(["losses", "regularizers", "evaluate", "gan"], 2),
    **dict.fromkeys(["_training", "train", "inference", "_mixed_effects"], 3),
    **dict.fromkeys(["plot", "doctor", "__init__"], 4),
}
MODELS = 1
# The rooms of `nde.solvers`, and its single files: the same rule.
ROOMS = {
    **dict.fromkeys(["_compat", "inputs", "trees", "integrals"], 0),
    **dict.fromkeys(["brownian", "lanes", "methods"], 1),
    **dict.fromkeys(["estimates", "reversible"], 2),
    "adjoint": 3,
    "failures": 4,
    "__init__": 5,
}
NOT_IN_SOLVERS = ("equinox.nn", "optax", "matplotlib", "tqdm", "sklearn", "torch")
ABOVE = ("examples", "tests", "benchmarks", "docs")
RUNTIME = {"jax", "equinox", "diffrax", "optax", "optimistix", "lineax", "jaxtyping", "numpy"}
EXTRAS = {"matplotlib", "tqdm", "qpax", "sympy"}
STACK = {"jax", "jaxlib", "equinox", "diffrax", "optax", "optimistix", "lineax", "jaxtyping"}
NOT_PUBLIC = ("equinox.internal", "jax.interpreters", "jax.extend")
KEEPER = "nde.solvers._compat"


def under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def module_of(path: Path) -> str:
    """solvers/brownian/grid.py -> nde.solvers.brownian.grid"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("nde", *parts) if parts[0] == "solvers" else parts)


def used_names(module: str, source: str) -> Iterator[str]:
    """Full dotted names that are imported, or reached through an imported module."""
    tree, aliases = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
                top = alias.name.split(".")[0]
                aliases[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}"
                aliases[alias.asname or alias.name] = f"{base}.{alias.name}"
    for node in ast.walk(tree):
        chain = []
        while isinstance(node, ast.Attribute):
            chain.insert(0, node.attr)
            node = node.value
        if chain and isinstance(node, ast.Name) and node.id in aliases:
            yield ".".join([aliases[node.id], *chain])


def breaches(module: str, source: str) -> set[str]:
    """What in `source` breaks the rule, were it the module of that name; empty if nothing."""
    found = set()
    for name in used_names(module, source):
        top = name.split(".")[0]
        if module != KEEPER and not is_public(name):
            found.add(f"{name} is not public")
        if not under(module, "nde"):
            continue
        if top in ABOVE:
            found.add(f"{name} stands above the library")
        elif top not in RUNTIME | EXTRAS | {"nde"} | sys.stdlib_module_names:
            found.add(f"{name} is not a dependency")
        if under(module, "nde.solvers"):
            if any(under(name, banned) for banned in NOT_IN_SOLVERS) or (
                top == "nde" and name != "nde" and not under(name, "nde.solvers")
            ):
                found.add(f"solvers must not know {name}")
            elif under(name, "nde.solvers") and name.count(".") > 1:
                found |= misplaced_room(module.split(".")[2], name.split(".")[2])
        elif top == "nde" and name.count(".") and not under(name, "nde.solvers"):
            found |= misplaced(module.split(".")[1], name.split(".")[1])
    return found


def is_public(name: str) -> bool:
    parts = name.split(".")
    if parts[0] not in STACK:
        return True
    hidden = any(p.startswith("_") and not p.startswith("__") for p in parts)
    return not hidden and not any(under(name, package) for package in NOT_PUBLIC)


def misplaced(here: str, there: str) -> set[str]:
    """Whether `nde.here` may import `nde.there`."""
    if there == here or there not in FLOORS or here == "__init__":
        return set()
    if FLOORS[there] > FLOORS[here]:
        return {f"{here} imports {there}, which stands above it"}
    if FLOORS[there] == FLOORS[here] == MODELS:
        return {f"{here} imports {there}: models do not import each other"}
    return set()


def misplaced_room(here: str, there: str) -> set[str]:
    """Whether `nde.solvers.here` may import `nde.solvers.there`."""
    if there in ROOMS and ROOMS[there] > ROOMS.get(here, 0):
        return {f"{here} imports {there}, which stands above it"}
    return set()


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Which of the modules each one imports, anywhere in its code. A package is its `__init__`."""
    graph = {}
    for module, source in sources.items():
        found = set()
        for name in used_names(module, source):
            parts = name.split(".")
            prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
            found |= set([p for p in prefixes if p in sources][:1])
        graph[module] = found - {module}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """What is left when modules that import none that is left are taken away, one after the other."""
    left = dict(graph)
    while free := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in free:
            del left[module]
    return sorted(left)


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize(
    "path", files("nde", "solvers", "examples", "tests", "benchmarks"), ids=name_of
)
def test_no_file_breaks_the_one_way_rule(path):
    assert breaches(module_of(path), path.read_text()) == set()


@pytest.mark.parametrize("path", files("nde"), ids=name_of)
def test_every_module_has_a_floor(path):
    name = path.relative_to(ROOT / "nde").with_suffix("").parts[0]  # a package stands as one
    assert name in FLOORS, f"say in FLOORS where nde/{name} stands"


@pytest.mark.parametrize("path", files("solvers"), ids=name_of)
def test_every_room_of_solvers_has_a_floor(path):
    name = path.relative_to(ROOT / "solvers").with_suffix("").parts[0]
    assert name in ROOMS, f"say in ROOMS where solvers/{name} stands"


def test_no_files_import_each_other_in_a_circle():
    package = lambda path: module_of(path).removesuffix(".__init__")
    sources = {package(path): path.read_text() for path in files("nde", "solvers")}
    assert circle(import_graph(sources)) == []


def test_the_check_sees_a_circle():
    a = "from nde.solvers.lanes import b"
    b = "def f():\n    from nde.solvers.lanes.a import g"
    c = "from nde.solvers.lanes import a\nimport jax"
    sources = dict(
        zip(["nde.solvers.lanes.a", "nde.solvers.lanes.b", "nde.c"], [a, b, c], strict=True)
    )
    assert circle(import_graph(sources)) == ["nde.c", "nde.solvers.lanes.a", "nde.solvers.lanes.b"]
    sources["nde.solvers.lanes.b"] = "import jax"
    assert circle(import_graph(sources)) == []


@pytest.mark.parametrize(
    ("module", "source", "breach"),
    [
        ("nde.solvers.lanes.primitives", "import optax", "solvers must not know optax"),
        ("nde.solvers.lanes.primitives", "import equinox as eqx\neqx.nn.MLP", "equinox.nn"),
        ("nde.solvers.lanes.primitives", "from equinox import nn", "equinox.nn"),
        ("nde.solvers.lanes.primitives", "def f():\n    import matplotlib.pyplot", "matplotlib"),
        (
            "nde.solvers.lanes.primitives",
            "from nde.fields import MLP",
            "solvers must not know nde.fields",
        ),
        ("nde.solvers.brownian.grid", "from ...fields import MLP", "must not know nde.fields"),
        (
            "nde.solvers.lanes.primitives",
            "from jax._src import core",
            "jax._src.core is not public",
        ),
        ("nde.solvers.lanes.primitives", "import jax\njax.interpreters.ad", "not public"),
        ("nde.solvers.lanes.primitives", "from jax.extend.core import Primitive", "not public"),
        (
            "nde.solvers.lanes.donors",
            "from nde.solvers.adjoint.forward import choose",
            "lanes imports adjoint, which stands above it",
        ),
        ("nde.solvers.reversible.ees", "from nde.solvers import failures", "stands above it"),
        ("nde.ode", "import equinox.internal as eqxi", "equinox.internal is not public"),
        ("nde.ode", "import equinox as eqx\neqx.internal.while_loop", "not public"),
        ("tests.numerics.x", "from diffrax._solver import tsit5", "not public"),
        ("nde.fields", "from nde.ode import NeuralODE", "stands above it"),
        ("nde.fields", "from nde import train", "stands above it"),
        ("nde.ode", "from nde.hybrid import HybridODE", "models do not import each other"),
        ("nde.losses", "from .train import fit", "stands above it"),
        ("nde.ode", "import pandas", "pandas is not a dependency"),
        ("nde.ode", "from examples import lynx_hare", "stands above the library"),
    ],
)
def test_the_check_sees_a_breach(module, source, breach):
    assert any(breach in found for found in breaches(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nde.solvers._compat", "from jax.interpreters import ad"),
        (
            "nde.solvers.brownian.grid",
            "from nde.solvers.lanes.batch import Lanes\nimport math",
        ),
        ("nde.train", "import optax\nfrom nde.ode import NeuralODE\nfrom nde import losses"),
        ("nde.ode", "import jax\nfrom nde.solvers import DiscreteAdjoint\njax.__version__"),
        ("benchmarks.x", "import torch\nimport nde"),
    ],
)
def test_the_check_lets_the_rule_pass(module, source):
    assert breaches(module, source) == set()


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_solvers_cannot_be_imported_as_a_package_of_its_own():
    result = run_python("import solvers")
    assert result.returncode != 0
    assert "ImportError: Import this package as `nde.solvers`" in result.stderr


def test_importing_nde_loads_none_of_the_optional_packages():
    heavy = {"optax", "matplotlib", "tqdm"}
    result = run_python(f"import sys, nde, nde.solvers; print({heavy} & set(sys.modules))")
    assert (result.returncode, result.stdout.strip()) == (0, "set()"), result.stderr
    # The same question after an import that does load one: it can be answered with yes.
    result = run_python(f"import sys, optax; print({heavy} & set(sys.modules))")
    assert result.stdout.strip() == "{'optax'}"
