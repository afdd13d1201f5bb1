"""Bad input to a solve: each row of the table says what is wrong, and what to type instead.

Rows marked V are known without data and raise while tracing; rows marked R are known at run time, and
raise, or with `throw=False` leave a result code in their lane and the others alone.
"""

import diffrax as dfx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from messages import mentions
from oracles import CONSTANT, OURS, PARAMS, Y0, solve
from sweeps import sweep

from nde.solvers import (
    BrownianGrid,
    BrownianInterval,
    DiscreteAdjoint,
    Estimates,
    ReversibleAdjoint,
    ReversibleHeun,
    StormerVerlet,
)

RAISED = (RuntimeError, ValueError, TypeError, NotImplementedError)


def eagerly(fn):
    return fn(Y0)


def compiled(fn):
    return jax.jit(fn)(Y0)


def as_a_lane(fn):
    return jax.vmap(fn)(jnp.stack([Y0, 2.0 * Y0]))


MODES = [eagerly, compiled, as_a_lane]


def returns(value):
    """A vector field that returns something else than dy/dt."""
    return lambda y: solve(y, vector_field=lambda t, y, args: value(y))


def pid(rtol, atol):
    return {"stepsize_controller": dfx.PIDController(rtol=rtol, atol=atol)}


def with_noise(drift, diffusion=lambda y: lx.DiagonalLinearOperator(y)):
    path = dfx.UnsafeBrownianPath((3,), jax.random.key(0))
    noise = dfx.ControlTerm(lambda t, y, args: diffusion(y), path)
    terms = dfx.MultiTerm(dfx.ODETerm(lambda t, y, args: drift(y)), noise)
    return lambda y: dfx.diffeqsolve(terms, dfx.Euler(), 0.0, 1.0, 0.1, y, adjoint=OURS)


def along(values, solver=dfx.Heun(), adjoint=OURS):
    """A field times the control of a path through `values`."""
    path = dfx.LinearInterpolation(jnp.linspace(0.0, 1.0, 3), values)
    term = dfx.ControlTerm(lambda t, y, args: y[:, None], path)
    return lambda y: dfx.diffeqsolve(term, solver, 0.0, 1.0, 0.1, y, adjoint=adjoint)


def pair_of(solver, dq, adjoint=OURS):
    terms = (dfx.ODETerm(lambda t, p, args: dq(p)), dfx.ODETerm(lambda t, q, args: -q))
    return lambda y: dfx.diffeqsolve(terms, solver, 0.0, 1.0, 0.1, (y, y), adjoint=adjoint)


def path_of(kind, *args):
    return lambda y: kind(0.0, 1.0, *args)


def imaginary(y):
    return jax.lax.complex(jnp.zeros_like(y), y)


REVERSED = ReversibleAdjoint()
KEY = jax.random.key(0)
COMPLEX = ["complex", "real", "`.real`"]


CLIPPED = dfx.ClipStepSizeController(dfx.PIDController(rtol=-1e-3, atol=1e-6), jump_ts=[0.5])
IMPLICIT = dict(solver=dfx.Kvaerno3(), stepsize_controller=CONSTANT)
SINGLE = np.float32

