r"""Interpolation of an irregular series by a control path.

    linear           straight between observations; the derivative jumps there
    rectilinear      first time moves, then the values: nothing is known before it is observed
    hermite_cubic    cubic; the slope at an observation is that of the interval before it
    natural_cubic    cubic with two continuous derivatives, from all observations at once
    held             each value until the next one: an input that is switched

Hermite cubic with backward differences: on [t_i, t_{i+1}], with D the slope of the interval, b that
of the interval before (the first one: b = D), h its length and s = t - t_i,

    X(t) = x_i + b s + 2 (D - b) s^2 / h - (D - b) s^3 / h^2.

Missing values (NaN) are filled first: on the line between the observations around them, and by the
nearest one at the ends. With `causal` the last observation is carried forward, and a channel is
zero before its first: standardize the channels, so that zero is their mean. The natural cubic needs
no filling between observations: each channel has its own spline.

Channels are (time, values, counts). Time is needed: without it a model cannot tell a fast series
from a slow one. Counts say how often each channel has been observed so far: whether and when
something is measured may tell as much as its value.

Which:      `hermite_cubic` for a series that is complete when it is used, `rectilinear` for one
            that arrives while it is used.
Reference:  Neural controlled differential equations for online prediction tasks (2021) |
            arXiv:2106.11028
"""

import functools

import jax
import jax.numpy as jnp
import lineax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from nde.paths.control import ControlPath
from nde.paths.series import cleaned, fill

__all__ = ["held", "hermite_cubic", "linear", "natural_cubic", "rectilinear"]


def linear(
    ts: Float[Array, " times"],
    ys: Float[Array, "times channels"],
    length: Int[Array, ""] | None = None,
    *,
    time: bool = True,
    counts: bool = False,
    causal: bool = False,
) -> ControlPath:
    """Straight lines between the observations. Its derivative jumps: steps should end there.

    Args:
        ts: Times, increasing, shape (times,), at least two.
        ys: Values, shape (times, channels); NaN is a missing value.
        length: How many rows are data, shape (); what follows is padding of any content. `None`:
            all of them.
        time: Whether the time is the first channel of the path.
        counts: Whether the numbers of observations so far are the last channels of the path.
        causal: Whether missing values are filled from the past alone.

    Raises:
        ValueError: for times that are not finite or do not increase, fewer than two of them, shapes
            that do not fit, infinite values, a channel without an observation.
        RuntimeError: for the same numbers inside a transformation.

    Example:
        >>> path = nde.paths.linear(ts, ys)                  # (times,), (times, channels)
        >>> paths = jax.vmap(nde.paths.linear)(ts, ys, lengths)
    """
    ts, ys, observed = cleaned(ts, ys, length)
    values = _counted(fill(ts, ys, observed, causal), observed, counts)
    return straight(ts, values, time, causal)


def rectilinear(
    ts: Float[Array, " times"],
    ys: Float[Array, "times channels"],
    length: Int[Array, ""] | None = None,
    *,
    time: bool = True,
    counts: bool = False,
) -> ControlPath:
    """Time first, values second: in the first half of an interval the time channel runs to its end
    while the values are held, in the second half the values change while time stands still.

    The path is causal everywhere, also between observations, and at every observation it has the
    observed time and values. Arguments and errors as in `linear`.
    """
    ts, ys, observed = cleaned(ts, ys, length)
    values = _counted(fill(ts, ys, observed, True), observed, counts)
    return staircase(ts, values, time)


def hermite_cubic(
    ts: Float[Array, " times"],
    ys: Float[Array, "times channels"],
    length: Int[Array, ""] | None = None,
    *,
    time: bool = True,
    counts: bool = False,
    causal: bool = False,
) -> ControlPath:
    """The cubic with backward differences: a continuous derivative, and no more than the next
    observation is needed ahead. The default for data that are complete.

    Arguments and errors as in `linear`.
    """
    ts, ys, observed = cleaned(ts, ys, length)
    xs = _timed(ts, _counted(fill(ts, ys, observed, causal), observed, counts), time)
    slope, spacing = _slopes(ts, xs)
    before = jnp.concatenate([slope[:1], slope[:-1]])
    bend = (slope - before) / spacing
    coefficients = jnp.stack([xs[:-1], before, 2 * bend, -bend / spacing], axis=1)
    return ControlPath(ts, coefficients, ts, smooth=True, causal=causal)


def natural_cubic(
    ts: Float[Array, " times"],
    ys: Float[Array, "times channels"],
    length: Int[Array, ""] | None = None,
    *,
    time: bool = True,
    counts: bool = False,
    causal: bool = False,
) -> ControlPath:
    """The spline with two continuous derivatives, the second one zero at both ends.

    Every value of the path depends on all observations, so it is never causal. In a gap at an end
    of the series the nearest observation is repeated at every time. Arguments and errors as in `linear`.

    Raises:
        ValueError: also for `causal=True`.
    """
    if causal:
        raise ValueError(
            "`causal=True` was given, but a natural cubic looks ahead to the last observation. Use "
            "`rectilinear`, or `hermite_cubic(..., causal=True)`."
        )
    ts, ys, observed = cleaned(ts, ys, length)
    xs = _timed(ts, _counted(fill(ts, ys, observed, False), observed, counts), time)
    # Time and counts are known at all times; so is a channel in a gap at an end, where a spline
    # that is held at every time comes to rest.
    real = jnp.append(True, ts[:-1] < ts[1:])
    since, until = jnp.cumsum(observed, axis=0), jnp.cumsum(observed[::-1], axis=0)[::-1]
    knots = (observed | (since == 0) | (until == 0)) & real[:, None]
    known = jnp.broadcast_to(real[:, None], xs.shape)
    knots = known.at[:, int(time) : int(time) + ys.shape[1]].set(knots)
    spline = jax.vmap(functools.partial(_natural_pieces, ts), in_axes=(1, 1), out_axes=2)
    return ControlPath(ts, spline(xs, knots), ts, smooth=True, causal=False)


