"""A path that grows while it is observed."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Real

from nde._times import check_gap, check_not_dates
from nde.paths.control import ControlPath
from nde.paths.interpolation import linear, rectilinear, staircase, straight
from nde.solvers.inputs import is_traced

__all__ = ["Stream"]


class Stream(eqx.Module):
    """The last observation of a series that is still going on; each further one gives the path
    since then.

    The paths are the pieces of the causal path of the whole series: `rectilinear(ts, ys)`, or
    `linear(ts, ys, causal=True)`. A missing value (NaN) carries the last one forward and is zero
    before there is one.

    Args:
        t: Time of the first observation, shape (). The stream keeps the higher precision of `t` and
            `x`, as the interpolations do.
        x: Its values, shape (channels,); NaN is a missing value.
        interpolation: `nde.paths.rectilinear` or `nde.paths.linear`.
        time, counts: As in the interpolation.

    Raises:
        ValueError: for shapes that do not fit, infinite values, an interpolation that looks ahead, a
            time that is not after the last one, dates, seconds since 1970 in single precision.

    Example:
        >>> stream = nde.paths.Stream(t, x)
        >>> z = model.initial_state(stream.start)
        >>> stream, path = stream.append(t, x)      # the next observation
        >>> z = model.continue_from(z, path)
    """

    t: Float[Array, ""]
    values: Float[Array, " channels"]
    seen: Float[Array, " channels"]
    first: Float[Array, ""]
    appended: Int[Array, ""]
    interpolation: Callable = eqx.field(static=True)
    time: bool = eqx.field(static=True)
    counts: bool = eqx.field(static=True)

    def __init__(
        self,
        t: Real[Array, ""],
        x: Float[Array, " channels"],
        *,
        interpolation: Callable = rectilinear,
        time: bool = True,
        counts: bool = False,
    ):
        if interpolation not in (linear, rectilinear):
            raise ValueError(
                f"`interpolation` is {interpolation!r}, which is not causal piece by piece; use "
                "nde.paths.rectilinear or nde.paths.linear."
            )
        check_not_dates("t", t)
        x = jnp.asarray(x)
        if x.ndim != 1 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"`x` has shape {x.shape} and dtype {x.dtype}; one observation is floating, of "
                "shape (channels,)."
            )
        with jax.numpy_dtype_promotion("standard"):
            x = _finite(x.astype(jnp.result_type(t, x)))
        observed = ~jnp.isnan(x)
        self.t = self.first = jnp.asarray(t, dtype=x.dtype)
        self.appended = jnp.zeros((), jnp.int32)
        self.values = jnp.where(observed, x, 0)
        self.seen = observed.astype(x.dtype)
        self.interpolation, self.time, self.counts = interpolation, time, counts

    @property
    def start(self) -> Float[Array, " channels"]:
        """What the path is at the last observation: (time, values, counts)."""
        row = self._rows()
        return jnp.concatenate([self.t[None], row]) if self.time else row

    def append(
        self, t: Real[Array, ""], x: Float[Array, " channels"]
    ) -> tuple["Stream", ControlPath]:
        """The stream after another observation, and the path from the last one to it."""
        self._check_kept(t)
        t, x = jnp.asarray(t, dtype=self.t.dtype), jnp.asarray(x, dtype=self.t.dtype)
        if x.shape != self.values.shape:
            raise ValueError(
                f"`x` has shape {x.shape} but the stream has shape {self.values.shape}; give every "
                "channel, with NaN where it is missing."
            )
        x = _finite(x)
        later = self._moved(_checked(self.t, t), x, ~jnp.isnan(x))
        ts, rows = jnp.stack([self.t, later.t]), jnp.stack([self._rows(), later._rows()])
        if self.interpolation is rectilinear:
            return later, staircase(ts, rows, self.time)
        return later, straight(ts, rows, self.time, causal=True)

    def _rows(self) -> Float[Array, " channels"]:
        return jnp.concatenate([self.values, self.seen]) if self.counts else self.values

    def _check_kept(self, t: Any) -> None:
        """The typical gap of a series that is not complete is its mean gap so far."""
        check_not_dates("t", t)
        if not is_traced(self.t, t):
            typical = abs(t - np.float64(self.first)) / (int(self.appended) + 1)
            check_gap("t", self.t, t, self.t.dtype, typical)

    def _moved(self, t: Array, x: Array, observed: Bool[Array, " channels"]) -> "Stream":
        return eqx.tree_at(
            lambda stream: (stream.t, stream.values, stream.seen, stream.appended),
            self,
            (
                t,
                jnp.where(observed, x, self.values),
                self.seen + observed.astype(x.dtype),
                self.appended + 1,
            ),
        )


def _finite(x: Array) -> Array:
    """`x`, if nothing in it is infinite."""
    if is_traced(x):
        return eqx.error_if(x, jnp.isinf(x), "`x` must be finite; a missing value is NaN.")
    if jnp.isinf(x).any():
        raise ValueError(f"`x` is {x}; values must be finite, a missing value is NaN.")
    return x


def _checked(last: Array, t: Array) -> Array:
    """`t`, if it is after `last`."""
    if is_traced(last, t):
        return eqx.error_if(t, ~(t > last), "`t` must be after the last observation of the stream.")
    if not t > last:
        raise ValueError(
            f"`t` is {t} but the stream is at {last}; give the observations in the order of time."
        )
    return t
