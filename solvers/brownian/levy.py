r"""Space-space Levy area, drawn from the increment and its space-time area.

    A_ij = 1/2 int_s^t (W_i dW_j - W_j dW_i) = H_i W_j - W_i H_j + b_ij,      Var A_ij = h^2/4

with W measured from the start of the interval, of length h. The bridge part b is antisymmetric, has
mean zero given (W, H), and its law is known only through a series, so a normal with the right
variance stands in:

    Foster   E[b_ij^2 | W, H] = h^2/20 + h/5 (H_i^2 + H_j^2)       exact conditional variance
    Davie    E[b_ij^2]        = h^2/12                             exact unconditional variance

Kolmogorov distance of A to its law: Foster .003, Davie .015, no b at all .063. Joining two
intervals, Chen:

    A = A_1 + A_2 + 1/2 (W_1 (x) W_2 - W_2 (x) W_1)

Cost:       n (n - 1)/2 normals for n channels.
Not for:    pathwise use at two resolutions: b is drawn afresh for every interval. Draw it on one
            grid and join, as `BrownianGrid(..., levy_area=SpaceSpaceLevyArea)` does.
Reference:  Numerical approximations for stochastic differential equations (2020, Foster, thesis)
            Pathwise approximation of stochastic differential equations using coupling (2014, Davie)
"""

import diffrax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt

from nde.solvers.brownian import bridge, threefry


def foster_area(
    increment: diffrax.AbstractSpaceTimeLevyArea, *, key: PRNGKeyArray
) -> Float[Array, "n n"]:
    """Space-space Levy area given W and H, shape (n,) each, with the exact conditional variance.

    Args:
        increment: One interval's `dt` (time), `W` and `H`; one vector of n channels.
        key: One key, used for nothing else.

    Raises:
        ValueError: if `W` is not one vector.
    """
    h, (rows, cols) = jnp.abs(_vector(increment, increment.dt)), _pairs(increment)
    squares = jnp.square(_vector(increment, increment.H))
    return _area(increment, jnp.sqrt(h * h / 20 + h / 5 * (squares[rows] + squares[cols])), key)


def davie_area(
    increment: diffrax.AbstractSpaceTimeLevyArea, *, key: PRNGKeyArray
) -> Float[Array, "n n"]:
    """Space-space Levy area given W and H, shape (n,) each, with the exact unconditional variance.

    Args:
        increment: One interval's `dt` (time), `W` and `H`; one vector of n channels.
        key: One key, used for nothing else.

    Raises:
        ValueError: if `W` is not one vector.
    """
    h, (rows, _) = jnp.abs(_vector(increment, increment.dt)), _pairs(increment)
    return _area(increment, jnp.broadcast_to(h / np.sqrt(12.0).item(), rows.shape), key)


def join_areas(
    first: Float[Array, "n n"],
    second: Float[Array, "n n"],
    w_first: Float[Array, " n"],
    w_second: Float[Array, " n"],
    zero: UInt[Array, ""],
) -> Float[Array, "n n"]:
    """Area of an interval from the areas and increments of its two parts, in order (Chen).

    `zero` is the `bridge.opaque_zero` of the path's key.
    """
    outer = bridge.pinned(jnp.outer(w_first, w_second), zero)
    return first + second + (outer - outer.T) / 2


def _vector(increment, x):
    if jnp.ndim(increment.W) != 1:
        raise ValueError(
            f"`increment.W` has shape {jnp.shape(increment.W)}; Levy area is defined between the channels "
            "of one vector, shape (n,)."
        )
    return jnp.asarray(x, increment.W.dtype)


def _pairs(increment):
    """The pairs of channels i < j: one area each."""
    return np.triu_indices(increment.W.size, 1)


def _area(increment, scale, key):
    (rows, cols), w, h = _pairs(increment), increment.W, increment.H
    zero = bridge.opaque_zero(key)
    draws = threefry.normal(key, (rows.size,), w.dtype)
    mean = bridge.pinned(h[rows] * w[cols], zero) - bridge.pinned(w[rows] * h[cols], zero)
    upper = mean + bridge.pinned(scale * draws, zero)
    # Written twice, not computed twice: two roundings of one area would not cancel in A + A^T.
    return jnp.zeros((w.size, w.size), w.dtype).at[rows, cols].set(upper).at[cols, rows].set(-upper)
