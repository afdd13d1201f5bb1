"""Losses, and what a loss over trajectories needs: masks that are safe to differentiate, and a
growing horizon.

A mask says which entries count. A masked entry is replaced *before* the arithmetic: 0 * nan is nan,
and so is its gradient. A mask without a true entry gives nan, which `nde.fit` reports: nothing to
learn from must not look like a loss of zero.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, PRNGKeyArray

from nde._inputs import check_callable

__all__ = ["growing_horizon", "log_mse", "mse", "trajectory"]


def mse(
    prediction: Float[Array, "*shape"],
    target: Float[Array, "*shape"],
    mask: Bool[Array, "..."] | None = None,
) -> Float[Array, ""]:
    """Mean squared error.

    Args:
        prediction: Any shape.
        target: The same shape.
        mask: The entries that count: the leading axes of `prediction`, such as (examples, times).

    Raises:
        ValueError: if the shapes do not fit, or the mask is not boolean.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"`prediction` has shape {prediction.shape} but `target` has shape {target.shape}; "
            "give one target for every prediction."
        )
    if mask is None:
        return jnp.mean((prediction - target) ** 2)
    mask = _entries(mask, target)
    error = jnp.where(mask, prediction, 0.0) - jnp.where(mask, target, 0.0)
    return jnp.mean(error**2, where=mask)


def log_mse(
    prediction: Float[Array, "*shape"],
    target: Float[Array, "*shape"],
    mask: Bool[Array, "..."] | None = None,
) -> Float[Array, ""]:
    """Mean squared error of the logarithms: log-normal errors, for positive quantities over several
    orders of magnitude.

    Its square root is close to the typical relative error. Arguments and errors as in `mse`; a
    prediction that is not positive gives nan.
    """
    if mask is not None:
        prediction, target = (
            jnp.where(_entries(mask, values), values, 1.0) for values in (prediction, target)
        )
    return mse(jnp.log(prediction), jnp.log(target), mask)


def growing_horizon(
    ts: Float[Array, " times"], fraction: ArrayLike
) -> tuple[Float[Array, " times"], Bool[Array, " times"]]:
    """The first `fraction` of a series at a fixed shape: the rest repeats the last time reached.

    A model that is trained on all of an oscillating series at once settles on its mean. Trained on
    a short beginning that grows, it follows the oscillation. The shape never changes, so nothing is
    compiled again, and the solve ends at the horizon, so it costs what it covers.

    Args:
        ts: Times, shape (times,), ordered.
        fraction: Of the intervals, in (0, 1]; may be traced. At least one interval is kept.

    Returns:
        The times to solve at, and the mask of those that count, both of shape (times,).
    """
    last = ts.shape[0] - 1
    # Rounding up must not be undone by round-off: 0.1 * 50 is 5.000000001 in some precisions.
    reached = jnp.ceil(jnp.asarray(fraction, dtype=float) * last - 1e-3)
    reached = jnp.clip(reached.astype(int), min(1, last), last)
    seen = jnp.arange(ts.shape[0]) <= reached
    return jnp.where(seen, ts, ts[reached]), seen


