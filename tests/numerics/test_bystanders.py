"""Lanes that have nothing to contribute evaluate something all the same, and zero times nan is nan.

So what they evaluate must be harmless: in a lane that failed, that waits for others, or that has no output
due. The reference is each time the lanes that matter, solved alone.
"""

import functools as ft

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import DIFFRAX
from sweeps import sweep

from nde._steps import KnotSteps
from nde.solvers import (
    EES25,
    AsynchronousLeapfrog,
    DiscreteAdjoint,
    ReversibleAdjoint,
    ReversibleHeun,
    StormerVerlet,
)

DISCRETE, REVERSIBLE = DiscreteAdjoint(), ReversibleAdjoint(checkpoint_every=2)
PAIRS = {
    "Tsit5": (dfx.Tsit5(), DISCRETE),
    "ReversibleHeun, stored": (dfx.ReversibleHeun(), DISCRETE),
    "ReversibleHeun": (ReversibleHeun(), REVERSIBLE),
    "leapfrog, stored": (AsynchronousLeapfrog(), DISCRETE),
    "leapfrog": (AsynchronousLeapfrog(), REVERSIBLE),
}
SINE = lambda t, y, args: jnp.sin(args[0] * y + args[1])
SAVED = {
    "plain": dfx.SaveAt(t0=True, t1=True),
    "ends": dfx.SaveAt(t0=True, t1=True, fn=SINE),
    "end and state": dfx.SaveAt(t1=True, fn=SINE, solver_state=True),
    "times": dfx.SaveAt(ts=jnp.array([0.0, 0.4, 1.0]), fn=SINE),
    "steps": dfx.SaveAt(steps=2, t1=True, fn=SINE),
}


def shared(pair, saveat, stop=False):
    """The loss of a batch: p is shared, the rates are each lane's own, and so are the ends of time."""
    solver, adjoint = pair

    def loss(p, rates, ys, ends):
        def lane(rate, y, end):
            field = lambda t, y, args: -args[1] * jnp.sin(args[0] * y)
            sol = dfx.diffeqsolve(
                dfx.ODETerm(field), solver, 0.0, end, 0.25, y, (p, rate), adjoint=adjoint,
                max_steps=6, saveat=saveat, throw=False,
            )  # fmt: skip
            tree = (sol.ys, sol.solver_state if saveat.solver_state else None)
            leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
            total = sum(jnp.sum(jnp.where(jnp.isfinite(x), x, 0.0)) for x in leaves)
            return jnp.where(sol.result == dfx.RESULTS.successful, total, 0.0)

        return jnp.sum(jax.vmap(lane)(rates, ys, ends))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))


def check_alone(gradient, rates, ys, ends):
    """Lane 1 of 3 fails: the others are as they are without it."""
    p, others = jnp.array(1.5), np.array([0, 2])
    got = gradient(p, *map(jnp.array, (rates, ys, ends)))
    want = gradient(p, *(jnp.array(x)[others] for x in (rates, ys, ends)))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-13)
    for of_lanes, alone in zip(got[1:], want[1:], strict=True):
        np.testing.assert_allclose(of_lanes[others], alone, rtol=1e-13)
        assert of_lanes[1] == 0


@pytest.mark.parametrize(
    "name, saved",
    [
        ("Tsit5", "ends"),
        ("Tsit5", "times"),
        pytest.param("Tsit5", "steps", marks=pytest.mark.slow),
        ("ReversibleHeun, stored", "plain"),
        ("ReversibleHeun", "ends"),
        pytest.param("ReversibleHeun", "steps", marks=pytest.mark.slow),
        ("leapfrog, stored", "end and state"),
        ("leapfrog", "plain"),
    ],
)
def test_a_failed_lane_is_pulled_back_nowhere(name, saved):
    """Neither in the loop nor beside it, where the solver begins and outputs at the ends are made."""
    gradient = shared(PAIRS[name], SAVED[saved])
    good = [1.0, 1.1, 1.2]
    check_alone(gradient, [1.0, np.nan, 0.5], good, np.ones(3))  # its own parameter
    check_alone(gradient, good, [1.0, np.nan, 2.0], np.ones(3))  # its own state
    if saved != "times":
        check_alone(gradient, good, good, [1.0, 50.0, 1.0])  # too few steps


