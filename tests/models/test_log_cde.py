"""`LogNeuralCDE` beside matrix exponentials, its stated order, and the plain CDE."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from nde import paths
from nde.cde import NeuralCDE
from nde.fields import MatrixField
from nde.log_cde import LogNeuralCDE

RANDOM = np.random.default_rng(3)
TIMES = np.linspace(0.0, 1.0, 65)
WALK = np.cumsum(RANDOM.normal(size=(65, 3)), axis=0)
MATRICES = RANDOM.normal(size=(3, 4, 4))
Z0 = RANDOM.normal(size=4)
TIGHT = {
    "steps_per_interval": None,
    "solver": diffrax.Tsit5(),
    "stepsize_controller": diffrax.PIDController(rtol=1e-11, atol=1e-11),
}


def linear_field(t, z, args):
    return jnp.einsum("cij,j->ic", jnp.asarray(MATRICES), z)


def start(x):
    return jnp.asarray(Z0)


@eqx.filter_jit
def log_signature(ys, window, depth, ts=TIMES):
    return paths.log_signature(paths.linear(jnp.asarray(ts), ys, time=False), window, depth)


@eqx.filter_jit
def run(model, path):
    return model(path)


def exact(ys):
    z = Z0
    for step in np.diff(ys, axis=0):
        z = scipy.linalg.expm(np.einsum("c,cij->ij", step, MATRICES)) @ z
    return z


def neural(columns, **options):
    keys = jax.random.split(jax.random.key(0), 3)
    field = MatrixField(4, columns, 8, 2, activation=jax.nn.silu, key=keys[0])
    first, readout = eqx.nn.Linear(3, 4, key=keys[1]), eqx.nn.Linear(4, 2, key=keys[2])
    return field, first, readout, options


def test_brackets_are_minus_the_commutators_of_a_linear_field():
    """One window: z1 = expm(sum_i A_i x_i + sum_{i<j} (A_j A_i - A_i A_j) area_ij) z0."""
    ys = 0.1 * WALK
    found = run(LogNeuralCDE(linear_field, start, **TIGHT), log_signature(jnp.asarray(ys), 64, 2))
    steps, since = np.diff(ys, axis=0), ys[:-1] - ys[0]
    area = 0.5 * (since.T @ steps - steps.T @ since)
    generator = np.einsum("c,cij->ij", ys[-1] - ys[0], MATRICES)
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        commutator = MATRICES[i] @ MATRICES[j] - MATRICES[j] @ MATRICES[i]
        generator = generator - commutator * area[i, j]
    np.testing.assert_allclose(found, scipy.linalg.expm(generator) @ Z0, rtol=1e-8, atol=1e-8)


def test_the_error_of_a_window_has_the_stated_order_and_the_wrong_sign_is_worse():
    sizes = 2.0 ** -np.arange(7, 11)
    errors = {1: [], 2: [], "wrong sign": []}
    model = LogNeuralCDE(linear_field, start, **TIGHT)
    for size in sizes:
        ys = size * WALK
        for depth in (1, 2):
            control = log_signature(jnp.asarray(ys), 64, depth)
            errors[depth].append(np.abs(run(model, control) - exact(ys)).max())
        flip = jnp.where(jnp.arange(6) < 3, 1.0, -1.0)[None, None]
        flipped = eqx.tree_at(
            lambda p: p.control.coefficients, control, control.control.coefficients * flip
        )
        errors["wrong sign"].append(np.abs(run(model, flipped) - exact(ys)).max())
    for depth in (1, 2):
        order = np.polyfit(np.log(sizes), np.log(errors[depth]), 1)[0]
        assert abs(order - (depth + 1)) < 0.15
    assert np.all(np.array(errors["wrong sign"]) > np.array(errors[1]))


@pytest.mark.slow
def test_shorter_windows_approach_the_plain_equation_of_a_nonlinear_field():
    """The order of the whole solve is the depth: here for windows of a smooth path."""
    fine = np.linspace(0.0, 1.0, 65)
    ys = jnp.asarray(np.stack([np.sin(3 * fine), np.cos(4 * fine), fine**2], axis=1))
    field, first, readout, _ = neural(3)
    plain = jax.jit(lambda ys: paths.linear(jnp.asarray(fine), ys, time=False))(ys)
    # Steps of a method of order 5 at the same knots: what is left is the error of the windows.
    expected = run(NeuralCDE(field, first, readout, solver=diffrax.Tsit5()), plain)
    model = LogNeuralCDE(field, first, readout, steps_per_interval=8)
    windows, errors = [16, 4], {}
    for depth in (1, 2):
        controls = [log_signature(ys, window, depth, fine) for window in windows]
        errors[depth] = [np.abs(run(model, control) - expected).max() for control in controls]
        assert np.polyfit(np.log(windows), np.log(errors[depth]), 1)[0] > 1.7
    assert np.all(np.array(errors[2]) < np.array(errors[1]) / 5), errors


def test_depth_one_of_one_piece_is_the_neural_cde_on_straight_pieces():
    field, first, readout, options = neural(3, steps_per_interval=2, solver=diffrax.Heun())
    ys = jnp.asarray(WALK / 4)
    plain = jax.jit(lambda ys: paths.linear(jnp.asarray(TIMES), ys, time=False))(ys)
    expected = eqx.filter_jit(NeuralCDE(field, first, readout, **options).trajectory)(plain)
    for brackets in (True, False):
        model = LogNeuralCDE(field, first, readout, brackets=brackets, **options)
        found = eqx.filter_jit(model.trajectory)(log_signature(ys, 1, 1))
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_field_with_columns_for_the_brackets_is_the_same_equation():
    """The rough form, given the brackets of a linear field as columns of its own, depth 3 left
    without a column that acts."""

    def columns(t, z, args):
        plain = linear_field(t, z, args)
        pairs = [(0, 1), (0, 2), (1, 2)]
        turns = [MATRICES[j] @ MATRICES[i] - MATRICES[i] @ MATRICES[j] for i, j in pairs]
        brackets = jnp.stack([jnp.asarray(turn) @ z for turn in turns], axis=1)
        return jnp.concatenate([plain, brackets, jnp.zeros((4, 8))], axis=1)

    ys = jnp.asarray(0.05 * WALK)
    rough = LogNeuralCDE(columns, start, brackets=False)
    expected = run(LogNeuralCDE(linear_field, start), log_signature(ys, 16, 2))
    np.testing.assert_allclose(run(rough, log_signature(ys, 16, 3)), expected, atol=1e-12)


def test_gradients_with_brackets_are_those_of_autodiff():
    field, first, readout, _ = neural(3)
    walks = jnp.asarray(np.stack([WALK, -WALK[::-1]]) / 4)
    control = jax.vmap(lambda ys: log_signature(ys, 16, 2))(walks)

    def total(model):
        return jnp.sum(jax.vmap(model)(control) ** 2)

    model = LogNeuralCDE(field, first, readout, solver=diffrax.Heun())
    peer = eqx.tree_at(lambda m: m.adjoint, model, diffrax.DirectAdjoint())
    found, exact = (eqx.filter_jit(eqx.filter_grad(total))(each) for each in (model, peer))
    leaves = [jax.tree.leaves(eqx.filter(g, eqx.is_array)) for g in (found, exact)]
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
        assert np.any(np.asarray(a) != 0)


def test_a_short_last_window_and_padding_change_nothing():
    field, first, readout, _ = neural(3)
    model = LogNeuralCDE(field, first, readout)
    alone = log_signature(jnp.asarray(WALK[:40] / 4), 16, 2, TIMES[:40])

    @jax.jit
    def padded(ts, ys):
        path = paths.linear(ts, ys, jnp.asarray(40), time=False)
        return paths.log_signature(path, 16, 2)

    ts, ys = np.where(np.arange(65) < 40, TIMES, np.nan), WALK / 4
    found = run(model, padded(jnp.asarray(ts), jnp.asarray(ys)))
    np.testing.assert_allclose(found, run(model, alone), atol=1e-12)


def test_calls_that_cannot_work():
    field, first, readout, _ = neural(3)
    model, ys = LogNeuralCDE(field, first, readout), jnp.asarray(WALK)
    with pytest.raises(ValueError, match="brackets are computed up to depth 2"):
        model(log_signature(ys, 16, 3))
    with pytest.raises(ValueError, match="make log-signatures of the path first"):
        model(paths.linear(jnp.asarray(TIMES), ys, time=False))
    with pytest.raises(ValueError, match=r"returned shape \(4, 3\).* 6 channels"):
        LogNeuralCDE(field, first, readout, brackets=False)(log_signature(ys, 16, 2))
    with pytest.raises(ValueError, match="`steps_per_interval` is 1.5"):
        LogNeuralCDE(field, first, steps_per_interval=1.5)
    with pytest.raises(ValueError, match="looks ahead"):
        LogNeuralCDE(field, first, causal=True)(log_signature(ys, 16, 2))
