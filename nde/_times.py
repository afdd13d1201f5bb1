r"""Times enter here: what a user has, against what jax holds. Every series, path and model asks it.

A time t is held as t + d with |d| <= u |t|. In single precision u = 2^-24, and jax has nothing else
unless 64 bits are allowed: seconds since 1970 (t = 1.7e9) move by up to 64 s. Rounding is monotone:
it may make one time of two, but never exchanges them.

What d does: an observation at t is taken for one at t + d. Where the observed quantity x varies at
a rate x', that is an error x' d of its value, however close its neighbors are. It is small if d is
small against the time in which x varies, and of that time the spacing at which somebody chose to
observe x is all that is known: its median g, which neither a few close pairs nor a long break moves.
So with d_k at the times t_k,

    refused:   two times that become one,   or   max_k |d_(k+1) - d_k| > g / 100.

The gap between t_k and t_(k+1) does not do in place of g. Of n times drawn from [0, T] the closest
two are about T / n^2 apart: among a few thousand series there is always a pair whose distance is
rounded by percents, and nothing notices, since the increment of x between them stays what it is.
For times near zero u T < T / (100 n) as long as n < 160,000, and nothing ordinary is refused.

In code:    g -> typical
Not for:    times that jax holds already: what they were before is not known.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_CURE = (
    "Subtract an offset, such as the first time, or use float64: "
    'jax.config.update("jax_enable_x64", True).'
)


def check_kind(name: str, times: Array | np.ndarray) -> None:
    """Times are floating numbers; for others, how they become some.

    Raises:
        ValueError: for dates, integers and whatever else is not floating.
    """
    check_not_dates(name, times)
    if not jnp.issubdtype(times.dtype, jnp.floating):
        raise ValueError(
            f"`{name}` has dtype {times.dtype}; times are floating: {name}.astype(float)."
        )


def check_not_dates(name: str, times: Any) -> None:
    """A date has neither a unit nor an origin that a derivative by time could refer to."""
    if isinstance(times, jax.Array):
        return
    kind = np.asarray(times)
    since = (
        f"({name} - origin) / np.timedelta64(1, 'D') in days since an `origin`, such as the first"
    )
    if kind.dtype.kind == "M":
        raise ValueError(f"`{name}` has dtype {kind.dtype}; times are numbers: {since}.")
    if kind.dtype.kind == "m":
        raise ValueError(
            f"`{name}` has dtype {kind.dtype}; times are numbers: {name} / np.timedelta64(1, 'D') in "
            "days."
        )
    if kind.dtype.kind == "O":
        held = type(kind.flat[0]).__name__ if kind.size else "nothing"
        raise ValueError(
            f"`{name}` holds Python objects ({held}); times are numbers. For dates, "
            f"np.asarray({name}, 'datetime64[us]'), and then {since}."
        )


def check_spacing(name: str, times: Float[np.ndarray, "... times"] | Array) -> None:
    """The times of a series, or of a series per row, survive the precision that jax gives them.

    Raises:
        ValueError: if it would merge two, or move them by more than a hundredth of the typical gap.
    """
    kept = jax.dtypes.canonicalize_dtype(times.dtype)
    if kept == times.dtype:  # as it is of everything that jax holds already
        return
    times = np.asarray(times)
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is told elsewhere
        gaps = np.diff(times)
        rounded = np.diff(times.astype(kept).astype(times.dtype))
    if gaps.shape[-1] == 0:
        return
    # The upper median of those that are not zero: padding repeats a time.
    sizes = np.sort(np.abs(gaps), axis=-1)
    repeats = (sizes == 0).sum(axis=-1, keepdims=True)
    middle = np.minimum((repeats + sizes.shape[-1]) // 2, sizes.shape[-1] - 1)
    typical = np.take_along_axis(sizes, middle, axis=-1)
    wrong = ((rounded == 0) & (gaps != 0)) | (np.abs(rounded - gaps) > 0.01 * typical)
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        _refuse(name, times[at], gaps[at], rounded[at], kept)


def check_gap(
    name: str, last: Float[Array, ""], t: Any, kept: np.dtype, typical: Float[Array, ""]
) -> None:
    """The same of one time `t` that follows `last`, held in the precision `kept`.

    Raises:
        ValueError: as `check_spacing`.
    """
    given, held = np.float64(t), np.float64(np.asarray(t, kept))
    gap, rounded = given - np.float64(last), held - np.float64(last)
    if (rounded == 0 and gap != 0) or abs(held - given) > 0.01 * np.float64(typical):
        _refuse(name, given, gap, rounded, kept)


def _refuse(name: str, time: Any, gap: Any, rounded: Any, kept: np.dtype) -> None:
    become = f"{rounded} apart" if rounded else "one and the same"
    raise ValueError(
        f"`{name}` has neighbors {gap} apart that {kept} would hold as {become}: they are near "
        f"{time}, and {kept} has {np.finfo(kept).precision + 1} digits. {_CURE}"
    )
