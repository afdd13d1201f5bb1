"""`NeuralODE` and what every ODE model shares, against closed forms."""

import re

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from sweeps import sweep

import nde

TIGHT = {"stepsize_controller": diffrax.PIDController(rtol=1e-9, atol=1e-9)}
A = np.array([[-0.1, 1.3], [-1.0, -0.1]])
TS = np.array([0.0, 0.1, 0.5, 1.7, 2.0])
Y0 = np.array([1.0, -0.5])


def linear(t, y, args):
    return jnp.asarray(A, dtype=y.dtype) @ y


def exact(ts, y0):
    return np.stack([scipy.linalg.expm(A * (t - ts[0])) @ y0 for t in ts])


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_solves_forward_and_backward_at_irregular_times(direction):
    model, ts = nde.NeuralODE(linear, **TIGHT), jnp.asarray(direction * TS)
    solution = model.solve(ts, jnp.asarray(Y0))
    np.testing.assert_allclose(solution.ys, exact(ts, Y0), atol=1e-7)
    np.testing.assert_array_equal(model(ts, jnp.asarray(Y0)), solution.ys)
    assert int(solution.stats["nfe"]) > 0


def test_starts_at_the_first_time_whatever_it_is():
    ts = jnp.asarray(TS)
    model = nde.NeuralODE(linear, **TIGHT)
    later = model(ts + 5.0, jnp.asarray(Y0))
    np.testing.assert_allclose(later, exact(TS, Y0), atol=1e-7)


def test_padding_with_the_last_time_repeats_the_last_state_and_costs_nothing():
    model, y0 = nde.NeuralODE(linear, **TIGHT), jnp.asarray(Y0)
    plain = model.solve(jnp.asarray(TS), y0)
    padded = model.solve(jnp.asarray(np.append(TS, [2.0, 2.0])), y0)
    np.testing.assert_array_equal(padded.ys[:5], plain.ys)
    np.testing.assert_array_equal(padded.ys[5:], np.stack([plain.ys[-1]] * 2))
    assert int(padded.stats["nfe"]) == int(plain.stats["nfe"])


def test_one_time_is_the_initial_state():
    ys = nde.NeuralODE(linear)(jnp.array([3.0]), jnp.asarray(Y0))
    np.testing.assert_array_equal(ys, Y0[None])


def test_a_pytree_state_is_solved_leaf_by_leaf():
    def spring(t, y, args):
        return {"x": y["v"], "v": -args * y["x"]}

    y0 = {"x": jnp.ones(3), "v": jnp.zeros(3)}
    ys = nde.NeuralODE(spring, **TIGHT)(jnp.asarray(TS), y0, jnp.array([1.0, 4.0, 9.0]))
    omega = np.array([1.0, 2.0, 3.0])
    np.testing.assert_allclose(ys["x"], np.cos(TS[:, None] * omega), atol=1e-7)
    np.testing.assert_allclose(ys["v"], -omega * np.sin(TS[:, None] * omega), atol=1e-7)


def test_vmap_is_the_batch_and_a_lane_does_not_see_its_neighbors():
    model = nde.NeuralODE(linear, **TIGHT)
    y0s = jnp.stack([jnp.asarray(Y0), 1e3 * jnp.asarray(Y0), jnp.zeros(2)])
    ys = jax.jit(jax.vmap(model, in_axes=(None, 0)))(jnp.asarray(TS), y0s)
    for lane, y0 in zip(ys, y0s, strict=True):
        np.testing.assert_allclose(lane, model(jnp.asarray(TS), y0), rtol=1e-12, atol=1e-12)


class Growth(eqx.Module):
    """rate y."""

    rate: jax.Array

    def __call__(self, t, y, args):
        return self.rate * y


def test_a_lift_pieces_and_a_readout_make_a_network():
    """readout(exp(0.3 a_1 + 0.7 a_2) (initial(x), 0)), and a shift of the zeros that were appended."""
    rates = jnp.array([[0.5, -1.0, 0.2], [2.0, 0.3, -0.4]])
    field = nde.fields.DepthVarying([Growth(rate) for rate in rates], nde.fields.Pieces(0.3))
    lift, readout = (eqx.nn.Linear(a, b, key=jax.random.key(a)) for a, b in ((4, 2), (3, 5)))
    controller = diffrax.ClipStepSizeController(
        diffrax.PIDController(rtol=1e-11, atol=1e-11), jump_ts=jnp.array([0.3])
    )
    model = nde.NeuralODE(
        lambda t, y, args: field(t, y) + jnp.array([0.0, 0.0, 1.0]), augment=1, initial=lift,
        readout=readout, solver=diffrax.Dopri8(), stepsize_controller=controller,
    )  # fmt: skip
    x = jnp.array([0.1, -0.4, 0.7, 1.0])
    ys = model(jnp.array([0.0, 1.0]), x)
    state = jnp.exp(0.3 * rates[0] + 0.7 * rates[1])[:2] * lift(x)
    one = (np.exp(0.2 * 0.3) - 1) / 0.2  # of a' = 0.2 a + 1, then of a' = -0.4 a + 1
    one = one * np.exp(-0.4 * 0.7) + (np.exp(-0.4 * 0.7) - 1) / -0.4
    np.testing.assert_allclose(ys[1], readout(jnp.append(state, one)), rtol=1e-8)
    np.testing.assert_allclose(ys[0], readout(jnp.append(lift(x), 0.0)), rtol=1e-12)
    with pytest.raises(ValueError, match="`initial` cannot be applied"):
        model(jnp.array([0.0, 1.0]), x[:3])


