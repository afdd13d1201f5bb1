r"""What every Brownian path shares: shapes, keys, times, and the increments it hands to diffrax.

Inside, one increment is a flat vector: every leaf of `shape` raveled, one after the other, so that
one query costs one normal draw however many leaves there are. Outside it is diffrax's
`BrownianIncrement` or `SpaceTimeLevyArea`, or our `SpaceSpaceLevyArea`, with the pytree of `shape`
in every field.
"""

import math
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Inexact, PRNGKeyArray, PyTree, Real

from nde.solvers.brownian import threefry
from nde.solvers.inputs import known_number

LevyArea = type[diffrax.AbstractBrownianIncrement]
Shape = tuple[int, ...] | PyTree[jax.ShapeDtypeStruct]


class SpaceSpaceLevyArea(diffrax.AbstractSpaceTimeLevyArea):
    """A Brownian increment with its space-time and space-space Levy areas, for one vector of n
    channels.

    Args:
        dt: Length of the interval, in units of time.
        W: Increment, shape (n,).
        H: Space-time area, shape (n,).
        A: Space-space area `1/2 int (W_i dW_j - W_j dW_i)`, antisymmetric, shape (n, n).
    """

    dt: PyTree[Real[Array, ""]]
    W: Float[Array, " n"]
    H: Float[Array, " n"]
    A: Float[Array, "n n"]


def as_structs(shape: Shape, owner: str, order: str) -> PyTree[jax.ShapeDtypeStruct]:
    """`shape` as a pytree of `jax.ShapeDtypeStruct`; a bare tuple of ints gets the default float
    type.

    Raises:
        ValueError: if a leaf is not a real floating-point `jax.ShapeDtypeStruct`.
    """
    if isinstance(shape, tuple) and all(isinstance(n, int | np.integer) for n in shape):
        return jax.ShapeDtypeStruct(shape, jnp.result_type(float))
    for leaf in jax.tree.leaves(shape):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(
                f"`shape` of {owner}({order}) has the leaf {leaf!r}; pass a tuple of ints, such as (3,), "
                "or a pytree of jax.ShapeDtypeStruct((3,), jnp.float32)."
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"`shape` of {owner} asks for {leaf.dtype}; Brownian motion is real and floating-point. "
                "For complex noise use two real channels."
            )
    return shape


def check_levy_area(levy_area: Any, allowed: tuple[LevyArea, ...], owner: str) -> None:
    """Raises `ValueError` unless `levy_area` is one of the increment types `allowed`."""
    if levy_area not in allowed:
        names = ", ".join(x.__name__ for x in allowed)
        raise ValueError(f"`levy_area` of {owner} is {levy_area!r}; it makes only: {names}.")


def vector_size(structs: PyTree[jax.ShapeDtypeStruct]) -> int:
    """Number of scalars in one increment."""
    return sum(math.prod(s.shape) for s in jax.tree.leaves(structs))


def vector_dtype(structs: PyTree[jax.ShapeDtypeStruct]) -> Any:
    """Type to draw and compute in: float64 if any leaf needs it, else float32, for halves too."""
    wide = any(s.dtype.itemsize == 8 for s in jax.tree.leaves(structs))
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def unravel(vector: Float[Array, " size"], structs: PyTree[jax.ShapeDtypeStruct]) -> PyTree[Array]:
    """Cuts the flat vector into the pytree of shapes and types `structs`."""
    leaves, start = [], 0
    for s in jax.tree.leaves(structs):
        stop = start + math.prod(s.shape)
        leaves.append(vector[start:stop].reshape(s.shape).astype(s.dtype))
        start = stop
    return jax.tree.unflatten(jax.tree.structure(structs), leaves)


def step_length(
    dt: Real[Array, ""], structs: PyTree[jax.ShapeDtypeStruct]
) -> PyTree[Float[Array, ""]]:
    """`dt` once per leaf, in the type of that leaf, as diffrax's paths give it."""
    return jax.tree.map(lambda s: dt.astype(s.dtype), structs)


@jax.custom_jvp
def _no_gradient(t):
    return t


def _refuse(primals, tangents):
    (t,), (tangent,) = primals, tangents
    if not isinstance(tangent, SymbolicZero):
        raise ValueError(
            "A Brownian path has no gradient with respect to the times `t0`, `t1` at which it is queried. "
            "Use jax.lax.stop_gradient on the times of the solve."
        )
    return t, jnp.zeros_like(t)


_no_gradient.defjvp(_refuse, symbolic_zeros=True)


def check_interval(t0: Any, t1: Any, name: str) -> None:
    """A path stands on an interval, where its ends are known."""
    start, stop = known_number(t0), known_number(t1)
    if start is not None and stop is not None and not -math.inf < start < stop < math.inf:
        raise ValueError(
            f"{name} on [`t0`, `t1`] = [{start}, {stop}] is empty or endless; `t0` must be before `t1`. "
            "For a solve backwards in time give the path the same interval in increasing order."
        )


def query_times(t0: Any, t1: Any) -> tuple[Inexact[Array, ""], Inexact[Array, ""]]:
    """Both (scalar) times as arrays of one floating-point type, with gradients refused."""
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(t0, t1)
        dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)
        return _no_gradient(jnp.asarray(t0, dtype)), _no_gradient(jnp.asarray(t1, dtype))


def salted(key: PRNGKeyArray, salt: int) -> PRNGKeyArray:
    """An independent (scalar) key for another purpose of the same cell.

    The integers are taken from the top because the counters of a normal draw with `key` itself
    start at 0.
    """
    return threefry.fold_in(key, np.uint32(0xFFFFFFFF - salt))
