"""The gradient of one small trajectory beside its peers.

    python benchmarks/small.py --out benchmarks/results/small.json

What hybrid modellers fit all day: one trajectory of a mechanistic model (Lotka-Volterra; a chain of
reactions with 8 and 20 species), 21 outputs or the end, squared error, gradient with respect to all
parameters, float64. Constant steps, and adaptive ones.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import measure

from nde.solvers import DiscreteAdjoint

ROUNDS, COMPILES = 15, 3
PEER, FORWARD = "diffrax default", "diffrax forward mode"


class Case(NamedTuple):
    """One problem: numbers in the state, whether steps are adaptive, whether there are 21 outputs."""

    state: int
    adaptive: bool
    outputs: bool


CASES = tuple(
    Case(state, adaptive, outputs)
    for state in (2, 8, 20)
    for adaptive in (False, True)
    for outputs in (False, True)
)


def problem(state: int) -> tuple[Callable[..., jax.Array], jax.Array, jax.Array]:
    """Field, start and parameters: 4 of them, or as many as there are species."""
    if state == 2:

        def predator_and_prey(t, y, p):
            prey, predator = y
            return jnp.stack(
                [p[0] * prey - p[1] * prey * predator, p[2] * prey * predator - p[3] * predator]
            )

        return predator_and_prey, jnp.array([1.0, 1.0]), jnp.array([1.5, 1.0, 1.0, 3.0])

    def chain(t, y, p):
        flow = p * y / (1.0 + y)
        return jnp.roll(flow, 1) - flow

    return chain, jnp.linspace(1.0, 2.0, state), jnp.linspace(0.5, 2.0, state)


def methods(case: Case) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """Every way to the gradient, as a function of the parameters."""
    field, y0, _ = problem(case.state)
    t1, ts = 5.0, jnp.linspace(0.0, 5.0, 21)
    if case.adaptive:
        how = dict(dt0=None, stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-6))
    else:
        how = dict(dt0=t1 / 100)
    saveat = diffrax.SaveAt(ts=ts) if case.outputs else diffrax.SaveAt(t1=True)

    def loss(p: jax.Array, adjoint: diffrax.AbstractAdjoint) -> jax.Array:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field), diffrax.Tsit5(), 0.0, t1, y0=y0, args=p, saveat=saveat,
            adjoint=adjoint, **how,
        )  # fmt: skip
        return jnp.mean((solution.ys - 1.0) ** 2)

    return {
        "ours": jax.grad(lambda p: loss(p, DiscreteAdjoint())),
        "ours, step by step": jax.grad(lambda p: loss(p, DiscreteAdjoint(parallel=False))),
        "ours, forward mode": jax.jacfwd(lambda p: loss(p, DiscreteAdjoint())),
        PEER: jax.grad(lambda p: loss(p, diffrax.RecursiveCheckpointAdjoint())),
        FORWARD: jax.jacfwd(lambda p: loss(p, diffrax.ForwardMode())),
    }


def compiling(case: Case, name: str) -> measure.Seconds:
    """Seconds to trace and compile one method."""
    jax.config.update("jax_enable_x64", True)
    p = problem(case.state)[2]
    build = lambda: jax.jit(methods(case)[name]).lower(p).compile()
    return measure.compile_seconds(build, COMPILES)


def measure_case(case: Case, rounds: int) -> dict[str, Any]:
    """One row of the results."""
    p = problem(case.state)[2]
    compiled = {name: jax.jit(fn).lower(p).compile() for name, fn in methods(case).items()}
    memory = {name: measure.temporary_megabytes(fn) for name, fn in compiled.items()}
    calls: dict[str, Callable[[], Any]] = {
        name: lambda fn=fn: fn(p) for name, fn in compiled.items()
    }
    seconds = measure.interleaved(calls, rounds)
    compiles = {
        name: min(measure.in_fresh_process(compiling, case, name)) for name in ("ours", PEER)
    }
    claims = [
        measure.Claim("gradient / diffrax default", measure.ratio(seconds, "ours", PEER), 0.5),
        measure.Claim("gradient / forward mode", measure.ratio(seconds, "ours", FORWARD), None),
        measure.Claim("compile, seconds", compiles["ours"], 2.0),
    ]
    return measure.entry("gradient", case._asdict(), seconds, memory, claims) | {
        "compile_seconds": compiles,
        "difference": measure.relative_difference(calls["ours"](), calls[PEER]()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", help="state,adaptive,outputs: 2,0,1")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    chosen = [[int(x) for x in c.split(",")] for c in args.cases or []]
    cases = [Case(n, bool(a), bool(o)) for n, a, o in chosen] or CASES
    entries = [measure_case(case, args.rounds) for case in cases]
    measure.show_and_write(entries, args.out, ("jax", "diffrax", "equinox"))


if __name__ == "__main__":
    main()
