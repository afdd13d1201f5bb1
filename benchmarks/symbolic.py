"""Formulas from trajectories, and layers that solve: how often, how exactly, at what cost.

`recovery`: from ten sets of noise-free trajectories of each of three equations (slopes of local
polynomials, `nde.symbolic.search`), how often the chosen formulas are those of the equation: equal by
sympy once expanded and rounded to two decimals, and within 1 % on a grid. Published, on other data: Kozax
10 of 10 on Lotka-Volterra with both states observed, about 7 of 10 with one. Their code is not run here.

`throughput`: expressions per second whose constants are fitted and whose loss is computed: seven sweeps
forward over the tape and three back for each.

`implicit`: gradient of a fixed point of 64 units for 128 examples, against unrolling as many steps as the
solve takes: time, and memory besides arguments and results.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import measure
import numpy as np
import sympy

import nde
from nde import implicit, symbolic
from nde.symbolic.evolution import Settings, advance, start
from nde.symbolic.tape import Language

jax.config.update("jax_enable_x64", True)
ARITHMETIC = ("+", "-", "*", "/")
# name -> (formulas, operators, range of the initial states, end, times, series)
PROBLEMS = {
    "x / (1 + x)": (["v / (1.0 + v)", "x / (1.0 + x)"], ARITHMETIC, (0.0, 1.5), 2.0, 21, 8),
    "pendulum": (
        ["v", "-9.81 * sin(x) - 0.25 * v"],
        ("+", "-", "*", "/", "sin", "exp"),
        (-2.0, 2.0),
        1.0,
        41,
        8,
    ),
    "van der Pol": (["v", "1.5 * (1.0 - x * x) * v - x"], ARITHMETIC, (-2.0, 2.0), 1.0, 41, 8),
}


def trajectories(name: str, seed: int) -> tuple[Any, ...]:
    """Times, initial states and states of a problem."""
    formulas, _, (low, high), end, times, series = PROBLEMS[name]
    tight = diffrax.PIDController(rtol=1e-9, atol=1e-9)
    truth = nde.NeuralODE(symbolic.Field.parse(formulas, ("x", "v")), stepsize_controller=tight)
    ts = jnp.linspace(0.0, end, times)
    y0s = jax.random.uniform(jax.random.key(1000 + seed), (series, 2), minval=low, maxval=high)
    return ts, y0s, jax.jit(jax.vmap(truth, in_axes=(None, 0)))(ts, y0s)


def is_recovered(found: symbolic.Expression, text: str, low: float, high: float) -> bool:
    """Whether a formula is that of the equation."""
    truth = symbolic.Expression.parse(text, ("x", "v"))
    grid = jnp.asarray(
        np.stack(np.meshgrid(*[np.linspace(low, high, 9)[1:]] * 2), 0).reshape(2, -1)
    )
    exact = truth(*grid)
    if not float(jnp.max(jnp.abs(found(*grid) - exact))) <= 0.01 * float(jnp.max(jnp.abs(exact))):
        return False
    expanded = sympy.expand(found.sympy())  # a factor may hold part of a constant
    hundredths = {x: sympy.Rational(round(100 * x), 100) for x in expanded.atoms(sympy.Float)}
    exact_truth = sympy.nsimplify(truth.sympy(), rational=True)
    difference = expanded.xreplace(hundredths) - exact_truth
    return sympy.simplify(difference) == 0


def recovery(problems: Sequence[str], seeds: int, generations: int) -> dict[str, Any]:
    """How often each equation is found, and the seconds of a seed (the first one compiles)."""
    rows = {}
    for name in problems:
        formulas, operators, (low, high), *_ = PROBLEMS[name]
        found, seconds, texts = [], [], []
        for seed in range(seeds):
            ts, _, ys = trajectories(name, seed)
            began = time.perf_counter()
            fronts = symbolic.search(
                *symbolic.slopes(ts, ys),
                variables=("x", "v"),
                operators=operators,
                length=14,
                generations=generations,
                tolerance=1e-7,
                progress=False,
                key=jax.random.key(seed),
            )
            seconds.append(time.perf_counter() - began)
            chosen = [front.choose() for front in fronts]
            pairs = zip(chosen, formulas, strict=True)
            found.append(all(is_recovered(e, text, low, high) for e, text in pairs))
            texts.append([str(expression) for expression in chosen])
            print(name, seed, found[-1], f"{seconds[-1]:.0f} s", texts[-1], flush=True)
        rows[name] = {
            "recovered": sum(found),
            "seeds": seeds,
            "seconds": sorted(seconds)[seeds // 2],
            "formulas": texts,
        }
    return rows


def throughput(generations: int) -> dict[str, Any]:
    """Children per second, and evaluations of tapes."""
    rows = {}
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(0.1, 2.0, (2, 200)))
    data = (x, x[0] / (1 + x[1]) + jnp.asarray(rng.normal(size=200)))
    for name, operators in (("+ - * /", ARITHMETIC), ("and sin, exp", (*ARITHMETIC, "sin", "exp"))):
        settings = Settings(Language(("x", "v"), operators, 14), 16, 64, 32, 8, 3, 0.0, None)
        state = advance(
            settings, start(settings, data, jax.random.key(0)), data, jax.random.key(1), generations
        )
        jax.block_until_ready(state)
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            jax.block_until_ready(advance(settings, state, data, jax.random.key(2), generations))
            seconds.append(time.perf_counter() - began)
        children = 16 * 32 * generations / min(seconds)
        rows[name] = {"children_per_second": children, "evaluations_per_second": 7 * children}
    return rows


def layers(rounds: int) -> dict[str, Any]:
    """Implicit against unrolled gradients, by spectral radius."""
    rows = {}
    key = jax.random.key(0)
    w, x = jax.random.normal(key, (64, 64)) / 8, jax.random.normal(key, (128, 64))
    for scale in (0.5, 0.9):

        def loss(w, gradient, x=x):
            cell = lambda z, x: jnp.tanh(w @ z + x)
            layer = lambda x: implicit.fixed_point(cell, jnp.zeros(64), x, gradient=gradient).value
            return jnp.sum(jax.vmap(layer)(x) ** 2)

        weight = scale * w
        cell = lambda z, x, w=weight: jnp.tanh(w @ z + x)
        found = jax.vmap(lambda x, f=cell: implicit.fixed_point(f, jnp.zeros(64), x))(x)
        steps = int(jnp.max(found.stats["iterations"]))
        kinds = {
            "implicit": implicit.Implicit(),
            "Jacobian-free": implicit.JacobianFree(),
            "unrolled": implicit.Unrolled(steps),
        }
        compiled = {
            kind: jax.jit(jax.grad(lambda w, g=g: loss(w, g))).lower(weight).compile()
            for kind, g in kinds.items()
        }
        seconds = measure.interleaved(
            {k: (lambda c=c, w=weight: c(w)) for k, c in compiled.items()}, rounds
        )
        exact = compiled["unrolled"](weight)
        rows[f"{scale} W"] = {"iterations": steps} | {
            kind: {
                "ms": 1e3 * sorted(seconds[kind])[rounds // 2],
                "ratio": measure.ratio(seconds, kind, "unrolled"),
                "megabytes": measure.temporary_megabytes(compiled[kind]),
                "difference": measure.relative_difference(compiled[kind](weight), exact),
            }
            for kind in kinds
        }
        print(rows[f"{scale} W"], flush=True)
    return rows


def main() -> None:
    """Runs the parts asked for, and saves them if `--out` is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=["recovery", "throughput", "implicit"])
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="tiny and few: does it run at all?")
    parser.add_argument("--out", type=Path, help="where to save the results (JSON)")
    options = parser.parse_args()
    quick = options.quick
    work = {
        "recovery": lambda: recovery(
            options.problems, *((1, 3) if quick else (options.seeds, 100))
        ),
        "throughput": lambda: throughput(2 if quick else 10),
        "implicit": lambda: layers(3 if quick else 21),
    }
    report: dict[str, Any] = {
        "environment": measure.environment(
            ["nde", "jax", "jaxlib", "diffrax", "optimistix", "sympy"]
        )
    }
    for name in options.parts:
        report[name] = work[name]()
        if options.out is not None:
            measure.write(options.out, report)


if __name__ == "__main__":
    main()
