"""The causes of a failed solve, told apart; and what is said about them is true."""

import re

import diffrax as dfx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from failing import CASES, Case, problem
from sweeps import sweep

from nde.solvers import (
    BrownianGrid,
    BrownianInterval,
    Diagnosis,
    StormerVerlet,
    diagnose,
)
from nde.solvers.failures import causes, jacobian

CAUSES = [
    "bad_input",
    "zero_step",
    "vector_field",
    "blow_up",
    "precision",
    "stiff",
    "too_few_steps",
]


def diagnosed(case, dtype=np.float64, sign=1, **changes):
    positional, options = problem(case, dtype, sign)
    return diagnose(*positional, **(options | changes))


@pytest.mark.parametrize("dtype", sweep([np.float64, np.float32], np.float64))
def test_the_confusion_matrix_is_the_identity(dtype):
    """Every cause, in both directions of time, with a pytree as state; and no cause where none is."""
    wrong = {}
    for sign in (1, -1):
        for name, case in CASES.items():
            found = diagnosed(case, dtype, sign)
            if found.cause != case.cause or case.leaf not in (None, found.leaf):
                wrong[name, sign] = (found.cause, found.leaf, found.message)
            if case.stop is not None and abs(sign * found.t - case.stop) > 1e-3:
                wrong[name, sign] = (found.t, case.stop)
            assert found.message.endswith(found.advice) and bool(found.advice) == bool(case.cause)
    assert wrong == {}


def test_every_cause_has_five_problems():
    for cause in CAUSES:
        assert sum(case.cause == cause for case in CASES.values()) >= 5, cause


def test_the_advised_number_of_steps_is_enough_and_not_twice_too_many():
    case = Case("stiff", "decay", t1=20.0)
    found = diagnosed(case)
    assert found.cause == "stiff"
    advised = int(re.search("max_steps≈([0-9]+)", found.advice)[1])
    assert advised > 4096
    longer = CASES["ringing"]._replace(t1=2.0)
    assert int(re.search("max_steps≈([0-9]+)", diagnosed(longer).advice)[1]) <= advised
    assert diagnosed(longer, max_steps=advised).cause is None
    found = diagnosed(case, max_steps=advised)
    assert found.cause is None and found.steps > advised / 2


def test_the_advised_length_of_a_step_is_stable():
    case = CASES["steps too long"]
    advised = float(re.search("steps below ([0-9.e-]+)", diagnosed(case).advice)[1])
    assert diagnosed(case._replace(dt0=advised, t1=4000 * advised)).cause is None
    assert diagnosed(case._replace(dt0=1.1 * advised, t1=4000 * advised)).cause == "stiff"


def test_a_first_step_that_the_controller_cannot_take():
    terms, solver, t0, t1, _, *rest = problem(CASES["far from zero"], np.float64, 1)[0]
    controller = dfx.PIDController(1e-5, 1e-8)
    found = diagnose(terms, solver, t0, t1, None, *rest, stepsize_controller=controller)
    assert found.cause == "zero_step" and "dt0" in found.advice


# --- other terms and solvers ---------------------------------------------------------------------

Y0 = jnp.array([1.0, 0.5])


def undefined(t, y, args):
    return y * jnp.where(t > 0.5, jnp.nan, 1.0)


def test_a_control():
    path = dfx.LinearInterpolation(jnp.linspace(0.0, 2.0, 9), jnp.linspace(0.0, 1.0, 9)[:, None])
    term = dfx.ControlTerm(lambda t, y, args: (y**3)[:, None], path)
    found = diagnose(term, dfx.Heun(), 0.0, 2.0, 0.01, Y0, saveat=None, throw=True)
    # y' = y^3 / 2 is infinite at t = 1.
    assert found.cause == "blow_up" and found.leaf == "y[0]"
    assert abs(found.t - 1.0) < 0.1


