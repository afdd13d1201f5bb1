"""Losses against NumPy, and the derivatives of what a mask leaves out."""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nde
from nde.losses import growing_horizon, log_mse, mse, trajectory
from nde.solvers import SolveError
from nde.train import Batch

RNG = np.random.default_rng(0)
PREDICTION, TARGET = RNG.uniform(0.5, 2.0, (2, 4, 5, 3))
MASK = RNG.uniform(size=(4, 5)) > 0.4


@pytest.mark.parametrize("loss, change", [(mse, lambda x: x), (log_mse, np.log)])
def test_mean_over_the_entries_that_count(loss, change):
    squares = (change(PREDICTION) - change(TARGET)) ** 2
    prediction, target = jnp.asarray(PREDICTION), jnp.asarray(TARGET)
    np.testing.assert_allclose(loss(prediction, target), squares.mean(), rtol=1e-12)
    masked = loss(prediction, target, jnp.asarray(MASK))
    np.testing.assert_allclose(masked, squares[MASK].mean(), rtol=1e-12)


@pytest.mark.parametrize("loss", [mse, log_mse])
@pytest.mark.parametrize("rubbish", [np.nan, np.inf, -1e300])
def test_what_is_masked_reaches_neither_the_value_nor_the_gradient(loss, rubbish):
    where = np.broadcast_to(MASK[..., None], TARGET.shape)
    clean = jax.value_and_grad(loss)(
        jnp.asarray(PREDICTION), jnp.asarray(TARGET), jnp.asarray(MASK)
    )
    prediction, target = (jnp.asarray(np.where(where, x, rubbish)) for x in (PREDICTION, TARGET))
    value, gradient = jax.value_and_grad(loss)(prediction, target, jnp.asarray(MASK))
    np.testing.assert_array_equal(value, clean[0])
    np.testing.assert_array_equal(gradient, clean[1])
    np.testing.assert_array_equal(gradient[~where], 0)


def test_an_empty_mask_is_not_a_loss_of_zero():
    value = mse(jnp.ones(3), jnp.zeros(3), jnp.zeros(3, dtype=bool))
    np.testing.assert_equal(float(value), np.nan)


def test_more_entries_than_half_precision_counts_to():
    error, mask = jnp.full(70_000, 0.5, jnp.float16), jnp.ones(70_000, dtype=bool)
    assert mse(error, jnp.zeros_like(error), mask) == mse(error, jnp.zeros_like(error)) == 0.25


@pytest.mark.parametrize(
    "fraction, last", [(1e-6, 1), (0.1, 1), (0.5, 5), (0.51, 6), (1.0, 10), (7.0, 10)]
)
@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_the_horizon_keeps_the_beginning_and_repeats_its_last_time(fraction, last, direction):
    ts = direction * np.arange(11.0) ** 2
    clipped, seen = jax.jit(growing_horizon)(jnp.asarray(ts), fraction)
    np.testing.assert_array_equal(seen, np.arange(11) <= last)
    np.testing.assert_array_equal(clipped, ts[np.minimum(np.arange(11), last)])


TIGHT = diffrax.PIDController(rtol=1e-8, atol=1e-8)


def decay(direction=1.0):
    return nde.HybridODE(lambda t, y, p: -direction * p * y, None, 0.5, stepsize_controller=TIGHT)


def batch(step=0, mask=(True, True, False)):
    ts = jnp.broadcast_to(jnp.linspace(0.0, 2.0, 6), (3, 6))
    ys = jnp.array([1.0, 2.0, 7.0])[:, None, None] * jnp.exp(-ts)[..., None]
    return Batch((ts, ys), jnp.asarray(mask), jnp.asarray(step))


@pytest.mark.parametrize("step, last", [(0, 1), (5, 3), (100, 5)])
def test_trajectory_scores_valid_examples_up_to_the_horizon(step, last):
    loss = functools.partial(trajectory, horizon=optax.linear_schedule(0.2, 1.0, 10))
    value, metrics = loss(decay(), batch(step), jax.random.key(0))
    ts = np.linspace(0.0, 2.0, 6)[1 : last + 1]
    gap = np.exp(-ts / 2) - np.exp(-ts)
    np.testing.assert_allclose(value, np.mean([gap**2, (2 * gap) ** 2]), rtol=1e-6)
    assert float(metrics["failed"]) == 0
    assert float(metrics["nfe"]) > 6


SERIES = [
    (np.linspace(0.0, 1.0, 11), RNG.normal(size=(11, 2))),
    (np.array([0.0, 0.25, 0.5, 1.0]), RNG.normal(size=(4, 2))),
]