@pytest.mark.parametrize("saved", ["ends", "end and state"])
def test_every_lane_may_fail(saved):
    gradient = shared(PAIRS["leapfrog"], SAVED[saved])
    grads = gradient(jnp.array(1.5), jnp.ones(2), jnp.full(2, jnp.nan), jnp.ones(2))
    assert not any(np.any(x) for x in jax.tree.leaves(grads))


@pytest.mark.slow
def test_levels_of_constants_beside_the_loop():
    """A parameter on one level of two, in an output at the end: both orders of `vmap` and `grad`."""

    def one(adjoint, p, q, y):
        fn = lambda t, y, args: jnp.sin(args[0] * y) * args[1]
        return dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: -args[1] * y), dfx.Heun(), 0.0, 1.0, 0.25, y, (p, q),
            adjoint=adjoint, max_steps=6, saveat=dfx.SaveAt(t1=True, fn=fn), throw=False,
        ).ys[0]  # fmt: skip

    def gradients(adjoint):
        solve = ft.partial(one, adjoint)

        def total(p, qs, ys):
            return jnp.sum(jnp.cos(jax.vmap(lambda q: jax.vmap(lambda y: solve(p, q, y))(ys))(qs)))

        p, qs, ys = jnp.array(0.7), jnp.array([0.5, 1.5]), jnp.array([1.0, 2.0, 3.0])
        gradient = jax.grad(total, argnums=(0, 1, 2))
        apart = jax.vmap(gradient, in_axes=(None, 0, None))(p, qs[:, None], ys)
        rows = jax.vmap(jax.jacrev(solve, argnums=(0, 1)), in_axes=(None, None, 0))(p, qs[0], ys)
        return gradient(p, qs, ys), apart, rows

    found = [gradients(adjoint) for adjoint in (DISCRETE, DIFFRAX)]
    for got, want in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("name", ["Tsit5", "ReversibleHeun"])
@pytest.mark.parametrize("rates", [0.5, [0.5, 0.6]], ids=["shared", "own"])
def test_a_failed_lane_does_not_share_the_nan_of_the_lane_it_borrows_from(name, rates):
    """The derivative of the square root is infinite in lane 0; lane 1 fails."""
    solver, adjoint = PAIRS[name]

    def loss(rate, y):
        field = lambda t, y, rate: -rate * jnp.sqrt(y)
        return dfx.diffeqsolve(
            dfx.ODETerm(field), solver, 0.0, 1.0, 0.25, y, rate, adjoint=adjoint, max_steps=6,
            saveat=dfx.SaveAt(t1=True, fn=lambda t, y, rate: rate * y), throw=False,
        ).ys[0]  # fmt: skip

    gradient = jax.vmap(jax.grad(loss, argnums=(0, 1)), in_axes=(0 if np.ndim(rates) else None, 0))
    grads = gradient(jnp.asarray(rates), jnp.array([0.0, -1.0]))
    assert np.isnan(grads[0][0]) and not np.any(np.asarray(grads)[:, 1])


# --- outputs without a derivative ----------------------------------------------------------------


def through_zero(p, y0, saveat, solver, adjoint):
    """y = y0 + t, with outputs that have no derivative where y = 0."""
    return dfx.diffeqsolve(
        dfx.ODETerm(lambda t, y, p: jnp.ones_like(y)), solver, 0.0, 1.0, 0.25, y0, p,
        adjoint=adjoint, max_steps=4, saveat=saveat,
    ).ys.sum()  # fmt: skip


def norm(t, y, p):
    return jnp.linalg.norm(p * y)


@pytest.mark.parametrize(
    "solver, adjoint", [(dfx.Euler(), DISCRETE), (ReversibleHeun(), REVERSIBLE)]
)
def test_a_step_that_is_not_saved_is_not_pulled_back(solver, adjoint):
    """y = 0 after the first step; saved are the second and the fourth."""
    saveat = dfx.SaveAt(steps=2, fn=norm)
    y0 = jnp.array([-0.25, -0.25])
    got = jax.grad(through_zero)(2.0, y0, saveat, solver, adjoint)
    np.testing.assert_allclose(got, np.sqrt(2) * (0.25 + 0.75), rtol=1e-12)