def test_a_control_without_derivative_does_not_stop_the_diagnosis():
    term = dfx.ControlTerm(lambda t, y, args: (y**3)[:, None], lambda t0, t1: (t1 - t0)[None])
    found = diagnose(term, dfx.Heun(), 0.0, 2.0, 0.01, Y0)
    assert found.cause == "unknown" and 0.5 < found.t < 0.6


@pytest.mark.parametrize("where", ["drift", "diffusion"])
def test_noise(where):
    fine = lambda t, y, args: 0.1 * y
    drift, diffusion = (undefined, fine) if where == "drift" else (fine, undefined)
    path = BrownianGrid(0.0, 1.0, 0.01, (2,), key=jax.random.key(0))
    diagonal = lambda t, y, args: lx.DiagonalLinearOperator(diffusion(t, y, args))
    terms = dfx.MultiTerm(dfx.ODETerm(drift), dfx.ControlTerm(diagonal, path))
    found = diagnose(terms, dfx.Euler(), 0.0, 1.0, 0.01, Y0)
    assert found.cause == "vector_field" and found.t == pytest.approx(0.51, abs=0.011)
    assert ("noise" in found.message) == (where == "diffusion")


def test_a_brownian_path_that_ends_before_the_solve():
    path = BrownianInterval(0.0, 0.5, (2,), jax.random.key(0))
    diagonal = lambda t, y, args: lx.DiagonalLinearOperator(y)
    terms = dfx.MultiTerm(dfx.ODETerm(lambda t, y, args: -y), dfx.ControlTerm(diagonal, path))
    found = diagnose(terms, dfx.EulerHeun(), 0.0, 1.0, 0.01, Y0)
    assert found.cause == "bad_input" and "[0.0, 0.5]" in found.message
    assert diagnose(terms, dfx.EulerHeun(), 0.0, 0.5, 0.01, Y0).cause is None


def test_a_path_that_knows_no_shorter_steps():
    path = BrownianInterval(0.0, 1.0, (2,), jax.random.key(0), tol=0.1)
    diagonal = lambda t, y, args: lx.DiagonalLinearOperator(y)
    terms = dfx.MultiTerm(dfx.ODETerm(lambda t, y, args: -y), dfx.ControlTerm(diagonal, path))
    options = dict(stepsize_controller=dfx.PIDController(1e-4, 1e-4), max_steps=200)
    found = diagnose(terms, dfx.Heun(), 0.0, 1.0, 0.1, Y0, **options)
    assert found.cause == "precision" and "`tol`=0.1" in found.message


def test_what_succeeds_is_said_to():
    found = diagnose(dfx.ODETerm(lambda t, y, args: -y), dfx.Euler(), 0.0, 1.0, 0.25, Y0)
    message = "Nothing failed: t=1 was reached after 4 steps."
    assert found == Diagnosis(None, 1.0, None, 4, message, "")


def test_separable_terms():
    terms = (dfx.ODETerm(lambda t, p, args: p), dfx.ODETerm(undefined))
    found = diagnose(terms, StormerVerlet(), 0.0, 1.0, 0.01, (Y0, Y0))
    assert (found.cause, found.leaf) == ("vector_field", "y[1][0]")


def test_an_implicit_solver_is_not_called_stiff():
    """The same field stops an explicit solver, which is told to be implicit."""
    term = dfx.ODETerm(lambda t, y, args: -1e6 * (y - jnp.cos(3000 * t)))
    controller = dfx.PIDController(1e-6, 1e-9)
    run = lambda solver: diagnose(
        term, solver, 0.0, 1.0, None, Y0, stepsize_controller=controller, max_steps=512
    )
    explicit = run(dfx.Tsit5())
    assert explicit.cause == "stiff" and "`diffrax.Kvaerno5()`" in explicit.advice
    assert run(dfx.Kvaerno3()).cause == "too_few_steps"


