"""Error and stiffness estimates of a solve: their values, gradients and costs."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest
from sweeps import sweep

import nde
from nde.solvers import (
    SOSRI,
    BrownianInterval,
    DiscreteAdjoint,
    Estimates,
    Reversible,
    ReversibleAdjoint,
    ReversibleHeun,
    WithEstimates,
)

WEIGHTS = np.array([[0.3, -1.2], [0.8, 0.1]])
Y0S = np.array([[1.0, 2.0], [0.0, 1.0], [3.0, -1.0]])
RTOL, ATOL = 1e-4, 1e-6
ADAPTIVE = dfx.PIDController(rtol=RTOL, atol=ATOL)
# Steps of one length, judged by tolerances: what a finite difference can be compared with.
FORCED = dfx.PIDController(rtol=RTOL, atol=ATOL, dtmin=0.25, dtmax=0.25, force_dtmin=True)
NAMES = ("error_estimate", "stiffness_estimate")


def field(t, y, w):
    return 2 * jnp.tanh(w @ y) + jnp.sin(t)


def solve(w, y0, adjoint, solver=None, controller=ADAPTIVE, **options):
    return dfx.diffeqsolve(
        dfx.ODETerm(field), dfx.Tsit5() if solver is None else solver, 0.0, 2.0, 0.25, y0, args=w,
        adjoint=adjoint, stepsize_controller=controller, max_steps=64, **options,
    )  # fmt: skip


def by_hand(solver, ts, y):
    """E and S of every step, in NumPy, from the definition."""
    tableau, errors, stiffness = solver.tableau, [], []
    f = lambda t, y: 2 * np.tanh(WEIGHTS @ y) + np.sin(t)
    for t0, t1 in zip(ts[:-1], ts[1:], strict=True):
        h, gs, ks = t1 - t0, [y], [f(t0, y)]
        for row, c in zip(tableau.a_lower, tableau.c, strict=True):
            gs.append(y + h * sum(a * k for a, k in zip(row, ks, strict=True)))
            ks.append(f(t0 + c * h, gs[-1]))
        y1 = y + h * sum(b * k for b, k in zip(tableau.b_sol, ks, strict=True))
        e = h * sum(b * k for b, k in zip(tableau.b_error, ks, strict=True))
        scale = ATOL + RTOL * np.maximum(np.abs(y), np.abs(y1))
        errors.append(np.sqrt(np.mean((e / scale) ** 2)))
        stiffness.append(np.linalg.norm(ks[-1] - ks[-2]) / np.linalg.norm(gs[-1] - gs[-2]))
        y = y1
    return np.array(errors), np.array(stiffness)


@pytest.mark.parametrize(
    "solver, limit",
    [(dfx.Tsit5(), 3.5068), (dfx.Dopri5(), 3.3066), (dfx.Dopri8(), 5.1667), (dfx.Bosh3(), None)],
    ids=["Tsit5", "Dopri5", "Dopri8", "Bosh3"],
)
def test_equal_the_definition(solver, limit):
    adjoint = DiscreteAdjoint(estimates=Estimates(series=True))
    run = lambda y: solve(WEIGHTS, y, adjoint, solver, saveat=dfx.SaveAt(t0=True, steps=True))
    sols = jax.vmap(run)(Y0S)
    for i, y0 in enumerate(Y0S):
        n = int(sols.stats["num_accepted_steps"][i])
        ts = np.asarray(sols.ts[i, : n + 1])
        error, quotient = by_hand(solver, ts, y0)
        assert error.max() <= 1 + 1e-12
        stats = {name: np.asarray(x[i]) for name, x in sols.stats.items()}
        # The error is a difference of nearly equal numbers, hence absolutely.
        np.testing.assert_allclose(stats["error_steps"][:n], error, rtol=0, atol=1e-10)
        np.testing.assert_allclose(stats["step_lengths"][:n], np.diff(ts), rtol=1e-14)
        assert not np.any(stats["error_steps"][n:]) and not np.any(stats["step_lengths"][n:])
        np.testing.assert_allclose(stats["error_estimate"], error @ np.diff(ts), atol=1e-10)
        if limit is None:
            assert "stiffness_estimate" not in stats
        else:
            np.testing.assert_allclose(stats["stiffness_steps"][:n], quotient / limit, atol=1e-10)
            np.testing.assert_allclose(
                stats["stiffness_estimate"], quotient.sum() / limit, atol=1e-10
            )


def test_stability_limits():
    """h S = 1 on the linear equation y' = -y with h at the end of the stability region."""
    for solver, limit in ((dfx.Tsit5(), 3.5068), (dfx.Dopri5(), 3.3066), (dfx.Dopri8(), 5.1667)):
        grown = []
        for h in (0.999 * limit, 1.001 * limit):
            sol = dfx.diffeqsolve(
                dfx.ODETerm(lambda t, y, args: -y), solver, 0.0, h, h, jnp.array([1.0]),
                adjoint=DiscreteAdjoint(estimates=Estimates()),
            )  # fmt: skip
            grown.append(float(jnp.abs(sol.ys[-1, 0])))
            np.testing.assert_allclose(sol.stats["stiffness_estimate"] * limit, 1.0, rtol=1e-10)
        assert grown[0] < 1 < grown[1]


