r"""Experiments: what was done, what was measured and of whom, as one batch.

An experiment starts at t0, is given doses, inputs and covariates, and is observed at times of its own,
of its own number, with gaps. In a batch the series are padded to one shape: the last time repeats, and
what was not observed is nan. `Experiments` is a PyTree with the experiments as its first axis, so it is
the `data` of `nde.fit` and `nde.least_squares`, and `jax.vmap` gives one row of it to a model.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from nde._times import check_kind, check_spacing


class Experiments(eqx.Module):
    """Experiments side by side; inside `jax.vmap`, one. Made by `experiments`.

    Args:
        ts: Times of the observations, shape (experiments, times); the last one of a series repeats.
        ys: What was measured, shape (experiments, times, channels); nan is missing.
        t0: Where the solve starts, shape (experiments,).
        args: What the equation of each is given, its `args`: an input; None if nothing.
        covariates: What `start` and `observe` are given of each: a weight, a dose; None if nothing.
        subject: Number of the subject, shape (experiments,).
        doses: Times, shape (experiments, doses), and amounts, shape (experiments, doses, ...) for every
            leaf of the state; None without.
        jumps: Times at which the equation jumps, shape (experiments, jumps); None without.
    """

    ts: Float[Array, "*experiments times"]
    ys: Float[Array, "*experiments times channels"]
    t0: Float[Array, "*experiments"]
    args: PyTree[Any]
    covariates: PyTree[Any]
    subject: Int[Array, "*experiments"]
    doses: tuple[Array, PyTree[Array]] | None
    jumps: Float[Array, "*experiments jumps"] | None

    def __getitem__(self, which: Any) -> "Experiments":
        """One of them, or some: `data[0]`, `data[1:]`."""
        return jax.tree.map(lambda x: x[which], self)

    def at(self, ts: Float[ArrayLike, " times"]) -> "Experiments":
        """The same experiments at other times, for a forecast: nothing is observed there."""
        ts = jnp.asarray(ts, self.ts.dtype)
        ts = jnp.broadcast_to(ts, (*self.t0.shape, *ts.shape))
        ys = jnp.full((*ts.shape, self.ys.shape[-1]), jnp.nan, self.ys.dtype)
        return dataclasses.replace(self, ts=ts, ys=ys)


def experiments(
    series: Sequence[tuple[ArrayLike, ArrayLike]],
    *,
    t0: float | Sequence[float] | None = None,
    args: Sequence[PyTree[Any]] | None = None,
    covariates: Sequence[PyTree[Any]] | None = None,
    subject: Sequence[int] | None = None,
    doses: Sequence[tuple[ArrayLike, PyTree[ArrayLike]]] | None = None,
    jumps: Sequence[ArrayLike] | None = None,
) -> Experiments:
    """Experiments of unequal length as one batch.

    Args:
        series: A pair (ts, ys) of each: times in order, shape (times,), and measured values, shape
            (times, channels) or (times,); nan is missing.
        t0: Where the solve starts, one number or one of each; None: at the first time.
        args: What the equation of each is given: PyTrees of arrays of one shape, such as a path from
            `nde.paths`.
        covariates: What `start` and `observe` are given of each: PyTrees of arrays of one shape.
        subject: Number of the subject of each; None: every experiment is of its own.
        doses: A pair (times, amounts) of each: amounts of shape (doses, ...) are added to the state.
        jumps: Times at which the equation of each jumps, such as the knots of `nde.paths.held`.

    Raises:
        ValueError: for series, doses or inputs that do not fit, and for a series without observation.

    Example:
        >>> data = nde.measured.experiments([(ts_a, ys_a), (ts_b, ys_b)], t0=0.0)
        >>> means = jax.vmap(model)(data)               # of an nde.Measured: (experiments, times, channels)
    """
    pairs = [_checked_pair(number, pair) for number, pair in enumerate(series)]
    if not pairs:
        raise ValueError("`series` is empty; give at least one pair (ts, ys).")
    channels = {ys.shape[1] for _, ys in pairs}
    if len(channels) > 1:
        raise ValueError(
            f"`series` have {sorted(channels)} channels; give all the same, with nan in what one lacks."
        )
    count = len(pairs)
    first = [ts[0] for ts, _ in pairs] if t0 is None else np.broadcast_to(np.asarray(t0), count)
    ends = [ts[-1] for ts, _ in pairs]
    for number, ((ts, _), start) in enumerate(zip(pairs, first, strict=True)):
        if not ts[0] >= start:
            raise ValueError(
                f"`series[{number}]` has an observation at {ts[0]}, before the solve starts at `t0` = "
                f"{start}."
            )
    of_each = {"args": args, "covariates": covariates, "subject": subject}
    for name, given in (of_each | {"doses": doses, "jumps": jumps}).items():
        if given is not None and len(given) != count:
            raise ValueError(f"`{name}` has {len(given)} entries for {count} series; one of each.")
    _check_inputs(args, ends)
    length = max(len(ts) for ts, _ in pairs)
    rows = [np.minimum(np.arange(length), len(ts) - 1) for ts, _ in pairs]
    padded = [
        np.where(np.arange(length)[:, None] < len(ts), ys[row], np.nan)
        for (ts, ys), row in zip(pairs, rows, strict=True)
    ]
    return Experiments(
        ts=jnp.asarray(np.stack([ts[row] for (ts, _), row in zip(pairs, rows, strict=True)])),
        ys=jnp.asarray(np.stack(padded)),
        t0=jnp.asarray(np.asarray(first, dtype=float)),
        args=None if args is None else _stacked("args", args),
        covariates=None if covariates is None else _stacked("covariates", covariates),
        subject=jnp.asarray(np.arange(count) if subject is None else _whole(subject)),
        doses=None if doses is None else _padded_doses(doses, list(first), ends),
        jumps=None if jumps is None else _padded_jumps(jumps, ends),
    )


def by_subject(
    table: Any, subject: str, time: str, values: Sequence[str]
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[Any]]:
    """The series of a long table, one row per observation: a pandas data frame, or a dict of columns.

    Args:
        table: `table[name]` is a column.
        subject: Name of the column that says whose row it is.
        time: Name of the times.
        values: Names of the measured values.

    Returns:
        A pair (ts, ys) per subject, for `experiments`, in the order in which they first appear; and the
        subjects.

    Raises:
        ValueError: for a column that is missing.
    """
    try:
        whose, ts, *ys = (np.asarray(table[name]) for name in (subject, time, *values))
    except KeyError as error:
        raise ValueError(f"`table` has no column {error}; it has {list(table)}.") from error
    names = list(dict.fromkeys(whose.tolist()))
    series = []
    for name in names:
        rows = np.flatnonzero(whose == name)
        rows = rows[np.argsort(ts[rows], kind="stable")]
        series.append((ts[rows], np.stack([y[rows] for y in ys], axis=1).astype(float)))
    return series, names


def _checked_pair(number: int, pair: Any) -> tuple[np.ndarray, np.ndarray]:
    try:
        ts, ys = (np.asarray(part) for part in pair)
    except (TypeError, ValueError):
        raise ValueError(f"`series[{number}]` is not a pair of arrays (ts, ys).") from None
    name = f"series[{number}]"
    ys = ys[:, None] if ys.ndim == 1 else ys
    if ts.ndim != 1 or not ts.size or ys.ndim != 2 or len(ys) != len(ts):
        raise ValueError(
            f"`{name}` has times of shape {ts.shape} and values of shape {ys.shape}; they are (times,) "
            "and (times, channels)."
        )
    ts = ts.astype(float) if ts.dtype.kind in "iu" else ts
    check_kind(name, ts)
    check_spacing(name, ts)
    ys = ys.astype(float)
    if not np.isfinite(ts).all() or (np.diff(ts) < 0).any():
        raise ValueError(f"`{name}` has times that are not finite or not in order.")
    if np.isinf(ys).any():
        raise ValueError(f"`{name}` has infinite values; what was not observed is nan.")
    if np.isnan(ys).all():
        raise ValueError(f"`{name}` has no observation; leave it out.")
    return ts, ys


def _check_inputs(args: Sequence[PyTree] | None, ends: Sequence[float]) -> None:
    """Paths among the inputs reach as far as the solve."""
    for number, tree in enumerate(args or ()):
        is_path = lambda x: hasattr(x, "evaluate") and hasattr(x, "t1")
        for path in filter(is_path, jax.tree.leaves(tree, is_leaf=is_path)):
            if not float(path.t1) >= ends[number]:
                raise ValueError(
                    f"`args[{number}]` has an input that ends at {float(path.t1):.6g}, before the last "
                    f"observation at {ends[number]:.6g}; give it up to there."
                )


def _stacked(name: str, trees: Sequence[PyTree]) -> PyTree[Array]:
    trees = [jax.tree.map(jnp.asarray, tree) for tree in trees]
    shapes = [
        [(jtu.keystr(p), x.shape) for p, x in jtu.tree_leaves_with_path(tree)] for tree in trees
    ]
    for number, found in enumerate(shapes):
        if found != shapes[0]:
            raise ValueError(
                f"`{name}[{number}]` has arrays {found} but `{name}[0]` has {shapes[0]}; all are alike."
            )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _whole(subject: Sequence[int]) -> np.ndarray:
    numbers = np.asarray(subject)
    if numbers.dtype.kind not in "iu" or (numbers < 0).any():
        raise ValueError(
            f"`subject` is {list(subject)}; subjects are numbered from 0: the index of each name in a "
            "list of them."
        )
    return numbers


def _padded_doses(
    doses: Sequence[tuple], first: Sequence[float], ends: Sequence[float]
) -> tuple[Array, PyTree[Array]]:
    length = max(len(np.asarray(times)) for times, _ in doses)
    times_of, amounts_of = [], []
    for number, (times, amounts) in enumerate(doses):
        times = np.asarray(times, dtype=float)
        low, high = first[number], ends[number]
        if times.ndim != 1 or (np.diff(times) < 0).any():
            raise ValueError(f"`doses[{number}]` has times {times}; they are in order.")
        if times.size and not (low <= times[0] and times[-1] <= high):
            raise ValueError(
                f"`doses[{number}]` has times from {times[0]} to {times[-1]}, outside the solve from "
                f"{low} to {high}, the last observation."
            )
        amounts = np.asarray(amounts, dtype=float) if isinstance(amounts, list) else amounts
        more = length - len(times)
        times_of.append(np.concatenate([times, np.full(more, high)]))

        def filled(leaf, number=number, count=len(times), more=more):
            leaf = np.asarray(leaf, dtype=float)
            if leaf.shape[:1] != (count,):
                raise ValueError(
                    f"`doses[{number}]` has amounts of shape {leaf.shape} at {count} times; they are "
                    "(doses, ...) like the state."
                )
            return np.concatenate([leaf, np.zeros((more, *leaf.shape[1:]))])

        amounts_of.append(jax.tree.map(filled, amounts))
    return jnp.asarray(np.stack(times_of)), _stacked("doses", amounts_of)


def _padded_jumps(jumps: Sequence[ArrayLike], ends: Sequence[float]) -> Float[Array, "n jumps"]:
    rows = [np.sort(np.asarray(times, dtype=float)) for times in jumps]
    length = max(len(row) for row in rows)
    # Behind the end they do nothing.
    fill = [np.full(length - len(row), end + 1.0) for row, end in zip(rows, ends, strict=True)]
    return jnp.asarray(np.stack([np.concatenate(pair) for pair in zip(rows, fill, strict=True)]))