@pytest.mark.parametrize(
    "solver, adjoint", [(dfx.Euler(), DISCRETE), (ReversibleHeun(), REVERSIBLE)]
)
def test_a_lane_with_nothing_due_is_not_pulled_back(solver, adjoint):
    """While the other lane has an output in a step, the end of that step is where y = 0."""
    ys, ts = jnp.array([[-0.25, -0.25], [1.0, 1.0]]), jnp.array([[0.4, 0.9], [0.1, 0.6]])

    def total(p):
        run = lambda y, t: through_zero(p, y, dfx.SaveAt(ts=t, fn=norm), solver, adjoint)
        return jnp.sum(jax.vmap(run)(ys, ts))

    want = np.sqrt(2) * (0.15 + 0.65 + 1.1 + 1.6)
    np.testing.assert_allclose(jax.grad(total)(2.0), want, rtol=1e-12)


@pytest.mark.parametrize(
    "solver, adjoint",
    [(dfx.Heun(), DISCRETE), (ReversibleHeun(), REVERSIBLE)],
)
@pytest.mark.parametrize("saved", ["steps", "ts"])
def test_a_lane_with_nothing_due_is_not_evaluated_at_the_point_of_another(solver, adjoint, saved):
    """With the thresholds of its own it may be undefined there."""
    thresholds, ys = jnp.array([0.1, 3.0, 50.0]), jnp.array([1.0, 10.0, 100.0])
    ts, ends = jnp.array([[0.3, 1.0], [0.1, 0.6], [0.05, 0.2]]), jnp.array([1.0, 0.75, 0.25])

    def one(weight, threshold, y, t, end, adjoint):
        fn = lambda t, y, p: weight * jnp.sqrt(y - threshold)
        saveat = dfx.SaveAt(steps=True, fn=fn) if saved == "steps" else dfx.SaveAt(ts=t, fn=fn)
        ys = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, p: -0.5 * y), solver, 0.0, end if saved == "steps" else 1.0,
            0.25, y, adjoint=adjoint, max_steps=4, saveat=saveat,
        ).ys  # fmt: skip
        return jnp.sum(jnp.where(jnp.isfinite(ys), ys, 0))

    def gradients(adjoint):
        def total(weight, thresholds, ys):
            run = lambda *lane: one(weight, *lane, adjoint)
            return jnp.sum(jax.vmap(run)(thresholds, ys, ts, ends))

        return jax.grad(total, argnums=(0, 1, 2))(1.3, thresholds, ys)

    for got, want in zip(gradients(adjoint), gradients(DIFFRAX), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12)


# --- lanes that wait -----------------------------------------------------------------------------


def emptied(p, y0, t1):
    """Torricelli's law by Euler's method, which empties the tank of lane 0 in one step exactly."""
    return dfx.diffeqsolve(
        dfx.ODETerm(lambda t, y, g: -jnp.sqrt(2.0 * g * y)), dfx.Euler(), 0.0, t1, 0.25, y0, p,
        adjoint=DISCRETE, max_steps=32,
    ).ys.sum()  # fmt: skip


def ended(p, y0, t1, solver, adjoint):
    """A field that ends where the solve of lane 0 does."""
    return dfx.diffeqsolve(
        dfx.ODETerm(lambda t, y, p: jnp.sqrt(p * y0 - t) + 0.0 * y), solver, 0.0, t1, 0.25, 1.0, p,
        adjoint=adjoint, max_steps=8,
    ).ys.sum()  # fmt: skip


def knotted(p, y0, knots):
    """The same, the steps being those of a controller that differs from lane to lane."""
    return dfx.diffeqsolve(
        dfx.ODETerm(lambda t, y, p: jnp.sqrt(p * y0 - t) + 0.0 * y), dfx.Midpoint(), 0.0, 1.0, None,
        1.0, p, stepsize_controller=KnotSteps(knots, 1), adjoint=DISCRETE, max_steps=8,
    ).ys.sum()  # fmt: skip


