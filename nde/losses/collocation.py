r"""Collocation: the field against slopes of smoothed data, without a solve.

    loss = mean |f(t_j, x_j) - x'_j|^2

with x and x' of a smoother, such as `nde.symbolic.slopes` (local polynomials). It is cheap, has hardly a
local minimum, and inherits the error of the smoother: the start for a training through the solve, which
ends where the data say.
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from nde.losses.squared_error import broadcast_mask, mse


def collocation(
    model: Any, batch: Any, key: PRNGKeyArray, *, error: Callable = mse
) -> Float[Array, ""]:
    """The loss of a field on states and their slopes.

    Args:
        model: An ODE model: `model.vector_field(t, y, None)`.
        batch: An `nde.train.Batch` whose data are `(ts, ys, slopes)`, of shapes (points,) and
            (points, ...): `states, rates = nde.symbolic.slopes(ts, ys)` are those of one or several
            series, with the times `jnp.tile(ts, series)`.
        key: Not used.
        error: As of `trajectory`.

    Raises:
        ValueError: for other data.
    """
    try:
        ts, ys, slopes = batch.data
    except (TypeError, ValueError):
        raise ValueError("`batch.data` is (ts, ys, slopes) for `collocation`.") from None
    if ts.ndim != 1 or ys.shape != slopes.shape or ys.shape[:1] != ts.shape:
        raise ValueError(
            f"`batch.data` has shapes {ts.shape}, {ys.shape} and {slopes.shape}; they are (points,), "
            "(points, ...) and (points, ...)."
        )
    rates = jax.vmap(lambda t, y: model.vector_field(t, y, None))(ts, ys)
    return error(rates, slopes, broadcast_mask(batch.mask, slopes))
