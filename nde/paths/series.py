"""Series as arrays: what may go in, how gaps are filled, how unequal lengths become one shape.

An entry that is missing is NaN, channel by channel. A series that is shorter than its array has a
`length`: what stands behind it is padding, and is replaced before any arithmetic, since 0 * nan is
nan.
"""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from nde._times import check_kind, check_spacing
from nde.solvers.inputs import is_traced

__all__ = ["PaddedSeries", "fill_gaps", "pad_series"]


class PaddedSeries(NamedTuple):
    """Series of unequal length in arrays of one shape; see `pad_series`.

    Args:
        ts: Times, shape (series, times); the last time of a series repeats.
        ys: Values, shape (series, times, channels); the last row of a series repeats.
        mask: Which entries belong to a series, shape (series, times).
        lengths: How many do, shape (series,).
    """

    ts: Float[Array, "series times"]
    ys: Float[Array, "series times channels"]
    mask: Bool[Array, "series times"]
    lengths: Int[Array, " series"]

    @property
    def observed(self) -> Bool[Array, "series times channels"]:
        """Which values were observed: those of a series that are not NaN."""
        return ~jnp.isnan(self.ys) & self.mask[..., None]


def pad_series(series: Sequence[tuple[ArrayLike, ArrayLike]]) -> PaddedSeries:
    """Pad series of unequal length at their end.

    Args:
        series: One pair (ts, ys) per series: increasing times of shape (times,), at least two, and
            values of shape (times, channels); NaN is a missing value.

    Raises:
        ValueError: for no series, and, with its number, for one that cannot be interpolated, that
            has another number of channels than the first, or whose times are dates, or seconds
            since 1970 where jax has single precision.

    Example:
        >>> padded = nde.paths.pad_series([(ts_a, ys_a), (ts_b, ys_b)])
        >>> ts, ys, mask, lengths = padded
        >>> controls = jax.vmap(nde.paths.hermite_cubic)(ts, ys, lengths)
        >>> observed = padded.observed      # (series, times, channels): the mask of single values
    """
    if len(series) == 0:
        raise ValueError("`series` is empty; give at least one pair (ts, ys).")
    pairs = []
    for number, pair in enumerate(series):
        try:
            ts, ys = (np.asarray(part) for part in pair)
        except (TypeError, ValueError):
            raise ValueError(f"`series[{number}]` is not a pair of arrays (ts, ys).") from None
        try:
            check_shapes(ts, ys)
            _check_numbers(ts, ys)
            check_spacing("ts", ts)
        except ValueError as error:
            raise ValueError(f"`series[{number}]`: {error}") from None
        if pairs and ys.shape[1] != pairs[0][1].shape[1]:
            raise ValueError(
                f"`series[{number}]` has {ys.shape[1]} channels but `series[0]` has "
                f"{pairs[0][1].shape[1]}; give every series the same channels, with NaN in those "
                "that it lacks."
            )
        pairs.append((ts, ys))
    lengths = np.array([len(ts) for ts, _ in pairs])
    rows = np.minimum(np.arange(lengths.max()), lengths[:, None] - 1)
    return PaddedSeries(
        jnp.stack([jnp.asarray(ts[row]) for (ts, _), row in zip(pairs, rows, strict=True)]),
        jnp.stack([jnp.asarray(ys[row]) for (_, ys), row in zip(pairs, rows, strict=True)]),
        jnp.asarray(np.arange(lengths.max()) < lengths[:, None]),
        jnp.asarray(lengths),
    )


def fill_gaps(
    ts: Float[Array, " times"],
    ys: Float[Array, "times channels"],
    length: Int[Array, ""] | None = None,
    *,
    causal: bool = False,
) -> Float[Array, "times channels"]:
    """The values of one series with its gaps filled, as the paths fill them.

    A gap lies on the line between the observations around it, and at an end of the series the nearest
    one is repeated. With `causal` a value depends on nothing after its time: the last observation is
    carried forward, and before the first the value is zero (the mean, if the channels are
    standardized). In the padding the last values repeat.

    Args:
        ts: Times, increasing, shape (times,), at least two, in any unit.
        ys: Values, shape (times, channels); NaN is a missing value.
        length: How many rows are data, shape (); what follows is padding of any content. `None`:
            all of them.
        causal: Whether a gap is filled from the past alone.

    Raises:
        ValueError: for a series that cannot be interpolated, as `linear`.
        RuntimeError: for the same numbers inside a transformation.

    Example:
        >>> ys = jax.vmap(nde.paths.fill_gaps)(ts, ys)      # (series, times, channels), without NaN
    """
    return fill(*cleaned(ts, ys, length), causal)


def cleaned(
    ts: Float[Array, " times"],
    ys: Float[Array, "times channels"],
    length: Int[ArrayLike, ""] | None,
) -> tuple[Array, Array, Array]:
    """Check a series and take the padding out of it.

    Times, values without NaN, and which values were observed; of one precision.
    """
    check_shapes(*(x if eqx.is_array(x) else np.asarray(x) for x in (ts, ys)))
    if length is not None and not jnp.issubdtype(jnp.result_type(length), jnp.integer):
        raise ValueError(f"`length` is {length!r}; it counts the observations: an integer.")
    if not is_traced(ts, ys, length):
        if length is not None and not 2 <= int(length) <= ts.shape[0]:
            raise ValueError(
                f"`length` is {int(length)} of {ts.shape[0]}; a path needs at least 2 observations, "
                "and no more than there are."
            )
        stop = None if length is None else int(length)
        _check_numbers(np.asarray(ts)[:stop], np.asarray(ys)[:stop])
    if not is_traced(ts, length):
        check_spacing("ts", np.asarray(ts)[: None if length is None else int(length)])
    ts, ys = jnp.asarray(ts), jnp.asarray(ys)
    dtype = max(ts.dtype, ys.dtype, key=lambda dtype: jnp.finfo(dtype).bits)
    ts, ys = ts.astype(dtype), ys.astype(dtype)
    real = jnp.ones(ts.shape, dtype=bool)
    if length is not None:
        length = jnp.asarray(length)
        real = jnp.arange(ts.shape[0], dtype=length.dtype) < length
        ts = jnp.where(real, ts, ts[length - 1])
    observed = ~jnp.isnan(ys) & real[:, None]
    ys = jnp.where(observed, ys, 0)
    ts = _check_traced(ts, ys, observed, real, length)
    return ts, ys, observed


