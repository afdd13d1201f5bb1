"""Gradient of a neural ODE solved for a batch: `DiscreteAdjoint` beside its peers.

The problem: y' = MLP(y) with two hidden softplus layers, y0 normal, loss mean(y(1)^2), gradient
with respect to all weights, the batch through `jax.vmap`, float32. `fixed` takes constant steps,
`adaptive` a PID controller from a first step of 0.01. The peers:

    RecursiveCheckpointAdjoint   diffrax's default
    DirectAdjoint                diffrax: autodiff through a bounded loop
    BacksolveAdjoint             diffrax: the continuous adjoint, whose gradient is approximate
    scan                         the same fixed steps written by hand with `jax.lax.scan`, as the
                                 tableau has them: y + h sum(b_i k_i) over all its stages
    scan lean, scan remat        without the stage that only an error estimate would need, which
                                 `scan` pays for though its weight is zero (6 evaluations a step of
                                 Tsit5, not 7); plain, and with `jax.checkpoint` around the step
    torchdiffeq                  if installed, in a process of its own: `odeint`, `odeint_adjoint`,
                                 the batch as one system. It has no fixed-step Tsit5: `fixed` is its
                                 `rk4` with as many evaluations, `adaptive` its `dopri5`

    python benchmarks/ode_gradient.py --out benchmarks/results/ode_gradient.json
    python benchmarks/ode_gradient.py --quick
    python benchmarks/ode_gradient.py --sizes 8,32,16,40 --solver Dopri5 --seed 1
"""

import argparse
import functools as ft
import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import measure
import numpy as np

from nde.solvers import DiscreteAdjoint

OURS, DEFAULT = "DiscreteAdjoint", "RecursiveCheckpointAdjoint"
ADJOINTS = {
    OURS: DiscreteAdjoint,
    DEFAULT: diffrax.RecursiveCheckpointAdjoint,
    "DirectAdjoint": diffrax.DirectAdjoint,
    "BacksolveAdjoint": diffrax.BacksolveAdjoint,
}
SCANS = {  # name -> whether it leaves stages out, and forgets them
    "scan": (False, False),
    "scan lean": (True, False),
    "scan remat": (True, True),
}

FORWARDS = (OURS, DEFAULT, "scan lean")  # the other forward solves are one of these
NO_TARGET = ("DirectAdjoint", "BacksolveAdjoint")  # slow, and shown for orientation: one round

# Largest allowed ratio to diffrax's default by (state, width, batch). The others hold for any size.
GRADIENT_TARGETS = {
    "fixed": {(2, 64, 32): 0.75, (16, 128, 64): 0.70, (64, 256, 128): 0.40},
    "adaptive": {(2, 64, 32): 0.60, (16, 128, 64): 0.60, (64, 256, 128): 0.40},
}
SCAN_TARGET, FORWARD_TARGET, COMPILE_TARGET = 1.15, 1.05, 0.5


class Size(NamedTuple):
    """How large a problem is, and how many constant steps it is solved with."""

    state: int
    width: int
    batch: int
    steps: int


class Case(NamedTuple):
    """One problem and how it is measured. Plain data: it travels to other processes."""

    stepping: str
    size: Size
    solver: str
    seed: int
    tolerance: float
    rounds: int
    compilations: int

    @property
    def title(self) -> str:
        """As it stands in tables."""
        state, width, batch, steps = self.size
        taken = f"{steps} steps" if self.stepping == "fixed" else f"{self.tolerance:g}"
        return f"{state}, {width}, {batch}; {self.stepping}, {taken}"


# The problem


def vector_field(t, y, mlp):
    """y' = MLP(y), the network being the argument of the solve."""
    return mlp(y)


