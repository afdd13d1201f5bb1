"""Paths that remember: the loops carry their memory, and nothing but the cost depends on it."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from sweeps import sweep

from nde.solvers import (
    BrownianGrid,
    BrownianInterval,
    DiscreteAdjoint,
    ReversibleAdjoint,
    ReversibleHeun,
)
from nde.solvers.adjoint import noise

W = jnp.array([[0.4, 1.5], [-1.6, -0.3]])
Y0 = jnp.array([0.3, -0.2])
ADAPTIVE = dfx.PIDController(rtol=1e-2, atol=1e-3, pcoeff=0.1, icoeff=0.3, dtmin=2**-12)


def terms_of(w, key, tol=2**-14):
    path = BrownianInterval(0.0, 1.0, (2,), key, tol=tol)
    drift = dfx.ODETerm(lambda t, y, args: jnp.tanh(w @ y))
    sigma = lambda t, y, args: lx.DiagonalLinearOperator(0.2 * jnp.cos(w @ y))
    return dfx.MultiTerm(drift, dfx.ControlTerm(sigma, path))


def loss(w, y0, key, adjoint, solver, controller, saveat, direction=1):
    ends = (0.0, 1.0) if direction == 1 else (1.0, 0.0)
    sol = dfx.diffeqsolve(
        terms_of(w, key), solver, *ends, None if isinstance(controller, dfx.StepTo) else direction / 32,
        y0, adjoint=adjoint, saveat=saveat, stepsize_controller=controller, max_steps=256,
    )  # fmt: skip
    reached = jnp.isfinite(sol.ys)
    return jnp.sum(jnp.where(reached, jnp.sin(jnp.where(reached, sol.ys, 0.0)), 0.0)), sol


CASES = {
    "stored": (DiscreteAdjoint(), dfx.Heun(), dfx.Heun()),
    "few slots": (DiscreteAdjoint(checkpoints=2), dfx.Heun(), dfx.Heun()),
    "reversed": (ReversibleAdjoint(checkpoint_every=7), ReversibleHeun(), dfx.ReversibleHeun()),
}


@pytest.mark.parametrize("direction", sweep([1, -1], 1))
@pytest.mark.parametrize("name", sweep(CASES, "stored"))
def test_gradient_is_that_of_diffrax_over_the_same_steps(name, direction):
    """diffrax asks the path anew at every step, forwards and backwards."""
    adjoint, ours, theirs = CASES[name]
    every, last = dfx.SaveAt(t0=True, steps=True), dfx.SaveAt(t1=True)
    key = jax.random.key(2)
    _, sol = loss(W, Y0, key, adjoint, ours, ADAPTIVE, every, direction)
    knots = np.asarray(sol.ts)[np.isfinite(sol.ts)]
    assert sol.stats["num_rejected_steps"] > 0
    got, _ = jax.grad(loss, argnums=(0, 1), has_aux=True)(
        W, Y0, key, adjoint, ours, ADAPTIVE, last, direction
    )
    default = dfx.RecursiveCheckpointAdjoint()
    want, _ = jax.grad(loss, argnums=(0, 1), has_aux=True)(
        W, Y0, key, default, theirs, dfx.StepTo(knots), last, direction
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("direction", [1, -1])
def test_accepted_steps_end_on_nodes(direction):
    every = dfx.SaveAt(steps=True)
    _, sol = loss(
        W, Y0, jax.random.key(2), DiscreteAdjoint(), dfx.Heun(), ADAPTIVE, every, direction
    )
    knots = np.asarray(sol.ts)[np.isfinite(sol.ts)]
    steps = np.abs(np.diff(np.concatenate([[0.0 if direction == 1 else 1.0], knots])))
    # Each end is a multiple of the largest 2^-k at most an eighth of the step that led there.
    grids = 2.0 ** np.floor(np.log2(steps) - 3)
    assert np.all(knots / grids == np.round(knots / grids))
    assert knots[-1] == (1.0 if direction == 1 else 0.0)


def test_a_solver_that_asks_about_parts_of_a_step_is_left_alone():
    def heard(solver):
        terms = terms_of(W, jax.random.key(0))
        from nde.solvers.adjoint.stepper import stepper_for

        stepper = stepper_for(solver, terms, None, 0.0, 0.1, Y0)
        t0, t1 = jnp.array(0.0), jnp.array(0.1)
        state = stepper.state(solver.init(terms, t0, t1, Y0, None))
        return noise.noise_of(stepper, t0, t1, Y0, state)

    assert heard(dfx.HalfSolver(dfx.Heun())) is None
    assert heard(dfx.Heun()).use_levy == (False,)


class Substeps(dfx.AbstractItoSolver):
    """Four Euler steps in one: the query is traced once, and made four times."""

    term_structure = dfx.AbstractTerm
    interpolation_cls = dfx.LocalLinearInterpolation

    def order(self, terms):
        return 1

    def strong_order(self, terms):
        return 0.5

    def init(self, terms, t0, t1, y0, args):
        return None

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        h = (t1 - t0) / 4

        def euler(i, y):
            t = t0 + i * h
            return y + terms.vf_prod(t, y, args, terms.contr(t, t + h))

        y1 = jax.lax.fori_loop(0, 4, euler, y0)
        return y1, None, dict(y0=y0, y1=y1), None, dfx.RESULTS.successful


class Later(dfx.AbstractPath):
    """A path with a time of its own."""

    path: dfx.AbstractPath
    by: float
    t0 = None
    t1 = None

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        return self.path.evaluate(t0 - self.by, t1 - self.by)


class Read(eqx.Module):
    """A random ODE: the field reads the path."""

    path: dfx.AbstractPath

    def __call__(self, t, y, args):
        return self.path.evaluate(t) - y


def control(path):
    sigma = lambda t, y, args: lx.DiagonalLinearOperator(0.2 * jnp.cos(y))
    return dfx.MultiTerm(dfx.ODETerm(lambda t, y, args: -y), dfx.ControlTerm(sigma, path))


PATH = BrownianInterval(0.0, 1.0, (2,), jax.random.key(0))
ODD = {
    "over two steps": (control(PATH), dfx.LeapfrogMidpoint(), 0.0, dfx.ConstantStepSize()),
    "in a loop": (control(PATH), Substeps(), 0.0, dfx.ConstantStepSize()),
    "shifted": (control(Later(PATH, 1.0)), dfx.Heun(), 1.0, ADAPTIVE),
    "in the field": (dfx.ODETerm(Read(PATH)), dfx.Euler(), 0.0, dfx.ConstantStepSize()),
    "in every stage": (dfx.ODETerm(Read(PATH)), dfx.Heun(), 0.0, dfx.ConstantStepSize()),
}


@pytest.mark.filterwarnings("ignore:.*not marked as converging.*")
@pytest.mark.parametrize("name", ODD)
def test_a_path_that_is_asked_in_another_way_answers_as_it_does_to_diffrax(name):
    terms, solver, t0, controller = ODD[name]

    def run(adjoint):
        return dfx.diffeqsolve(
            terms, solver, t0, t0 + 1, 1 / 8, Y0, adjoint=adjoint, max_steps=64,
            stepsize_controller=controller,
        ).ys  # fmt: skip

    want = run(dfx.RecursiveCheckpointAdjoint())
    np.testing.assert_allclose(run(DiscreteAdjoint()), want, rtol=1e-12)


def test_batched_lanes_see_their_own_paths():
    keys = jax.random.split(jax.random.key(5), 3)
    run = lambda key: loss(
        W, Y0, key, DiscreteAdjoint(), dfx.Heun(), ADAPTIVE, dfx.SaveAt(t1=True)
    )[1].ys[0]
    alone = jnp.stack([run(key) for key in keys])
    np.testing.assert_allclose(jax.jit(jax.vmap(run))(keys), alone, rtol=1e-12)
    assert not np.allclose(alone[0], alone[1])


def test_a_grid_refuses_steps_that_leave_it():
    path = BrownianGrid(0.0, 1.0, 1 / 32, (2,), jax.random.key(0))
    sigma = lambda t, y, args: lx.DiagonalLinearOperator(jnp.cos(y))
    terms = dfx.MultiTerm(dfx.ODETerm(lambda t, y, args: -y), dfx.ControlTerm(sigma, path))
    with pytest.raises(ValueError, match="BrownianGrid.*PIDController.*BrownianInterval"):
        dfx.diffeqsolve(
            terms, dfx.Heun(), 0.0, 1.0, 1 / 32, Y0, adjoint=DiscreteAdjoint(),
            stepsize_controller=ADAPTIVE,
        )  # fmt: skip
