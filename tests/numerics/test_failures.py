"""A trajectory that fails: its own result, no gradient, and nothing changed for the others."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import CONSTANT, DIFFRAX, OURS, PARAMS, Y0, field, relative, solve, weigh
from problems import PROBLEMS, terms
from sweeps import sweep

from nde.solvers import EES25, DiscreteAdjoint, ReversibleAdjoint, ReversibleHeun

LANES, BAD = 3, 1
TS = np.array([0.1, 0.4, 0.95])
CONTROLLERS = {"adaptive": dfx.PIDController(rtol=1e-3, atol=1e-5), "constant": CONSTANT}


def fragile(t, y, args):
    """`mode` 1: undefined after t = 0.5; 2: grows without bound at a finite time."""
    p, rate, mode = args
    defined = jnp.where(mode == 1, jnp.sqrt(jnp.where(mode == 1, 0.5 - t, 1.0)), 1.0)
    growth = jnp.where(mode == 2, 9.0, 0.0).astype(y.dtype) * y * jnp.sum(y**2)
    return rate * (defined.astype(y.dtype) * field(t.astype(y.dtype), y, p) + growth)


class Lanes:
    """One compiled batch per controller and dtype; the failures are only numbers in it."""

    def __init__(self, controller, dtype):
        self.dtype = dtype

        def one(p, y, rate, mode, t1, ts):
            sol = solve(
                y, (p, rate, mode), vector_field=fragile, solver=dfx.Bosh3(), t1=t1, max_steps=64,
                stepsize_controller=controller, saveat=dfx.SaveAt(ts=ts, t1=True),
                throw=False,
            )  # fmt: skip
            return sol.ts, sol.ys, sol.stats, sol.result

        def loss(p, ys, rate, mode, t1, ts, weights):
            out = jax.vmap(one, in_axes=(None, 0, 0, 0, 0, 0))(p, ys, rate, mode, t1, ts)
            return jnp.sum(weights * jnp.sum(out[1], axis=(1, 2))), out

        self.run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))

    def __call__(self, change=None, weight=1.0):
        """Lane `BAD` with the numbers of `change`, the others always with the same."""
        numbers = {
            "ys": np.stack([Y0, -0.5 * Y0, Y0[::-1]]),
            "rate": np.array([1.0, 1.5, 2.0]),
            "mode": np.zeros(LANES, np.int32),
            "t1": np.array([1.0, 1.0, 1.2]),
            "ts": np.stack([TS, TS, TS]),
            "weights": np.array([1.0, weight, 1.0]),
        }
        for name, value in (change or {}).items():
            numbers[name][BAD] = value
        cast = lambda x: x.astype(self.dtype) if np.issubdtype(x.dtype, np.inexact) else x
        params = jax.tree.map(lambda x: x.astype(self.dtype), PARAMS)
        return self.run(params, *(cast(x) for x in numbers.values()))


KINDS = [("adaptive", np.float64), ("constant", np.float64), ("adaptive", np.float32)]
FAILURES = {
    "too many steps": ({"t1": 500.0}, "max_steps_reached"),
    "y0 nan": ({"ys": np.array([0.1, np.nan, 0.2])}, "nonfinite"),
    "y0 inf": ({"ys": np.array([0.1, 0.2, -np.inf])}, "nonfinite"),
    "field undefined": ({"mode": 1}, None),
    "blow-up": ({"mode": 2, "ys": np.array([2.0, 1.0, 3.0])}, None),
    "argument nan": ({"rate": np.nan}, None),
    "argument huge": ({"rate": 1e30}, None),
}
RESULTS = {"adaptive": "max_steps_reached", "constant": "nonfinite"}


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]}-{kind[1].__name__}")
def lanes(request):
    controller, dtype = request.param
    return controller, Lanes(CONTROLLERS[controller], dtype)


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_lane_is_alone(lanes, failure):
    """Compared with a healthy lane in its place whose weight in the loss is zero: bit by bit."""
    controller, run = lanes
    change, expected = FAILURES[failure]
    want_grads, (_, want_ys, want_stats, want_result) = run(weight=0.0)
    grads, (ts, ys, stats, result) = run(change)
    assert np.all(want_result == dfx.RESULTS.successful)
    others = np.arange(LANES) != BAD
    np.testing.assert_array_equal(ys[others], want_ys[others])
    for name in want_stats:
        if name != "max_steps":
            np.testing.assert_array_equal(stats[name][others], want_stats[name][others])
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_array_equal(got, want)
    assert not np.any(grads[1][BAD]) and not np.any(grads[2][BAD])
    assert np.all(grads[1][others]) and np.all(grads[0]["w"])  # nothing is zero by default
    expected = expected or RESULTS[controller]
    np.testing.assert_array_equal(result == dfx.RESULTS.successful, others)
    np.testing.assert_array_equal(result == getattr(dfx.RESULTS, expected), ~others)
    # What was reached stays, and the last state behind it; other rows are inf, as their times are.
    reached = np.isfinite(ts[BAD])
    assert np.all(np.isinf(ys[BAD][~reached]))
    if failure == "field undefined":
        np.testing.assert_array_equal(reached, [True, True, True, False])
        assert 0.4 < ts[BAD][2] <= 0.5 and np.all(np.isfinite(ys[BAD][reached]))


@pytest.mark.parametrize("checkpoints", sweep([64, 4], 4))
def test_a_lane_that_waits_takes_no_step_that_overflows(checkpoints):
    """The last step of one lane is 1e7 times its first, so from where it began it leads to infinity.

    While the other lane's later steps are pulled back it must not be taken from there: zero times nan
    would reach the rate, which both share.
    """

    def end(adjoint, rate, y0, t1):
        return dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, rate: -rate * y**3), dfx.Tsit5(), 0.0, t1, 1e-7, y0, rate,
            stepsize_controller=dfx.PIDController(rtol=1e-3, atol=1e-3), adjoint=adjoint,
            max_steps=128,
        )  # fmt: skip

    y0, t1 = jnp.array([1e3, 1.0]), jnp.array([5.0, 2000.0])

    def total(rate, adjoint):
        sol = jax.vmap(lambda y, t: end(adjoint, rate, y, t))(y0, t1)
        return jnp.sum(sol.ys), sol.stats["num_accepted_steps"]

    gradient = jax.jit(jax.grad(total, has_aux=True), static_argnums=1)
    ours, (first, second) = gradient(1.0, DiscreteAdjoint(checkpoints=checkpoints))
    assert first > second + 8
    np.testing.assert_allclose(ours, gradient(1.0, DIFFRAX)[0], rtol=1e-10)


@pytest.mark.parametrize("fused", [True, False])
def test_a_lane_that_failed_is_unstepped_with_its_donor(fused):
    """It borrows the last state of the other lane, from where that one's first step overflows.

    So it must borrow the states before as well: zero times nan would reach the rate, which both share.
    An output that is not linear in y makes the reversal undo a step before it pulls back through it.
    """
    square = dfx.SubSaveAt(steps=True, fn=lambda t, y, rate: y**2)
    last = dfx.SubSaveAt(t1=True)

    def end(rate, limit):
        field = lambda t, y, rate: rate * y**21 + jnp.where(t > limit, jnp.nan, 0.0)
        return dfx.diffeqsolve(
            dfx.ODETerm(field), EES25(), 0.0, 1 - 1e-6, 0.05, 1.0, rate, throw=False,
            saveat=dfx.SaveAt(subs=[last] if fused else [last, square]),
            stepsize_controller=dfx.PIDController(rtol=1e-3, atol=1e-5),
            adjoint=ReversibleAdjoint(checkpoint_every=None),
        )  # fmt: skip

    def total(rate, limits):
        sol = jax.vmap(end, in_axes=(None, 0))(rate, limits)
        return jnp.sum(jnp.where(sol.result == dfx.RESULTS.successful, sol.ys[0][:, 0], 0.0)), sol

    gradient = jax.jit(jax.grad(total, has_aux=True))
    both, sol = gradient(0.05, jnp.array([2.0, 0.5]))
    np.testing.assert_array_equal(sol.result == dfx.RESULTS.successful, [True, False])
    alone, sol = gradient(0.05, jnp.array([2.0, 2.0]))
    assert np.all(sol.result == dfx.RESULTS.successful) and alone > 0
    np.testing.assert_allclose(2 * both, alone, rtol=1e-10)


def test_a_lane_of_length_zero(lanes):
    _, run = lanes
    grads, (_, ys, stats, result) = run({"t1": 0.0, "ts": 0.0})
    want_grads, (_, want_ys, _, _) = run(weight=0.0)
    assert np.all(result == dfx.RESULTS.successful)
    assert stats["num_steps"][BAD] == 0
    np.testing.assert_array_equal(ys[BAD], np.broadcast_to(ys[BAD, 0], (4, 3)))
    np.testing.assert_array_equal(ys[BAD, 0], (-0.5 * np.asarray(Y0)).astype(ys.dtype))
    np.testing.assert_array_equal(grads[1][BAD], [4.0, 4.0, 4.0])
    others = np.arange(LANES) != BAD
    np.testing.assert_array_equal(ys[others], want_ys[others])
    np.testing.assert_array_equal(grads[0]["w"], want_grads[0]["w"])


def test_what_is_saved_of_a_failed_solve_carries_no_gradient():
    """Also at the ends of the solve, where `fn` is applied outside the loop."""
    saveat = dfx.SaveAt(t0=True, t1=True, fn=lambda t, y, args: y * args)

    def loss(rate, y0):
        blow_up = lambda t, y, args: y**2
        sol = solve(
            y0, rate, vector_field=blow_up, saveat=saveat, max_steps=32, throw=False,
            adjoint=DiscreteAdjoint(),
        )  # fmt: skip
        return jnp.sum(sol.ys), sol.result == dfx.RESULTS.successful

    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
    grads, healthy = jax.vmap(gradient, in_axes=(None, 0))(jnp.array(2.0), jnp.array([0.5, 2.0]))
    np.testing.assert_array_equal(healthy, [True, False])
    for of_lane in grads:
        assert of_lane[0] != 0 and of_lane[1] == 0


def test_every_lane_may_fail(lanes):
    _, run = lanes
    ones = np.ones(LANES, run.dtype)
    states = np.full((LANES, 3), np.nan, run.dtype)
    params = jax.tree.map(lambda x: x.astype(run.dtype), PARAMS)
    mode = np.zeros(LANES, np.int32)
    ts = np.stack([TS, TS, TS]).astype(run.dtype)
    grads, (_, _, _, result) = run.run(params, states, ones, mode, ones, ts, ones)
    assert np.all(result == dfx.RESULTS.nonfinite)
    assert not any(np.any(x) for x in jax.tree.leaves(grads))


def test_a_batch_of_nothing():
    """With `throw=False`: equinox's errors need a lane."""
    one = lambda p, y: weigh(solve(y, p, throw=False).ys)
    nobody = jnp.zeros((0, 3))
    total = lambda p, ys: jnp.sum(jax.vmap(one, in_axes=(None, 0))(p, ys))
    assert total(PARAMS, nobody) == 0
    grads = jax.jit(jax.grad(total))(PARAMS, nobody)
    assert relative(grads, jax.tree.map(jnp.zeros_like, PARAMS)) == 0
    apart = jax.vmap(jax.grad(one, argnums=1), in_axes=(None, 0))(PARAMS, nobody)
    assert apart.shape == (0, 3)