def trajectory(
    model: Any,
    batch: Any,
    key: PRNGKeyArray,
    *,
    error: Callable = mse,
    horizon: Callable | None = None,
    regularizer: Callable | None = None,
    coefficient: float | Callable = 1.0,
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """The loss of an ODE model that starts at the first observation and should meet the others.

    Give it to `nde.fit` as it is, or with its options bound:
    `functools.partial(losses.trajectory, horizon=optax.linear_schedule(0.1, 1.0, 500))`.

    A solve that fails does not count and, with an adjoint of `nde.solvers`, reaches no gradient;
    `nde.fit` stops when more than a tenth of them do.

    Args:
        model: An ODE model: `model.solve(ts, y0, throw=False)`.
        batch: An `nde.train.Batch` whose data is `(ts, ys)`, shapes (examples, times) and
            (examples, times, ...), or `(ts, ys, mask)` where values are missing: True where a value
            counts, with the leading axes of `ys`. The first row is where the solve starts: it must
            be complete (a value that was filled in counts there if it is good to start from). A
            series that repeats its last time has ended there: that is how `nde.paths.pad_series` pads, and
            the copies do not count.
        key: Of what the regularizer draws.
        error: `error(prediction, target, mask) -> scalar`, with arrays (examples, times - 1, ...)
            and a mask (examples, times - 1), of all axes if the data has a mask: `mse`, `log_mse`.
        horizon: `horizon(step) -> fraction` of the series to train on, see `growing_horizon`: any
            optax schedule.
        regularizer: One of `nde.regularizers`, to be added as its mean over the batch.
        coefficient: Of the regularizer: a number, or a function of the step such as
            `nde.regularizers.exponential_decay(100.0, 10.0, 3000)`.

    Returns:
        The loss, and as metrics the fraction of solves that `failed`, the `result` of each, the
        `penalty` of a regularizer and, where the adjoint counts them, `nfe`: the mean number of
        vector-field evaluations.

    Raises:
        ValueError: for other data, and for a `horizon` that is not a function.
        RuntimeError: for an example whose first row is masked.
    """
    ts, ys, observed = _series(batch.data)
    if horizon is not None:
        check_callable("horizon", horizon, "(step)")
        ts, seen = jax.vmap(growing_horizon, in_axes=(0, None))(ts, horizon(batch.step))
        observed = observed & _entries(seen, observed)

    def solve(ts, y0, key):
        if regularizer is None:
            solution, penalty = model.solve(ts, y0, throw=False), jnp.zeros(())
        else:
            solution, penalty = regularizer(model, ts, y0, key=key)
        return solution.ys, solution.result, solution.stats, penalty

    keys = jax.random.split(key, ts.shape[0])
    predicted, results, stats, penalties = jax.vmap(solve)(ts, ys[:, 0], keys)
    failed = results != diffrax.RESULTS.successful
    counts = batch.mask & ~failed
    metrics: dict[str, Any] = {"failed": _mean(failed, batch.mask), "result": results}
    if "nfe" in stats:
        metrics["nfe"] = _mean(stats["nfe"], batch.mask)
    mask = observed & _entries(counts, observed)
    loss = error(predicted[:, 1:], ys[:, 1:], mask[:, 1:])
    if regularizer is not None:
        metrics["penalty"] = _mean(penalties, counts)
        weight = coefficient(batch.step) if callable(coefficient) else coefficient
        loss = loss + weight * metrics["penalty"]
    return loss, metrics


def _series(data: Any) -> tuple[Array, Array, Bool[Array, "examples times ..."]]:
    """Times, values and which of them count."""
    arrays = isinstance(data, tuple | list) and len(data) in (2, 3) and all(map(eqx.is_array, data))
    if (
        not arrays
        or data[0].ndim != 2
        or data[0].shape[1] < 2
        or data[1].shape[:2] != data[0].shape
    ):
        raise ValueError(
            f"`batch.data` is {eqx.tree_pformat(data)}; `trajectory` takes (ts, ys) or (ts, ys, "
            "mask), of shapes (examples, times) and (examples, times, ...), with two times or more. "
            "Repeat times that all examples share: jnp.tile(ts, (len(ys), 1)). A list of batches is "
            "given as iter(batches). For other data write a loss, of model.solve and losses.mse."
        )
    ts, ys, *mask = data
    padded = (ts[:, 1:] == ts[:, :-1]) & (ts[:, 1:] == ts[:, -1:])
    observed = jnp.pad(~padded, ((0, 0), (1, 0)), constant_values=True)
    if mask:
        observed = _entries(observed, ys) & _entries(mask[0], ys)
        ys = eqx.error_if(
            ys,
            ~jnp.all(observed[:, 0]),
            "`mask` leaves out values of the first row of an example, where the solve starts. Begin "
            "each series at a complete row; or mark what was filled in there as True, if it is good "
            "to start from; or learn the start, with a loss of (model, y0).",
        )
    return ts, ys, observed


def _entries(mask: Bool[Array, "..."], values: Array) -> Bool[Array, "..."]:
    """A mask of leading axes as one of the shape of `values`."""
    if mask.dtype != bool:
        raise ValueError(
            f"`mask` has dtype {mask.dtype}; a mask is boolean, True where an entry counts: "
            "mask > 0. Weights need a loss of their own."
        )
    if mask.shape != values.shape[: mask.ndim]:
        raise ValueError(
            f"`mask` has shape {mask.shape} but the values have shape {values.shape}; "
            f"a mask has the leading axes, {values.shape[: mask.ndim]}."
        )
    mask = jnp.expand_dims(mask, tuple(range(mask.ndim, values.ndim)))
    return jnp.broadcast_to(mask, values.shape)


def _mean(values: Array, mask: Bool[Array, " examples"]) -> Float[Array, ""]:
    values = values.astype(float)
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.sum(mask, dtype=float)
