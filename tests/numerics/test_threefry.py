"""Draws in straight-line code have the bits of `jax.random`, key by key and lane by lane."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nde.solvers.brownian import threefry

KEYS = [jax.random.key(0), jax.random.key(2**31 - 1), jax.random.PRNGKey(7)]
NUMBERS = jnp.array([0, 1, 77, -1, 2**31 - 1], jnp.int32)


def draws(source, dtype, shape):
    """One draw per number, after a second `fold_in`."""

    def one(key, number):
        key = source.fold_in(source.fold_in(key, number), np.uint32(2**32 - 2))
        return source.normal(key, shape, dtype)

    return jax.jit(jax.vmap(one, in_axes=(None, 0)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("key", KEYS, ids=["typed", "large", "raw"])
def test_the_bits_are_those_of_jax_random(key, dtype):
    for shape in ((), (3,), (5, 2)):
        given = draws(threefry, dtype, shape)(key, NUMBERS)
        np.testing.assert_array_equal(given, draws(jax.random, dtype, shape)(key, NUMBERS))
        assert given.dtype == dtype and np.unique(given).size == given.size


def test_there_is_no_loop():
    """What `jax.random` runs as a loop on a CPU; only its absence makes a draw fast."""
    key, number = KEYS[0], jnp.int32(3)
    one = lambda source: lambda key, n: source.normal(source.fold_in(key, n), (4,), jnp.float32)
    text = lambda source: jax.jit(one(source)).lower(key, number).as_text()
    assert "while" not in text(threefry)
    if jax.default_backend() == "cpu":
        assert "while" in text(jax.random)


@pytest.mark.parametrize("kind", ["rbg", "unsafe_rbg"])
def test_other_kinds_of_keys_are_left_to_jax(kind):
    key = jax.random.key(0, impl=kind)
    folded = threefry.fold_in(key, 3)
    assert folded == jax.random.fold_in(key, 3)
    given = threefry.normal(folded, (3,), jnp.float32)
    np.testing.assert_array_equal(given, jax.random.normal(folded, (3,), jnp.float32))


def test_another_way_of_counting_is_left_to_jax():
    with jax.threefry_partitionable(False):
        given = threefry.normal(KEYS[0], (3,), jnp.float32)
        np.testing.assert_array_equal(given, jax.random.normal(KEYS[0], (3,), jnp.float32))
    assert (given != threefry.normal(KEYS[0], (3,), jnp.float32)).any()