CASES = {
    "Tsit5": (DiscreteAdjoint, dfx.Tsit5(), NAMES),
    "Kvaerno3": (
        DiscreteAdjoint,
        dfx.Kvaerno3(root_finder=optx.Newton(rtol=1e-12, atol=1e-12)),
        NAMES[:1],
    ),
    "HalfSolver": (DiscreteAdjoint, dfx.HalfSolver(dfx.Euler()), NAMES[:1]),
    "ReversibleHeun": (ReversibleAdjoint, ReversibleHeun(), NAMES[:1]),
    "Reversible": (ReversibleAdjoint, Reversible(dfx.Bosh3()), NAMES[:1]),
}


REDUCED = [("Tsit5", "max"), *((name, "sum") for name in CASES)]


@pytest.mark.parametrize(
    "name, reduce", sweep(REDUCED, *(r for r in REDUCED if r[0] != "HalfSolver"))
)
def test_gradients_equal_finite_differences(name, reduce):
    kind, solver, names = CASES[name]
    adjoint = kind(estimates=Estimates(reduce=reduce))

    def loss(w, ys):
        sol = jax.vmap(lambda y: solve(w, y, adjoint, solver, FORCED))(ys)
        total = sum(jnp.sum(sol.stats[n] * jnp.array([1.0, -2.0, 3.0])) for n in names)
        return 1e-3 * total + jnp.sum(sol.ys)

    rng = np.random.default_rng(0)
    direction = (rng.standard_normal(WEIGHTS.shape), rng.standard_normal(Y0S.shape))
    at = jax.jit(lambda s: loss(WEIGHTS + s * direction[0], Y0S + s * direction[1]))
    eps = 1e-4  # a fourth-order difference: rounding and truncation both below 1e-9
    expected = (8 * (at(eps) - at(-eps)) - (at(2 * eps) - at(-2 * eps))) / (12 * eps)
    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(WEIGHTS, Y0S)
    found = sum(np.sum(g * d) for g, d in zip(grads, direction, strict=True))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_equal_those_of_the_wrapped_solver():
    def ours(w, y):
        return solve(w, y, DiscreteAdjoint(estimates=Estimates()), controller=FORCED).stats

    def wrapped(w, y):
        solver = WithEstimates(dfx.Tsit5(), rtol=RTOL, atol=ATOL)
        options = dict(controller=FORCED, saveat=dfx.SaveAt(t1=True, solver_state=True))
        sol = solve(w, y, dfx.RecursiveCheckpointAdjoint(), solver, **options)
        return sol.solver_state.estimates

    values = []
    for run in (ours, wrapped):
        pair = lambda w, y, run=run: jnp.stack([run(w, y)[name] for name in NAMES])
        values.append(
            (jax.jit(pair)(WEIGHTS, Y0S[0]), *jax.jit(jax.jacrev(pair, (0, 1)))(WEIGHTS, Y0S[0]))
        )
    for a, b in zip(*values, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("solver", [dfx.Tsit5(), dfx.Kvaerno3(), dfx.HalfSolver(dfx.Heun())])
def test_any_solver_may_be_wrapped_with_any_adjoint(solver):
    def run(solver, adjoint):
        return dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: -(y**3)), solver, 0.0, 1.0, 0.05, jnp.ones(2),
            saveat=dfx.SaveAt(t1=True, solver_state=True), adjoint=adjoint, max_steps=256,
            stepsize_controller=dfx.PIDController(rtol=1e-6, atol=1e-6),
        )  # fmt: skip

    ours = run(WithEstimates(solver), DiscreteAdjoint())
    theirs = run(WithEstimates(solver), dfx.RecursiveCheckpointAdjoint())
    name = "error_estimate"
    np.testing.assert_allclose(
        ours.solver_state.estimates[name], theirs.solver_state.estimates[name], rtol=1e-8
    )
    assert ours.stats["nfe"] == run(solver, DiscreteAdjoint()).stats["nfe"]