def gaps(series):
    """Of exp(-t / 2), as in `decay`, from the observations after the first: shape (times - 1, 2)."""
    ts, ys = series
    return (ys[0] * np.exp(-(ts - ts[0]) / 2)[:, None] - ys)[1:]


@pytest.mark.parametrize("horizon", [None, lambda step: 1.0])
@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_trajectory_of_padded_series_scores_their_observations_alone(direction, horizon):
    ts, ys, *_ = nde.paths.pad_series(SERIES)
    ts = ts.at[0, 2].set(SERIES[0][0][1])  # two observations at one time, both of which count
    padded = Batch((direction * ts, ys), jnp.ones(2, bool), jnp.asarray(0))
    value, _ = trajectory(decay(direction), padded, jax.random.key(0), horizon=horizon)
    series = [(np.asarray(ts[0]), SERIES[0][1]), SERIES[1]]
    expected = np.mean(np.concatenate([gaps(pair) for pair in series]) ** 2)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize("channels", [False, True])
def test_trajectory_leaves_out_what_the_mask_of_the_data_leaves_out(channels):
    ts, ys = SERIES[0]
    mask = RNG.uniform(size=ys.shape if channels else ts.shape) > 0.4
    mask[0] = True
    where = np.broadcast_to(mask.reshape(11, -1), ys.shape)[1:]
    holes = jnp.asarray(ys).at[1:].set(jnp.where(where, ys[1:], 1e6))
    data = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], (ts, holes, mask))
    masked = Batch(data, jnp.ones(1, bool), jnp.asarray(0))
    value, _ = trajectory(decay(), masked, jax.random.key(0))
    np.testing.assert_allclose(value, np.mean(gaps(SERIES[0])[where] ** 2), rtol=1e-6)


def test_trajectory_leaves_out_single_values_that_are_nan():
    ts, ys = SERIES[0]
    seen = RNG.uniform(size=ys.shape) > 0.4
    seen[0] = True
    data = (jnp.asarray(ts)[None], jnp.asarray(np.where(seen, ys, np.nan))[None])
    value, gradient = eqx.filter_value_and_grad(
        lambda model: trajectory(model, Batch(data), jax.random.key(0))[0]
    )(decay())
    np.testing.assert_allclose(value, np.mean(gaps(SERIES[0])[seen[1:]] ** 2), rtol=1e-6)
    assert np.isfinite(gradient.parameters)


def test_trajectory_does_not_start_from_what_was_not_observed():
    ts, ys = (jnp.asarray(leaf)[None] for leaf in SERIES[0])
    batch = Batch((ts, ys, jnp.ones(ys.shape, bool).at[0, 0, 1].set(False)), jnp.ones(1, bool), 0)
    with pytest.raises(RuntimeError, match="first row .* where the solve starts"):
        trajectory(decay(), batch, jax.random.key(0))


def blow_up(t, y, p):
    return jnp.where(y > 5, p * y**2, 0.0)  # only the example that starts at 7 escapes


def test_fit_says_which_solve_failed_first_and_how():
    model, key = nde.HybridODE(blow_up, None, 0.5, max_steps=200), jax.random.key(0)
    options = {"optim": optax.sgd(0.0), "steps": 1, "progress": False, "key": key}
    message = (
        r"33% .* The first is example 2\. 1 x The maximum number of solver steps was reached\."
    )
    with pytest.raises(SolveError, match=message) as raised:
        nde.fit(model, trajectory, batch().data, **options)
    assert raised.value.lane == 2
    with pytest.raises(SolveError, match="The first is number 2 of the batch"):
        nde.fit(model, trajectory, iter([batch().data]), **options)


def test_results_are_one_per_example():
    def loss(model, batch, key):
        value, metrics = trajectory(model, batch, key)
        return value, metrics | {"result": metrics["failed"]}

    options = {"optim": optax.sgd(0.0), "steps": 1, "progress": False, "key": jax.random.key(0)}
    with pytest.raises(ValueError, match=r"a batch of diffrax.RESULTS of shape \(3,\)"):
        nde.fit(decay(), loss, batch().data, **options)


def test_a_failed_solve_does_not_count_and_reaches_no_gradient():
    model = nde.HybridODE(blow_up, None, 0.5, max_steps=200)
    everyone = batch(mask=(True, True, True))
    both = jax.value_and_grad(lambda p: with_rate(model, p, everyone), has_aux=True)
    (value, metrics), gradient = both(jnp.asarray(0.5))
    expected = with_rate(model, jnp.asarray(0.5), batch())[0]
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert float(metrics["failed"]) == pytest.approx(1 / 3)
    assert float(gradient) == 0


def with_rate(model, rate, batch):
    model = nde.HybridODE(model.known, None, rate, max_steps=model.max_steps)
    return trajectory(model, batch, jax.random.key(0))
