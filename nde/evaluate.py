r"""Judging a model that draws: is its law that of the data?

A sample of the model against one of the data, or against a known law, with what chance alone would give:

    ks                 D = sup |F - G| of each marginal; for equal laws the limit of sqrt(n m / (n + m)) D
                       exceeds x with probability 2 sum_k (-1)^(k-1) exp(-2 k^2 x^2)
    mmd                E k(X, X') + E k(Y, Y') - 2 E k(X, Y) of whole paths, against permuted labels
    classifier         the accuracy of a classifier on n paths it has not seen; 1/2 +- 1/(2 sqrt n)
    autocorrelation    of two times of one path
    coverage           how often the data lie in the bands of the model

One-time marginals and means hide wrong dynamics: look at pairs of times too (`autocorrelation`,
`classifier`, `losses.finite_dimensional_score`). A step of the solver used in training is part of the
model: judge it with half the step as well.

Reference:  Revisiting classifier two-sample tests (2017) | arXiv:1610.06545; A kernel two-sample test
            (2012) | https://jmlr.org/papers/v13/gretton12a.html
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from nde._inputs import check_key
from nde.losses.kernels import RBF
from nde.solvers.inputs import check_count

__all__ = ["SampleTest", "autocorrelation", "classifier", "coverage", "ks", "ks_quantile", "mmd"]


class SampleTest(NamedTuple):
    """A statistic with what chance gives.

    Args:
        statistic: Larger for laws that differ more.
        p_value: How probable it is to be as large for two equal laws.
        standard_error: Of the statistic for two equal laws, where that is known.
    """

    statistic: np.ndarray
    p_value: np.ndarray
    standard_error: float | None = None


def ks(fake: Float[ArrayLike, "paths *shape"], real: ArrayLike | Callable) -> SampleTest:
    """The Kolmogorov-Smirnov distance of each marginal: of two samples, or of one and a known law.

    Args:
        fake: Sample, shape (paths, ...), such as paths of shape (paths, times, channels).
        real: Another sample, shape (paths2, ...), or the distribution function: `cdf(values)`, of values
            shaped like `fake` and sorted along the first axis.

    Returns:
        Distances and p-values, shape (...). The p-values are those of many paths; of 50 or fewer they
        are a few per cent too large.

    Raises:
        ValueError: for samples that cannot be compared, or that are not finite.
    """
    x = np.sort(_sample("fake", fake), axis=0)
    n = x.shape[0]
    if callable(real):
        exact = np.asarray(real(x), dtype=float)
        if exact.shape != x.shape:
            raise ValueError(
                f"`real` returned shape {exact.shape} for values of shape {x.shape}; a distribution "
                "function gives one probability for every value."
            )
        ranks = np.arange(n).reshape(-1, *[1] * (x.ndim - 1))
        distance = np.maximum((ranks + 1) / n - exact, exact - ranks / n).max(axis=0)
        return SampleTest(distance, _kolmogorov(distance * _effective(n)))
    y = np.sort(_sample("real", real), axis=0)
    _check_alike(x, y)
    m = y.shape[0]
    pairs = zip(x.reshape(n, -1).T, y.reshape(m, -1).T, strict=True)
    distance = np.array([_distance(a, b) for a, b in pairs]).reshape(x.shape[1:])
    return SampleTest(distance, _kolmogorov(distance * _effective(n, m)))


def ks_quantile(probability: float, n: int, m: int | None = None) -> float:
    """The KS distance that equal laws exceed with probability 1 - `probability`: what a test at level .05
    allows is `ks_quantile(0.95, n, m)`, about 1.358 / sqrt(n) of one sample.

    Args:
        probability: In (0, 1).
        n: Size of the sample.
        m: Size of the other sample; None if its law is known.

    Raises:
        ValueError: for a probability outside (0, 1), or a size below 1.
    """
    if not 0 < probability < 1:
        raise ValueError(f"`probability` is {probability}; it is between 0 and 1, such as 0.95.")
    for name, size in (("n", n), ("m", m)):
        if size is not None:
            check_count(name, size)
    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _kolmogorov(middle) > 1 - probability else (low, middle)
    return high / _effective(n, m)


def mmd(
    fake: Float[ArrayLike, "paths *shape"],
    real: Float[ArrayLike, "paths2 *shape"],
    *,
    kernel: Callable | None = None,
    permutations: int = 500,
    key: PRNGKeyArray,
) -> SampleTest:
    """The squared maximum mean discrepancy of two samples (unbiased, so it may be negative), and the share
    of random exchanges between them that give as much.

    Args:
        fake: Sample, shape (paths, ...); each path is one vector. Scale the channels alike.
        real: Another sample, shape (paths2, ...).
        kernel: `kernel(x, y)` on features that come first; None for `losses.RBF` with the median distance
            as its width.
        permutations: Number of random exchanges; the p-value is a multiple of 1 / (permutations + 1).
        key: Of the exchanges.

    Raises:
        ValueError: for samples that cannot be compared, or that are not finite.
    """
    check_key(key)
    check_count("permutations", permutations, ", such as 500")
    x, y = _vectors(fake, real)
    pooled = jnp.asarray(np.concatenate([x, y]).T)
    if kernel is None:
        apart = x[: len(y)] - y[: len(x)]  # as many distances as paths are enough for a median
        kernel = RBF(float(np.sqrt(np.median(np.sum(apart**2, axis=1)))) or 1.0)
    n, m = len(x), len(y)
    gram = kernel(pooled[:, :, None], pooled[:, None, :])
    gram = gram - jnp.diag(jnp.diagonal(gram))

    keys = jax.random.split(key, permutations)
    orders = jax.vmap(lambda key: jax.random.permutation(key, n + m))(keys)
    value, null = _discrepancies(gram, jnp.arange(n + m), orders, n)
    p_value = (1 + jnp.sum(null >= value)) / (permutations + 1)
    return SampleTest(np.asarray(value), np.asarray(p_value), float(jnp.std(null)))


def classifier(
    fake: Float[ArrayLike, "paths times channels"],
    real: Float[ArrayLike, "paths2 times channels"],
    *,
    times: int = 12,
    key: PRNGKeyArray,
) -> SampleTest:
    """The accuracy of a classifier of model against data, on the half of the paths it has not seen: .5 if
    the two cannot be told apart.

    Logistic regression on the values at some times, their squares, and products of neighbors in time and
    of channels: it sees means, variances, correlations. What it does not find may still differ.

    Args:
        fake: Paths of the model, shape (paths, times, channels).
        real: Paths of the data; as many as there are of the smaller sample are used of both.
        times: Number of times that are looked at, spread over the paths.
        key: Of the halves.

    Returns:
        The accuracy, its p-value (one-sided) and its standard error under equality, 1 / (2 sqrt(paths)).

    Raises:
        ValueError: for samples that cannot be compared, or that are not finite.
    """
    check_key(key)
    check_count("times", times, ", such as 12")
    x, y = _sample("fake", fake), _sample("real", real)
    _check_alike(x, y)
    if x.ndim != 3:
        raise ValueError(f"`fake` has shape {x.shape}; paths are (paths, times, channels).")
    size = min(len(x), len(y)) // 2
    if size < 2:
        raise ValueError(
            "`fake` and `real` have fewer than 4 paths; half of them train, half test."
        )
    train, test = [], []
    for paths, half in zip((x, y), jax.random.split(key), strict=True):
        shuffled = jnp.asarray(paths)[jax.random.permutation(half, len(paths))]
        train.append(shuffled[:size])
        test.append(shuffled[size : 2 * size])
    train, test = jnp.concatenate(train), jnp.concatenate(test)
    at = np.unique(np.linspace(0, x.shape[1] - 1, times).round().astype(int))
    accuracy = float(_held_out_accuracy(train[:, at], test[:, at]))
    error = 0.5 / math.sqrt(2 * size)
    p_value = 0.5 * math.erfc((accuracy - 0.5) / error / math.sqrt(2))
    return SampleTest(np.asarray(accuracy), np.asarray(p_value), error)


def autocorrelation(
    paths: Float[ArrayLike, "paths times channels"], lags: Sequence[int]
) -> Float[np.ndarray, "lags channels"]:
    """The correlation over paths of X_t and X_(t + lag), mean over t.

    Args:
        paths: Shape (paths, times, channels).
        lags: In numbers of times.

    Raises:
        ValueError: for a lag that is not in the series, and for paths that are not finite.
    """
    x = _sample("paths", paths)
    if x.ndim != 3:
        raise ValueError(f"`paths` has shape {x.shape}; paths are (paths, times, channels).")
    length = x.shape[1]
    wrong = [lag for lag in lags if not 0 <= lag < length]
    if wrong:
        raise ValueError(f"`lags` has {wrong[0]}, but the paths have {length} times.")
    x = x - x.mean(axis=0)
    spread = x.std(axis=0)
    x = x / np.where(spread > 0, spread, 1.0)
    products = [np.mean(x[:, lag:] * x[:, : length - lag], axis=0) for lag in lags]
    return np.stack([product.mean(axis=0) for product in products])


def coverage(
    fake: Float[ArrayLike, "draws *shape"],
    real: Float[ArrayLike, "..."],
    levels: Sequence[float] = (0.5, 0.9),
) -> Float[np.ndarray, "levels *shape"]:
    """How often data lie in the central bands of a model; of a right model as often as the bands say.

    Args:
        fake: Draws, shape (draws, ...): paths of a generator, (draws, times, channels), or forecasts,
            (draws, examples, times, channels).
        real: Data, shape (..., ...), with leading axes that `fake` has not, over which the mean is taken:
            (examples, times, channels) in both cases. NaN is left out.
        levels: Of the bands. Those of few draws are too narrow: about 2 / draws is missing.

    Returns:
        Shape (levels, ...), of the axes of one draw. Take the mean over those that mean nothing to you.

    Raises:
        ValueError: for data that do not end in the axes of a draw, or a level outside (0, 1).
    """
    draws, data = _sample("fake", fake), np.asarray(real, dtype=float)
    shape = draws.shape[1:]
    if data.shape[data.ndim - len(shape) :] != shape:
        raise ValueError(
            f"`real` has shape {data.shape} but one draw of `fake` has shape {shape}; data end in the "
            "axes of a draw."
        )
    if not all(0 < level < 1 for level in levels):
        raise ValueError(f"`levels` is {tuple(levels)}; each is between 0 and 1, such as 0.9.")
    data = data.reshape(-1, *shape)
    seen = ~np.isnan(data)
    shares = []
    for level in levels:
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
        inside = np.sum((low <= data) & (data <= high), axis=0)
        shares.append(inside / np.where(seen.any(axis=0), seen.sum(axis=0), np.nan))
    return np.stack(shares)


def _distance(x: np.ndarray, y: np.ndarray) -> float:
    """The KS distance of two sorted samples."""
    both = np.concatenate([x, y])
    F = np.searchsorted(x, both, side="right") / x.size
    G = np.searchsorted(y, both, side="right") / y.size
    return float(np.abs(F - G).max())


def _effective(n: int, m: int | None = None) -> float:
    """What a distance is multiplied by; the last two terms are Stephens' correction (1970)."""
    root = math.sqrt(n if m is None else n * m / (n + m))
    return root + 0.12 + 0.11 / root


