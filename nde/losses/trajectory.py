"""The loss of a model that is solved from the first observation of each series to the last."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from nde._inputs import check_callable
from nde.losses.horizon import growing_horizon
from nde.losses.metrics import mean_that_counts, solve_metrics
from nde.losses.pull import pulled, through
from nde.losses.series import which_count
from nde.losses.squared_error import broadcast_mask, mse


def trajectory(
    model: Any,
    batch: Any,
    key: PRNGKeyArray,
    *,
    error: Callable = mse,
    horizon: Callable | None = None,
    pull: Callable | None = None,
    regularizer: Callable | None = None,
    coefficient: float | Callable = 1.0,
    dropout: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """The loss of an ODE model that starts at the first observation and should meet the others.

    Give it to `nde.fit` as it is, or with its options bound:
    `functools.partial(losses.trajectory, horizon=optax.linear_schedule(0.1, 1.0, 500))`.

    A solve that fails does not count and, with an adjoint of `nde.solvers`, reaches no gradient;
    `nde.fit` stops when more than a tenth of them do.

    Args:
        model: An ODE model: `model.solve(ts, y0, throw=False)`.
        batch: An `nde.train.Batch` whose data is `(ts, ys)`, shapes (examples, times) and
            (examples, times, ...), or `(ts, ys, mask)`: True where a value counts, with the leading
            axes of `ys`. A value that is nan was not observed and does not count either. The first
            row is where the solve starts: it must be complete (a value that was filled in counts
            there if it is good to start from). A series that repeats its last time has ended there:
            that is how `nde.paths.pad_series` pads, and the copies do not count.
        key: Of what the regularizer draws.
        error: `error(prediction, target, mask) -> scalar`, with arrays and a mask of shape
            (examples, times - 1, ...): `mse`, `log_mse`.
        horizon: `horizon(step) -> fraction` of the series to train on, see `growing_horizon`: any
            optax schedule. Without one it is that of the `nde.train.Stage`, if it has one.
        pull: `pull(step) -> rate` of a pull of the solution to the data, y' = f + rate (x - y), for
            states of shape (channels,): an optax schedule that ends at zero, such as
            `optax.polynomial_schedule(10.0, 0.0, 2.0, 1000)`. It makes oscillations trainable whose
            loss has many local minima; the rate is per unit of `ts`.
        regularizer: One of `nde.regularizers`, to be added as its mean over the batch.
        coefficient: Of the regularizer: a number, or a function of the step such as
            `nde.regularizers.exponential_decay(100.0, 10.0, 3000)`. It is multiplied by the weight
            `"penalty"` of the `nde.train.Stage`, if it has one.
        dropout: Share of the observation times to leave out at every step, drawn anew for every
            example, in [0, 1).

    In a validation (`batch.training` is False) the horizon is the whole series, and neither the pull,
    the regularizer nor the dropout takes part.

    Returns:
        The loss, and as metrics the fraction of solves that `failed`, the `result` of each, the
        `penalty` of a regularizer and, where the adjoint counts them, `nfe`: the mean number of
        vector-field evaluations. The `weight`, the number of values that the loss is a mean of, is
        for a batch that is divided.

    Raises:
        ValueError: for other data, for a `horizon` that is not a function, and for a `dropout` that
            is not in [0, 1).
        RuntimeError: for an example whose first row is masked.
    """
    if not hasattr(batch, "data"):
        raise ValueError(
            f"`batch` is {eqx.tree_pformat(batch)}; a loss takes a Batch of the data: "
            "nde.train.Batch((ts, ys))."
        )
    ts, ys, observed = series(batch.data)
    if horizon is not None:
        check_callable("horizon", horizon, "(step)")
    if pull is not None:
        check_callable("pull", pull, "(step)")
        if regularizer is not None:
            raise ValueError(
                "`pull` and `regularizer` were given; a pulled solve has no regularizer."
            )
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` is {dropout}; it is a share of the times, in [0, 1).")
    fraction, keys = batch.horizon, batch.example_keys(key)
    if horizon is not None:
        fraction = horizon(batch.step)
    if not batch.training:
        fraction, pull, regularizer, dropout = None, None, None, 0.0
    if dropout:
        drawn = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), ts.shape[1:]))
        observed = observed & broadcast_mask(drawn(keys) >= dropout, observed)
    paths = None if pull is None else jax.vmap(through)(ts, ys, observed)
    if fraction is not None:
        ts, seen = jax.vmap(growing_horizon, in_axes=(0, None))(ts, fraction)
        observed = observed & broadcast_mask(seen, observed)

    def solve(ts, y0, key, path):
        if regularizer is None:
            solved = model if pull is None else pulled(model, path, pull(batch.step))
            solution, penalty = solved.solve(ts, y0, throw=False), jnp.zeros(())
        else:
            solution, penalty = regularizer(model, ts, y0, key=key)
        return solution.ys, solution.result, solution.stats, penalty

    predicted, results, stats, penalties = jax.vmap(solve)(ts, ys[:, 0], keys, paths)
    failed = results != diffrax.RESULTS.successful
    counts = batch.mask & ~failed
    metrics = solve_metrics(results, stats, batch.mask)
    mask = observed & broadcast_mask(counts, observed)
    loss = error(predicted[:, 1:], ys[:, 1:], mask[:, 1:])
    metrics["weight"] = jnp.sum(mask[:, 1:], dtype=float)
    if regularizer is not None:
        metrics["penalty"] = mean_that_counts(penalties, counts)
        weight = coefficient(batch.step) if callable(coefficient) else coefficient
        weight = weight * batch.weights.get("penalty", 1.0)
        loss = loss + weight * metrics["penalty"]
    return loss, metrics


def series(
    data: Any, starts: bool = True
) -> tuple[Array, Array, Bool[Array, "examples times ..."]]:
    """Times, values and which of them count; with `starts`, the first row of each must be there."""
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
    observed = which_count(ts, ys, *mask)
    if mask and starts:
        ys = eqx.error_if(
            ys,
            ~jnp.all(observed[:, 0]),
            "`mask` leaves out values of the first row of an example, where the solve starts. Begin "
            "each series at a complete row; or mark what was filled in there as True, if it is good "
            "to start from; or learn the start, with a loss of (model, y0).",
        )
    return ts, ys, observed