# (row of the table, call, words of the message)
KNOWN_WITHOUT_DATA = [
    (5, lambda y: solve({"a": None}, vector_field=lambda t, y, args: y), ["`y0`", "no array"]),
    (6, lambda y: solve(y, dt0=None, stepsize_controller=CONSTANT), ["dt0"]),
    (8, lambda y: solve(y, max_steps=0), ["`max_steps` is 0", ">= 1"]),
    (8, lambda y: solve(y, max_steps=-3), ["`max_steps` is -3", ">= 1"]),
    (9, lambda y: solve(y, max_steps=None), ["max_steps", "DiscreteAdjoint", "max_steps=100_000"]),
    (10, lambda y: solve(y, **pid(0.0, 0.0)), ["`rtol`", "`atol`", "positive"]),
    (11, lambda y: solve(y, **pid(1e-3, -1e-6)), ["`atol` is -1e-06", "positive"]),
    (11, lambda y: solve(y, stepsize_controller=CLIPPED), ["`rtol` is -0.001", "positive"]),
    (11, lambda y: solve(y, **pid(float("nan"), 1e-6)), ["`rtol` is nan", "positive"]),
    (
        12,
        lambda y: solve(
            y.astype(SINGLE), t0=SINGLE(0), t1=SINGLE(1), dt0=SINGLE(0.1), **pid(1e-12, 1e-12)
        ),
        ["`rtol` is 1.0e-12", "1.2e-06", "jax_enable_x64"],
    ),
    (13, lambda y: solve(y, solver=dfx.Euler()), ["error estimates"]),
    (14, lambda y: solve(y, **IMPLICIT), ["tolerances"]),
    (
        17,
        lambda y: solve(y, saveat=dfx.SaveAt(ts=np.zeros((2, 5)))),
        ["`SaveAt(ts=...)`", "(2, 5)", "`jax.vmap`"],
    ),
    (25, returns(lambda y: None), ["vector field", "same structure as `y0`"]),
    (25, returns(lambda y: [y, y]), ["vector field", "same structure as `y0`"]),
    (25, returns(lambda y: y[:2]), ["[2]", "[3]"]),
    (25, lambda y: solve(y, vector_field=lambda t, y: y), ["takes 2 positional arguments"]),
    (26, returns(lambda y: y[0]), ["vector_field", "shape ()", "(3,)"]),
    (26, with_noise(lambda y: y[0]), ["vector_field", "shape ()", "(3,)"]),
    (27, returns(lambda y: jnp.array([1, 2, 3])), ["vector_field", "dtype int64", "1.0"]),
    (27, with_noise(lambda y: y > 0), ["vector_field", "dtype bool", "astype"]),
    (28, returns(imaginary), ["`vector_field(t, y, args)`", *COMPLEX]),
    (28, with_noise(imaginary), ["`vector_field(t, y, args)`", *COMPLEX]),
    (28, with_noise(lambda y: y, lambda y: lx.DiagonalLinearOperator(imaginary(y))), COMPLEX),
    (28, with_noise(lambda y: y, lambda y: imaginary(jnp.eye(3))), COMPLEX),
    (28, along(imaginary(jnp.ones((3, 1)))), COMPLEX),
    (28, along(imaginary(jnp.ones((3, 1))), ReversibleHeun(), REVERSED), COMPLEX),
    (28, pair_of(dfx.SemiImplicitEuler(), imaginary), COMPLEX),
    (28, pair_of(StormerVerlet(), imaginary, REVERSED), COMPLEX),
    (0, lambda y: type(OURS)(checkpoints=0), ["`checkpoints` is 0", ">= 1"]),
    (0, path_of(BrownianInterval, 1e-3, (2,), KEY), ["`shape`", "0.001", "(t0, t1, shape, key,"]),
    (0, path_of(BrownianGrid, (2,), 0.1, KEY), ["`shape`", "0.1", "(t0, t1, dt, shape, key,"]),
    (
        0,
        path_of(BrownianInterval, (2,), 0),
        ["`key` of BrownianInterval is 0", "jax.random.key(0)"],
    ),
    (0, path_of(BrownianGrid, 0.1, (2,), jax.random.split(KEY)), ["`key` of BrownianGrid", "(2,)"]),
]


@pytest.mark.filterwarnings("ignore:.*[Cc]omplex")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("row, call, words", KNOWN_WITHOUT_DATA)
def test_what_is_known_without_data(row, call, words, mode):
    with pytest.raises(RAISED, match=mentions(words)):
        mode(call)


@pytest.mark.parametrize("tolerance", [1e-6, 1e-7])
def test_tolerances_at_the_limit_of_float32_are_legal(tolerance):
    single = jax.tree.map(lambda x: x.astype(SINGLE), (Y0, PARAMS))
    linear = lambda t, y, args: args["w"] @ y
    times = dict(t0=SINGLE(0), t1=SINGLE(0.25), dt0=SINGLE(0.1), throw=False)
    sol = solve(*single, vector_field=linear, **times, **pid(tolerance, 1e-6))
    exact = jax.scipy.linalg.expm(0.25 * PARAMS["w"]) @ Y0
    np.testing.assert_allclose(sol.ys[0], exact, rtol=1e-5)


# --- gradients that there are not ----------------------------------------------------------------


def with_times(**moving):
    """The loss as a function of one number `x`, which is added to one of the times."""

    def loss(x, y):
        options = {name: make(x) for name, make in moving.items()}
        return jnp.sum(solve(y, **options).ys)

    return loss


