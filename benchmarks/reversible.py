"""Gradients without stored states: `ReversibleAdjoint` beside its peers.

The problem: y' = MLP(y) with two hidden softplus layers, y0 normal, constant steps on [0, 1], loss
mean(y(1)^2), gradient with respect to all weights, the batch through `jax.vmap`, float32. `error` is
the relative difference to the same gradient in float64. All methods take the steps of one solver:

    ReversibleAdjoint            un-steps, with restarts from every 32nd state
    ReversibleAdjoint(None)      un-steps, and stores nothing
    DiscreteAdjoint              stores some states, and replays between them
    RecursiveCheckpointAdjoint   diffrax's default; on diffrax's own solver if it has the same one
    BacksolveAdjoint             diffrax: the continuous adjoint, whose gradient is approximate
    scan                         the same steps in a `jax.lax.scan`, for ReversibleHeun by hand
    torchdiffeq adjoint          if installed, in a process of its own: `odeint_adjoint`, `midpoint`
                                 with as many evaluations, the batch as one system

Four parts: `sizes` (time at the given sizes), `steps` (time, memory and error against the number of
steps), `wide` (a state so wide that memory decides), `stability` (how far a reversal drifts, and
whether the forward solve itself is right, on y' = -a y + sin t + tanh(y)/2).

    python benchmarks/reversible.py
    python benchmarks/reversible.py --long
    python benchmarks/reversible.py --quick
    python benchmarks/reversible.py --parts sizes --sizes 8,32,16,40 --solvers EES27 --seed 1
"""

import argparse
import functools as ft
import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import measure
import numpy as np
from ode_gradient import Size, parse_size, torch_network, vector_field
from reversal_drift import UNDONE, run_stability

from nde.solvers import (
    EES25,
    EES27,
    AsynchronousLeapfrog,
    DiscreteAdjoint,
    Reversible,
    ReversibleAdjoint,
    ReversibleHeun,
)

RESULTS = Path(__file__).parent / "results" / "reversible.json"
PARTS = ("sizes", "steps", "wide", "stability")
OURS, PURE, DEFAULT = "ReversibleAdjoint", "ReversibleAdjoint(None)", "RecursiveCheckpointAdjoint"
ADJOINTS = {
    OURS: ReversibleAdjoint(),
    PURE: ReversibleAdjoint(checkpoint_every=None),
    "DiscreteAdjoint": DiscreteAdjoint(),
    DEFAULT: diffrax.RecursiveCheckpointAdjoint(),
    "BacksolveAdjoint": diffrax.BacksolveAdjoint(),
}
FEW_ROUNDS = ("BacksolveAdjoint",)  # slow, and shown for orientation
SOLVERS = {
    "ReversibleHeun": ReversibleHeun(),
    "AsynchronousLeapfrog": AsynchronousLeapfrog(),
    "EES25": EES25(),
    "EES27": EES27(),
    "Reversible(Midpoint)": Reversible(diffrax.Midpoint()),
    "Reversible(Tsit5)": Reversible(diffrax.Tsit5()),
}
# Largest allowed ratios, for ReversibleHeun; the memory one for every solver.
SCAN_TARGET, DEFAULT_TARGET, MEMORY_TARGET = 1.25, 0.65, 1.2
FEWEST = 100  # steps that the memory of more steps is compared with


class Case(NamedTuple):
    """One problem and how it is measured. Plain data: it travels to other processes."""

    part: str
    size: Size
    solver: str
    seed: int
    rounds: int

    @property
    def title(self) -> str:
        """As it stands in tables."""
        state, width, batch, steps = self.size
        sizes = f"{state}" if self.part == "wide" else f"{state}, {width}, {batch}"
        return f"{self.part}: {sizes}; {self.solver}, {steps} steps"


# The problem


