"""The negative evidence lower bound of a latent SDE, simulated or matched, as a loss.

    loss = mean over series of  - log p(x | Z) + w (KL(q0 || p0) + KL of the paths),     w of the step

A weight that grows from zero lets the reconstruction start before the divergence pulls the posterior to
an untrained prior: `optax.linear_schedule(0.0, 1.0, 1000)`. In the end it must be 1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from nde.losses.series import as_series


def evidence(
    model: Any,
    batch: Any,
    key: PRNGKeyArray,
    *,
    kl_weight: float | Callable = 1.0,
    low_variance: bool = False,
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """The negative ELBO of `nde.LatentSDE`, by one simulated path of the posterior for each series.

    Args:
        model: An `nde.LatentSDE`.
        batch: An `nde.train.Batch` whose data is `(ts, ys)`, shapes (examples, times) and (examples, times,
            channels), or `(ts, ys, mask)`, as of `trajectory` (nan is missing).
        key: Of the paths.
        kl_weight: Of both divergences: a number, or a function of the step.
        low_variance: Whether to add the stochastic integral that makes the gradient of the path
            divergence less noisy, see `nde.LatentSDE.evidence`.

    Returns:
        The loss, and as metrics the parts of the bound, means over the series.
    """

    def one(ts: Array, ys: Array, key: PRNGKeyArray) -> Any:
        return model.evidence(ts, ys, low_variance=low_variance, throw=False, key=key)

    return _loss(one, batch, key, kl_weight, "evidence")


def matched_evidence(
    model: Any,
    batch: Any,
    key: PRNGKeyArray,
    *,
    kl_weight: float | Callable = 1.0,
    samples: int = 1,
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """The negative ELBO of `nde.LatentSDE` with `PosteriorMarginals`, without simulation (SDE Matching).

    Args:
        model: An `nde.LatentSDE`.
        batch: As of `evidence`.
        key: Of the random times and states.
        kl_weight: Of both divergences: a number, or a function of the step.
        samples: Random times for the path divergence, one in each of so many equal parts.

    Returns:
        The loss, and as metrics the parts of the bound, means over the series.
    """

    def one(ts: Array, ys: Array, key: PRNGKeyArray) -> Any:
        return model.matched_evidence(ts, ys, samples=samples, key=key)

    return _loss(one, batch, key, kl_weight, "matched_evidence")


def _loss(
    one: Callable, batch: Any, key: PRNGKeyArray, kl_weight: float | Callable, name: str
) -> tuple[Float[Array, ""], dict[str, Any]]:
    ts, ys, observed = as_series(batch.data, name)
    ys = jnp.where(observed, ys, jnp.nan)
    parts = jax.vmap(one)(ts, ys, batch.example_keys(key))
    weight = kl_weight(batch.step) if callable(kl_weight) else kl_weight
    weight = jnp.asarray(weight, parts.kl_path.dtype)  # schedules have a precision of their own
    mean = lambda x: jnp.sum(jnp.where(batch.mask, x, 0.0)) / jnp.sum(batch.mask, dtype=x.dtype)
    metrics = {field: mean(value) for field, value in parts._asdict().items()}
    return -mean(parts.elbo(weight)), metrics
