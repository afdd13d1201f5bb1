"""Cost of Brownian paths: time and normal draws per query, beside diffrax's.

One round asks every path for the same kind of steps, one after the other, as a solver does: `steps`
increments in a `jax.lax.scan`, for one path and for a batch through `jax.vmap`, float32. `even`
steps are equal; `uneven` ones vary by 30 per cent around a 200th of the interval, as adaptive steps
do. `solve` is a whole forward solve by diffrax with Heun's method; `adaptive`, one with adaptive steps
(rtol = atol = 1e-3) by `DiscreteAdjoint` on ours and by diffrax's default on diffrax's path, and
`adaptive gradient` its gradient with respect to y0. Adaptive solves of different paths differ in their
number of steps: there one path means the mean over 16 of them, solved one after the other. The peers:

    BrownianGrid.cell        ours, by the number of the step            (even)
    BrownianGrid             ours, by time                              (even)
    BrownianInterval         ours, with its state; rounded: the ends of the steps by `round_down`
    BrownianInterval alone   ours, without a state, as in a plain diffrax solve
    VirtualBrownianTree      diffrax, at the same tolerance
    UnsafeBrownianPath       diffrax: fresh noise for each step, cannot be asked again
    fold_in                  sqrt(dt) normal(fold_in(key, n)), written by hand      (even)

Draws are counted by the state of the path, one for each call of the normal generator, per query. In
a batch every lane turns as often as the slowest: that is what is counted there.

    python benchmarks/brownian.py --out benchmarks/results/brownian.json
    python benchmarks/brownian.py --quick
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import lineax as lx
import measure
import numpy as np

from nde.solvers import BrownianGrid, BrownianInterval, DiscreteAdjoint

DEPTH = 20
AREAS = {"W": diffrax.BrownianIncrement, "W, H": diffrax.SpaceTimeLevyArea}
TREE, UNSAFE, HAND = "VirtualBrownianTree", "UnsafeBrownianPath", "fold_in"
ROUNDED = "BrownianInterval rounded"

# Largest allowed ratio of the time of a query (lanes, name, peer).
TARGETS = {
    "uneven": [(1, ROUNDED, TREE, 0.4), (128, ROUNDED, TREE, 0.5)],
    "even": [(1, "BrownianGrid", HAND, 1.3), (128, "BrownianGrid", HAND, 1.3)],
    "solve": [(1, "BrownianGrid", TREE, 0.4), (128, "BrownianGrid", TREE, 0.4)],
    "adaptive": [(1, "BrownianInterval", TREE, 0.4), (128, "BrownianInterval", TREE, 0.5)],
    "adaptive gradient": [(1, "BrownianInterval", TREE, 0.4), (128, "BrownianInterval", TREE, 0.5)],
}
DRAWS_TARGET = 6.0
SINGLES = 16  # solves of one path each, where their steps are adaptive


class Case(NamedTuple):
    """What is asked: how many increments of which shape, by how many paths."""

    steps: int
    size: int
    lanes: int


def step_lengths(kind: str, case: Case, seed: int) -> jax.Array:
    """Lengths of the steps of each lane, shape (lanes, steps); they cover nearly the unit interval."""
    if kind == "uneven":
        noise = np.random.default_rng(seed).normal(size=(case.lanes, case.steps))
        lengths = np.exp(0.3 * noise)
        return jnp.asarray(0.999 * lengths / lengths.sum(axis=1, keepdims=True), jnp.float32)
    return jnp.full((case.lanes, case.steps), 1 / case.steps, jnp.float32)


def path_of(name: str, case: Case, area: Any, key: jax.Array) -> Any:
    """The path of one lane."""
    shape = jax.ShapeDtypeStruct((case.size,), jnp.float32)
    if name.startswith("BrownianGrid"):
        return BrownianGrid(0.0, 1.0, 1 / case.steps, shape, key, levy_area=area)
    if name.startswith("BrownianInterval"):
        return BrownianInterval(0.0, 1.0, shape, key, levy_area=area, tol=2.0**-DEPTH)
    if name == TREE:
        return diffrax.VirtualBrownianTree(0.0, 1.0, 2.0**-DEPTH, shape, key, levy_area=area)
    return diffrax.UnsafeBrownianPath(shape, key, levy_area=area)


def follow(name: str, case: Case, area: Any) -> Callable:
    """(key, step lengths) -> (sum of everything drawn, normal draws a query), for one lane."""

    def query(path, n, t0, t1, state):
        if name == HAND:
            draw = jax.random.normal(jax.random.fold_in(path.key, n), (case.size,), jnp.float32)
            return jnp.sqrt(t1 - t0) * draw, state
        if name == "BrownianGrid.cell":
            return path.cell(n, use_levy=True), state
        if state is not None:
            return path.draw(t0, t1, state, use_levy=True)
        return path.evaluate(t0, t1, use_levy=True), state

    def run(key, lengths):
        path = path_of(name, case, area, key)
        keeps_state = name in ("BrownianInterval", ROUNDED)

        def body(carry, step):
            (n, length), (t0, total, state) = step, carry
            t1 = jnp.minimum(t0 + length, 1.0)
            if name in ("BrownianGrid", "BrownianGrid.cell", HAND):
                t0, t1 = n / case.steps, (n + 1) / case.steps  # no drift of the sum
            if name == ROUNDED:
                t1 = path.round_down(t0, t1)
            increment, state = query(path, n, t0, t1, state)
            parts = [x for x in jax.tree.leaves(increment) if x.ndim]
            return (t1, total + sum(parts[1:], start=parts[0]), state), None

        start = (jnp.zeros((), jnp.float32), jnp.zeros(case.size, jnp.float32))
        state = path.init() if keeps_state else None
        steps = (jnp.arange(case.steps, dtype=jnp.int32), lengths)
        (_, total, state), _ = jax.lax.scan(body, (*start, state), steps)
        return total, state.draws / case.steps if keeps_state else jnp.ones(())

    return run


def solve(name: str, case: Case, area: Any) -> Callable:
    """(key, step lengths) -> end of a solve with equal steps, for one lane."""

    def run(key, lengths):
        del lengths
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, args: -y),
            diffrax.ControlTerm(
                lambda t, y, args: lx.DiagonalLinearOperator(0.1 * jnp.cos(y)),
                path_of(name, case, area, key),
            ),
        )
        y0 = jnp.ones(case.size, jnp.float32)
        solution = diffrax.diffeqsolve(
            terms,
            diffrax.Heun(),
            t0=0.0,
            t1=1.0,
            dt0=1 / case.steps,
            y0=y0,
            max_steps=case.steps + 1,
            adjoint=diffrax.ForwardMode(),  # the only one that takes UnsafeBrownianPath
        )
        return solution.ys[-1], jnp.ones(())

    return run


def adaptive(name: str, case: Case, area: Any) -> Callable:
    """(key, step lengths) -> (end of a solve with adaptive steps, how many were tried), for one lane."""

    def run(key, lengths, y0=1.0):
        del lengths
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, args: -y),
            diffrax.ControlTerm(
                lambda t, y, args: lx.DiagonalLinearOperator(0.5 * jnp.cos(y)),
                path_of(name, case, area, key),
            ),
        )
        ours = name.startswith("Brownian")
        solution = diffrax.diffeqsolve(
            terms,
            diffrax.Heun(),
            t0=0.0,
            t1=1.0,
            dt0=0.01,
            y0=jnp.full(case.size, y0, jnp.float32),
            stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-3),
            max_steps=16 * case.steps,
            adjoint=DiscreteAdjoint() if ours else diffrax.RecursiveCheckpointAdjoint(),
        )
        return solution.ys[-1], solution.stats["num_steps"]

    return run


def adaptive_gradient(name: str, case: Case, area: Any) -> Callable:
    """The same for the gradient with respect to y0."""
    run = adaptive(name, case, area)

    def loss(y0, key, lengths):
        y1, steps = run(key, lengths, y0)
        return jnp.mean(y1**2), steps

    return lambda key, lengths: jax.grad(loss, has_aux=True)(jnp.float32(1.0), key, lengths)


RUNS = {"solve": solve, "adaptive": adaptive, "adaptive gradient": adaptive_gradient}
NAMES = {
    "even": ("BrownianGrid.cell", "BrownianGrid", "BrownianInterval", TREE, UNSAFE, HAND),
    "uneven": (ROUNDED, "BrownianInterval", "BrownianInterval alone", TREE, UNSAFE),
    "solve": ("BrownianGrid", "BrownianInterval alone", TREE, UNSAFE),
    "adaptive": ("BrownianInterval", TREE),
    "adaptive gradient": ("BrownianInterval", TREE),
}


def measure_case(kind: str, case: Case, area: str, rounds: int, seed: int) -> dict[str, Any]:
    """Microseconds and draws per query of every path that can serve this kind of steps."""
    one_by_one = case.lanes == 1 and kind.startswith("adaptive")
    keys = jax.random.split(jax.random.key(seed), SINGLES if one_by_one else case.lanes)
    lengths = step_lengths(kind, case, seed)
    calls, draws = {}, {}
    for name in NAMES[kind]:
        if name == HAND and area != "W":
            continue
        run = RUNS.get(kind, follow)(name, case, AREAS[area])
        if one_by_one:
            each = lambda keys, length, run=run: jax.lax.map(lambda key: run(key, length), keys)
            compiled = jax.jit(each).lower(keys, lengths[0]).compile()
            calls[name] = lambda f=compiled: f(keys, lengths[0])
        elif case.lanes == 1:
            compiled = jax.jit(run).lower(keys[0], lengths[0]).compile()
            calls[name] = lambda f=compiled: f(keys[0], lengths[0])
        else:
            compiled = jax.jit(jax.vmap(run)).lower(keys, lengths).compile()
            calls[name] = lambda f=compiled: f(keys, lengths)
        if name in ("BrownianInterval", ROUNDED) and kind not in RUNS:
            draws[name] = float(jnp.mean(calls[name]()[1]))
    seconds = measure.interleaved(calls, rounds)
    queries = case.steps * (SINGLES if one_by_one else 1)
    micro = {name: 1e6 * statistics.median(s) / queries for name, s in seconds.items()}
    claims = [
        measure.Claim(
            f"{name} / {peer}, {kind}, {area}, {lanes}", measure.ratio(seconds, name, peer), most
        )
        for lanes, name, peer, most in TARGETS[kind]
        if lanes == case.lanes and name in seconds and peer in seconds
    ]
    if ROUNDED in draws and case.lanes == 1:
        claims.append(
            measure.Claim(f"draws a query, {ROUNDED}, {area}", draws[ROUNDED], DRAWS_TARGET)
        )
    return {
        "kind": kind,
        "area": area,
        "case": case._asdict(),
        "us": micro,
        "draws": draws,
        "claims": claims,
    }


def main() -> None:
    """Measures, prints, and saves if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="few steps and rounds: does it run?")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    steps, rounds = (20, 2) if args.quick else (200, 15)
    reports = []
    for kind in NAMES:
        for area in ("W",) if kind.startswith("adaptive") else AREAS:
            for lanes in (1, 128):
                report = measure_case(kind, Case(steps, 4, lanes), area, rounds, args.seed)
                reports.append(report)
                print(f"\n{kind} steps, {area}, {lanes} path(s): microseconds and draws a query")
                rows = [(n, us, report["draws"].get(n)) for n, us in report["us"].items()]
                print(measure.table(("path", "us", "draws"), rows))
                for claim in report["claims"]:
                    print(claim.line())
    if args.out:
        entries = [{**r, "claims": [c.record() for c in r["claims"]]} for r in reports]
        packages = ("jax", "diffrax", "equinox", "nde")
        measure.write(args.out, {"environment": measure.environment(packages), "cases": entries})


if __name__ == "__main__":
    main()
