"""Regularizers against closed forms: rotations and linear fields, whose integrals are known."""

import functools
import itertools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from sweeps import sweep

import nde
from nde import losses, regularizers
from nde.solvers import SOSRI, SOSRI2, BrownianGrid, DiscreteAdjoint, Estimates
from nde.train import Batch

KEY = jax.random.key(3)
OMEGA, Y0, TS = 1.7, np.array([0.6, -0.8]), np.linspace(0.0, 2.0, 5)
ROTATION = np.array([[0.0, -OMEGA], [OMEGA, 0.0]])
TIGHT = dict(stepsize_controller=dfx.PIDController(rtol=1e-9, atol=1e-11))


def linear(matrix, **options):
    return nde.HybridODE(lambda t, y, p: p["A"] @ y, None, {"A": matrix}, **options)


def decay(rate, **options):
    return nde.HybridODE(lambda t, y, p: -p["a"] * y, None, {"a": rate}, **options)


def test_estimates_are_those_of_the_solve():
    model = linear(ROTATION)
    for reduce in ("sum", "mean", "max"):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(model.vector_field), model.solver, TS[0], TS[-1], None, jnp.asarray(Y0),
            stepsize_controller=model.stepsize_controller,
            adjoint=DiscreteAdjoint(estimates=Estimates(reduce=reduce, series=True)),
        )  # fmt: skip
        error, stiffness = sol.stats["error_estimate"], sol.stats["stiffness_estimate"]
        inputs = (jnp.asarray(TS), jnp.asarray(Y0))
        values = {
            regularizers.error_estimate: error,
            regularizers.stiffness_estimate: stiffness,
            regularizers.error_and_stiffness: error + 0.1 * stiffness,
        }
        for regularizer, expected in values.items():
            solution, penalty = regularizer(model, *inputs, reduce=reduce)
            np.testing.assert_allclose(penalty, expected, rtol=1e-12)
            np.testing.assert_allclose(solution.ys, model(*inputs), rtol=1e-12)
        steps = np.asarray(sol.stats["error_steps"])[: int(sol.stats["num_accepted_steps"])]
        squares = getattr(np, reduce)(steps**2)
        _, penalty = regularizers.error_estimate(model, *inputs, reduce=reduce, squared=True)
        np.testing.assert_allclose(penalty, squares, rtol=1e-12)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "adjoint",
    [
        DiscreteAdjoint(),
        pytest.param(dfx.RecursiveCheckpointAdjoint(), marks=pytest.mark.slow),
    ],
)
def test_local_takes_one_step(biased, adjoint):
    # A step of Heun from y has the error (a h)^2 y / 2; the state there is no function of a.
    a, h = 1.3, 0.125
    model = decay(
        a, solver=dfx.Heun(), stepsize_controller=dfx.ConstantStepSize(), dt0=h, adjoint=adjoint
    )

    def penalty(model, key):
        y0 = jnp.array([2.0])
        return regularizers.local(model, jnp.asarray(TS), y0, key=key, biased=biased)[1]

    keys = jax.random.split(KEY, 64)

    @eqx.filter_jit
    def both(model, keys):
        arrays, rest = eqx.partition(model, eqx.is_array)
        value = lambda arrays, key: penalty(eqx.combine(arrays, rest), key)
        return jax.vmap(jax.value_and_grad(value), in_axes=(None, 0))(arrays, keys)

    values, grads = both(model, keys)
    np.testing.assert_allclose(grads.parameters["a"], 2 * values / a, rtol=1e-10)
    starts = 2.0 * (1 - a * h + (a * h) ** 2 / 2) ** np.arange(16)
    allowed = h * (a * h) ** 2 / 2 * starts
    if biased:
        nearest = np.min(np.abs(np.asarray(values)[:, None] - allowed), axis=1)
        assert nearest.max() < 1e-14
        assert len(np.unique(np.round(values, 12))) > 10
    else:
        times = TS[-1] * np.asarray(jax.vmap(jax.random.uniform)(keys))
        steps = np.minimum(h, TS[-1] - times)  # not beyond the end
        exact = steps**3 * a**2 / 2 * 2.0 * np.exp(-a * times)
        np.testing.assert_allclose(values, exact, rtol=2e-2)