def problem(case: Case) -> tuple[Any, Any, jax.Array]:
    """(weights, the rest of the field, y0 of shape (batch, state)), always in float32."""
    state, width, batch, _ = case.size
    key_weights, key_y0 = jax.random.split(jax.random.key(case.seed))
    if case.part == "wide":
        field = Ring(jnp.linspace(0.5, 1.5, state, dtype=jnp.float32))
    else:
        field = eqx.nn.MLP(
            state, state, width, 2, activation=jax.nn.softplus, key=key_weights, dtype=jnp.float32
        )
    weights, static = eqx.partition(field, eqx.is_inexact_array)
    return weights, static, jax.random.normal(key_y0, (batch, state), jnp.float32)


class Ring(eqx.Module):
    """A field as wide as its state, and cheap: neighbors on a ring pull at each other."""

    weight: jax.Array

    def __call__(self, y):
        """dy/dt."""
        return jnp.tanh(self.weight * jnp.roll(y, 1)) - 0.1 * y


def diffrax_solve(case: Case, adjoint: diffrax.AbstractAdjoint, field, y0):
    """y(1) of one trajectory."""
    solver = SOLVERS[case.solver]
    if case.solver == "ReversibleHeun" and type(adjoint) is diffrax.RecursiveCheckpointAdjoint:
        solver = diffrax.ReversibleHeun()
    steps = case.size.steps
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field),
        solver,
        0.0,
        1.0,
        1 / steps,
        y0,
        args=field,
        adjoint=adjoint,
        max_steps=steps + 1,  # rounding may leave a last step of nearly no length
    )
    return solution.ys[0]


def scan_solve(case: Case, field, y0):
    """The same steps in a `jax.lax.scan`."""
    steps, solver = case.size.steps, SOLVERS[case.solver]
    h = 1 / steps
    if case.solver == "ReversibleHeun":

        def by_hand(carry, _):
            y, z, v = carry
            z = 2 * y - z + h * v
            w = field(z)
            return (y + 0.5 * h * (v + w), z, w), None

        (y, _, _), _ = jax.lax.scan(by_hand, (y0, y0, field(y0)), length=steps)
        return y

    term, zero = diffrax.ODETerm(vector_field), jnp.zeros((), y0.dtype)

    def step(carry, _):
        y, state = carry
        y, _, _, state, _ = solver.step(term, zero, zero + h, y, field, state, False)
        return (y, state), None

    state = solver.init(term, zero, zero + h, y0, field)
    (y, _), _ = jax.lax.scan(step, (y0, state), length=steps)
    return y


def methods(case: Case) -> dict[str, Callable]:
    """name -> (field, y0) -> y1, for one trajectory."""
    found = {name: ft.partial(diffrax_solve, case, adj) for name, adj in ADJOINTS.items()}
    return found | {"scan": ft.partial(scan_solve, case)}


def loss(solve: Callable, static, weights, y0):
    """mean(y1^2) over the batch."""
    y1 = jax.vmap(solve, in_axes=(None, 0))(eqx.combine(weights, static), y0)
    return jnp.mean(y1**2)


def lowered(case: Case, name: str):
    """The gradient of one method, not yet compiled."""
    weights, static, y0 = problem(case)
    gradient = jax.grad(ft.partial(loss, methods(case)[name], static))
    return jax.jit(gradient).lower(weights, y0)


# Measuring: each function runs in a fresh process


def reference(case: Case) -> list[np.ndarray]:
    """The gradient in float64, from the scan with each step recomputed: leaves in order."""
    jax.config.update("jax_enable_x64", True)
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float64), tree)
    weights, static, y0 = problem(case)
    solve = ft.partial(scan_solve, case)
    gradient = jax.jit(jax.grad(ft.partial(loss, solve, static)))(wide(weights), wide(y0))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(gradient)]