def problem(case: Case) -> tuple[Any, Any, jax.Array]:
    """(weights, the rest of the network, y0 of shape (batch, state))."""
    state, width, batch, _ = case.size
    key_weights, key_y0 = jax.random.split(jax.random.key(case.seed))
    mlp = eqx.nn.MLP(state, state, width, 2, activation=jax.nn.softplus, key=key_weights)
    # Tripled weights bend the trajectories enough for an adaptive solve to need some twenty steps.
    weights, static = eqx.partition(mlp, eqx.is_array)
    return jax.tree.map(lambda x: 3 * x, weights), static, jax.random.normal(key_y0, (batch, state))


def diffrax_solve(case: Case, adjoint: diffrax.AbstractAdjoint, mlp, y0):
    """(y(1), number of steps) of one trajectory."""
    if case.stepping == "fixed":
        controller, dt0 = diffrax.ConstantStepSize(), 1 / case.size.steps
    else:
        controller, dt0 = diffrax.PIDController(rtol=case.tolerance, atol=case.tolerance), 0.01
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field),
        getattr(diffrax, case.solver)(),
        0.0,
        1.0,
        dt0,
        y0,
        args=mlp,
        stepsize_controller=controller,
        adjoint=adjoint,
    )
    return solution.ys[0], solution.stats["num_steps"]


def scan_solve(case: Case, lean: bool, remat: bool, mlp, y0):
    """The same by hand: constant steps of the solver's tableau in a `jax.lax.scan`."""
    tableau, h = getattr(diffrax, case.solver).tableau, 1 / case.size.steps
    weights = tableau.b_sol.tolist()
    if lean:
        weights = weights[: int(np.flatnonzero(weights)[-1]) + 1]
    rows = [row.tolist() for row in tableau.a_lower][: len(weights) - 1]

    def combine(y, weights, ks):
        terms = zip(weights, ks, strict=True)
        return y + h * sum(w * k for w, k in terms if w != 0 or not lean)

    def step(y, _):
        ks = [mlp(y)]
        for row in rows:
            ks.append(mlp(combine(y, row, ks)))
        return combine(y, weights, ks), None

    y1, _ = jax.lax.scan(jax.checkpoint(step) if remat else step, y0, length=case.size.steps)
    return y1, jnp.asarray(case.size.steps)


def methods(case: Case) -> dict[str, Callable]:
    """name -> (mlp, y0) -> (y1, steps), for one trajectory."""
    found = {name: ft.partial(diffrax_solve, case, kind()) for name, kind in ADJOINTS.items()}
    if case.stepping == "fixed":
        found |= {name: ft.partial(scan_solve, case, *how) for name, how in SCANS.items()}
    return found


def loss(solve: Callable, static, weights, y0):
    """(mean(y1^2) over the batch, largest number of steps)."""
    mlp = eqx.combine(weights, static)
    y1, steps = jax.vmap(solve, in_axes=(None, 0))(mlp, y0)
    return jnp.mean(y1**2), jnp.max(steps)


def compiled_gradient(case: Case, name: str, weights, static, y0):
    """The compiled gradient of one method; not yet called."""
    gradient = jax.grad(ft.partial(loss, methods(case)[name], static), has_aux=True)
    return jax.jit(gradient).lower(weights, y0).compile()


# Measuring: each function runs in a fresh process


