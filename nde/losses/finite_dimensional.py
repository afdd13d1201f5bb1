"""Finite-dimensional matching: a score of the values at a few times, averaged over the choice of times.

With Z = (t_1, ..., t_r, X_t1, ..., X_tr), one vector per path, and a kernel k,

    S = E_t [ E k(Z, Z') - 2 E k(Z, Z_real) ],      means over independent pairs of paths.

r = 1 matches marginals, and nothing else: a process that is independent at each time passes. r = 2 is
strictly proper for Markov processes. Data that are not Markovian (a price without its volatility) need
r = 3 or more, or a signature kernel.

Cost:       draws x n (n + m) kernels of r (channels + 1) numbers; no solve, no sweep along the path.
Reference:  Efficient training of neural SDEs by matching finite dimensional distributions (2025) |
            arXiv:2410.03973
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from nde._inputs import check_key
from nde.losses.kernels import Energy
from nde.losses.samples import check_samples, mean_of_pairs
from nde.solvers.inputs import check_count


def finite_dimensional_score(
    ts: Float[Array, "*examples times"],
    fake: Float[Array, "paths times channels"],
    real: Float[Array, "paths2 times channels"],
    *,
    size: int = 2,
    draws: int = 16,
    kernel: Callable = Energy(),
    mask: Bool[Array, "paths times"] | None = None,
    key: PRNGKeyArray | None = None,
) -> Float[Array, ""]:
    """The score of the values at `size` random times, to be made small: marginals (1), pairs (2), ...

    With `Energy()` it is the energy score, with `RBF(...)` it is that of the maximum mean discrepancy. Its
    value at the true law is minus the mean kernel of two real paths, not zero.

    Args:
        ts: Times, shape (times,) or (paths, times), increasing; they stand beside the values only where
            paths have their own: scale them like the values.
        fake: Paths of the model, shape (paths, times, channels).
        real: Paths of the data, shape (paths2, times, channels).
        size: Times in one vector. Pairs determine the law of a Markov process, marginals of none.
        draws: Random choices of times, of which the mean is taken. With `size=1` and `draws` of at least
            `times` all times are taken once.
        kernel: `kernel(x, y)` on features that come first: `Energy()`, `RBF(scale)`.
        mask: Where path i of both samples is observed, shape (paths, times), with `ts` of that shape. A
            choice of times at which fewer than two paths are observed does not count.
        key: Of the choice of times.

    Raises:
        ValueError: for samples that cannot be compared, more times than there are, or no key.

    Reference:
        Efficient training of neural SDEs by matching finite dimensional distributions (2025) |
        arXiv:2410.03973
    """
    samples = check_samples(ts, fake, real, mask)
    fake, real, length = samples.fake, samples.real, fake.shape[1]
    check_count("size", size, ", such as 2 for pairs")
    check_count("draws", draws, ", such as 16")
    if size > length:
        raise ValueError(f"`size` is {size} but the paths have {length} times.")
    if size == length:
        chosen = jnp.arange(length)[None]
    elif size == 1 and draws >= length:
        chosen = jnp.arange(length)[:, None]
    else:
        check_key(key)
        chosen = _choices(key, length, size, draws)

    def features(paths: Array, at: Int[Array, " size"]) -> Float[Array, "features paths"]:
        parts = [paths[:, at].reshape(paths.shape[0], -1)]
        if samples.paired:
            parts.append(samples.ts[:, at].astype(paths.dtype))
        return jnp.concatenate(parts, axis=1).T

    @jax.checkpoint  # one matrix of pairs at a time, also in the gradient
    def score(at: Int[Array, " size"]) -> tuple[Array, Array]:
        x, y = features(fake, at), features(real, at)
        seen = None if mask is None else jnp.all(mask[:, at], axis=1)
        weights = None if seen is None else seen.astype(fake.dtype)
        within = mean_of_pairs(kernel(x[:, :, None], x[:, None]), weights, independent=False)
        between = mean_of_pairs(
            kernel(x[:, :, None], y[:, None]), weights, independent=not samples.paired
        )
        enough = jnp.asarray(True) if seen is None else jnp.sum(seen) > 1
        return within - 2 * between, enough

    scores, enough = jax.lax.map(score, chosen)
    return jnp.mean(jnp.where(enough, scores, 0.0), where=enough)


def _choices(key: PRNGKeyArray, length: int, size: int, draws: int) -> Int[Array, "draws size"]:
    """Distinct times, in order."""

    def choice(key: PRNGKeyArray) -> Int[Array, " size"]:
        return jnp.sort(jax.random.choice(key, length, (size,), replace=False))

    return jax.vmap(choice)(jax.random.split(key, draws))
