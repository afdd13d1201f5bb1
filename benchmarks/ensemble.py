"""The gradient of an ensemble of Lorenz systems, each with parameters of its own.

    python benchmarks/ensemble.py --out benchmarks/results/ensemble.json

128 to 32,768 trajectories through `jax.vmap`, adaptive Tsit5 on [0, 1], loss the mean square of the
end, gradient with respect to all parameters, float64.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import measure

from nde.solvers import DiscreteAdjoint

ROUNDS = 7
SIZES = (128, 1024, 8192, 32768)
PEER = "diffrax default"


def lorenz(t: jax.Array, y: jax.Array, p: jax.Array) -> jax.Array:
    """The field; p holds sigma, rho and beta."""
    return jnp.stack([p[0] * (y[1] - y[0]), y[0] * (p[1] - y[2]) - y[1], y[0] * y[1] - p[2] * y[2]])


def loss(p: jax.Array, y0: jax.Array, adjoint: diffrax.AbstractAdjoint) -> jax.Array:
    """Of the whole ensemble: `p` and `y0` have a row for each trajectory."""

    def one(p: jax.Array, y0: jax.Array) -> jax.Array:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lorenz), diffrax.Tsit5(), 0.0, 1.0, None, y0, p, adjoint=adjoint,
            stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-6), max_steps=1024,
        ).ys[0]  # fmt: skip

    return jnp.mean(jax.vmap(one)(p, y0) ** 2)


def measure_size(size: int, rounds: int) -> dict[str, Any]:
    """One row of the results."""
    keys = jax.random.split(jax.random.key(0))
    p = jnp.array([10.0, 28.0, 8 / 3]) * jax.random.uniform(
        keys[0], (size, 3), minval=0.8, maxval=1.2
    )
    y0 = jnp.array([1.0, 1.0, 20.0]) + jax.random.normal(keys[1], (size, 3))
    adjoints = {"ours": DiscreteAdjoint(), PEER: diffrax.RecursiveCheckpointAdjoint()}
    calls: dict[str, Callable[[], Any]] = {}
    memory = {}
    for name, adjoint in adjoints.items():
        gradient = jax.jit(jax.grad(lambda p, y0, adjoint=adjoint: loss(p, y0, adjoint)))
        compiled = gradient.lower(p, y0).compile()
        memory[name] = measure.temporary_megabytes(compiled)
        calls[name] = lambda compiled=compiled: compiled(p, y0)
    seconds = measure.interleaved(calls, rounds)
    claims = [
        measure.Claim("gradient / diffrax default", measure.ratio(seconds, "ours", PEER), None)
    ]
    case = {"trajectories": size}
    return measure.entry("gradient", case, seconds, memory, claims) | {
        "difference": measure.relative_difference(calls["ours"](), calls[PEER]()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="*", type=int, default=SIZES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    entries = [measure_size(size, args.rounds) for size in args.sizes]
    measure.show_and_write(entries, args.out, ("jax", "diffrax", "equinox"))


if __name__ == "__main__":
    main()
