"""The gradient of an ensemble of mechanistic models, each with parameters of its own.

    python benchmarks/ensemble.py --out benchmarks/results/ensemble.json

The Lorenz system, 128 to 32,768 trajectories on [0, 1], and twenty reactions of eight species, 1 and 64
trajectories on [0, 5]; through `jax.vmap`, adaptive Tsit5, loss the mean square of the end, gradient with
respect to all parameters, float64.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import measure
import numpy as np

from nde.solvers import DiscreteAdjoint

ROUNDS = 7
PEER = "diffrax default"
REACTIONS = np.random.default_rng(0).integers(0, 8, (20, 3))  # a + b -> 2 c


class Ensemble(NamedTuple):
    """Field, end, parameters and starts; the last two have a row for each trajectory."""

    field: Callable[..., jax.Array]
    end: float
    p: jax.Array
    y0: jax.Array


CASES = tuple(
    [("lorenz", size) for size in (128, 1024, 8192, 32768)]
    + [("reactions", size) for size in (1, 64)]
)


def lorenz(t: jax.Array, y: jax.Array, p: jax.Array) -> jax.Array:
    """The field; p holds sigma, rho and beta."""
    return jnp.stack([p[0] * (y[1] - y[0]), y[0] * (p[1] - y[2]) - y[1], y[0] * y[1] - p[2] * y[2]])


def reactions(t: jax.Array, y: jax.Array, p: jax.Array) -> jax.Array:
    """Mass action, one term after the other, as such models are written."""
    rates = [jnp.zeros(())] * 8
    for rate, (a, b, c) in zip(p, REACTIONS, strict=True):
        flow = rate * y[a] * y[b]
        for species, change in ((a, -flow), (b, -flow), (c, 2 * flow)):
            rates[species] = rates[species] + change
    return jnp.stack(rates)


def ensemble(problem: str, size: int) -> Ensemble:
    """`size` trajectories of a problem."""
    keys = jax.random.split(jax.random.key(0))
    if problem == "lorenz":
        means, y0 = jnp.array([10.0, 28.0, 8 / 3]), jnp.array([1.0, 1.0, 20.0])
        y0 = y0 + jax.random.normal(keys[1], (size, 3))
    else:
        means = jnp.linspace(0.1, 0.3, len(REACTIONS))
        y0 = jax.random.uniform(keys[1], (size, 8), minval=1.0, maxval=2.0)
    p = means * jax.random.uniform(keys[0], (size, len(means)), minval=0.8, maxval=1.2)
    return Ensemble(*((lorenz, 1.0) if problem == "lorenz" else (reactions, 5.0)), p, y0)


def loss(p: jax.Array, y0: jax.Array, of: Ensemble, adjoint: diffrax.AbstractAdjoint) -> jax.Array:
    """Of the whole ensemble."""

    def one(p: jax.Array, y0: jax.Array) -> jax.Array:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(of.field), diffrax.Tsit5(), 0.0, of.end, None, y0, p, adjoint=adjoint,
            stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-6), max_steps=1024,
        ).ys[0]  # fmt: skip

    return jnp.mean(jax.vmap(one)(p, y0) ** 2)


def measure_case(problem: str, size: int, rounds: int) -> dict[str, Any]:
    """One row of the results."""
    of = ensemble(problem, size)
    p, y0 = of.p, of.y0
    adjoints = {"ours": DiscreteAdjoint(), PEER: diffrax.RecursiveCheckpointAdjoint()}
    calls: dict[str, Callable[[], Any]] = {}
    memory = {}
    for name, adjoint in adjoints.items():
        gradient = jax.jit(jax.grad(lambda p, y0, adjoint=adjoint: loss(p, y0, of, adjoint)))
        compiled = gradient.lower(p, y0).compile()
        memory[name] = measure.temporary_megabytes(compiled)
        calls[name] = lambda compiled=compiled: compiled(p, y0)
    seconds = measure.interleaved(calls, rounds)
    claims = [
        measure.Claim("gradient / diffrax default", measure.ratio(seconds, "ours", PEER), 0.75)
    ]
    case = {"problem": problem, "trajectories": size}
    return measure.entry("gradient", case, seconds, memory, claims) | {
        "difference": measure.relative_difference(calls["ours"](), calls[PEER]()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", help="problem,trajectories: lorenz,128")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    chosen = [case.split(",") for case in args.cases or []]
    cases = [(problem, int(size)) for problem, size in chosen] or CASES
    entries = [measure_case(*case, args.rounds) for case in cases]
    measure.show_and_write(entries, args.out, ("jax", "diffrax", "equinox"))


if __name__ == "__main__":
    main()