def time_methods(case: Case) -> dict[str, Any]:
    """Times, memory and agreement of every method, and our ratios to the peers."""
    weights, static, y0 = problem(case)
    gradients, forwards = {}, {}
    for name, solve in methods(case).items():
        gradients[name] = compiled_gradient(case, name, weights, static, y0)
        if name in FORWARDS:
            forward = jax.jit(ft.partial(loss, solve, static))
            forwards[name] = forward.lower(weights, y0).compile()
    results = {name: call(weights, y0) for name, call in gradients.items()}
    exact, _ = results["scan" if "scan" in results else DEFAULT]

    def seconds(compiled, rounds):
        calls = {name: ft.partial(call, weights, y0) for name, call in compiled.items()}
        return measure.interleaved(calls, rounds)

    others = {name: gradients.pop(name) for name in NO_TARGET}
    forward_s, gradient_s = seconds(forwards, case.rounds), seconds(gradients, case.rounds)
    gradient_s |= seconds(others, 1)
    gradients |= others
    report = {
        name: {
            "gradient_ms": 1e3 * statistics.median(gradient_s[name]),
            "forward_ms": 1e3 * statistics.median(forward_s[name]) if name in forward_s else None,
            "temporary_mb": measure.temporary_megabytes(gradients[name]),
            "difference": measure.relative_difference(gradient, exact),
            "steps": int(steps),
        }
        for name, (gradient, steps) in results.items()
    }
    ratios = {
        "gradient": measure.ratio(gradient_s, OURS, DEFAULT),
        "forward": measure.ratio(forward_s, OURS, DEFAULT),
    }
    if case.stepping == "fixed":
        fastest = min(SCANS, key=lambda name: report[name]["gradient_ms"])
        ratios["scan"] = measure.ratio(gradient_s, OURS, "scan")
        ratios["best scan"] = measure.ratio(gradient_s, OURS, fastest)
    return {"methods": report, "ratios": ratios}


def time_compilation(case: Case, name: str) -> list[float]:
    """Seconds to trace, lower and compile the gradient of one method, twice."""
    build = ft.partial(compiled_gradient, case, name, *problem(case))
    return measure.compile_seconds(build, 2)


def time_torch(case: Case) -> dict[str, Any]:
    """Gradient and forward times of torchdiffeq, on the same weights and initial states."""
    import torch
    import torchdiffeq

    weights, _, y0 = problem(case)
    network = torch_network(weights)
    parameters = tuple(network.parameters())
    start, ts = torch.tensor(np.asarray(y0)), torch.tensor([0.0, 1.0])
    if case.stepping == "fixed":  # 4 evaluations a step instead of 6
        how = {"method": "rk4", "options": {"step_size": 4 / (6 * case.size.steps)}}
    else:
        how = {"method": "dopri5", "rtol": case.tolerance, "atol": case.tolerance}
    solves = {
        "torchdiffeq": torchdiffeq.odeint,
        "torchdiffeq adjoint": ft.partial(torchdiffeq.odeint_adjoint, adjoint_params=parameters),
    }

    def forward(solve):
        return (solve(lambda t, y: network(y), start, ts, **how)[-1] ** 2).mean()

    def gradient(solve):
        torch.autograd.grad(forward(solve), parameters)

    @torch.no_grad()
    def forward_alone(solve):
        forward(solve)

    gradient_s, forward_s = (
        measure.interleaved({n: ft.partial(run, s) for n, s in solves.items()}, case.rounds)
        for run in (gradient, forward_alone)
    )
    return {
        name: {
            "gradient_ms": 1e3 * statistics.median(gradient_s[name]),
            "forward_ms": 1e3 * statistics.median(forward_s[name]),
        }
        for name in solves
    }


def torch_network(weights) -> Any:
    """The same network in torch."""
    import torch

    layers = []
    for layer in weights.layers:
        linear = torch.nn.Linear(layer.weight.shape[1], layer.weight.shape[0])
        linear.weight.data = torch.tensor(np.asarray(layer.weight))
        linear.bias.data = torch.tensor(np.asarray(layer.bias))
        layers += [linear, torch.nn.Softplus()]
    return torch.nn.Sequential(*layers[:-1])


# The whole benchmark


