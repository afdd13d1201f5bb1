r"""Normal draws with the bits of `jax.random`, in straight-line code.

The Threefry hash turns a key (k0, k1) and a counter (x0, x1) into two random words: twenty rounds of

    x0 <- x0 + x1,    x1 <- rotate(x1, r) ^ x0,

with a word of the key added after every fourth, k2 being k0 ^ k1 ^ 0x1BD11BDA.

On a CPU `jax.random` runs these rounds as a loop, which compiles fast, and costs many times more than
the rounds when few numbers are drawn at a time, as in each step of a solve. Here they are written out,
and one compiled loop goes from the counter to the normal.

    fold_in(key, n)     the hash of the counter (0, n), as a new key
    normal(key, shape)  sqrt(2) erfinv(u), u uniform in (-1, 1), from the hash of the counters (0, i)

Keys of another kind than Threefry's, and `jax_threefry_partitionable=False`, are left to `jax.random`.

Reference:  Parallel random numbers: as easy as 1, 2, 3 (2011)
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA

Word = UInt[Array, "..."]


def fold_in(key: PRNGKeyArray, number: Int[Any, ""]) -> PRNGKeyArray:
    """`jax.random.fold_in`."""
    if not _is_plain(key):
        return jax.random.fold_in(key, number)
    counter = jnp.asarray(number, jnp.uint32)
    words = jnp.stack(_hash(jax.random.key_data(key), jnp.zeros_like(counter), counter))
    return _like(key, words)


def normal(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> Float[Array, "*shape"]:
    """`jax.random.normal`, for float32 and float64."""
    if not _is_plain(key) or dtype not in (jnp.float32, jnp.float64):
        return jax.random.normal(key, shape, dtype)
    dtype = np.dtype(dtype)
    counter = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    high, low = _hash(jax.random.key_data(key), jnp.zeros_like(counter), counter)
    bits = high ^ low
    if dtype.itemsize == 8:
        bits = high.astype(jnp.uint64) << np.uint64(32) | low.astype(jnp.uint64)
    # A number in [1, 2) has a fixed exponent and random digits.
    info = np.finfo(dtype)
    one = np.ones((), dtype).view(bits.dtype)
    unit = jax.lax.bitcast_convert_type(bits >> (info.bits - info.nmant) | one, dtype) - 1
    least = np.nextafter(dtype.type(-1), dtype.type(0))
    uniform = jnp.maximum(least, unit * (1 - least) + least)
    return dtype.type(math.sqrt(2)) * jax.lax.erf_inv(uniform)


def _is_plain(key: PRNGKeyArray) -> bool:
    # pyright does not see the attributes that jax adds to its configuration.
    if not jax.config.jax_threefry_partitionable:  # pyright: ignore[reportAttributeAccessIssue]
        return False
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key.dtype == jnp.uint32 and key.shape == (2,)
    return str(jax.random.key_impl(key)) == "threefry2x32"


def _like(key: PRNGKeyArray, words: UInt[Array, "2"]) -> PRNGKeyArray:
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return jax.random.wrap_key_data(words, impl="threefry2x32") if typed else words


def _hash(key: UInt[Array, "2"], x0: Word, x1: Word) -> tuple[Word, Word]:
    """The two words that Threefry-2x32-20 makes of each counter."""
    keys = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(_PARITY))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for group in range(5):
        for turn in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = (x1 << np.uint32(turn) | x1 >> np.uint32(32 - turn)) ^ x0
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x0, x1