def time_methods(case: Case, exact: list[np.ndarray] | None) -> dict[str, Any]:
    """Times, memory and error of every method, and our ratios to the peers."""
    weights, _, y0 = problem(case)
    gradients, compile_s = {}, {}
    for name in methods(case):
        built = []
        build = lambda name=name, built=built: built.append(lowered(case, name).compile())
        compile_s[name] = statistics.median(measure.compile_seconds(build, 1))
        gradients[name] = built[0]
    calls = {name: ft.partial(call, weights, y0) for name, call in gradients.items()}
    often = {name: call for name, call in calls.items() if name not in FEW_ROUNDS}
    seldom = {name: call for name, call in calls.items() if name in FEW_ROUNDS}
    seconds = measure.interleaved(often, case.rounds)
    seconds |= measure.interleaved(seldom, min(case.rounds, 2))
    report = {
        name: {
            "gradient_ms": 1e3 * statistics.median(seconds[name]),
            "compile_s": compile_s[name],
            "temporary_mb": measure.temporary_megabytes(gradients[name]),
            "error": None if exact is None else difference(calls[name](), exact),
        }
        for name in calls
    }
    pairs = {"scan": (OURS, "scan"), "default": (OURS, DEFAULT), "pure": (PURE, "scan")}
    ratios = {name: measure.ratio(seconds, *pair) for name, pair in pairs.items()}
    return {"methods": report, "ratios": ratios}


def difference(gradient, exact: list[np.ndarray]) -> float:
    """As `measure.relative_difference`, in the precision of numpy."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(gradient), exact, strict=True):
        worst = max(worst, float(np.max(np.abs(np.asarray(a, b.dtype) - b)) / np.max(np.abs(b))))
    return worst


def time_torch(case: Case) -> dict[str, Any]:
    """Gradient times of torchdiffeq's adjoint, on the same weights and initial states."""
    import torch
    import torchdiffeq

    weights, _, y0 = problem(case)
    network = torch_network(weights)
    parameters = tuple(network.parameters())
    start, ts = torch.tensor(np.asarray(y0)), torch.tensor([0.0, 1.0])
    evaluations = SOLVERS[case.solver].declared.evaluations * case.size.steps
    options = {"step_size": 1 / math.ceil(evaluations / 2)}

    def gradient():
        end = torchdiffeq.odeint_adjoint(
            lambda t, y: network(y), start, ts, method="midpoint", options=options,
            adjoint_params=parameters,
        )[-1]  # fmt: skip
        torch.autograd.grad((end**2).mean(), parameters)

    gradient()
    seconds = []
    for _ in range(min(case.rounds, 3)):
        began = time.perf_counter()
        gradient()
        seconds.append(time.perf_counter() - began)
    return {"torchdiffeq adjoint": {"gradient_ms": 1e3 * statistics.median(seconds)}}


# The whole benchmark


def run_case(case: Case) -> dict[str, Any]:
    """Everything about one case, printed and returned."""
    wide = case.part == "wide"
    exact = None if wide else measure.in_fresh_process(reference, case)
    timed = measure.in_fresh_process(time_methods, case, exact)
    report = timed["methods"]
    if importlib.util.find_spec("torchdiffeq") and not wide:
        report |= measure.in_fresh_process(time_torch, case)
    columns = ["gradient_ms", "compile_s", "temporary_mb", "error"]
    rows = [[name, *(entry.get(column) for column in columns)] for name, entry in report.items()]
    print(f"\n{case.title}\n{measure.table(['', *columns], rows)}", flush=True)
    claims = judge(case, timed["ratios"])
    print("\n".join(claim.line() for claim in claims), flush=True)
    return {
        "title": case.title,
        "part": case.part,
        "solver": case.solver,
        **case.size._asdict(),
        "methods": report,
        "claims": [claim.record() for claim in claims],
    }