def run_case(case: Case) -> dict[str, Any]:
    """Everything about one case, printed and returned."""
    timed = measure.in_fresh_process(time_methods, case)
    report, ratios = timed["methods"], timed["ratios"]
    compile_s = time_compilations(case, [name for name in FORWARDS if name in report])
    for name, seconds in compile_s.items():
        report[name]["compile_s"] = statistics.median(seconds)
    ratios["compile"] = measure.ratio(compile_s, OURS, DEFAULT)
    if importlib.util.find_spec("torchdiffeq"):
        report |= measure.in_fresh_process(time_torch, case)

    claims = judge(case, ratios)
    columns = ["gradient_ms", "forward_ms", "compile_s", "temporary_mb", "difference", "steps"]
    rows = [[name, *(entry.get(column) for column in columns)] for name, entry in report.items()]
    print(f"\n{case.title}\n{measure.table(['', *columns], rows)}", flush=True)
    print("\n".join(claim.line() for claim in claims), flush=True)
    return {
        "title": case.title,
        "stepping": case.stepping,
        **case.size._asdict(),
        "methods": report,
        "claims": [claim.record() for claim in claims],
    }


def time_compilations(case: Case, names: list[str]) -> dict[str, list[float]]:
    """Seconds of each method, the methods in turns: compilation depends on the mood of a machine too."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(case.compilations):
        for name in names:
            once = measure.in_fresh_process(time_compilation, case, name)
            seconds[name].append(statistics.median(once))
    return seconds


def judge(case: Case, ratios: dict[str, float]) -> list[measure.Claim]:
    """The ratios beside their targets."""
    target = GRADIENT_TARGETS[case.stepping].get(case.size[:3])
    claims = [measure.Claim("gradient / diffrax default", ratios["gradient"], target)]
    if "scan" in ratios:
        claims += [
            measure.Claim("gradient / scan", ratios["scan"], SCAN_TARGET),
            measure.Claim("gradient / best scan", ratios["best scan"], SCAN_TARGET),
        ]
    return [
        *claims,
        measure.Claim("forward / diffrax default", ratios["forward"], FORWARD_TARGET),
        measure.Claim("compile / diffrax default", ratios["compile"], COMPILE_TARGET),
    ]


def parse_size(text: str) -> Size:
    """`state,width,batch,steps`."""
    try:
        size = Size(*map(int, text.split(",")))
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not state,width,batch,steps") from None
    if min(size) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has an entry below 1")
    return size


def parse_solver(text: str) -> str:
    """The name of a diffrax solver that has a tableau to write a scan from."""
    solver = getattr(diffrax, text, None)
    if not (isinstance(solver, type) and issubclass(solver, diffrax.AbstractERK)):
        raise argparse.ArgumentTypeError(f"{text!r} is no explicit Runge-Kutta method of diffrax")
    return text


def main() -> None:
    """Runs the cases asked for, and saves them if `--out` is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    full = ["2,64,32,100", "16,128,64,100", "64,256,128,50"]
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=[*map(parse_size, full)])
    parser.add_argument(
        "--stepping", nargs="+", default=[*GRADIENT_TARGETS], choices=GRADIENT_TARGETS
    )
    parser.add_argument("--solver", type=parse_solver, default="Tsit5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tolerance", type=float, default=1e-6, help="rtol and atol, adaptive")
    parser.add_argument("--quick", action="store_true", help="tiny and few: does it run at all?")
    parser.add_argument("--out", type=Path, help="where to save the results (JSON)")
    options = parser.parse_args()
    sizes, rounds, compilations = options.sizes, 15, 3
    if options.quick:
        sizes, rounds, compilations = [Size(2, 16, 4, 10)], 3, 1

    settings = (options.solver, options.seed, options.tolerance, rounds, compilations)
    cases = [Case(stepping, size, *settings) for stepping in options.stepping for size in sizes]
    report = {
        "environment": measure.environment(
            ["nde", "jax", "jaxlib", "diffrax", "equinox", "torch", "torchdiffeq"]
        ),
        "solver": options.solver,
        "seed": options.seed,
        "tolerance": options.tolerance,
        "rounds": rounds,
        "cases": [run_case(case) for case in cases],
    }
    if options.out is not None:
        measure.write(options.out, report)


if __name__ == "__main__":
    main()
