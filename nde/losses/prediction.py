r"""What a model predicts of each observation from those before it, against the observation.

    squared error    mean of (p_i - x_i)^2
    likelihood       mean of -log N(x_i; m_i, s_i^2) + w KL(N(m_i+, s_i+^2) || N(x_i, s^2))

with means over what was observed, p_i or (m_i, s_i) the prediction before x_i is seen, and (m_i+, s_i+)
the readout of the state after its jump, which should be near what it has just been told.

In code:    m, log s -> the halves of a prediction; w -> weight, s -> observation_std
Reference:  GRU-ODE-Bayes: continuous modeling of sporadically-observed time series (2019)
            | arXiv:1905.12374
"""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from nde.losses.metrics import solve_metrics
from nde.losses.series import as_series
from nde.losses.squared_error import broadcast_mask, mse


def prediction_error(
    model: Any, batch: Any, key: PRNGKeyArray
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """The mean squared error of one-step predictions.

    A series whose solve fails does not count; `nde.fit` stops when more than a tenth of them do.

    Args:
        model: An `nde.ODERNN` whose readout has shape (channels,).
        batch: An `nde.train.Batch` whose data is `(ts, ys)`, shapes (examples, times) and (examples, times,
            channels), or `(ts, ys, mask)`, as of `trajectory` (nan is missing).
        key: Not used.

    Returns:
        The loss, and as metrics `failed`, `result`, `nfe` and `weight` as of `trajectory`.

    Raises:
        ValueError: for other data, or predictions of another shape.
    """
    del key
    ys, crossings, counts, metrics = _predicted(model, batch, "prediction_error")
    return mse(crossings.prediction, ys, counts), metrics


def prediction_likelihood(
    model: Any,
    batch: Any,
    key: PRNGKeyArray,
    *,
    weight: float = 1e-4,
    observation_std: float = 1e-2,
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """The negative log-likelihood of one-step predictions that are normal laws, in nats per observed
    value, and the divergence after the jumps: the loss of GRU-ODE-Bayes.

    Args:
        model: An `nde.ODERNN` whose readout has shape (2 channels,): means and log standard deviations.
        batch: As of `prediction_error`.
        key: Not used.
        weight: Of the divergence.
        observation_std: Standard deviation of an observation, positive.

    Returns:
        The loss, and as metrics `nll` and `kl`, its parts, and those of `prediction_error`.

    Raises:
        ValueError: for other data or predictions of another shape.
    """
    del key
    if not observation_std > 0:
        raise ValueError(f"`observation_std` is {observation_std}; it must be positive.")
    ys, crossings, counts, metrics = _predicted(model, batch, "prediction_likelihood")
    after = jax.vmap(jax.vmap(model.readout))(crossings.after)
    for found in (crossings.prediction, after):
        if found.shape != (*ys.shape[:2], 2 * ys.shape[2]):
            raise ValueError(
                f"`readout` gives {found.shape[2:]} but `ys` has {ys.shape[2:]} channels; it gives mean "
                "and log standard deviation of each, shape (2 channels,)."
            )
    ys = jnp.where(counts, ys, 0)
    mean = lambda x: jnp.sum(jnp.where(counts, x, 0)) / jnp.sum(counts, dtype=x.dtype)
    m, log_s = jnp.split(crossings.prediction, 2, axis=-1)
    nll = mean(((ys - m) * jnp.exp(-log_s)) ** 2 / 2 + log_s + 0.5 * np.log(2 * np.pi))
    m, log_s = jnp.split(after, 2, axis=-1)
    apart = (jnp.exp(2 * log_s) + (m - ys) ** 2) / observation_std**2
    kl = mean((apart - 1) / 2 - log_s + np.log(observation_std))
    return nll + weight * kl, metrics | {"nll": nll, "kl": kl}


def _predicted(
    model: Any, batch: Any, name: str
) -> tuple[Array, Any, Bool[Array, "examples times channels"], dict[str, Any]]:
    """Observations, states and predictions, what counts, and the metrics."""
    ts, ys, observed = as_series(batch.data, name)
    solution = jax.vmap(lambda ts, ys: model.solve(ts, ys, throw=False))(
        ts, jnp.where(observed, ys, jnp.nan)
    )
    failed = solution.result != diffrax.RESULTS.successful
    counts = observed & broadcast_mask(batch.mask & ~failed, observed)
    metrics = solve_metrics(solution.result, solution.stats, batch.mask)
    metrics["weight"] = jnp.sum(counts, dtype=float)
    return ys, solution.ys, counts, metrics
