"""Arithmetic of states that are pytrees of arrays.

None stands for zero: what is not computed costs nothing, and needs no shape.
"""

import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree


def add(*trees: PyTree) -> PyTree:
    """x + y + .. from left to right; None where all are."""
    given = [x for x in trees if x is not None]
    if not given:
        return None
    return jax.tree.map(lambda *leaves: functools.reduce(jnp.add, leaves), *given)


def subtract(x: PyTree, y: PyTree) -> PyTree:
    """x - y."""
    return jax.tree.map(jnp.subtract, x, y)


def scale(weight: float, x: PyTree) -> PyTree:
    """w x."""
    return None if x is None else jax.tree.map(lambda leaf: weight * leaf, x)


def multiply(x: PyTree, y: PyTree) -> PyTree:
    """x y, entry by entry."""
    return None if x is None or y is None else jax.tree.map(jnp.multiply, x, y)


def combine(weights: Iterable[float], trees: Iterable[PyTree]) -> PyTree:
    """w_1 x_1 + w_2 x_2 + .., as long as the shorter of the two.

    What has weight 0 is left out, and 1 costs no multiplication. Zeros if all weights are 0.
    """
    pairs = [(float(w), x) for w, x in zip(weights, trees, strict=False) if x is not None]
    if pairs and all(w == 0.0 for w, _ in pairs):
        return zeros_like(pairs[0][1])
    return add(*(x if w == 1.0 else scale(w, x) for w, x in pairs if w != 0.0))


def stack(trees: Sequence[PyTree]) -> PyTree:
    """One tree, with a new first axis that counts them."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def zeros_like(x: PyTree) -> PyTree:
    """Zeros of the same shapes and dtypes."""
    return jax.tree.map(jnp.zeros_like, x)


def where(mask: Bool[Array, "..."], new: PyTree, old: PyTree) -> PyTree:
    """`new` where the mask holds, else `old`, in the dtype of `old`.

    The axes of the mask are the first ones of every array: a mask of lanes picks lane by lane.
    """

    def pick(a: Array, b: Array) -> Array:
        here = mask.reshape(mask.shape + (1,) * (jnp.ndim(b) - mask.ndim)) if mask.ndim else mask
        return jnp.where(here, a if a.dtype == b.dtype else a.astype(b.dtype), b)

    return jax.tree.map(pick, new, old)