def judge(case: Case, ratios: dict[str, float]) -> list[measure.Claim]:
    """The ratios beside their targets."""
    judged = case.part == "sizes" and case.solver == "ReversibleHeun"
    scan, default = (SCAN_TARGET, DEFAULT_TARGET) if judged else (None, None)
    return [
        measure.Claim("gradient / scan", ratios["scan"], scan),
        measure.Claim("gradient / diffrax default", ratios["default"], default),
        measure.Claim("gradient with nothing stored / scan", ratios["pure"], None),
    ]


def judge_memory(cases: list[dict[str, Any]]) -> list[measure.Claim]:
    """Memory of the longest solve over that of the shortest, the step times taken off."""
    claims = []
    for solver in dict.fromkeys(case["solver"] for case in cases):
        own = sorted((c for c in cases if c["solver"] == solver), key=lambda c: c["steps"])
        few, many = own[0], own[-1]
        times = 4e-6 * many["batch"] * (many["steps"] - few["steps"])  # float32, each lane its own
        megabytes = lambda case: case["methods"][PURE]["temporary_mb"]
        what = f"{solver}: memory at {many['steps']} steps / at {few['steps']}"
        claims.append(
            measure.Claim(what, (megabytes(many) - times) / megabytes(few), MEMORY_TARGET)
        )
    return claims


def run_steps(cases: list[Case]) -> list[dict[str, Any]]:
    """The cases of one sweep over the number of steps, and what they say about memory."""
    found = [run_case(case) for case in cases]
    claims = judge_memory(found)
    print("\n" + "\n".join(claim.line() for claim in claims), flush=True)
    return [*found, {"part": "memory", "claims": [claim.record() for claim in claims]}]


def main() -> None:
    """Runs the parts asked for, and saves them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = [Size(16, 128, 64, 1000), Size(64, 256, 128, 200)]
    parser.add_argument("--parts", nargs="+", default=[*PARTS], choices=PARTS)
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=sizes)
    parser.add_argument(
        "--sweep", type=parse_size, default=Size(8, 32, 16, 10_000),
        help="size of the part `steps`; its steps are the most",
    )  # fmt: skip
    parser.add_argument("--solvers", nargs="+", default=["ReversibleHeun"], choices=SOLVERS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--long", action="store_true", help="up to 100 000 steps")
    parser.add_argument("--quick", action="store_true", help="tiny and few: does it run at all?")
    parser.add_argument("--out", type=Path, help=f"where to save the results ({RESULTS.name})")
    options = parser.parse_args()
    sizes, sweep, rounds, undone = options.sizes, options.sweep, options.rounds, [*UNDONE]
    wide, restarts = Size(2**16, 1, 1, 2000), [None, 32]
    if options.long:
        sweep = sweep._replace(steps=100_000)
    if options.quick:
        sizes, sweep, rounds = [Size(2, 16, 4, 10)], Size(2, 8, 2, 200), 2
        wide, restarts, undone = Size(1000, 1, 1, 100), [None], ["EES27", "ReversibleHeun"]

    counts = [FEWEST]
    while counts[-1] < sweep.steps:
        counts.append(min(10 * counts[-1], sweep.steps))
    found: list[dict[str, Any]] = []
    for solver in options.solvers:
        case = lambda part, size, solver=solver: Case(part, size, solver, options.seed, rounds)
        if "sizes" in options.parts:
            found += [run_case(case("sizes", size)) for size in sizes]
        if "steps" in options.parts:
            found += run_steps([case("steps", sweep._replace(steps=n)) for n in counts])
        if "wide" in options.parts:
            found.append(run_case(case("wide", wide)._replace(rounds=min(rounds, 3))))
    if "stability" in options.parts:
        found += [run_stability(undone, every) for every in restarts]
    report = {
        "environment": measure.environment(
            ["nde", "jax", "jaxlib", "diffrax", "equinox", "torch", "torchdiffeq"]
        ),
        "seed": options.seed,
        "rounds": rounds,
        "cases": found,
    }
    out = options.out or (None if options.quick else RESULTS)
    if out is not None:
        measure.write(out, report)


if __name__ == "__main__":
    main()