def test_local_with_the_step_of_the_controller():
    model = linear(ROTATION)
    run = lambda key: regularizers.local(model, jnp.asarray(TS), jnp.asarray(Y0), key=key)[1]
    values = jax.vmap(run)(jax.random.split(KEY, 8))
    assert np.all(np.isfinite(values)) and np.all(values > 0)
    stiffness = functools.partial(regularizers.local, of="stiffness")
    _, penalty = stiffness(model, jnp.asarray(TS), jnp.asarray(Y0), key=KEY)
    np.testing.assert_allclose(penalty, OMEGA / 3.5068, rtol=1e-9)


def gradient(regularizer, model, ts, y0, key=KEY):
    """The penalty and its gradient."""
    return eqx.filter_value_and_grad(lambda m: regularizer(m, ts, y0, key=key)[1])(model)


@pytest.mark.parametrize("biased", [False, True])
def test_local_of_a_failed_solve_is_zero(biased):
    """y' = a y^2 escapes at t = 1 / (a y0); a state of inf behind it must not reach the gradient."""
    local = functools.partial(regularizers.local, biased=biased)
    model = nde.HybridODE(lambda t, y, p: p["a"] * y**2, None, {"a": 1.0}, max_steps=64)
    run = lambda y0, key: gradient(local, model, jnp.asarray(TS), y0, key)
    lanes = eqx.filter_jit(jax.vmap(jax.vmap(run, in_axes=(None, 0)), in_axes=(0, None)))
    values, grads = lanes(jnp.array([[0.3], [3.0]]), jax.random.split(KEY, 8))
    assert np.all(values[0] > 0) and np.all(grads.parameters["a"][0] > 0)
    np.testing.assert_array_equal(values[1], 0.0)
    np.testing.assert_array_equal(grads.parameters["a"][1], 0.0)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("ts", [np.zeros(1), np.ones(3)])
def test_local_without_a_step_is_zero(ts, biased):
    local = functools.partial(regularizers.local, biased=biased)
    value, grads = gradient(local, decay(1.3), jnp.asarray(ts), jnp.array([2.0]))
    assert value == 0.0 and grads.parameters["a"] == 0.0