def held(ts: Float[ArrayLike, " times"], ys: Float[ArrayLike, "times channels"]) -> ControlPath:
    """Each value from its time to the next: an input that is switched, a heating, an infusion rate.

    The path jumps at its knots. A solve meets the jumps exactly where steps end at them:
    `jumps=` of `nde.measured.experiments`, or
    `stepsize_controller=diffrax.ClipStepSizeController(controller, jump_ts=path.ts)`. Its derivative is
    zero: it is for `evaluate`, not to drive a controlled equation.

    Args:
        ts: Times, increasing, shape (times,), at least two.
        ys: Values, shape (times, channels). The last one is at the last time alone, where the path ends.

    Raises:
        ValueError: as `linear`.
    """
    ts, ys, observed = cleaned(jnp.asarray(ts), jnp.asarray(ys), None)
    values = fill(ts, ys, observed, True)[:-1]
    coefficients = jnp.stack([values, jnp.zeros_like(values)], axis=1)
    return ControlPath(ts, coefficients, ts, smooth=False, causal=True)


def straight(
    ts: Float[Array, " times"], values: Float[Array, "times channels"], time: bool, causal: bool
) -> ControlPath:
    """Straight lines through complete values."""
    return _connect(ts, _timed(ts, values, time), ts, causal)


def staircase(
    ts: Float[Array, " times"], values: Float[Array, "times channels"], time: bool
) -> ControlPath:
    """The rectilinear path through complete values."""
    knots = _interleave(ts, (ts[:-1] + ts[1:]) / 2)
    xs = _timed(_interleave(ts, ts[1:]), _interleave(values, values[:-1]), time)
    return _connect(knots, xs, ts, True)


def _counted(values: Array, observed: Array, counts: bool) -> Array:
    """The values, and how often each has been observed so far."""
    if not counts:
        return values
    return jnp.concatenate([values, jnp.cumsum(observed, axis=0).astype(values.dtype)], axis=1)


def _timed(ts: Array, values: Array, time: bool) -> Array:
    return jnp.concatenate([ts[:, None], values], axis=1) if time else values


def _interleave(a: Array, b: Array) -> Array:
    """a[0], b[0], a[1], b[1], ..., a[-1]."""
    pairs = jnp.stack([a[:-1], b], axis=1).reshape(-1, *a.shape[1:])
    return jnp.concatenate([pairs, a[-1:]])


def _slopes(ts: Array, xs: Array) -> tuple[Array, Array]:
    """Slope of every piece, and its length; in the padding zero, and one."""
    spacing = jnp.diff(ts)[:, None]
    spacing = jnp.where(spacing > 0, spacing, 1)
    return jnp.diff(xs, axis=0) / spacing, spacing


def _connect(ts: Array, xs: Array, times: Array, causal: bool) -> ControlPath:
    slope, _ = _slopes(ts, xs)
    coefficients = jnp.stack([xs[:-1], slope], axis=1)
    return ControlPath(ts, coefficients, times, smooth=False, causal=causal)


def _natural_pieces(
    ts: Float[Array, " times"], xs: Float[Array, " times"], knots: Bool[Array, " times"]
) -> Float[Array, "pieces 4"]:
    """One channel: its spline through the values at its knots, as a polynomial on every piece."""
    # The knots go to the front, in order; the last one is repeated behind them.
    count = jnp.sum(knots)
    order = jnp.argsort(~knots, stable=True)
    order = order[jnp.minimum(jnp.arange(ts.shape[0]), count - 1)]
    slope, spacing = _slopes(ts[order], xs[order][:, None])
    slope, h = slope[:, 0], spacing[:, 0]
    second = _second_derivatives(slope, h, count)
    third = jnp.diff(second) / h
    first = slope - h * (2 * second[:-1] + second[1:]) / 6
    # A piece may begin inside a spline's interval: expand around its beginning.
    at = jnp.clip(jnp.cumsum(knots)[:-1] - 1, 0, count - 2)
    s = ts[:-1] - ts[order][at]
    c0, c1, c2, c3 = xs[order][at], first[at], second[:-1][at] / 2, third[at] / 6
    moved = [
        c0 + s * (c1 + s * (c2 + s * c3)),
        c1 + s * (2 * c2 + s * 3 * c3),
        c2 + s * 3 * c3,
        c3,
    ]
    return jnp.stack(moved, axis=1)


def _second_derivatives(slope: Array, h: Array, count: Array) -> Float[Array, " times"]:
    """Continuity of the first derivative at the inner knots; zero at the ends and behind them."""
    size = h.shape[0] + 1
    inner = (jnp.arange(size) > 0) & (jnp.arange(size) < count - 1)
    ends = jnp.zeros(1, dtype=h.dtype)
    before, after = jnp.concatenate([ends, h]), jnp.concatenate([h, ends])
    jump = jnp.concatenate([ends, 6 * jnp.diff(slope), ends])
    operator = lineax.TridiagonalLinearOperator(
        jnp.where(inner, 2 * (before + after), 1),
        jnp.where(inner[1:], h, 0),
        jnp.where(inner[:-1], h, 0),
    )
    solution = lineax.linear_solve(operator, jnp.where(inner, jump, 0), lineax.Tridiagonal())
    return solution.value
