"""Gradient of a neural CDE over a batch: `DiscreteAdjoint` and `ReversibleAdjoint` beside diffrax's
default and torchcde.

The problem: irregular series of two channels and time, F a network of one hidden softplus layer with
final tanh, loss mean(z(T)^2), gradient with respect to all weights, the batch through `jax.vmap`,
float32, paths precomputed. Two ways to solve, the same for every method of a case:

    knots       one step of Heun per observation, on straight pieces (reversible Heun: `ReversibleHeun`,
                and diffrax's own solver of that name with its default adjoint)
    adaptive    Tsit5 under a PID controller, on the cubic with backward differences

torchcde, if installed, runs in a process of its own on the same weights and series: `midpoint` with a
step per observation (as many evaluations as Heun), and `dopri5`.

    python benchmarks/cde.py --out benchmarks/results/cde.json
    python benchmarks/cde.py --quick
    python benchmarks/cde.py --sizes 8,128,32,100 --seed 1
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

from nde import paths
from nde.cde import NeuralCDE
from nde.fields import MatrixField
from nde.solvers import ReversibleAdjoint, ReversibleHeun

CHANNELS = 3  # time and two values
OURS, REVERSIBLE = "DiscreteAdjoint", "ReversibleAdjoint"
DEFAULT, REVERSIBLE_DEFAULT = "RecursiveCheckpointAdjoint", "RecursiveCheckpointAdjoint, reversible"
GRADIENT_TARGET, TORCH_TARGET = 0.6, 0.5


class Size(NamedTuple):
    """How large a problem is."""

    hidden: int
    width: int
    batch: int
    length: int


class Case(NamedTuple):
    """One problem and how it is measured. Plain data: it travels to other processes."""

    stepping: str
    size: Size
    seed: int
    tolerance: float
    rounds: int
    compilations: int

    @property
    def title(self) -> str:
        """As it stands in tables."""
        hidden, width, batch, length = self.size
        taken = "a step per observation" if self.stepping == "knots" else f"{self.tolerance:g}"
        return f"{hidden}, {width}, {batch}; length {length}; {self.stepping}, {taken}"


# The problem


def series(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Irregular times on [0, 1] with common ends, shape (batch, length), and smooth values."""
    rng = np.random.default_rng(case.seed)
    _, _, batch, length = case.size
    gaps = rng.uniform(0.5, 1.5, (batch, length))
    gaps[:, 0] = 0.0
    ts = np.cumsum(gaps, axis=1) / gaps.sum(axis=1, keepdims=True)
    phase = rng.uniform(0, 2 * np.pi, (batch, 1, 2))
    ys = np.sin(12.0 * ts[:, :, None] + phase)
    return ts.astype(np.float32), ys.astype(np.float32)


def model_of(case: Case, **numerics) -> NeuralCDE:
    """The model, without a readout."""
    key_field, key_initial = jax.random.split(jax.random.key(case.seed))
    field = MatrixField(case.size.hidden, CHANNELS, case.size.width, 1, key=key_field)
    return NeuralCDE(field, eqx.nn.Linear(CHANNELS, case.size.hidden, key=key_initial), **numerics)


def models(case: Case) -> dict[str, NeuralCDE]:
    """The methods of a case."""
    default = diffrax.RecursiveCheckpointAdjoint()
    if case.stepping == "knots":
        return {
            OURS: model_of(case),
            DEFAULT: model_of(case, adjoint=default),
            REVERSIBLE: model_of(case, solver=ReversibleHeun(), adjoint=ReversibleAdjoint()),
            REVERSIBLE_DEFAULT: model_of(case, solver=diffrax.ReversibleHeun(), adjoint=default),
        }
    controller = diffrax.PIDController(rtol=case.tolerance, atol=case.tolerance)
    adaptive = {
        "solver": diffrax.Tsit5(),
        "stepsize_controller": controller,
        "steps_per_interval": None,
    }
    return {OURS: model_of(case, **adaptive), DEFAULT: model_of(case, adjoint=default, **adaptive)}


def controls_of(case: Case) -> paths.ControlPath:
    """The paths of the batch."""
    make = paths.linear if case.stepping == "knots" else paths.hermite_cubic
    return jax.jit(jax.vmap(make))(*map(jnp.asarray, series(case)))