STEPS = {
    "chosen": lambda sign: {},
    "constant": lambda sign: {
        "stepsize_controller": dfx.ConstantStepSize(), "dt0": sign * 0.125
    },
    "clipped": lambda sign: {
        "stepsize_controller": dfx.ClipStepSizeController(
            dfx.PIDController(rtol=1e-3, atol=1e-6), step_ts=sign * jnp.linspace(0.05, 1.95, 39)
        )
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "biased, steps",
    sweep(
        [(False, "chosen"), (False, "constant"), (False, "clipped"), (True, "chosen")],
        (False, "chosen"),
    ),
)
def test_local_does_not_depend_on_the_direction_of_time(biased, steps):
    """Where y solves y' = f(t, y), y(-t) solves z' = -f(-t, z): the same steps, mirrored."""
    local = functools.partial(regularizers.local, biased=biased)
    field = lambda t, y: -(1.0 + t**2) * y

    def penalty(sign, key):
        options = STEPS[steps](sign)
        model = nde.NeuralODE(lambda t, y, args: sign * field(sign * t, y), **options)
        return local(model, sign * jnp.asarray(TS), jnp.array([2.0]), key=key)[1]

    keys = jax.random.split(KEY, 8)
    forward, backward = (jax.vmap(functools.partial(penalty, sign))(keys) for sign in (1.0, -1.0))
    assert np.all(forward > 0)
    np.testing.assert_allclose(backward, forward, rtol=1e-12)


def test_local_takes_times_of_lower_precision():
    ts, y0 = jnp.asarray(TS), jnp.asarray(Y0)
    _, expected = regularizers.local(linear(ROTATION), ts, y0, key=KEY)
    _, penalty = regularizers.local(linear(ROTATION), ts.astype(jnp.float32), y0, key=KEY)
    assert penalty == expected


REGULARIZERS = {
    "local": regularizers.local,
    "local, biased": functools.partial(regularizers.local, biased=True),
    "kinetic": regularizers.kinetic,
    "taylor": regularizers.taylor,
}


@pytest.mark.parametrize("name", sweep(REGULARIZERS, "local"))
def test_parameters_of_higher_precision_than_the_data(name):
    """The penalty and its gradient are those of parameters with the precision of the data."""
    steps = dict(solver=dfx.Heun(), stepsize_controller=dfx.ConstantStepSize(), dt0=0.25)
    ts, y0 = jnp.asarray(TS, dtype=jnp.float32), jnp.array([2.0], dtype=jnp.float32)
    single, double = (decay(jnp.asarray(1.25, dtype=d), **steps) for d in ("float32", "float64"))
    expected, slope = gradient(REGULARIZERS[name], single, ts, y0)
    with jax.numpy_dtype_promotion("standard"):
        value, grads = gradient(REGULARIZERS[name], double, ts, y0)
    assert value.dtype == jnp.float32 and grads.parameters["a"].dtype == jnp.float64
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    np.testing.assert_allclose(grads.parameters["a"], slope.parameters["a"], rtol=1e-4)


@pytest.mark.parametrize("width", [None, 0.05])
def test_steer_moves_times_and_keeps_their_order(width):
    ts = jnp.array([0.0, 1.0, 1.1, 3.0, 3.5, 3.5, 3.5])  # padded
    model = nde.HybridODE(lambda t, y, p: jnp.ones_like(y), None, {})  # y is the time
    run = lambda key: regularizers.steer(model, ts, jnp.zeros(1), key=key, width=width)
    solution, penalty = jax.jit(jax.vmap(run))(jax.random.split(KEY, 200))
    times = np.asarray(solution.ys[..., 0])
    assert not np.any(penalty)
    assert np.all(np.diff(times, axis=1) >= -1e-12)
    np.testing.assert_array_equal(times[:, 0], 0.0)
    np.testing.assert_allclose(times[:, 4:], times[:, 4:5] * np.ones(3), atol=1e-12)
    reach = np.array([0.05, 0.05, 0.25, 0.25]) if width is None else np.full(4, 0.05)
    apart = np.abs(times[:, 1:5] - np.asarray(ts)[1:5]).max(axis=0)
    assert np.all(apart <= reach + 1e-9) and np.all(apart > 0.9 * reach)


def test_steer_of_an_end_time():
    model = nde.HybridODE(lambda t, y, p: jnp.ones_like(y), None, {})
    run = lambda key: regularizers.steer(model, jnp.array([0.0, 1.0]), jnp.zeros(1), key=key)[0].ys
    ends = np.asarray(jax.vmap(run)(jax.random.split(KEY, 500)))[:, 1, 0]
    assert 0.5 <= ends.min() < 0.52 and 1.48 < ends.max() <= 1.5
    assert abs(ends.mean() - 1) < 0.04


@pytest.mark.parametrize(
    "biased, of", sweep(itertools.product([False, True], ["error", "stiffness"]), (False, "error"))
)
def test_local_where_the_field_is_undefined_leaves_the_others_alone(biased, of):
    """Zero times nan must not reach the rate, which all examples share."""
    local = functools.partial(regularizers.local, biased=biased, of=of)
    ts, y0s, keys = jnp.asarray(TS), jnp.array([-1.0, 2.0, jnp.nan]), jax.random.split(KEY, 3)

    def total(rate, y0s, keys):
        model = nde.NeuralODE(lambda t, y, args: -rate * jnp.sqrt(y), max_steps=16)
        run = lambda y0, key: local(model, ts / 4, y0[None], key=key)[1]
        return jnp.sum(jax.vmap(run)(y0s, keys))

    found = jax.value_and_grad(total)(jnp.array(0.5), y0s, keys)
    expected = jax.value_and_grad(total)(jnp.array(0.5), y0s[1:2], keys[1:2])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert expected[1] != 0


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_kinetic_energy_and_jacobian_of_a_rotation(direction):
    model, inputs = linear(ROTATION, **TIGHT), (direction * jnp.asarray(TS), jnp.asarray(Y0))
    noise = jax.random.normal(jax.random.split(KEY, 1)[0], (2,), jnp.float64)
    energy = TS[-1] * OMEGA**2 * np.sum(Y0**2) / 2
    jacobian = TS[-1] * OMEGA**2 * float(noise @ noise) / 2
    solution, penalty = regularizers.kinetic(model, *inputs, key=KEY, energy=0.3, jacobian=0.7)
    np.testing.assert_allclose(penalty, 0.3 * energy + 0.7 * jacobian, rtol=1e-8)
    np.testing.assert_allclose(solution.ys, model(*inputs), rtol=1e-12)
    # The integral has no say in the steps.
    assert solution.stats["num_steps"] == model.solve(*inputs).stats["num_steps"]
    cut = eqx.tree_at(lambda m: m.max_steps, model, 2, is_leaf=lambda x: x is model.max_steps)
    assert regularizers.kinetic(cut, *inputs, key=KEY)[1] == jnp.inf  # whatever the direction


@pytest.mark.parametrize("direction", [1.0, -1.0])
@pytest.mark.parametrize("order", sweep([1, 2, 3], 2))
def test_total_derivatives(order, direction):
    model, inputs = linear(ROTATION, **TIGHT), (direction * jnp.asarray(TS), jnp.asarray(Y0))
    _, penalty = regularizers.taylor(model, *inputs, order=order)
    expected = TS[-1] * OMEGA ** (2 * order) * np.sum(Y0**2) / 2
    np.testing.assert_allclose(penalty, expected, rtol=1e-8)


@pytest.mark.parametrize("order, expected", [(2, 4 * 2.0**3 / 3), (3, 4 * 2.0), (4, 0.0)])
def test_total_derivatives_in_time(order, expected):
    model = nde.HybridODE(lambda t, y, p: t**2 * jnp.ones_like(y), None, {}, **TIGHT)
    _, penalty = regularizers.taylor(model, jnp.asarray(TS), jnp.zeros(1), order=order)
    np.testing.assert_allclose(penalty, expected, rtol=1e-8, atol=1e-12)


def test_a_loss_with_a_regularizer():
    model = linear(ROTATION)
    ts = jnp.broadcast_to(jnp.asarray(TS), (3, 5))
    ys = jax.random.normal(KEY, (3, 5, 2))
    mask, step = jnp.array([True, True, False]), jnp.array(5)
    batch = Batch((ts, ys), mask, step)
    plain, _ = losses.trajectory(model, batch, KEY)
    schedule = regularizers.exponential_decay(100.0, 1.0, 10)
    options = dict(regularizer=regularizers.error_estimate, coefficient=schedule)
    loss, metrics = losses.trajectory(model, batch, KEY, **options)
    each = [regularizers.error_estimate(model, ts[i], ys[i, 0])[1] for i in range(2)]
    np.testing.assert_allclose(metrics["penalty"], np.mean(each), rtol=1e-9)
    np.testing.assert_allclose(loss, plain + 10.0 * np.mean(each), rtol=1e-9)
    for name in ("local", "steer"):
        options = dict(regularizer=getattr(regularizers, name), coefficient=0.1)
        value = eqx.filter_value_and_grad(
            lambda m, o=options: losses.trajectory(m, batch, KEY, **o)[0]
        )
        loss, grad = eqx.filter_jit(value)(model)
        assert np.isfinite(loss) and np.all(np.isfinite(grad.parameters["A"]))


def test_coefficients_decay_exponentially():
    coefficient = regularizers.exponential_decay(100.0, 10.0, 50)
    np.testing.assert_allclose(coefficient(jnp.array(0)), 100.0)
    np.testing.assert_allclose(coefficient(jnp.array(25)), 1000.0**0.5)
    np.testing.assert_allclose(coefficient(jnp.array(80)), 10.0)


def test_a_batch_with_one_step_size():
    field = nde.fields.MLPField(2, width=8, depth=1, key=KEY)
    y0s = jax.random.normal(KEY, (4, 2))
    one = nde.NeuralODE(field, **TIGHT)
    whole = nde.NeuralODE(nde.fields.Batched(field), **TIGHT)
    ts = jnp.asarray(TS)
    solution, penalty = regularizers.error_estimate(whole, ts, y0s)
    assert penalty.shape == () and solution.stats["num_steps"].shape == ()
    expected = jax.vmap(one, in_axes=(None, 0))(ts, y0s)
    np.testing.assert_allclose(jnp.swapaxes(solution.ys, 0, 1), expected, atol=1e-8)


class GeometricNoise(eqx.Module):
    """dy = -rate y dt + y / 5 dW on eight steps: a model whose input is the key of its noise."""

    rate: jax.Array
    solver: dfx.AbstractSolver
    adjoint: dfx.AbstractAdjoint = DiscreteAdjoint()

    def solve(self, key, *, throw=True):
        path = BrownianGrid(0.0, 1.0, 0.125, (2,), key, levy_area=dfx.SpaceTimeLevyArea)
        drift = dfx.ODETerm(lambda t, y, args: -self.rate * y)
        noise = dfx.ControlTerm(lambda t, y, args: lx.DiagonalLinearOperator(y / 5), path)
        return dfx.diffeqsolve(
            dfx.MultiTerm(drift, noise), self.solver, 0.0, 1.0, 0.125, jnp.asarray(Y0),
            adjoint=self.adjoint, throw=throw,
        )  # fmt: skip


@pytest.mark.slow
def test_a_stochastic_model_has_both_estimates():
    model = GeometricNoise(jnp.array(4.0), SOSRI2())
    found = {}
    for reduce in ("mean", "sum"):
        value = lambda m, r=reduce: regularizers.stiffness_estimate(m, KEY, reduce=r)[1]
        found[reduce], grad = eqx.filter_value_and_grad(value)(model)
        # S of a linear drift is its rate over the stability limit, whatever the noise.
        steps = 1 if reduce == "mean" else 8
        np.testing.assert_allclose(found[reduce], steps * 4.0 / 10.6, rtol=1e-10)
        np.testing.assert_allclose(grad.rate, steps / 10.6, rtol=1e-8)
    solution, error = regularizers.error_estimate(model, KEY, reduce="sum")
    np.testing.assert_allclose(solution.ys, model.solve(KEY).ys, rtol=1e-12)
    _, both = regularizers.error_and_stiffness(model, KEY, reduce="sum", weight=0.3)
    np.testing.assert_allclose(both, error + 0.3 * found["sum"], rtol=1e-10)
    other = GeometricNoise(jnp.array(4.0), SOSRI())
    assert regularizers.error_estimate(other, KEY)[1] > 0
    with pytest.raises(ValueError, match="SOSRI has no stiffness estimate.*SOSRI2"):
        regularizers.stiffness_estimate(other, KEY)


MISTAKES = {
    "no estimates": (
        lambda ts, y0: regularizers.error_estimate(
            linear(ROTATION, adjoint=dfx.RecursiveCheckpointAdjoint()), ts, y0
        ),
        "RecursiveCheckpointAdjoint",
    ),
    "no stiffness": (
        lambda ts, y0: regularizers.stiffness_estimate(
            linear(ROTATION, solver=dfx.Bosh3()), ts, y0
        ),
        "Bosh3 has no stiffness estimate",
    ),
    "no local stiffness": (
        lambda ts, y0: regularizers.local(
            linear(ROTATION, solver=dfx.Bosh3()), ts, y0, key=KEY, of="stiffness"
        ),
        "Bosh3 has no stiffness estimate",
    ),
    "own times": (
        lambda ts, y0: regularizers.local(
            linear(ROTATION, stepsize_controller=dfx.StepTo(ts)), ts, y0, key=KEY
        ),
        "StepTo.*biased=True",
    ),
    "order": (
        lambda ts, y0: regularizers.taylor(linear(ROTATION), ts, y0, order=0),
        "`order` is 0",
    ),
    "width": (
        lambda ts, y0: regularizers.steer(linear(ROTATION), ts, y0, key=KEY, width=-1.0),
        "`width` is -1.0",
    ),
    "one time": (
        lambda ts, y0: regularizers.steer(linear(ROTATION), ts[:1], y0, key=KEY),
        "moves the second time",
    ),
    "decay": (lambda ts, y0: regularizers.exponential_decay(0.0, 1.0, 5), "positive coefficients"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    make, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        make(jnp.asarray(TS), jnp.asarray(Y0))