def test_an_event_that_does_not_happen():
    turn = dfx.ODETerm(lambda t, y, args: jnp.stack([y[1], -y[0]]))
    options = dict(
        stepsize_controller=dfx.PIDController(1e-4, 1e-6), max_steps=64,
        event=dfx.Event(dfx.steady_state_event()),
    )  # fmt: skip
    found = diagnose(turn, dfx.Tsit5(), 0.0, jnp.inf, None, Y0, **options)
    assert found.cause == "too_few_steps" and "event has not happened" in found.message


def test_steps_that_may_not_be_short_enough():
    controller = dfx.PIDController(1e-5, 1e-6, dtmin=0.9, force_dtmin=False)
    turn = dfx.ODETerm(lambda t, y, args: jnp.stack([y[1], -y[0]]))
    found = diagnose(turn, dfx.Tsit5(), 0.0, 10.0, None, Y0, stepsize_controller=controller)
    assert found.cause == "tolerance" and "`dtmin`" in found.advice


STIFF = lambda t, y, args: -1e6 * (y - jnp.cos(t))
FAST = lambda t, y, args: 100.0 * jnp.stack([y[1], -y[0]])
CLIPPED = dfx.ClipStepSizeController(dfx.PIDController(1e-3, 1e-6, dtmin=0.01), step_ts=[0.5])
FORCED = {
    "stiff": ("stiff", STIFF, 2.0, CLIPPED),
    "fast": ("tolerance", FAST, 40.0, dfx.PIDController(1e-3, 1e-6, dtmin=1.0)),
}


@pytest.mark.parametrize("name", FORCED)
def test_steps_that_are_forced_to_be_too_long(name):
    """The state explodes, which the solution does not."""
    cause, field, t1, controller = FORCED[name]
    solve = (dfx.ODETerm(field), dfx.Tsit5(), 0.0, t1, None, Y0)
    found = diagnose(*solve, stepsize_controller=controller, max_steps=2**14)
    assert found.cause == cause and "`dtmin=" in found.message and "`dtmin`" in found.advice


def test_a_field_of_rounding_errors():
    """In single precision; in double the same solve takes 21 steps."""
    term = dfx.ODETerm(lambda t, y, args: -1e5 * (y - jnp.cos(t)))
    ends, y0 = jnp.array([0.0, 1.0], jnp.float32), jnp.zeros(1, jnp.float32)
    controller = dfx.PIDController(1e-4, 1e-6)
    found = diagnose(term, dfx.Kvaerno5(), *ends, None, y0, stepsize_controller=controller)
    assert found.cause == "precision" and "float64" in found.advice


def test_steps_that_grow_are_not_taken_for_the_first_ones():
    """Robertson's reaction: at the pace of the first 40 steps it would take 2.5e9."""
    mix = lambda p, q: jnp.stack([p, -p - q, q])
    field = lambda t, y, args: mix(-0.04 * y[0] + 1e4 * y[1] * y[2], 3e7 * y[1] ** 2)
    options = dict(stepsize_controller=dfx.PIDController(1e-6, 1e-8))
    solve = (dfx.ODETerm(field), dfx.Kvaerno5(), 0.0, 1e4, None, jnp.array([1.0, 0.0, 0.0]))
    found = diagnose(*solve, **options, max_steps=40)
    advised = int(re.search("max_steps≈([0-9]+)", found.advice)[1])
    assert advised < 10_000 and diagnose(*solve, **options, max_steps=advised).cause is None


# --- where it can be asked -----------------------------------------------------------------------


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad])
def test_there_must_be_numbers(transform):
    decay = lambda t, y, args: -y
    ask = lambda y: diagnose(dfx.ODETerm(decay), dfx.Euler(), 0.0, 1.0, 0.1, y)
    with pytest.raises(ValueError, match="inside jax.jit, jax.vmap or jax.grad.*y0.lane."):
        transform(ask)(jnp.array(1.0) if transform is jax.grad else Y0)