def test_failed_members_of_an_ensemble():
    """A member whose parameters are NaN fails on every example; the other member learns."""

    def one(p, y):
        options = dict(solver=dfx.Bosh3(), stepsize_controller=CONSTANT, max_steps=32, throw=False)
        return jnp.sum(solve(y, p, **options).ys)

    grid = jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None))
    gradient = jax.jit(jax.grad(lambda p, ys: jnp.sum(grid(p, ys)), argnums=(0, 1)))
    ys = jnp.stack([Y0, -Y0])
    pair = lambda scale: jax.tree.map(lambda x: jnp.stack([x, scale * x]), PARAMS)
    (params, states), (alone, _) = gradient(pair(jnp.nan), ys), gradient(pair(0.5), ys)
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(got[0], want[0])
        assert not np.any(got[1])
    single = jax.jit(jax.vmap(jax.grad(one, argnums=1), in_axes=(None, 0)))(PARAMS, ys)
    assert relative(states, single) < 1e-14


MESSAGES = {
    "max_steps": (dict(t1=500.0), "maximum number of solver steps was reached"),
    "undefined": (dict(args=(PARAMS, 1.0, 1), stepsize_controller=CONSTANT), "Nonfinite"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_throw_raises_what_happened(name):
    options, message = MESSAGES[name]
    options = dict(args=(PARAMS, 1.0, 0), max_steps=32) | options
    args = options.pop("args")
    with pytest.raises(RuntimeError, match=message):
        solve(Y0, args, vector_field=fragile, **options)


# --- solves that only look as if they failed -----------------------------------------------------


def test_a_trial_step_that_overflows_is_a_rejection():
    """exp(y) overflows in a trial step, the solution is smooth and tends to 5."""
    sol = solve(
        jnp.array(0.0), None, vector_field=lambda t, y, args: jnp.exp(y) * (5.0 - y),
        t1=10.0, dt0=100.0, stepsize_controller=dfx.PIDController(1e-3, 1e-6), max_steps=4096,
    )  # fmt: skip
    np.testing.assert_allclose(sol.ys, [5.0], rtol=1e-3)
    # A smooth solution, but a stiff one: stability bounds the step, and rejects one in four.
    assert 430 < sol.stats["num_accepted_steps"] < 480
    assert 150 < sol.stats["num_rejected_steps"] < 190


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_float32_solves_end_on_t1(controller):
    """Ends and steps whose rounding leaves a sliver before t1: y' = 1 gives y(t1) = t1 - t0."""
    single = jnp.float32
    key = jax.random.key(0)
    t0 = jnp.array([0.0, 0.0, 1.0, -7.0, 1000.0, 0.1], single).repeat(100)
    length = jax.random.uniform(key, t0.shape, single, 0.1, 3.0)
    dt0 = length * jax.random.uniform(jax.random.key(1), t0.shape, single, 0.03, 1.5)

    def one(t0, t1, dt0):
        clock = lambda t, y, args: jnp.ones_like(y)
        sol = solve(
            single(0.0), None, vector_field=clock, t0=t0, t1=t1, dt0=dt0, max_steps=64,
            stepsize_controller=CONTROLLERS[controller], solver=dfx.Heun(), throw=False,
        )  # fmt: skip
        return sol.ys[0], sol.ts[0], sol.result

    y1, t_end, result = jax.jit(jax.vmap(one))(t0, t0 + length, dt0)
    assert np.all(result == dfx.RESULTS.successful)
    np.testing.assert_array_equal(t_end, t0 + length)
    np.testing.assert_allclose(y1, (t0 + length) - t0, rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", ["forced", "network", "rotation", "strong dissipation"])
def test_forward_solve_is_that_of_diffrax(name):
    problem = PROBLEMS[name]
    results = []
    for adjoint in (OURS, DIFFRAX):
        sol = dfx.diffeqsolve(
            terms(problem), dfx.Tsit5(), 0.0, problem.t1, None, problem.y0, problem.params,
            stepsize_controller=dfx.PIDController(1e-6, 1e-8), adjoint=adjoint, max_steps=512,
            saveat=dfx.SaveAt(ts=np.linspace(0.0, problem.t1, 4)),
        )  # fmt: skip
        results.append(sol)
    ours, theirs = results
    for count in ("num_steps", "num_accepted_steps", "num_rejected_steps"):
        assert ours.stats[count] == theirs.stats[count]
    assert relative(ours.ys, theirs.ys) < 1e-12


@pytest.mark.parametrize(
    "adjoint, solver",
    [(DiscreteAdjoint(), dfx.Heun()), (ReversibleAdjoint(), ReversibleHeun())],
    ids=["discrete", "reversible"],
)
def test_failed_combination_of_nested_lanes(adjoint, solver):
    # Lane (1, 0) alone fails, yet each number it is made of is used by a lane that does not.
    def one(w, p, a, y):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, w: -w * y * jnp.sqrt(p[0] + a)), solver, 0.0, 1.0, 0.1, y,
            args=w, adjoint=adjoint, throw=False,
        )  # fmt: skip
        return jnp.where(sol.result == dfx.RESULTS.successful, sol.ys[-1], 0.0)

    def loss(w, ps, shifts, ys):
        inner = jax.vmap(one, in_axes=(None, None, 0, 0))
        return jnp.sum(jax.vmap(inner, in_axes=(None, 0, None, 0))(w, ps, shifts, ys))

    ps = jnp.array([[1.0, 0.0], [-1.0, 0.0]])  # the larger constant: it stays on its level
    shifts, ys = jnp.array([0.5, 2.0]), jnp.array([[1.0, 2.0], [3.0, 0.5]])
    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(jnp.array(0.7), ps, shifts, ys)

    def reference(w, ps, shifts, ys):
        lanes = [(0, 0), (0, 1), (1, 1)]
        rates = [w * jnp.sqrt(ps[i, 0] + shifts[j]) for i, j in lanes]
        factor = _heun_factor if isinstance(solver, dfx.Heun) else _reversible_heun_factor
        return sum(ys[i, j] * factor(r, 10) for (i, j), r in zip(lanes, rates, strict=True))

    expected = jax.grad(reference, argnums=(0, 1, 2, 3))(jnp.array(0.7), ps, shifts, ys)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def _heun_factor(rate, steps):
    z = rate / steps
    return (1 - z + z**2 / 2) ** steps


def _reversible_heun_factor(rate, steps):
    """y after so many steps of y' = -rate y from y = 1."""
    h, y, z = 1.0 / steps, 1.0, 1.0
    for _ in range(steps):
        before = -rate * z
        z = 2 * y - z + h * before
        y = y + 0.5 * h * (before - rate * z)
    return y
