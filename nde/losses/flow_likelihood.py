"""The likelihood of a model that has a density, an `nde.CNF`, as a loss."""

from collections.abc import Callable
from typing import Any

import diffrax
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from nde.losses.matching import points_of
from nde.losses.metrics import mean_that_counts, solve_metrics


def flow_likelihood(
    model: Any,
    batch: Any,
    key: PRNGKeyArray,
    *,
    regularizer: Callable | None = None,
    coefficient: float | Callable = 1.0,
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """The mean of -log p over a batch, in nats per example.

    Give it to `nde.fit` as it is, or with its options bound. The entropy of the law of the data is the
    least value there is: a mean over new data that is below it by more than its error is a mistake.
    Of scaled data, (x - m) / s, the density of x itself has - sum log s added to log p.

    Args:
        model: An `nde.CNF`.
        batch: An `nde.train.Batch` whose data is x, shape (examples, size), or (x, args), args a
            PyTree of arrays with a leading axis: the conditions.
        key: Of random traces and of the regularizer: new vectors for every example.
        regularizer: Of `nde.regularizers`, on the same solves, except `local`.
        coefficient: Of the regularizer, a number or a schedule of the step.

    Returns:
        The loss, and metrics: `failed`, `result`, `nfe` and `penalty`, as `nde.losses.trajectory`.

    Raises:
        ValueError: for data of another form or size.
    """
    x, args = points_of(batch, "flow_likelihood")
    solve = lambda x, args, key: model.solve_back(
        x, args, key=key, regularizer=regularizer, throw=False
    )
    axes = (0, None if args is None else 0, 0)
    found = jax.vmap(solve, in_axes=axes)(x, args, batch.example_keys(key))
    results = found.solution.result
    failed = results != diffrax.RESULTS.successful
    counts = batch.mask & ~failed
    metrics = solve_metrics(results, found.solution.stats, batch.mask)
    loss = -mean_that_counts(found.value, counts)
    if regularizer is not None:
        metrics["penalty"] = mean_that_counts(found.penalty, counts)
        weight = coefficient(batch.step) if callable(coefficient) else coefficient
        loss = loss + weight * metrics["penalty"]
    return loss, metrics