@pytest.mark.parametrize("transform", [jax.jit, jax.grad])
def test_nor_may_the_field_close_over_what_is_traced(transform):
    def ask(rate):
        term = dfx.ODETerm(lambda t, y, args: -rate * y)
        return diagnose(term, dfx.Euler(), 0.0, 1.0, 0.1, Y0)

    with pytest.raises(ValueError, match="no numbers to look at"):
        transform(ask)(1.0)


def test_what_diffrax_refuses_is_refused():
    with pytest.raises(ValueError, match=r"`dt0` is -0.1, but .* from 0.0 to 1.0"):
        diagnose(dfx.ODETerm(undefined), dfx.Heun(), 0.0, 1.0, -0.1, Y0)
    tree = dfx.VirtualBrownianTree(0.0, 0.5, 1e-3, (2,), jax.random.key(0))
    diagonal = lambda t, y, args: lx.DiagonalLinearOperator(y)
    with pytest.raises(ValueError, match="cannot be repeated: Cannot evaluate VirtualBrownianTree"):
        diagnose(dfx.ControlTerm(diagonal, tree), dfx.Heun(), 0.0, 1.0, 0.1, Y0)


def test_an_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="maximum_steps"):
        diagnosed(CASES["long"], maximum_steps=10)


# --- the jacobian --------------------------------------------------------------------------------


def matrices():
    draw = np.random.default_rng(1)
    diffusion = 1e3 * (np.eye(300, k=1) + np.eye(300, k=-1) - 2 * np.eye(300))
    diffusion[7, 7] += 5e4
    yield "random", draw.standard_normal((30, 30))
    yield "one block of Jordan", np.eye(6, k=1) - 2.0 * np.eye(6)
    yield "all alike", 3.0 * np.eye(300)
    yield "unbalanced", np.array([[0.0, 1.0], [1e30, 0.0]])
    yield "stiff", np.array([[-1e6, 1e6], [1.0, 2.0]])
    yield "large", diffusion


@pytest.mark.parametrize("name, matrix", list(matrices()))
@pytest.mark.parametrize("direction", [1, -1])
def test_growth_and_decay_are_those_of_the_eigenvalues(name, matrix, direction):
    linear = dfx.ODETerm(lambda t, y, args: matrix @ y)
    y = jnp.ones(len(matrix))
    growth, decay = jacobian.growth_and_decay(linear, jnp.array(0.0), y, None, direction)
    real = direction * np.linalg.eigvals(matrix).real
    # Of a large matrix 48 products see the ends of the jacobian: an isolated one well.
    rtol = 0.05 if name == "large" else 1e-6
    np.testing.assert_allclose(growth, max(0.0, real.max()), rtol=rtol, atol=1e-10)
    np.testing.assert_allclose(decay, max(0.0, -real.min()), rtol=rtol, atol=1e-10)


@pytest.mark.parametrize("size", [3, 300])
def test_a_jacobian_that_is_not_finite(size):
    root = dfx.ODETerm(lambda t, y, args: jnp.sqrt(y))
    rates = jacobian.growth_and_decay(root, jnp.array(0.0), jnp.zeros(size), None, 1)
    assert np.isnan(rates).all()


def test_entries_have_names():
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": (jnp.array(6.0), jnp.array([7.0]))}
    assert jacobian.entry(tree, 4) == "['a'][1, 1]"
    assert jacobian.entry(tree, 6) == "['b'][0]"
    assert jacobian.entry(tree, 7) == "['b'][1][0]"
    again = jacobian.tree_like(jacobian.vector(tree), tree)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), tree, again))


def test_limits_of_stability():
    assert causes.stability_limit(dfx.HalfSolver(dfx.Kvaerno3())) == np.inf
    limit = causes.stability_limit(dfx.Tsit5())
    grow = lambda z: abs(float(_step(z)))
    assert grow(-0.999 * limit) < 1 < grow(-1.001 * limit)


def _step(z):
    term = dfx.ODETerm(lambda t, y, args: z * y)
    return dfx.diffeqsolve(term, dfx.Tsit5(), 0.0, 1.0, 1.0, jnp.array(1.0)).ys[-1]