def loss(static, weights, controls):
    """(mean(z(T)^2) over the batch, largest number of steps)."""
    model = eqx.combine(weights, static)

    def final(control):
        solution = model.solve(control)
        return solution.ys[-1], solution.stats["num_steps"]

    states, steps = jax.vmap(final)(controls)
    return jnp.mean(states**2), jnp.max(steps)


def compiled(case: Case, name: str, gradient: bool = True) -> tuple[Callable, tuple]:
    """The compiled gradient, or forward solve, of one method, and its arguments; not yet called."""
    weights, static = eqx.partition(models(case)[name], eqx.is_inexact_array)
    arguments = weights, controls_of(case)
    run = ft.partial(loss, static)
    run = jax.grad(run, has_aux=True) if gradient else run
    return jax.jit(run).lower(*arguments).compile(), arguments


# Measuring: each function runs in a fresh process


def time_methods(case: Case) -> dict[str, Any]:
    """Times, memory and agreement of every method, and our ratios to diffrax's default."""
    names = list(models(case))
    gradients = {name: compiled(case, name) for name in names}
    forwards = {name: compiled(case, name, gradient=False) for name in names}
    results = {name: call(*arguments) for name, (call, arguments) in gradients.items()}

    def seconds(calls):
        ready = {name: ft.partial(call, *arguments) for name, (call, arguments) in calls.items()}
        return measure.interleaved(ready, case.rounds)

    gradient_s, forward_s = seconds(gradients), seconds(forwards)
    report = {}
    for name, (gradient, steps) in results.items():
        peer = REVERSIBLE_DEFAULT if name == REVERSIBLE else DEFAULT
        exact = results[name if name == REVERSIBLE_DEFAULT else peer][0]
        report[name] = {
            "gradient_ms": 1e3 * statistics.median(gradient_s[name]),
            "forward_ms": 1e3 * statistics.median(forward_s[name]),
            "temporary_mb": measure.temporary_megabytes(gradients[name][0]),
            "difference": measure.relative_difference(
                jax.tree.leaves(gradient), jax.tree.leaves(exact)
            ),
            "steps": int(steps),
        }
    ratios = {"gradient": measure.ratio(gradient_s, OURS, DEFAULT)}
    if REVERSIBLE in names:
        ratios["reversible"] = measure.ratio(gradient_s, REVERSIBLE, REVERSIBLE_DEFAULT)
    return {"methods": report, "ratios": ratios}


def time_compilation(case: Case, name: str) -> list[float]:
    """Seconds to trace, lower and compile the gradient of one method."""
    return measure.compile_seconds(ft.partial(compiled, case, name), case.compilations)


def torch_linear(linear: eqx.nn.Linear) -> Any:
    """The same layer in torch."""
    import torch

    copy = torch.nn.Linear(linear.weight.shape[1], linear.weight.shape[0])
    copy.weight.data = torch.tensor(np.asarray(linear.weight))
    copy.bias.data = torch.tensor(np.asarray(linear.bias))
    return copy