WAITING = {
    "Euler": (emptied, 8.0, [1.0, 100.0], [0.25, 0.75]),
    "Midpoint": (lambda *x: ended(*x, dfx.Midpoint(), DISCRETE), 1.0, [1.0, 9.0], [1.0, 1.5]),
    "leapfrog": (
        lambda *x: ended(*x, AsynchronousLeapfrog(), REVERSIBLE), 1.0, [1.0, 9.0], [1.0, 1.5],
    ),
    "EES25": (lambda *x: ended(*x, EES25(), REVERSIBLE), 1.0, [1.0, 9.0], [1.0, 1.5]),
    "knots": (knotted, 1.0, [1.0, 9.0], [[0.0, 0.5, 1.0, 1.0], [0.0, 0.25, 0.5, 1.0]]),
}  # fmt: skip


@pytest.mark.parametrize("name", sweep(WAITING, *(WAITING.keys() - {"leapfrog"})))
def test_a_lane_that_waits_does_so_where_it_began(name):
    """With constant steps: at its end the field may have no derivative."""
    lane, p, ys, ends = WAITING[name]
    ys, ends = jnp.array(ys), jnp.array(ends)
    got = jax.grad(lambda p: jnp.sum(jax.vmap(lambda y, t: lane(p, y, t))(ys, ends)))(p)
    want = sum(jax.grad(lane)(p, y, t) for y, t in zip(ys, ends, strict=True))
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("every", sweep([None, 4, 32], None, 4))
@pytest.mark.parametrize(
    "solver", [ReversibleHeun(), EES25(), StormerVerlet()], ids=lambda s: type(s).__name__
)
def test_a_lane_without_a_step_keeps_its_cotangent(solver, every):
    """It goes back with another lane, whose cotangents are not its own."""
    separable = isinstance(solver, StormerVerlet)
    shear = lambda t, x, p: -p * jnp.sin(x)
    term = dfx.ODETerm(shear)
    terms = (term, term) if separable else term
    ys, ends = jnp.array([1.0, 2.0, 0.5]), jnp.array([1.0, 0.0, 0.3])

    def gradients(adjoint):
        def total(ys, p):
            def run(y, end):
                y0 = (y, 0.5 * y) if separable else y
                out = dfx.diffeqsolve(
                    terms, solver, 0.0, end, 0.1, y0, p, adjoint=adjoint, max_steps=16
                ).ys
                return sum(jax.tree.leaves(jax.tree.map(jnp.sum, out)))

            return jax.vmap(run)(ys, ends) @ jnp.arange(1.0, 4.0)

        return jax.grad(total, argnums=(0, 1))(ys, 0.7)

    found = gradients(ReversibleAdjoint(checkpoint_every=every))
    assert found[0][1] == (3.0 if separable else 2.0)
    undone = 1e-12 if every else 1e-8  # EES25 takes back what a step did but for its fifth power
    for got, want in zip(found, gradients(DIFFRAX), strict=True):
        np.testing.assert_allclose(got, want, rtol=undone)


@pytest.mark.parametrize("name", ["leapfrog", "leapfrog, stored"])
def test_a_lane_without_a_step_is_not_pulled_back_through_its_first_state(name):
    """Where the field has no derivative."""
    solver, adjoint = PAIRS[name]

    def final(p, y, end):
        field = dfx.ODETerm(lambda t, y, p: -p * jnp.sqrt(y))
        return dfx.diffeqsolve(
            field, solver, 0.0, end, 0.25, y, p, adjoint=adjoint, max_steps=4
        ).ys[0]

    total = lambda p, ys, ends: jnp.sum(jax.vmap(final, in_axes=(None, 0, 0))(p, ys, ends))
    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    both = gradient(0.5, jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0]))
    alone = gradient(0.5, jnp.array([1.0]), jnp.array([1.0]))
    np.testing.assert_allclose(both[0], alone[0], rtol=1e-12)
    np.testing.assert_allclose(both[1], [alone[1][0], 1.0], rtol=1e-12)