def _kolmogorov(x: ArrayLike) -> np.ndarray:
    """The probability that the limit of sqrt(n) D exceeds x; below 0.2 it is 1 to rounding."""
    x = np.maximum(np.asarray(x, dtype=float), 0.2)
    k = np.arange(1, 40).reshape(-1, *[1] * x.ndim)
    return np.clip(2 * np.sum((-1.0) ** (k - 1) * np.exp(-2 * k**2 * x**2), axis=0), 0.0, 1.0)


@functools.partial(jax.jit, static_argnames="n")
def _discrepancies(
    gram: Float[Array, "pooled pooled"], given: Array, orders: Array, n: int
) -> tuple[Float[Array, ""], Float[Array, " orders"]]:
    """The discrepancy of the first n of the pooled sample in each order; `gram` has a zero diagonal."""
    m = gram.shape[0] - n

    def statistic(order: Array) -> Array:
        first = (order < n).astype(gram.dtype)
        seen, other = gram @ first, gram @ (1 - first)
        within = first @ seen / (n * (n - 1)) + (1 - first) @ other / (m * (m - 1))
        return within - 2 * (first @ other) / (n * m)

    return statistic(given), jax.lax.map(statistic, orders)


@jax.jit
def _held_out_accuracy(
    train: Float[Array, "paths times channels"], test: Float[Array, "paths times channels"]
) -> Float[Array, ""]:
    """Of a classifier of the first half of the paths against the second, as large."""
    labels = jnp.arange(train.shape[0]) < train.shape[0] // 2
    weights = _logistic(_features(train, train), labels)
    return jnp.mean((_features(test, train) @ weights > 0) == labels)


