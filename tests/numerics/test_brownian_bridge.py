"""The bridge has the right law: checked exactly, on the matrices, without drawing a number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nde.solvers.brownian import bridge

CUTS = [0.005, 0.3, 0.5, 0.9]
ZERO = jnp.uint32(0)
WIDTH = 0.7


def halves_matrix(cut, width=WIDTH, split=bridge.split, weights=bridge.coefficients):
    """P with (W_l, H_l, W_r, H_r) = P (W, H, X1, X2): linear, so unit vectors give columns."""
    w, h, x1, x2 = jnp.eye(4)
    table = weights(jnp.asarray(cut), jnp.asarray(width), 2)
    (w_left, h_left), (w_right, h_right) = split((w, h), table, (x1, x2), ZERO)
    return np.stack([w_left, h_left, w_right, h_right])


def law_error(matrix, cut, width=WIDTH):
    """Largest deviation of P diag(h, h/12, 1, 1) P^T from diag(l, l/12, r, r/12)."""
    left, right = cut * width, (1 - cut) * width
    law = matrix @ np.diag([width, width / 12, 1, 1]) @ matrix.T
    return np.abs(law - np.diag([left, left / 12, right, right / 12])).max()


def chen_error(matrix, cut, width=WIDTH):
    """Largest deviation of the joined halves from the (W, H) that was cut."""
    left, right = cut * width, (1 - cut) * width
    w_left, h_left, w_right, h_right = matrix
    h = (left * (h_left - w_right / 2) + right * (h_right + w_left / 2)) / width
    joined = np.stack([w_left + w_right, h])
    return np.abs(joined - np.eye(4)[:2]).max()


@pytest.mark.parametrize("cut", CUTS)
def test_both_halves_have_the_law_of_brownian_motion_and_join_to_the_whole(cut):
    matrix = halves_matrix(cut)
    assert law_error(matrix, cut) < 1e-12
    assert chen_error(matrix, cut) < 1e-12


@pytest.mark.parametrize("cut", CUTS)
def test_halves_without_area_have_the_law_of_brownian_motion(cut):
    w, x = jnp.eye(2)
    weights = bridge.coefficients(jnp.asarray(cut), jnp.asarray(WIDTH), 1)
    (left,), (right,) = bridge.split((w,), weights, (x,), ZERO)
    matrix = np.stack([left, right])
    law = matrix @ np.diag([WIDTH, 1]) @ matrix.T
    np.testing.assert_allclose(law, np.diag([cut * WIDTH, (1 - cut) * WIDTH]), atol=1e-12)


def wrong_area_variance(matrix, cut):
    return np.abs(matrix @ np.diag([WIDTH, WIDTH / 6, 1, 1]) @ matrix.T).max()


@pytest.mark.parametrize("mistake", ["no area in W", "midpoint rule", "one sign", "variance h/6"])
def test_a_wrong_bridge_is_noticed(mistake):
    cut = 0.3
    matrix = halves_matrix(cut)
    if mistake == "no area in W":
        matrix[0, 1] = matrix[2, 1] = 0.0
    elif mistake == "midpoint rule":
        matrix = halves_matrix(0.5)
    elif mistake == "one sign":
        matrix[3, 3] *= -1
    elif mistake == "variance h/6":
        matrix[:, 1] *= np.sqrt(2)
    assert law_error(matrix, cut) > 1e-3


@pytest.mark.parametrize("cut", CUTS)
def test_joining_agrees_with_the_textbook_formula(cut):
    left, right = cut * WIDTH, (1 - cut) * WIDTH
    w1, h1, w2, h2 = np.random.default_rng(0).normal(size=(4, 5))
    first = bridge.piece((jnp.asarray(w1), jnp.asarray(h1)), jnp.asarray(left), ZERO)
    second = bridge.piece((jnp.asarray(w2), jnp.asarray(h2)), jnp.asarray(right), ZERO)
    w, h = bridge.area(bridge.join(first, second, ZERO), ZERO)
    np.testing.assert_allclose(w, w1 + w2, rtol=1e-14)
    np.testing.assert_allclose(
        h, (left * (h1 - w2 / 2) + right * (h2 + w1 / 2)) / WIDTH, atol=1e-14
    )


def test_a_pinned_product_is_rounded_before_it_is_added():
    a, b, c = jax.random.normal(jax.random.key(0), (3, 4096))
    zero = bridge.opaque_zero(jax.random.key(1))
    pinned = jax.jit(lambda a, b, c, zero: bridge.pinned(a * b, zero) + c)(a, b, c, zero)
    np.testing.assert_array_equal(pinned, np.asarray(a) * np.asarray(b) + np.asarray(c))


def test_the_opaque_zero_is_zero():
    keys = jax.random.split(jax.random.key(2), 1000)
    assert int(jnp.sum(jax.vmap(bridge.opaque_zero)(keys))) == 0
