"""`stats["nfe"]` is how often the compiled solve calls the vector field."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nde.solvers import (
    EES25,
    AsynchronousLeapfrog,
    DiscreteAdjoint,
    Reversible,
    ReversibleAdjoint,
    ReversibleHeun,
    StormerVerlet,
    WithEstimates,
)
from nde.solvers.methods.declared import declared_by

STORED, REVERSED = DiscreteAdjoint(), ReversibleAdjoint()
CONSTANT, ADAPTIVE = dfx.ConstantStepSize(), dfx.PIDController(rtol=1e-3, atol=1e-5)
JUMP = dfx.ClipStepSizeController(ADAPTIVE, jump_ts=jnp.array([0.45]))
END, INSIDE = dfx.SaveAt(t1=True), dfx.SaveAt(ts=jnp.array([0.33, 0.77]))
TSIT5 = Reversible(dfx.Tsit5())
SOLVES = {
    "Tsit5, end": (TSIT5, STORED, CONSTANT, END),
    "Tsit5, inside": (TSIT5, STORED, CONSTANT, INSIDE),
    "Tsit5, adaptive": (TSIT5, STORED, ADAPTIVE, END),
    "Tsit5, reversed, end": (TSIT5, REVERSED, CONSTANT, END),
    "Tsit5, reversed, inside": (TSIT5, REVERSED, CONSTANT, INSIDE),
    "Tsit5, reversed, adaptive": (TSIT5, REVERSED, ADAPTIVE, END),
    "estimates": (WithEstimates(TSIT5), STORED, ADAPTIVE, END),
    "half steps": (dfx.HalfSolver(EES25()), STORED, ADAPTIVE, END),
    "leapfrog": (AsynchronousLeapfrog(), REVERSED, ADAPTIVE, END),
    "Verlet, end": (StormerVerlet(), STORED, CONSTANT, END),
    "Verlet, inside": (StormerVerlet(), STORED, CONSTANT, INSIDE),
    "Verlet, reversed, end": (StormerVerlet(), REVERSED, CONSTANT, END),
    "Heun, jump": (ReversibleHeun(), STORED, JUMP, END),
    "Heun, reversed, jump": (ReversibleHeun(), REVERSED, JUMP, END),
}


@pytest.mark.parametrize("name", SOLVES)
def test_nfe_counts_what_is_not_compiled_away(name):
    solver, adjoint, controller, saveat = SOLVES[name]
    calls = []

    def count(y):
        calls.append(y)
        return np.zeros_like(y)

    def field(t, y, args):  # pure: XLA drops an evaluation that nobody uses
        return jnp.tanh(-y) + jax.pure_callback(count, jax.typeof(y), y)

    terms, y0 = dfx.ODETerm(field), jnp.array([1.0, 0.5])
    if isinstance(solver, StormerVerlet):
        terms, y0 = (terms, dfx.ODETerm(lambda t, q, args: -q)), (y0, y0)

    def nfe(y0):
        return dfx.diffeqsolve(
            terms, solver, 0.0, 1.0, 0.1, y0, stepsize_controller=controller, saveat=saveat,
            adjoint=adjoint, max_steps=64,
        ).stats["nfe"]  # fmt: skip

    run = jax.jit(lambda y0: (nfe(y0), 0)).lower(y0).compile()
    calls.clear()
    found, _ = jax.block_until_ready(run(y0))
    assert found == len(calls) > 0


def test_every_solver_of_diffrax_is_known():
    kinds = [x for x in vars(dfx).values() if isinstance(x, type)]
    solvers = [x for x in kinds if issubclass(x, dfx.AbstractSolver)]
    named = {x.__name__: x for x in solvers if not x.__name__.startswith("Abstract")}
    assert len(named) > 30
    for name, kind in named.items():
        solver = kind(dfx.Heun()) if name == "HalfSolver" else kind()
        declared = declared_by(solver)
        assert declared is not None and declared.evaluations > 0, name
        implicit = issubclass(kind, dfx.AbstractImplicitSolver)
        assert np.isinf(declared.stability_limit) == implicit, name


def test_a_step_of_ones_own_is_not_known():
    class Halved(dfx.Heun):
        def step(self, *args, **kwargs):
            y1, *rest = super().step(*args, **kwargs)
            return 0.5 * y1, *rest

    assert declared_by(Halved()) is None and declared_by(dfx.HalfSolver(Halved())) is None
    assert declared_by(WithEstimates(Halved())) is None
