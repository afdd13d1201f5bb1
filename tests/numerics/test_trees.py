"""Sums, multiples and selections of pytrees."""

import jax.numpy as jnp
import numpy as np

from nde.solvers import trees

X, Y = (jnp.array([1.0, 2.0]), jnp.array(3.0)), (jnp.array([10.0, 20.0]), jnp.array(30.0))


def leaves_equal(tree, *expected):
    for leaf, want in zip(tree, expected, strict=True):
        np.testing.assert_array_equal(leaf, want)


def test_none_counts_as_zero():
    leaves_equal(trees.add(None, X, None, Y), [11.0, 22.0], 33.0)
    leaves_equal(trees.combine((2.0, 3.0, 1.0), (X, None, Y)), [12.0, 24.0], 36.0)
    assert trees.add(None, None) is None
    assert trees.scale(2.0, None) is None and trees.multiply(None, X) is None
    assert trees.combine((), ()) is None


def test_zero_weights_are_left_out():
    ks = [jnp.array(np.nan), jnp.array(2.0), jnp.array(np.inf)]
    assert trees.combine((0.0, 0.5, 0.0), ks) == 1.0
    assert trees.combine((0.0, 0.0, 0.0), ks) == 0.0


def test_a_mask_of_lanes_picks_lane_by_lane():
    new, old = jnp.ones((2, 3), jnp.float32), jnp.zeros((2, 3))
    (picked,) = trees.where(jnp.array([True, False]), (new,), (old,))
    np.testing.assert_array_equal(picked, [[1.0] * 3, [0.0] * 3])
    assert picked.dtype == old.dtype
    leaves_equal(trees.where(jnp.array(False), X, Y), *Y)
