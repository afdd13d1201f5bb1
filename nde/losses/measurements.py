r"""The negative log-likelihood of measurements, per measured value.

    loss = -(1/n) sum_i ( sum_j log p(y_ij | m_ij) - |eta_i|^2 / 2 )

over the experiments i of a batch and their n observed values; eta_i are the random effects of the
subject of experiment i: their law is part of the likelihood (one experiment, one subject). What nobody
observed, nan or padding, does not count.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from nde._inputs import check_callable
from nde._parameters import random_effects
from nde.losses.horizon import growing_horizon
from nde.losses.metrics import mean_that_counts
from nde.losses.squared_error import broadcast_mask
from nde.measured import Experiments


def negative_log_likelihood(
    model: Any,
    batch: Any,
    key: PRNGKeyArray,
    *,
    horizon: Callable | None = None,
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """The loss of an `nde.Measured` model.

    A solve that fails does not count; `nde.fit` stops when more than a tenth of them do.

    Args:
        model: An `nde.Measured`.
        batch: An `nde.train.Batch` whose data are `nde.measured.experiments`.
        key: Not used.
        horizon: As in `trajectory`.

    Returns:
        The loss, and as metrics the fraction of solves that `failed`, and the `weight`, the number of
        values that the loss is a mean of.

    Raises:
        ValueError: for other data, and for values that the law of the errors cannot give.
    """
    data: Experiments = batch.data
    if not isinstance(data, Experiments):
        raise ValueError(
            "`batch.data` is no Experiments, which `negative_log_likelihood` takes: "
            "nde.measured.experiments([(ts, ys), ...])."
        )
    fraction = batch.horizon
    if horizon is not None:
        check_callable("horizon", horizon, "(step)")
        fraction = horizon(batch.step)
    observed = ~jnp.isnan(data.ys)
    if fraction is not None and batch.training:
        ts, seen = jax.vmap(growing_horizon, in_axes=(0, None))(data.ts, fraction)
        data = dataclasses.replace(data, ts=ts)
        observed = observed & broadcast_mask(seen, observed)
    means, failed = jax.vmap(model.means)(data)
    counts = batch.mask & ~failed
    observed = observed & broadcast_mask(counts, observed)
    # Replaced before the arithmetic: 0 * nan is nan, and so is its gradient.
    means, ys = jnp.where(observed, means, 1.0), jnp.where(observed, data.ys, 1.0)
    density = jnp.sum(jnp.where(observed, model.errors.log_density(ys, means), 0.0))
    weight = jnp.sum(observed, dtype=float)
    for effect in random_effects(model):
        offsets = effect.offsets[data.subject]
        mask = broadcast_mask(counts, offsets)
        density = density - jnp.sum(jnp.where(mask, offsets, 0.0) ** 2) / 2
    return -density / weight, {"failed": mean_that_counts(failed, batch.mask), "weight": weight}
