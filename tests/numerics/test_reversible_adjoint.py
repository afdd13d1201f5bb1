"""Gradients of `ReversibleAdjoint` against autodiff through a plain scan of the same steps."""

import functools

import diffrax as dfx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from oracles import CONSTANT, DIFFRAX, PARAMS, Y0, field, relative, solve, weigh
from problems import PROBLEMS, terms
from reversibles import SOLVERS
from sweeps import sweep

from nde.solvers import (
    EES27,
    DiscreteAdjoint,
    Reversible,
    ReversibleAdjoint,
    ReversibleHeun,
    trees,
)
from nde.solvers.reversible.coupling import Coupling

EXACT = 1e-12  # a few hundred roundings
VARIABLE = dfx.StepTo(np.array([0.0, 0.2, 0.3, 0.55, 0.8, 0.95, 1.1]))
PID = dfx.PIDController(rtol=1e-3, atol=1e-4, dtmax=0.2)


def observe(t, y, args):
    """A nonlinear output that depends on the parameters, too."""
    scale = jnp.sum(jax.tree.leaves(args)[0]) * jnp.exp(-t)
    return jax.tree.map(lambda x: jnp.sin(scale * x), y)


def scan(solver, its_terms, times, y0, args, ts=None, fn=None, state=None):
    """The solver's own steps, one after the other: all states, and the outputs at `ts`."""
    times, ts = jnp.asarray(times), jnp.asarray([] if ts is None else ts)
    forward = times[-1] > times[0]

    def step(carry, when):
        y, state = carry
        y1, _, info, state, _ = solver.step(its_terms, *when, y, args, state, False)
        path = solver.interpolation_cls(t0=when[0], t1=when[1], **info)
        here = jnp.where(
            forward, (when[0] < ts) & (ts <= when[1]), (when[0] > ts) & (ts >= when[1])
        )
        inside = jax.vmap(path.evaluate)(jnp.where(here, ts, when[1]))
        keep = lambda x: jnp.where(here.reshape((-1,) + (1,) * (x.ndim - 1)), x, 0.0)
        return (y1, state), (y1, jax.tree.map(keep, inside))

    state = solver.init(its_terms, times[0], times[1], y0, args) if state is None else state
    _, (ys, at) = jax.lax.scan(step, (y0, state), (times[:-1], times[1:]))
    at = jax.tree.map(lambda x: jnp.sum(x, axis=0), at)
    end = jax.tree.map(lambda x: x[-1:], ys)
    out = {"end": end, "steps": ys, "ts": at}
    if fn is not None:
        out["fn"] = jax.vmap(lambda t, y: fn(t, y, args))(ts, at)
    return out


def taken(sol_ts, t0):
    """The ends of all steps, from the times that `steps=1` has saved."""
    return np.concatenate([[t0], np.asarray(sol_ts)[np.isfinite(sol_ts)]])


def compared(adjoint, solver, its_terms, y0, args, *, t0=0.0, t1=1.0, ts=None, fn=None, **options):
    """The error of the gradient to (y0, args), and the solution."""
    subs = {"end": dfx.SubSaveAt(t1=True), "steps": dfx.SubSaveAt(steps=1)}
    if ts is not None:
        subs["ts"] = dfx.SubSaveAt(ts=ts)
    if fn is not None:
        subs["fn"] = dfx.SubSaveAt(ts=ts, fn=fn)
    make = its_terms if callable(its_terms) else lambda args: its_terms

    def ours(y0, args):
        sol = dfx.diffeqsolve(
            make(args), solver, t0, t1, y0=y0, args=args, saveat=dfx.SaveAt(subs=subs),
            adjoint=adjoint, **(dict(max_steps=256) | options),
        )  # fmt: skip
        return weigh(sol.ys), sol

    got, sol = jax.jit(jax.grad(ours, argnums=(0, 1), has_aux=True))(y0, args)
    times = taken(sol.ts["steps"], t0)

    def theirs(y0, args):
        out = scan(solver, make(args), times, y0, args, ts, fn)
        return weigh({name: out[name] for name in subs})

    return relative(got, jax.jit(jax.grad(theirs, argnums=(0, 1)))(y0, args)), sol


def problem_of(name):
    return PROBLEMS["driven pendulum" if name in ("StormerVerlet", "Yoshida4") else "network"]