def test_an_entry_without_a_unit_counts_as_no_error():
    """`atol=0`, and an entry that stays at zero: the mean is over one more entry, that is all."""

    def estimate(y):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: -y), WithEstimates(dfx.Tsit5(), rtol=RTOL, atol=0.0),
            0.0, 1.0, 0.25, y, saveat=dfx.SaveAt(t1=True, solver_state=True),
        )  # fmt: skip
        return sol.solver_state.estimates["error_estimate"]

    both = jax.jit(jax.value_and_grad(estimate))
    one, slope = both(jnp.array([1.0]))
    two, slopes = both(jnp.array([1.0, 0.0]))
    assert one > 0
    np.testing.assert_allclose(two, one / np.sqrt(2), rtol=1e-9)
    np.testing.assert_allclose(slopes[0], slope[0] / np.sqrt(2), atol=1e-9)
    assert np.isfinite(slopes[1])


def test_of_a_stochastic_solve():
    """SOSRI: the same numbers and gradients as its own steps, one by one."""
    path = BrownianInterval(0.0, 1.0, (2,), jax.random.key(1), levy_area=dfx.SpaceTimeLevyArea)

    def terms(w):
        noise = lambda t, y, args: jnp.array([0.3, 0.2]) * y * w[0, 0]
        drift = dfx.ODETerm(lambda t, y, args: -jnp.tanh(w @ y))
        return dfx.MultiTerm(drift, dfx.ControlTerm(diagonal(noise), path))

    def ours(w):
        sol = dfx.diffeqsolve(
            terms(w), SOSRI(), 0.0, 1.0, None, jnp.asarray(Y0S[0]), max_steps=16,
            stepsize_controller=dfx.StepTo(jnp.array([0.0, 0.5, 1.0])),
            adjoint=DiscreteAdjoint(estimates=Estimates()),
        )  # fmt: skip
        return sol.stats["error_estimate"]

    def unrolled(w):
        solver, y, total = SOSRI(), jnp.asarray(Y0S[0]), 0.0
        state = solver.init(terms(w), 0.0, 0.5, y, None)
        for i in range(2):
            t0, t1 = jnp.asarray(i / 2), jnp.asarray((i + 1) / 2)
            y, e, _, state, _ = solver.step(terms(w), t0, t1, y, None, state, False)
            total += jnp.sqrt(jnp.mean(e**2)) / 2
        return total

    found, expected = (jax.jit(jax.value_and_grad(f))(WEIGHTS) for f in (ours, unrolled))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


def diagonal(noise):
    return lambda t, y, args: lx.DiagonalLinearOperator(noise(t, y, args))


def test_no_error_at_all():
    """A field that vanishes: estimates of zero, and no NaN in their gradients."""
    adjoint = DiscreteAdjoint(estimates=Estimates())
    run = lambda w: solve(w, jnp.zeros(2), adjoint, controller=dfx.ConstantStepSize()).stats

    def still(w):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, w: w @ y), dfx.Tsit5(), 0.0, 1.0, 0.5, jnp.zeros(2), args=w,
            adjoint=adjoint,
        )  # fmt: skip
        return sum(sol.stats[name] for name in NAMES)

    value, grad = jax.value_and_grad(still)(WEIGHTS)
    assert value == 0 and np.all(np.asarray(grad) == 0)
    assert float(run(WEIGHTS)["error_estimate"]) > 0


def test_a_failed_lane_has_no_part():
    adjoint = DiscreteAdjoint(estimates=Estimates())

    def one(w, y, bad):
        undefined = lambda t: jnp.sqrt(jnp.where(bad, 0.5 - t, 1.0))
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, w: field(t, y, w) * undefined(t)), dfx.Tsit5(), 0.0, 1.0, 0.1,
            y, args=w, adjoint=adjoint, stepsize_controller=ADAPTIVE, max_steps=64, throw=False,
        )  # fmt: skip
        return jnp.where(sol.result == dfx.RESULTS.successful, sol.stats["error_estimate"], 0.0)

    both = lambda w, bad: jnp.sum(jax.vmap(one, in_axes=(None, 0, 0))(w, Y0S[:2], bad))
    gradient = jax.jit(jax.grad(both))
    alone = jax.jit(jax.grad(lambda w: one(w, Y0S[0], False)))(WEIGHTS)
    np.testing.assert_allclose(gradient(WEIGHTS, np.array([False, True])), alone, rtol=1e-9)


def test_no_evaluation_more():
    def evaluations(adjoint):
        run = lambda w: solve(w, jnp.asarray(Y0S[0]), adjoint).ys
        return jax.jit(run).lower(WEIGHTS).as_text().count("tanh")

    assert evaluations(DiscreteAdjoint(estimates=Estimates())) == evaluations(DiscreteAdjoint())


