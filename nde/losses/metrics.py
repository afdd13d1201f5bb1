"""What losses report of the solves of a batch: numbers over the examples that count."""

from typing import Any

import diffrax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def solve_metrics(
    results: diffrax.RESULTS, stats: dict[str, Array], mask: Bool[Array, " examples"]
) -> dict[str, Any]:
    """Of a batch of solves: the fraction that `failed`, the `result` of each and, where the adjoint counts
    them, `nfe`, the mean number of vector-field evaluations."""
    failed = results != diffrax.RESULTS.successful
    metrics: dict[str, Any] = {"failed": mean_that_counts(failed, mask), "result": results}
    if "nfe" in stats:
        metrics["nfe"] = mean_that_counts(stats["nfe"], mask)
    return metrics


def mean_that_counts(values: Array, mask: Bool[Array, " examples"]) -> Float[Array, ""]:
    """The mean over the examples that count, of numbers or of Booleans, shape (examples,)."""
    values = values.astype(float)
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.sum(mask, dtype=float)
