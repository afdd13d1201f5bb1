"""The signature-kernel score: E k(X, X') - 2 E k(X, Y), k the signature kernel of paths with time.

It sees the whole path, so it suits partly observed and not Markovian data. Time is a channel (a signature
does not see the clock), and a first point at 0 shows the start. Strictly proper with an `RBF` static kernel
on bounded sets of paths; with plain paths where the signatures determine the law.

Cost:       n^2 / 2 + n m kernels (see `signature_kernel`).
Reference:  Non-adversarial training of neural SDEs with signature kernel scores (2023) | arXiv:2305.16274
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, PRNGKeyArray

from nde.losses.samples import Samples, check_samples, last_observed, mean_of_pairs
from nde.losses.signature_kernel import signature_gram


def signature_score(
    ts: Float[Array, "*examples times"],
    fake: Float[Array, "paths times channels"],
    real: Float[Array, "paths2 times channels"],
    *,
    static_kernel: Callable | None = None,
    dyadic_order: int = 1,
    lead_lag: bool = False,
    start: bool = True,
    scalings: Float[ArrayLike, " scalings"] = (1.0,),
    block: int = 16,
    mask: Bool[Array, "paths times"] | None = None,
    key: PRNGKeyArray | None = None,
) -> Float[Array, ""]:
    """The score of a sample of paths by the signature kernel, to be made small.

    Its value at the true law is minus the mean kernel of two real paths, not zero. Only differences have
    a meaning.

    Args:
        ts: Times, shape (times,) or (paths, times), increasing; scaled to [0, 1] and added as a channel.
        fake: Paths of the model, shape (paths, times, channels). Scale the channels to about 1.
        real: Paths of the data, shape (paths2, times, channels).
        static_kernel: As in `signature_kernel`: `RBF(1.0)`; None for the paths themselves.
        dyadic_order: As in `signature_kernel`.
        lead_lag: Whether each path stands beside itself one point later, which shows its quadratic
            variation to low terms of the signature; twice the points and channels.
        start: Whether a point at 0 comes first, so that the score sees where paths start.
        scalings: Factors of time and values; the score is the mean over them. Several make the kernel
            less one of high or low terms.
        block: As in `signature_gram`.
        mask: Where path i of both samples is observed, shape (paths, times), with `ts` of that shape; the
            paths lead straight over what is not. A path without an observation does not count.
        key: Not needed: nothing is drawn.

    Raises:
        ValueError: for samples that cannot be compared.

    Reference:
        Non-adversarial training of neural SDEs with signature kernel scores (2023) | arXiv:2305.16274
    """
    samples = check_samples(ts, fake, real, mask)
    fake, real = (
        _prepared(samples, paths, lead_lag, start) for paths in (samples.fake, samples.real)
    )
    weights = None if mask is None else jnp.any(mask, axis=1).astype(fake.dtype)

    def score(scale: Array) -> Array:
        def gram(*paths: Array) -> Array:
            scaled = [scale * sample for sample in paths]
            return signature_gram(
                *scaled, static_kernel=static_kernel, dyadic_order=dyadic_order, block=block
            )

        within = mean_of_pairs(gram(fake), weights, independent=False)
        return within - 2 * mean_of_pairs(gram(fake, real), weights, independent=not samples.paired)

    return jnp.mean(jax.lax.map(score, jnp.asarray(scalings, fake.dtype)))


def _prepared(samples: Samples, paths: Array, lead_lag: bool, start: bool) -> Array:
    """Paths with time, each from its start, or from 0."""
    ts = samples.ts
    if samples.mask is not None:
        ts, paths = (last_observed(rows, samples.mask) for rows in (ts, paths))
    span = jnp.max(samples.ts[:, -1] - samples.ts[:, 0])
    times = jnp.broadcast_to((ts - samples.ts[:, :1]) / span, paths.shape[:2]).astype(paths.dtype)
    if start:
        times = jnp.concatenate([times[:, :1], times], axis=1)
        paths = jnp.pad(paths, ((0, 0), (1, 0), (0, 0)))
    else:
        paths = paths - paths[:, :1]
    if lead_lag:
        lead, lag = (jnp.repeat(paths, 2, axis=1) for _ in range(2))
        times = jnp.repeat(times, 2, axis=1)[:, 1:]
        paths = jnp.concatenate([lead[:, 1:], lag[:, :-1]], axis=2)
    return jnp.concatenate([times[..., None], paths], axis=2)