MISTAKES = {
    "reduce": (lambda: Estimates(reduce="median"), "`reduce` is 'median'"),
    "no estimate": (
        lambda: solve(WEIGHTS, Y0S[0], DiscreteAdjoint(estimates=Estimates()), dfx.Euler()),
        "Euler has no error estimate",
    ),
    "dense": (
        lambda: solve(
            WEIGHTS, Y0S[0], DiscreteAdjoint(estimates=Estimates()), saveat=dfx.SaveAt(dense=True)
        ),
        "WithEstimates",
    ),
    "wrapped": (lambda: WithEstimates(dfx.Euler()), "Euler has no error estimate"),
    "one tolerance": (lambda: WithEstimates(dfx.Tsit5(), rtol=1e-3), "both `rtol` and `atol`"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    make, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("solver", [dfx.Tsit5(), dfx.Dopri5()], ids=lambda s: type(s).__name__)
def test_stiffness_that_is_rounding_counts_as_zero(solver):
    """In single precision the last stages of a short step differ by rounding alone."""
    ts = jnp.array([0.0, 1e-3, 1e-2, 0.1, 0.5, 1.0, 1.6])
    adjoint = DiscreteAdjoint(estimates=Estimates(series=True))

    def steps(w, dtype):
        cast = lambda x: jnp.asarray(x, dtype)
        term = dfx.ODETerm(lambda t, y, w: 2 * jnp.tanh(cast(w) @ y))
        return dfx.diffeqsolve(
            term, solver, cast(0.0), cast(1.6), None, cast(Y0S[0]), w, adjoint=adjoint,
            stepsize_controller=dfx.StepTo(cast(ts)), max_steps=6,
        ).stats["stiffness_steps"]  # fmt: skip

    single, double = (steps(jnp.asarray(WEIGHTS), dtype) for dtype in (jnp.float32, jnp.float64))
    known = np.asarray(single > 0)
    assert np.all(double > 0) and not known[0] and np.all(known[3:])
    np.testing.assert_allclose(single[known], double[known], rtol=0.05)
    slope = lambda dtype: jax.grad(lambda w: steps(w, dtype) @ known.astype(dtype))(
        jnp.asarray(WEIGHTS)
    )
    exact = slope(jnp.float64)
    np.testing.assert_allclose(slope(jnp.float32), exact, atol=0.05 * np.abs(exact).max())


def test_the_stiffness_of_a_batch_in_single_precision():
    """Its gradient is a small difference of large cotangents, which must cancel to the last bit.

    Near an equilibrium, where the terms of the field are larger than their sum; the second step.
    """
    network = nde.fields.MLPField(1, width=4, depth=1, last_layer_scale=0.1, key=jax.random.key(0))
    model = nde.HybridODE(
        lambda t, y, p: -p["k"] * jnp.log(y), network, {"k": 0.7}, max_steps=16,
        adjoint=DiscreteAdjoint(estimates=Estimates(series=True)),
    )  # fmt: skip

    def gradient(dtype):
        cast = lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x
        ts, ys = cast(jnp.linspace(0.0, 2.0, 9)), cast(jnp.linspace(1.5, 3.0, 12)[:, None])

        def second(model):
            solve = lambda y: model.solve(ts, y).stats["stiffness_steps"][1]
            return jnp.mean(jax.vmap(solve)(ys))

        return jax.tree.leaves(eqx.filter_jit(eqx.filter_grad(second))(jax.tree.map(cast, model)))

    for got, want in zip(gradient(jnp.float32), gradient(jnp.float64), strict=True):
        np.testing.assert_allclose(got, want, atol=0.02)


@pytest.mark.parametrize("adjoint", [dfx.RecursiveCheckpointAdjoint(), dfx.DirectAdjoint()])
def test_the_wrapper_in_a_batch_with_an_adjoint_of_diffrax(adjoint):
    """A lane that has ended takes steps of length zero, where a quotient has no derivative."""

    def stiffness(rate, t1):
        solver = WithEstimates(dfx.Tsit5(), RTOL, ATOL)
        state = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, rate: -rate * y**2), solver, 0.0, t1, None, 1.0, rate,
            stepsize_controller=ADAPTIVE, saveat=dfx.SaveAt(t1=True, solver_state=True),
            adjoint=adjoint, max_steps=16,
        ).solver_state  # fmt: skip
        return state.estimates["stiffness_estimate"]

    ends = np.array([0.5, 3.0])
    got = jax.jit(jax.vmap(jax.grad(stiffness), in_axes=(None, 0)))(0.7, ends)
    alone = jax.jit(jax.grad(stiffness))
    np.testing.assert_allclose(got, [alone(0.7, t) for t in ends], rtol=1e-6)


def test_an_empty_state_has_no_error():
    options = dict(adjoint=DiscreteAdjoint(estimates=Estimates()), max_steps=16)
    term = dfx.ODETerm(lambda t, y, args: y)
    stats = dfx.diffeqsolve(term, dfx.Tsit5(), 0.0, 1.0, 0.1, (), **options).stats
    assert stats["error_estimate"] == stats["stiffness_estimate"] == 0.0