def torch_field(model: NeuralCDE) -> Any:
    """The vector field of a model, of one hidden softplus layer, in torch."""
    import torch

    class Field(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = map(torch_linear, model.vector_field.field.mlp.layers)
            self.scale = torch.nn.Parameter(torch.tensor(1.0))

        def forward(self, t, z):
            out = self.last(torch.nn.functional.softplus(self.first(z)))
            return (self.scale * torch.tanh(out)).view(*z.shape, CHANNELS)

    return Field()


def time_torch(case: Case) -> dict[str, Any]:
    """Gradient and forward times of torchcde, on the same weights and series.

    torchcde has one set of knots for a batch: the times of a series are a channel only, and its
    knots are evenly spaced.
    """
    import torch
    import torchcde

    model, (ts, ys) = model_of(case), series(case)
    length = case.size.length
    field, initial = torch_field(model), torch_linear(model.initial)
    parameters = (*field.parameters(), *initial.parameters())
    values = torch.tensor(np.concatenate([ts[:, :, None], ys], axis=2))
    knots = torch.linspace(0, 1, length)
    if case.stepping == "knots":
        path = torchcde.LinearInterpolation(
            torchcde.linear_interpolation_coeffs(values, knots), knots
        )
        how = {"method": "midpoint", "options": {"step_size": 1 / (length - 1)}}
    else:
        coefficients = torchcde.hermite_cubic_coefficients_with_backward_differences(values, knots)
        path = torchcde.CubicSpline(coefficients, knots)
        how = {"method": "dopri5", "rtol": case.tolerance, "atol": case.tolerance}

    def forward(adjoint):
        z0 = initial(path.evaluate(path.interval[0]))
        options = dict(how, adjoint=adjoint)
        states = torchcde.cdeint(path, field, z0, path.interval, **options)
        return (states[:, -1] ** 2).mean()

    def gradient(adjoint):
        torch.autograd.grad(forward(adjoint), parameters)

    @torch.no_grad()
    def forward_alone(adjoint):
        forward(adjoint)

    kinds = {"torchcde": False, "torchcde adjoint": True}
    gradient_s, forward_s = (
        measure.interleaved({n: ft.partial(run, a) for n, a in kinds.items()}, case.rounds)
        for run in (gradient, forward_alone)
    )
    return {
        name: {
            "gradient_ms": 1e3 * statistics.median(gradient_s[name]),
            "forward_ms": 1e3 * statistics.median(forward_s[name]),
        }
        for name in kinds
    }


# The whole benchmark


def run_case(case: Case) -> dict[str, Any]:
    """Everything about one case, printed and returned."""
    timed = measure.in_fresh_process(time_methods, case)
    report, ratios = timed["methods"], timed["ratios"]
    for name in report:
        seconds = measure.in_fresh_process(time_compilation, case, name)
        report[name]["compile_s"] = statistics.median(seconds)
    if importlib.util.find_spec("torchcde"):
        torch = measure.in_fresh_process(time_torch, case)
        fastest = min(row["gradient_ms"] for row in torch.values())
        ratios["torchcde"] = report[OURS]["gradient_ms"] / fastest
        report |= torch

    claims = judge(ratios)
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


def judge(ratios: dict[str, float]) -> list[measure.Claim]:
    """The ratios beside their targets."""
    claims = [measure.Claim("gradient / diffrax default", ratios["gradient"], GRADIENT_TARGET)]
    if "reversible" in ratios:
        what = "reversible gradient / diffrax default"
        claims.append(measure.Claim(what, ratios["reversible"], GRADIENT_TARGET))
    if "torchcde" in ratios:
        claims.append(measure.Claim("gradient / torchcde", ratios["torchcde"], TORCH_TARGET))
    return claims


def parse_size(text: str) -> Size:
    """`hidden,width,batch,length`."""
    try:
        size = Size(*map(int, text.split(",")))
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not hidden,width,batch,length") from None
    if min(size) < 1 or size.length < 2:
        raise argparse.ArgumentTypeError(f"{text!r} has an entry that is too small")
    return size


def main() -> None:
    """Runs the cases asked for, and saves them if `--out` is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    full = ["8,128,32,100", "32,64,64,256"]
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=[*map(parse_size, full)])
    parser.add_argument(
        "--stepping", nargs="+", default=["knots", "adaptive"], choices=["knots", "adaptive"]
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tolerance", type=float, default=1e-4, help="rtol and atol, adaptive")
    parser.add_argument("--quick", action="store_true", help="tiny and few: does it run at all?")
    parser.add_argument("--out", type=Path, help="where to save the results (JSON)")
    options = parser.parse_args()
    sizes, rounds, compilations = options.sizes, 15, 3
    if options.quick:
        sizes, rounds, compilations = [Size(4, 16, 4, 10)], 3, 1

    settings = (options.seed, options.tolerance, rounds, compilations)
    cases = [Case(stepping, size, *settings) for stepping in options.stepping for size in sizes]
    report = {
        "environment": measure.environment(
            ["nde", "jax", "jaxlib", "diffrax", "equinox", "torch", "torchcde"]
        ),
        "seed": options.seed,
        "tolerance": options.tolerance,
        "rounds": rounds,
        "cases": [run_case(case) for case in cases],
    }
    if options.out is not None:
        measure.write(options.out, report)


if __name__ == "__main__":
    main()
