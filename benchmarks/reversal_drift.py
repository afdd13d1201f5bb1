"""How far a reversal drifts, and whether the forward solve itself is right.

On y' = -a y + sin t + tanh(y)/2, whose contraction a reversal has to undo: the drift and the split that
`ReversibleAdjoint(certify=True)` reports, in float32 and float64. A part of `reversible.py`.
"""

import functools as ft
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import measure
import numpy as np

from nde.solvers import (
    EES25,
    EES27,
    AsynchronousLeapfrog,
    Reversible,
    ReversibleAdjoint,
    ReversibleHeun,
)


class RK4(diffrax.AbstractERK):
    """The classical method."""

    tableau = diffrax.ButcherTableau(
        c=np.array([0.5, 0.5, 1.0]),
        a_lower=(np.array([0.5]), np.array([0.0, 0.5]), np.array([0.0, 0.0, 1.0])),
        b_sol=np.array([1 / 6, 1 / 3, 1 / 3, 1 / 6]),
        b_error=np.zeros(4),
    )
    interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms):
        """Four."""
        return 4


UNDONE = {
    "EES25": EES25(),
    "EES27": EES27(),
    "Reversible(RK4, .999)": Reversible(RK4(), 0.999),
    "Reversible(RK4, .99)": Reversible(RK4(), 0.99),
    "Reversible(RK4, .9)": Reversible(RK4(), 0.9),
    "Reversible(Midpoint, .999)": Reversible(diffrax.Midpoint(), 0.999),
    "ReversibleHeun": ReversibleHeun(),
    "AsynchronousLeapfrog": AsynchronousLeapfrog(),
}
DISSIPATION = ((1.0, 500), (1.0, 2000), (5.0, 500))  # (a, steps of length 0.01)


def dissipative(t, y, a):
    """Decays at a rate between a - 1/2 and a towards a small oscillation."""
    return -a * y + jnp.sin(t) + jnp.tanh(y) / 2


def drifts(names: list[str], every: int | None) -> dict[str, Any]:
    """For each solver, precision and case: (drift, split, y(T))."""
    jax.config.update("jax_enable_x64", True)
    longest = max(steps for _, steps in DISSIPATION)
    adjoint = ReversibleAdjoint(every, certify=True)

    def solve(solver, a, end, y0):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(dissipative), solver, jnp.zeros_like(end), end, 0.01, y0, a,
            adjoint=adjoint, max_steps=longest + 2, throw=False,
        )  # fmt: skip
        return sol.stats["drift"], sol.stats["split"], sol.ys[0]

    found: dict[str, Any] = {}
    for name in names:
        found[name] = {}
        for dtype in (jnp.float32, jnp.float64):
            run = jax.jit(jax.vmap(ft.partial(solve, UNDONE[name]), in_axes=(0, 0, None)))
            decay = jnp.array([a for a, _ in DISSIPATION], dtype)
            ends = jnp.array([0.01 * steps for _, steps in DISSIPATION], dtype)
            columns = run(decay, ends, jnp.ones((), dtype))
            rows = zip(*(np.asarray(column, float).tolist() for column in columns), strict=True)
            found[name][jnp.dtype(dtype).name] = [list(row) for row in rows]
    return found


def run_stability(names: list[str], every: int | None) -> dict[str, Any]:
    """The table, printed and returned."""
    found = measure.in_fresh_process(drifts, names, every)
    kept = "nothing stored" if every is None else f"restarts every {every} steps"
    print(f"\nstability: drift in float32, float64; split, y(T) in float64; {kept}", flush=True)
    header = ["", *(f"a={a:g}, n={steps}" for a, steps in DISSIPATION)]
    rows = []
    for name, by_dtype in found.items():
        cells = []
        for single, double in zip(by_dtype["float32"], by_dtype["float64"], strict=True):
            cells.append(f"{single[0]:.0e}, {double[0]:.0e}; {double[1]:.0e}, {double[2]:.4g}")
        rows.append([name, *cells])
    print(measure.table(header, rows), flush=True)
    return {"part": "stability", "checkpoint_every": every, "solvers": found}