def fill(
    ts: Float[Array, " times"],
    ys: Float[Array, "times channels"],
    observed: Bool[Array, "times channels"],
    causal: bool,
) -> Float[Array, "times channels"]:
    """The missing values: on the line between the observations around them, or, if `causal`, the
    last observation; before the first one its value, or, if `causal`, zero."""
    rows = jnp.broadcast_to(jnp.arange(ts.shape[0])[:, None], ys.shape)
    before = jax.lax.cummax(jnp.where(observed, rows, -1), axis=0)
    last = jnp.take_along_axis(ys, jnp.maximum(before, 0), axis=0)
    if causal:
        return jnp.where(before >= 0, last, 0)
    after = jax.lax.cummin(jnp.where(observed, rows, ts.shape[0]), axis=0, reverse=True)
    end = jnp.minimum(after, ts.shape[0] - 1)
    following = jnp.take_along_axis(ys, end, axis=0)
    began = ts[jnp.maximum(before, 0)]
    span = ts[end] - began
    share = (ts[:, None] - began) / jnp.where(span > 0, span, 1)
    between = last + share * (following - last)
    values = jnp.where(after == ts.shape[0], last, between)
    values = jnp.where(before < 0, following, values)
    return jnp.where(observed, ys, values)


def check_shapes(ts: Array | np.ndarray, ys: Array | np.ndarray) -> None:
    """One series: (times,) and (times, channels), floating, at least two times."""
    if ts.ndim != 1 or ys.ndim != 2:
        raise ValueError(
            f"`ts` has shape {ts.shape} and `ys` has shape {ys.shape}; one series is (times,) and "
            "(times, channels): ys[:, None] for one channel, jax.vmap for a batch."
        )
    if ts.shape[0] != ys.shape[0]:
        raise ValueError(
            f"`ts` has {ts.shape[0]} times but `ys` has {ys.shape[0]} rows; give one row per time."
        )
    if ts.shape[0] < 2:
        raise ValueError(
            f"`ts` has length {ts.shape[0]}; a path needs at least 2 observations. Leave the "
            "series out."
        )
    if ys.shape[1] == 0:
        raise ValueError(f"`ys` has shape {ys.shape}: no channels; give at least one.")
    check_kind("ts", ts)
    if not jnp.issubdtype(ys.dtype, jnp.floating):
        raise ValueError(f"`ys` has dtype {ys.dtype}; values are floating: ys.astype(float).")


def _check_numbers(ts: np.ndarray, ys: np.ndarray) -> None:
    """What can be said of numbers, with the place."""
    if not np.isfinite(ts).all():
        at = int(np.flatnonzero(~np.isfinite(ts))[0])
        raise ValueError(
            f"`ts` is {ts[at]} at index {at}; times must be finite. Drop the row (only values may "
            "be missing)."
        )
    if (np.diff(ts) <= 0).any():
        at = int(np.flatnonzero(np.diff(ts) <= 0)[0])
        what = "repeats a time" if ts[at] == ts[at + 1] else "is not in order"
        raise ValueError(
            f"`ts` {what}: ts[{at}]={ts[at]}, ts[{at + 1}]={ts[at + 1]} in {ts.dtype}. Sort the series "
            "and merge what was observed at one time; for padding, pass `length`. Times far from zero "
            "(seconds since 1970) need an offset subtracted, or float64, to stay apart."
        )
    if np.isinf(ys).any():
        at = tuple(map(int, np.argwhere(np.isinf(ys))[0]))
        raise ValueError(f"`ys` is {ys[at]} at index {at}; a missing value is NaN.")
    empty = np.flatnonzero(np.isnan(ys).all(axis=0))
    if empty.size:
        raise ValueError(
            f"`ys` has no observation in channel {int(empty[0])}: nothing to interpolate. Drop the "
            "channel, or fill it with a constant."
        )


def _check_traced(
    ts: Array, ys: Array, observed: Array, real: Array, length: Array | None
) -> Float[Array, " times"]:
    """The same inside a transformation, where a message has no numbers."""
    if not is_traced(ts, ys, length):
        return ts
    if length is not None:
        wrong = (length < 2) | (length > ts.shape[0])
        ts = eqx.error_if(ts, wrong, "`length` must be at least 2 and at most that of `ts`.")
    ts = eqx.error_if(ts, ~jnp.isfinite(ts).all(), "`ts` must be finite.")
    wrong = ((jnp.diff(ts) <= 0) & real[1:]).any()
    ts = eqx.error_if(
        ts,
        wrong,
        "`ts` must increase, without repeated times; for padding, pass `length`. Times far from zero "
        "need an offset subtracted, or float64, to stay apart.",
    )
    ts = eqx.error_if(ts, jnp.isinf(ys).any(), "`ys` must be finite; a missing value is NaN.")
    return eqx.error_if(
        ts, ~observed.any(axis=0).all(), "`ys` has a channel without an observation."
    )