UNKNOWN_GRADIENTS = {
    "`rtol`": with_times(stepsize_controller=lambda x: dfx.PIDController(rtol=1e-3 + x, atol=1e-6)),
    "`pcoeff`": with_times(
        stepsize_controller=lambda x: dfx.PIDController(rtol=1e-3, atol=1e-6, pcoeff=0.1 + x)
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", UNKNOWN_GRADIENTS)
def test_a_gradient_that_an_adjoint_lacks_is_refused(name, mode):
    """Row 37: never a silent zero."""
    gradient = lambda y: jax.grad(UNKNOWN_GRADIENTS[name])(0.0, y)
    words = [f"with respect to {name}", "step size controller", "`jax.lax.stop_gradient`"]
    with pytest.raises(ValueError, match=mentions(words)):
        mode(gradient)


@pytest.mark.parametrize(
    "options",
    [{"solver": dfx.Kvaerno3()}, {"adjoint": DiscreteAdjoint(estimates=Estimates())}],
    ids=["implicit", "estimates"],
)
def test_nor_has_it_that_of_a_tolerance_which_a_step_reads(options):
    """Of the roots of an implicit step, of estimates in units of it."""

    def loss(rtol):
        controller = dfx.PIDController(rtol=rtol, atol=1e-6)
        return jnp.sum(solve(Y0, stepsize_controller=controller, **options).ys)

    with pytest.raises(ValueError, match="with respect to `rtol` of the step size controller"):
        jax.grad(loss)(1e-3)


def test_what_the_message_says_to_type_works():
    controller = lambda x: dfx.PIDController(rtol=1e-3 + jax.lax.stop_gradient(x), atol=1e-6)
    got = jax.grad(with_times(stepsize_controller=controller), argnums=(0, 1))(0.0, Y0)
    want = jax.grad(lambda y: jnp.sum(solve(y, **pid(1e-3, 1e-6)).ys))(Y0)
    assert got[0] == 0.0
    np.testing.assert_allclose(got[1], want, rtol=1e-14)


def total(y):
    return jnp.sum(solve(y).ys)


SECOND = {
    "grad of grad": jax.grad(lambda y: jnp.sum(jax.grad(total)(y))),
    "grad of jvp": jax.grad(lambda y: jax.jvp(total, (y,), (y,))[1]),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SECOND)
def test_reverse_mode_of_a_derivative_is_refused(name, mode):
    """Row 38."""
    with pytest.raises(NotImplementedError, match=mentions(["jax.jvp(", "DirectAdjoint()"])):
        mode(SECOND[name])


# --- numbers -------------------------------------------------------------------------------------

GOOD = {"t0": 0.0, "t1": 1.0, "dt0": 0.25, "y0": Y0}
AT_RUN_TIME = [
    (1, {"t1": np.nan}, ["`t1`", "nan", "finite"]),
    (1, {"t0": np.nan}, ["`t0`", "nan", "finite"]),
    (2, {"t1": np.inf}, ["`t1`", "inf", "steady_state_event"]),
    (3, {"dt0": 0.0}, ["`dt0`", "zero", "dt0=None"]),
    (4, {"dt0": np.nan}, ["`dt0`", "nan", "finite"]),
    (4, {"dt0": np.inf}, ["`dt0`", "inf", "finite"]),
    (7, {"t0": 1e17, "t1": 2e17, "dt0": 1.0}, ["`dt0`", "smallest usable", "float64", "shift"]),
    (18, {"y0": Y0.at[1].set(jnp.nan)}, ["`y0`", "nan", "finite", "leaf"]),
    (18, {"y0": Y0.at[1].set(-jnp.inf)}, ["`y0`", "inf", "finite", "leaf"]),
]


SHORT = dict(solver=dfx.Heun(), max_steps=32, **pid(1e-3, 1e-3))


def run(t0, t1, dt0, y0):
    return solve(y0, t0=t0, t1=t1, dt0=dt0, **SHORT).ys


def results(t0, t1, dt0, y0):
    sol = solve(y0, t0=t0, t1=t1, dt0=dt0, throw=False, **SHORT)
    return sol.ys, sol.result, sol.stats["num_steps"]


def numbers(change):
    return [jnp.asarray(x) for x in (GOOD | change).values()]


def lanes(change):
    """The bad numbers between two good lanes."""
    good, bad = numbers({}), numbers(change)
    return [jnp.stack([g, b, g]) for g, b in zip(good, bad, strict=True)]


RUN_MODES = {
    "eager": lambda change: run(*numbers(change)),
    "jit": lambda change, fn=jax.jit(run): fn(*numbers(change)),
    "lane": lambda change, fn=jax.jit(jax.vmap(run)): fn(*lanes(change)),
}


@pytest.mark.parametrize("mode", RUN_MODES)
@pytest.mark.parametrize("row, change, words", AT_RUN_TIME)
def test_what_only_the_numbers_show(row, change, words, mode):
    with pytest.raises(RAISED, match=mentions(words)):
        jax.block_until_ready(RUN_MODES[mode](change))


@pytest.mark.parametrize("mode", RUN_MODES)
@pytest.mark.parametrize("change", [{}, {"t1": 0.0}, {"t1": 0.0, "dt0": 0.0}])
def test_good_numbers_raise_nothing(change, mode):
    """A solve of length zero is one, whatever its first step."""
    rows = RUN_MODES[mode](change).reshape(-1, 3)
    want = Y0 if "t1" in change else solve().ys[0]
    np.testing.assert_allclose(rows[len(rows) // 2], want, rtol=0, atol=0 if change else 3e-3)


TABULATED = jax.jit(jax.vmap(results))


@pytest.mark.parametrize("row, change, words", AT_RUN_TIME)
def test_without_throw_a_bad_lane_has_a_code_and_takes_no_step(row, change, words):
    ys, result, steps = TABULATED(*lanes(change))
    want, good, want_steps = TABULATED(*lanes({}))
    assert np.all(good == dfx.RESULTS.successful)
    expected = dfx.RESULTS.dt_min_reached if row in (3, 7) else dfx.RESULTS.nonfinite
    np.testing.assert_array_equal(result == expected, [False, True, False])
    np.testing.assert_array_equal(result == dfx.RESULTS.successful, [True, False, True])
    np.testing.assert_array_equal(steps, [want_steps[0], 0, want_steps[2]])
    np.testing.assert_array_equal(ys[::2], want[::2])


@pytest.mark.parametrize("ts", [[0.2, np.nan, 0.7], [0.7, 0.2], [0.5, 1.5]])
def test_times_of_outputs(ts):
    """Rows 15 and 16: nan is ours, order and range are diffrax's."""
    words = ["`SaveAt(ts=...)`", "nan", "index"] if np.isnan(ts).any() else ["saveat.ts must"]
    run = jax.jit(lambda ts: solve(saveat=dfx.SaveAt(ts=ts), **SHORT).ys)
    with pytest.raises(RAISED, match=mentions(words)):
        jax.block_until_ready(run(jnp.array(ts)))


def test_dt0_of_the_wrong_sign():
    """Row 5."""
    with pytest.raises(RAISED, match=mentions(["dt0", "t1 - t0"])):
        jax.block_until_ready(run(0.0, 1.0, -0.1, Y0))


def test_without_dt0_the_message_still_names_y0():
    with pytest.raises(RAISED, match="`y0` is not finite"):
        jax.block_until_ready(solve(Y0 * jnp.nan, **(SHORT | dict(dt0=None))).ys)


def driven(t0, t1, y0, first, last, throw):
    path = BrownianInterval(first, last, (3,), jax.random.key(0))
    noise = dfx.ControlTerm(lambda t, y, args: lx.DiagonalLinearOperator(0.1 * y), path)
    terms = dfx.MultiTerm(dfx.ODETerm(lambda t, y, args: -y), noise)
    options = dict(dt0=jnp.sign(t1 - t0) * 0.125, adjoint=OURS, max_steps=16, throw=throw)
    sol = dfx.diffeqsolve(terms, dfx.EulerHeun(), t0, t1, y0=y0, **options)
    return sol.ys, sol.result


@pytest.mark.parametrize("t0, t1", sweep([(0.0, 1.0), (1.0, 0.0)], (0.0, 1.0)))
def test_a_path_that_does_not_cover_the_solve(t0, t1):
    """Row 42, where the times are known at run time only."""
    words = ["`BrownianInterval`", "cover the solve", "`t0` or `t1`"]
    for ends in [(0.0, 0.5), (0.5, 1.0)]:
        with pytest.raises(RAISED, match=mentions(words)):
            jax.block_until_ready(driven(t0, t1, Y0, *ends, throw=True))
    firsts, lasts = jnp.array([0.0, 0.0, 0.25]), jnp.array([1.0, 0.5, 1.0])
    in_lanes = jax.vmap(lambda first, last: driven(t0, t1, Y0, first, last, throw=False))
    _, result = in_lanes(firsts, lasts)
    np.testing.assert_array_equal(result == dfx.RESULTS.successful, [True, False, False])
    np.testing.assert_array_equal(result == dfx.RESULTS.nonfinite, [False, True, True])
