r"""What is measured of a true value m: the laws of the error.

    Gaussian            y = m + s e                    a measuring device
    LogNormal           log y = log m + s e            errors in per cent; m is the median
    Poisson             y ~ Poisson(m)                 counts
    NegativeBinomial    mean m, variance m + m^2 / k   counts that scatter more: k is the size

Each has the log density of y, and a residual r whose square is the deviance, twice what the log density
falls below its value at m = y (up to what does not depend on m):

    Gaussian, LogNormal   r = (m - y) / s
    Poisson               r^2 = 2 (y log(y / m) - y + m) = (m - y)^2 h((y - m) / m) / m,
                          h(x) = 2 ((1 + x) log(1 + x) - x) / x^2

and the negative binomial is the difference of two such terms. So least squares of the residuals is
maximum likelihood, whatever the law. A number is known; what is to be found is a parameter:
`Gaussian(0.1)`, `Gaussian(Positive(0.1))`.

In code:    s -> std, k -> size, r -> residual
Reference:  Generalized linear models (1972) | doi:10.2307/2344614
"""

from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln, xlogy
from jaxtyping import Array, Float, PRNGKeyArray

from nde._parameters import AbstractParameter, Frozen, check_made
from nde.solvers.inputs import is_traced


class AbstractErrors(eqx.Module):
    """The law of what is measured, of arrays of true and measured values of one shape."""

    whole = False  # whether measured values are counts
    least = -np.inf  # what measured values are not below

    @abstractmethod
    def log_density(self, y: Float[Array, "..."], mean: Float[Array, "..."]) -> Array:
        """Of each value."""

    @abstractmethod
    def residual(self, y: Float[Array, "..."], mean: Float[Array, "..."]) -> Array:
        """The signed root of the deviance of each value."""

    @abstractmethod
    def sample(self, mean: Float[Array, "..."], key: PRNGKeyArray) -> Array:
        """What could be measured."""


class Gaussian(AbstractErrors):
    """Errors of one size.

    Args:
        std: Standard deviation, a number or an array that broadcasts with the values: known, or a
            `Positive` to be found.
    """

    std: Any

    def __init__(self, std: Any):
        self.std = _positive("std", std)

    def log_density(self, y: Float[Array, "..."], mean: Float[Array, "..."]) -> Array:
        std = self.std.value
        return -((mean - y) ** 2) / (2 * std**2) - jnp.log(std) - np.log(2 * np.pi) / 2

    def residual(self, y: Float[Array, "..."], mean: Float[Array, "..."]) -> Array:
        return (mean - y) / self.std.value

    def sample(self, mean: Float[Array, "..."], key: PRNGKeyArray) -> Array:
        return mean + self.std.value * jax.random.normal(key, mean.shape, mean.dtype)


class LogNormal(AbstractErrors):
    """Relative errors of positive values, whose median is the true value.

    Args:
        std: Standard deviation of the logarithm, as in `Gaussian`: 0.1 is about 10 %.
    """

    std: Any
    least = 0.0

    def __init__(self, std: Any):
        self.std = _positive("std", std)

    def log_density(self, y: Float[Array, "..."], mean: Float[Array, "..."]) -> Array:
        return Gaussian(self.std).log_density(jnp.log(y), jnp.log(mean)) - jnp.log(y)

    def residual(self, y: Float[Array, "..."], mean: Float[Array, "..."]) -> Array:
        return (jnp.log(mean) - jnp.log(y)) / self.std.value

    def sample(self, mean: Float[Array, "..."], key: PRNGKeyArray) -> Array:
        return mean * jnp.exp(self.std.value * jax.random.normal(key, mean.shape, mean.dtype))


class Poisson(AbstractErrors):
    """Counts of independent events."""

    whole = True
    least = 0.0

    def log_density(self, y: Float[Array, "..."], mean: Float[Array, "..."]) -> Array:
        return xlogy(y, mean) - mean - gammaln(y + 1)

    def residual(self, y: Float[Array, "..."], mean: Float[Array, "..."]) -> Array:
        return (mean - y) * jnp.sqrt(_curvature(y, mean))

    def sample(self, mean: Float[Array, "..."], key: PRNGKeyArray) -> Array:
        return jax.random.poisson(key, mean).astype(mean.dtype)


class NegativeBinomial(AbstractErrors):
    """Counts with more scatter than Poisson: the variance is m + m^2 / size.

    Args:
        size: Known, or a `Positive` to be found. A large one is Poisson.
    """

    size: Any
    whole = True
    least = 0.0

    def __init__(self, size: Any):
        self.size = _positive("size", size)

    def log_density(self, y: Float[Array, "..."], mean: Float[Array, "..."]) -> Array:
        k = self.size.value
        chosen = gammaln(y + k) - gammaln(k) - gammaln(y + 1)
        return chosen + xlogy(y, mean) - y * jnp.log(mean + k) - k * jnp.log1p(mean / k)

    def residual(self, y: Float[Array, "..."], mean: Float[Array, "..."]) -> Array:
        k = self.size.value
        return (mean - y) * jnp.sqrt(_curvature(y, mean) - _curvature(y + k, mean + k))

    def sample(self, mean: Float[Array, "..."], key: PRNGKeyArray) -> Array:
        first, second = jax.random.split(key)
        k = jnp.broadcast_to(jnp.asarray(self.size.value, mean.dtype), mean.shape)
        rate = mean / k * jax.random.gamma(first, k, dtype=mean.dtype)
        return jax.random.poisson(second, rate).astype(mean.dtype)


def _curvature(y: Array, mean: Array) -> Array:
    """h((y - mean) / mean) / mean: the deviance over the square of the difference."""
    x = (y - mean) / mean
    is_near = jnp.abs(x) < 1e-2
    near = jnp.where(is_near, x, 0.0)
    series = 1 + near * (-1 / 3 + near * (1 / 6 + near * (-1 / 10 + near * (1 / 15 - near / 21))))
    # As it stands, where it does not cancel; its slope is finite at y = 0 too.
    far = jnp.where(is_near, y + 1.0, mean)
    exact = 2 * (xlogy(y, y) - xlogy(y, far) - y + far) / (y - far) ** 2
    return jnp.where(is_near, series / mean, exact)


def _positive(name: str, value: Any) -> Any:
    """A parameter; a number as one that is held."""
    check_made(value)
    value = value if isinstance(value, AbstractParameter) else Frozen(value)
    if not is_traced(value.value) and not (np.asarray(value.value) > 0).all():
        raise ValueError(f"`{name}` is {value.value}; it is positive.")
    return value