@pytest.mark.parametrize("name", SOLVERS)
def test_constant_steps(name):
    """Outputs at the steps: un-stepped and pulled back at once."""
    problem, solver = problem_of(name), SOLVERS[name]
    every = 32 if name.startswith("EES") else None  # their inverse is not exact
    error, sol = compared(
        ReversibleAdjoint(every), solver, terms(problem), problem.y0, problem.params, dt0=0.04
    )
    assert sol.stats["num_steps"] == 25
    assert error < EXACT


# The others share their code with one of these, or (`Reversible`) are in the other tests of this file.
QUICK = ("ReversibleHeun", "ALF", "EES27", "StormerVerlet")


@pytest.mark.parametrize("name", sweep(SOLVERS, *QUICK))
def test_adaptive_steps(name):
    """Outputs between the steps as well, and a nonlinear one: un-stepped, then pulled back."""
    problem, solver = problem_of(name), SOLVERS[name]
    adaptive = isinstance(solver, dfx.AbstractAdaptiveSolver)
    error, sol = compared(
        ReversibleAdjoint(3), solver, terms(problem), problem.y0, problem.params, t1=1.1,
        dt0=0.1 if adaptive else None, ts=np.array([0.13, 0.5, 0.51, 0.52, 1.0]), fn=observe,
        stepsize_controller=PID if adaptive else VARIABLE,
    )  # fmt: skip
    assert sol.stats["num_accepted_steps"] > 3  # more than one chunk
    assert error < EXACT


def test_backwards_in_time():
    problem = PROBLEMS["network"]
    error, _ = compared(
        ReversibleAdjoint(3), ReversibleHeun(), terms(problem), problem.y0, problem.params, t0=1.0,
        t1=0.1, dt0=-0.1, ts=np.array([0.9, 0.32, 0.3]), stepsize_controller=PID,
    )  # fmt: skip
    assert error < EXACT


@pytest.mark.parametrize("every", sweep([1, 3, 32, None], 1, 32, None))
def test_a_thousand_steps(every):
    problem = PROBLEMS["network"]
    error, sol = compared(
        ReversibleAdjoint(every), ReversibleHeun(), terms(problem), problem.y0, problem.params,
        dt0=1 / 1000, max_steps=1001,
    )  # fmt: skip
    assert sol.stats["num_steps"] in (1000, 1001)
    assert error < EXACT


@pytest.mark.parametrize("name", sweep(["Reversible(Tsit5)", "EES27", "Yoshida4"], "EES27"))
def test_a_thousand_steps_of_the_others(name):
    """The default. What the damping of the coupling amplifies is replayed where it must be."""
    problem = problem_of(name)
    error, _ = compared(
        ReversibleAdjoint(), SOLVERS[name], terms(problem), problem.y0, problem.params,
        dt0=1 / 1000, max_steps=1001,
    )  # fmt: skip
    assert error < EXACT


# --- controls ------------------------------------------------------------------------------------


KNOTS = np.array([0.0, 0.3, 0.55, 0.9, 1.0])


def controlled(args):
    path = dfx.LinearInterpolation(KNOTS, args["path"])
    mix = lambda t, y, args: jnp.tanh(args["w"] @ y)[:, None] * args["b"][None] + 0.3 * jnp.cos(t)
    return dfx.ControlTerm(mix, path)


@pytest.mark.parametrize("name, every", [("ReversibleHeun", None), ("Reversible(Bosh3)", 3)])
def test_controlled_equations(name, every):
    """The gradient reaches the values that the control path goes through."""
    path = jnp.sin(jnp.arange(15.0).reshape(5, 3))
    args = PARAMS | {"path": path}
    error, _ = compared(
        ReversibleAdjoint(every), SOLVERS[name], controlled, Y0, args, dt0=0.05,
        ts=None if every is None else np.array([0.31, 0.77]),
    )  # fmt: skip
    assert error < EXACT


NOISE = dfx.VirtualBrownianTree(0.0, 1.0, tol=2**-7, shape=(3,), key=jax.random.key(1))


def matrix(t, y, args):
    return 0.2 * jnp.cos(args["w"]) * jnp.sin(y)[:, None]


def diagonal(t, y, args):
    return lx.DiagonalLinearOperator(0.2 * jnp.cos(args["b"]) * (1.0 + 0.1 * y))


