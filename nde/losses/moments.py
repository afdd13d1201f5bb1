"""Matching of moments: mean, variance and, on request, autocovariance at each time.

The cheapest comparison of two laws, and the least sharp: two laws with these moments may differ in all
else. For marginals known only by their moments, and as a first stage.

Reference:  Generative moment matching (the mean and variance losses of ERNSDE): Opening the blackbox (2021)
            | arXiv:2105.03918
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from nde.losses.samples import check_samples


def moments(
    ts: Float[Array, "*examples times"],
    fake: Float[Array, "paths times channels"],
    real: Float[Array, "paths2 times channels"],
    *,
    lags: Sequence[int] = (),
    mask: Bool[Array, "paths times"] | None = None,
    key: PRNGKeyArray | None = None,
) -> Float[Array, ""]:
    """Mean squared differences of the means, of the variances and of the autocovariances of each channel.

    Args:
        ts: Times, shape (times,) or (paths, times); moments are compared by their index.
        fake: Paths of the model, shape (paths, times, channels).
        real: Paths of the data, shape (paths2, times, channels).
        lags: Of the autocovariances, in numbers of times.
        mask: Where path i of both samples is observed, shape (paths, times), with `ts` of that shape.
        key: Not needed: nothing is drawn.

    Raises:
        ValueError: for samples that cannot be compared, or a lag that is not in the series.
    """
    samples = check_samples(ts, fake, real, mask)
    wrong = [lag for lag in lags if not 0 < lag < fake.shape[1]]
    if wrong:
        raise ValueError(
            f"`lags` has {wrong[0]}, which is not from 1 to {fake.shape[1] - 1}: the paths have "
            f"{fake.shape[1]} times."
        )
    fake, real = samples.fake, samples.real
    seen = jnp.ones(fake.shape[:2], bool) if mask is None else mask
    of_real = jnp.ones(real.shape[:2], bool) if mask is None else mask
    apart, means = [], []
    for paths, where in ((fake, seen), (real, of_real)):
        means.append(_mean(paths, where))
        apart.append(paths - means[-1][None])
    total = _difference(*means, jnp.any(seen, axis=0))
    times = fake.shape[1]
    for lag in (0, *lags):
        both = [where[:, lag:] & where[:, : times - lag] for where in (seen, of_real)]
        covariances = [
            _mean(y[:, lag:] * y[:, : times - lag], where)
            for y, where in zip(apart, both, strict=True)
        ]
        total = total + _difference(*covariances, jnp.any(both[0], axis=0))
    return total


def _mean(
    values: Float[Array, "paths times channels"], where: Bool[Array, "paths times"]
) -> Float[Array, "times channels"]:
    """The mean over the paths that are observed; 0 where none is."""
    count = jnp.sum(where, axis=0).astype(values.dtype)
    return (
        jnp.sum(jnp.where(where[..., None], values, 0.0), axis=0) / jnp.maximum(count, 1.0)[:, None]
    )


def _difference(
    a: Float[Array, "times channels"], b: Array, known: Bool[Array, " times"]
) -> Float[Array, ""]:
    return jnp.mean((a - b) ** 2, where=known[:, None])