def test_augmentation_represents_a_reflection():
    """x -> -x on a line crosses itself; half a turn in the plane does not. The field is exact."""

    def turn(t, y, args):
        return jnp.pi * jnp.stack([-y[1], y[0]])

    model = nde.NeuralODE(turn, augment=1, **TIGHT)
    x = jnp.array([[-2.0], [0.5], [3.0]])
    ys = jax.vmap(model, in_axes=(None, 0))(jnp.array([0.0, 1.0]), x)
    np.testing.assert_allclose(ys, np.stack([x, -x], axis=1), atol=1e-7)


def test_gradients_of_the_parameters_are_central_differences():
    field = nde.fields.MLPField(2, 4, 1, key=jax.random.key(0))
    steps = {"stepsize_controller": diffrax.ConstantStepSize(), "dt0": 0.1}
    model = nde.NeuralODE(field, **steps)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def total(params):
        return jnp.sum(eqx.combine(params, static)(jnp.asarray(TS), jnp.asarray(Y0)) ** 2)

    gradient = jax.jit(jax.grad(total))(params)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    direction = tree.unflatten(
        [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    )

    def along(h):
        return total(jax.tree.map(lambda p, d: p + h * d, params, direction))

    h = 1e-4
    expected = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
    products = jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction)
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), expected, rtol=1e-8)
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("time", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("state", [jnp.float32, jnp.float64])
def test_the_solve_has_the_higher_precision_of_time_and_state(time, state):
    ys = nde.NeuralODE(linear)(jnp.asarray(TS, dtype=time), jnp.asarray(Y0, dtype=state))
    assert ys.dtype == np.promote_types(time, state)
    np.testing.assert_allclose(ys, exact(TS, Y0), atol=5e-3)


@pytest.mark.parametrize(
    "known, data",
    sweep(
        [(False, jnp.float32), (True, jnp.float32), (False, jnp.float64)],
        (True, jnp.float32),
    ),
)
def test_gradients_of_a_model_of_another_precision_than_the_data(known, data):
    """They are those of the same weights in the precision of the data, in their own type."""
    field = nde.fields.MLPField(2, 4, 1, key=jax.random.key(0))
    steps = {"stepsize_controller": diffrax.ConstantStepSize(), "dt0": 0.1}
    model = nde.NeuralODE(field, **steps)
    if known:
        rate = {"rate": nde.hybrid.Positive(1.5)}
        model = nde.HybridODE(lambda t, y, p: -p["rate"] * y, field, rate, **steps)

    def gradient(precision):
        is_array = eqx.is_inexact_array
        cast = jax.tree.map(lambda x: x.astype(precision) if is_array(x) else x, model)
        ts, y0 = jnp.asarray(TS, dtype=data), jnp.asarray(Y0, dtype=data)
        return jax.tree.leaves(eqx.filter_grad(lambda m: jnp.sum(m(ts, y0) ** 2))(cast))

    other = jnp.float64 if data == jnp.float32 else jnp.float32
    with jax.numpy_dtype_promotion("standard"):
        found, expected = gradient(other), gradient(data)
    assert all(leaf.dtype == other for leaf in found)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_numpy_input_without_float64_is_cast_in_silence():
    with jax.enable_x64(False):
        model = nde.NeuralODE(nde.fields.MLPField(2, 4, 1, key=jax.random.key(0)))
        ys = model(TS, Y0)
        assert ys.dtype == jnp.float32
        np.testing.assert_array_equal(ys, model(jnp.asarray(TS), jnp.asarray(Y0)))
        for name in ("local", "steer", "kinetic"):
            regularizer = getattr(nde.regularizers, name)
            assert regularizer(model, TS, Y0, key=jax.random.key(0))[1].dtype == jnp.float32


@pytest.mark.parametrize("chosen, expected", [(None, "HIGHEST"), ("high", "HIGH")])
def test_matrix_products_are_exact_unless_the_user_says_otherwise(chosen, expected):
    model = nde.NeuralODE(nde.fields.MLPField(2, 4, 1, key=jax.random.key(0)))

    def total(model):
        return model(jnp.asarray(TS), jnp.asarray(Y0)).sum()

    with jax.default_matmul_precision(chosen):
        text = eqx.filter_jit(eqx.filter_grad(total)).lower(model).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    found = {re.search(r"precision = \[(\w+), ", line)[1] for line in products}
    assert expected in found <= {expected, "HIGHEST"}  # the solver's own stay exact


def test_a_failed_solve_is_a_value_with_throw_false():
    model = nde.NeuralODE(lambda t, y, args: y**2, max_steps=64)
    solution = model.solve(jnp.array([0.0, 0.5, 2.0]), jnp.array([1.0]), throw=False)
    assert solution.result != diffrax.RESULTS.successful
    np.testing.assert_allclose(solution.ys[1], 2.0, rtol=1e-2)  # 1 / (1 - t), before it escapes
    assert np.isinf(solution.ys[2])