@pytest.mark.parametrize(
    "name, diffusion, every",
    [
        ("EES25", diagonal, 32),
        pytest.param("ReversibleHeun", matrix, None, marks=pytest.mark.slow),
        pytest.param("Reversible(Midpoint)", matrix, 8, marks=pytest.mark.slow),
    ],
)
def test_stochastic_equations(name, diffusion, every):
    its_terms = dfx.MultiTerm(dfx.ODETerm(field), dfx.ControlTerm(diffusion, NOISE))
    error, _ = compared(ReversibleAdjoint(every), SOLVERS[name], its_terms, Y0, PARAMS, dt0=1 / 32)
    assert error < EXACT


# --- lanes ---------------------------------------------------------------------------------------


RATES = jnp.array([0.5, 1.0, 3.0])
YS = jnp.stack([Y0, -0.5 * Y0, Y0[::-1]])


def stretched(t, y, args):
    params, rate = args
    return rate * field(t, y, params)


def one(adjoint, solver, params, rate, y):
    sol = solve(
        y, (params, rate), vector_field=stretched, solver=solver, adjoint=adjoint, dt0=0.1,
        stepsize_controller=PID, throw=False,
    )  # fmt: skip
    return weigh(sol.ys), sol.stats["num_accepted_steps"]


def per_example(adjoint, solver):
    gradient = jax.grad(lambda *a: one(adjoint, solver, *a)[0], argnums=(0, 1, 2))
    return jax.vmap(gradient, in_axes=(None, 0, 0))


def summed(adjoint, solver):
    def loss(params, rates, ys):
        return jnp.sum(jax.vmap(lambda r, y: one(adjoint, solver, params, r, y)[0])(rates, ys))

    return jax.grad(loss, argnums=(0, 1, 2))


def nested(adjoint, solver):
    """Two sets of parameters, each with a batch."""

    def both(params, rates, ys):
        sets = jax.tree.map(lambda p: jnp.stack([p, 0.9 * p]), params)
        return jax.vmap(summed(adjoint, solver), in_axes=(0, None, None))(sets, rates, ys)

    return both


@pytest.mark.parametrize(
    "transform, name, every",
    [
        (summed, "ReversibleHeun", 32),
        (per_example, "ReversibleHeun", None),
        (nested, "ReversibleHeun", 3),
        (summed, "EES27", 3),
    ],
)
def test_lanes(transform, name, every):
    solver = SOLVERS[name]
    run = lambda adjoint: jax.jit(transform(adjoint, solver))(PARAMS, RATES, YS)
    assert relative(run(ReversibleAdjoint(every)), run(DiscreteAdjoint())) < EXACT


def test_the_lanes_take_different_numbers_of_steps():
    steps = jax.vmap(lambda r, y: one(ReversibleAdjoint(), ReversibleHeun(), PARAMS, r, y)[1])
    assert len(set(np.asarray(steps(RATES, YS)).tolist())) == 3


def fragile(t, y, args):
    """Undefined after t = 0.5 where `broken`."""
    params, broken = args
    defined = jnp.sqrt(jnp.where(broken, 0.5 - t, 1.0))
    return defined * field(t, y, params)


@pytest.mark.parametrize("every", [3, None])
def test_a_failed_lane_has_no_gradient_and_leaves_the_others_alone(every):
    def loss(params, ys, broken, weights):
        def lane(y, broken):
            sol = solve(
                y, (params, broken), vector_field=fragile, solver=ReversibleHeun(), dt0=0.05,
                adjoint=ReversibleAdjoint(every, certify=True), stepsize_controller=CONSTANT,
                max_steps=32, throw=False,
            )  # fmt: skip
            return jnp.sum(jnp.sin(sol.ys)), sol.result, sol.stats["drift"]

        values, result, drift = jax.vmap(lane)(ys, broken)
        return jnp.sum(weights * values), (result, drift)

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    healthy, (_, _) = run(PARAMS, YS, np.array([False, False, False]), np.array([1.0, 0.0, 1.0]))
    got, (result, drift) = run(PARAMS, YS, np.array([False, True, False]), np.ones(3))
    np.testing.assert_array_equal(result == dfx.RESULTS.successful, [True, False, True])
    assert not np.any(got[1][1]) and np.all(got[1][0]) and np.all(got[1][2])
    assert relative(got[0], healthy[0]) == 0 and relative(got[1], healthy[1]) == 0
    assert np.all(drift[np.array([0, 2])] < 1e-12)


# Accepts every step at its longest, whatever the error, and can be clipped.
FIXED = dfx.PIDController(rtol=1e3, atol=1e3, dtmax=0.05)