def _features(paths: Array, reference: Array) -> Array:
    """Values, squares and products of a path, standardized as of the reference, and a constant."""

    def products(x: Array) -> Array:
        x = _standardized(x, reference)
        parts = [x, x**2, x[:, 1:] * x[:, :-1]]
        channels = range(x.shape[2])
        parts += [x[..., i] * x[..., j] for i in channels for j in channels if i < j]
        return jnp.concatenate([part.reshape(x.shape[0], -1) for part in parts], axis=1)

    x = _standardized(products(paths), products(reference))
    return jnp.concatenate([jnp.ones((x.shape[0], 1), x.dtype), x], axis=1)


def _standardized(x: Array, reference: Array) -> Array:
    return (x - reference.mean(axis=0)[None]) / (reference.std(axis=0)[None] + 1e-12)


def _logistic(x: Array, labels: Array, ridge: float = 1.0, iterations: int = 12) -> Array:
    """Weights of a logistic regression with a ridge, by Newton's method."""
    identity = ridge * jnp.eye(x.shape[1], dtype=x.dtype)

    def improve(weights: Array, _: None) -> tuple[Array, None]:
        probability = jax.nn.sigmoid(x @ weights)
        curvature = (x.T * (probability * (1 - probability))[None]) @ x + identity
        slope = x.T @ (labels.astype(x.dtype) - probability) - ridge * weights
        return weights + jnp.linalg.solve(curvature, slope), None

    return jax.lax.scan(improve, jnp.zeros(x.shape[1], x.dtype), length=iterations)[0]


def _sample(name: str, values: ArrayLike) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim < 1 or values.shape[0] < 2:
        raise ValueError(
            f"`{name}` has shape {values.shape}; a sample has two values or more along its first axis."
        )
    if not np.isfinite(values).all():
        at = tuple(map(int, np.argwhere(~np.isfinite(values))[0]))
        raise ValueError(f"`{name}` is {values[at]} at index {at}; a sample must be finite.")
    return values


def _check_alike(x: np.ndarray, y: np.ndarray) -> None:
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"`fake` has shape {x.shape} but `real` has shape {y.shape}; samples agree in all axes but "
            "the first."
        )


def _vectors(fake: ArrayLike, real: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, y = _sample("fake", fake), _sample("real", real)
    _check_alike(x, y)
    return x.reshape(len(x), -1), y.reshape(len(y), -1)