@pytest.mark.parametrize("name, every", [("ReversibleHeun", None), ("Reversible(Bosh3)", 3)])
def test_jumps_of_the_field(name, every):
    """A shared evaluation must not be shared across a jump. diffrax takes the same steps."""
    controller = dfx.ClipStepSizeController(FIXED, jump_ts=[0.33, 0.71])

    def kinked(t, y, args):
        return jnp.where((t > 0.33) & (t <= 0.71), 2.0, -1.0) * field(t, y, args)

    def gradient(adjoint):
        def loss(y, params):
            sol = solve(
                y, params, vector_field=kinked, solver=SOLVERS[name], adjoint=adjoint, dt0=0.05,
                stepsize_controller=controller, max_steps=32,
            )  # fmt: skip
            return weigh(sol.ys)

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(Y0, PARAMS)

    assert relative(gradient(ReversibleAdjoint(every)), gradient(DIFFRAX)) < EXACT


# --- replays, and what a wrong inverse does ------------------------------------------------------


FEW, MANY = 40, 160


@functools.cache
def by_scan(solver, steps):
    times = np.linspace(0.0, 1.0, steps + 1)
    loss = lambda y, params: weigh(scan(solver, dfx.ODETerm(field), times, y, params)["end"])
    return jax.jit(jax.grad(loss, argnums=(0, 1)))(Y0, PARAMS)


def error_of(solver, every, steps):
    """Of the gradient of y(1)."""

    def loss(y, params):
        sol = solve(
            y, params, solver=solver, adjoint=ReversibleAdjoint(every), max_steps=steps,
            stepsize_controller=dfx.StepTo(np.linspace(0.0, 1.0, steps + 1)), dt0=None,
        )  # fmt: skip
        return weigh(sol.ys)

    got = jax.jit(jax.grad(loss, argnums=(0, 1)))(Y0, PARAMS)
    return relative(got, by_scan(solver, steps))


def test_a_chunk_that_misses_its_start_is_replayed():
    """coupling=0.5 doubles rounding in every step back: hopeless over 160 steps, and in 32 visible."""
    solver = Reversible(dfx.Midpoint(), 0.5)
    assert not error_of(solver, None, MANY) < 1e-3
    assert error_of(solver, 32, MANY) < EXACT


def wrong_sign(self, members, g):
    """`Coupling.inverse` that adds the increment once more instead of taking it away."""
    x, w = members[self.target], members[self.source]
    x = trees.scale(1.0 / self.a, trees.combine((1.0, -self.b, 1.0), (x, w, g)))
    return (*members[: self.target], x, *members[self.target + 1 :])


@pytest.mark.parametrize("name", ["ReversibleHeun", "Reversible(Midpoint)"])
def test_a_wrong_inverse_is_seen_without_restarts_and_repaired_with_them(name, monkeypatch):
    """Negative control of every test above."""
    monkeypatch.setattr(Coupling, "inverse", wrong_sign)
    assert not error_of(SOLVERS[name], None, FEW) < 1e-4
    assert error_of(SOLVERS[name], 32, FEW) < EXACT


def test_a_wrong_step_back_is_seen_without_restarts_and_repaired_with_them(monkeypatch):
    forwards = lambda self, step, y: self._stages(step, step.t0, step.t1, step.control, y).increment
    monkeypatch.setattr(EES27, "_back", forwards)
    assert not error_of(EES27(), None, FEW) < 1e-4
    assert error_of(EES27(), 32, FEW) < EXACT


def test_each_member_is_held_to_its_own_precision():
    """A constant in float32 beside it must not make the drift of a float64 member pass."""

    def loss(q, y0, adjoint):
        def field(t, y, q):
            return {"a": jnp.cos(q * y["a"][::-1]) * y["a"], "b": jnp.zeros_like(y["b"])}

        times = (np.float32(0.0), np.float32(3.1), np.float32(0.1))
        sol = dfx.diffeqsolve(
            dfx.ODETerm(field), Reversible(dfx.Midpoint(), 0.55), *times, y0, q, adjoint=adjoint,
            max_steps=64,
        )  # fmt: skip
        return jnp.sum(jnp.sin(sol.ys["a"]))

    y0 = {"a": jnp.array([0.7, 0.9]), "b": jnp.ones(2, jnp.float32)}
    got, want = (jax.grad(loss)(1.5, y0, a) for a in (ReversibleAdjoint(), DiscreteAdjoint()))
    np.testing.assert_allclose(got, want, rtol=1e-12)
