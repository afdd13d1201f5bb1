"""Kernels that compare two vectors: what the scores of samples are made of.

A kernel k is called with features on the leading axis and broadcasts over the rest,
`k(x, y)` of shapes (features, ...) -> (...), so a Gram matrix is `k(x[:, :, None], y[:, None, :])`.
A score E k(X, X') - 2 E k(X, Y) is strictly proper, least where X and Y have one law, for

    RBF      k = exp(-|x - y|^2 / (2 s^2)), or its mean over several s;
    Energy   k = -|x - y|^b, 0 < b < 2, on laws with a finite moment of order b: needs no scale.

Reference: Strictly proper scoring rules, prediction, and estimation (2007); A kernel two-sample test
(2012) | https://jmlr.org/papers/v13/gretton12a.html
"""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class RBF:
    """The Gaussian kernel, k(x, y) = exp(-|x - y|^2 / (2 scale^2)).

    Args:
        scale: Its width, in the unit of the features: about the median distance of two of them. Of
            several widths the mean of the kernels is taken.

    Raises:
        ValueError: for a width that is not positive.
    """

    scale: float | tuple[float, ...] = 1.0

    def __post_init__(self):
        if not all(s > 0 and math.isfinite(s) for s in self.scales):
            raise ValueError(f"`scale` is {self.scale}; a width is positive, such as RBF(1.0).")

    @property
    def scales(self) -> tuple[float, ...]:
        """The widths, as a tuple."""
        return self.scale if isinstance(self.scale, tuple) else (self.scale,)

    def __call__(
        self, x: Float[Array, "features ..."], y: Float[Array, "features ..."]
    ) -> Float[Array, "..."]:
        square = _sum(_squared_difference, x, y)
        terms = [jnp.exp(square * (-0.5 / s**2)) for s in self.scales]
        return sum(terms[1:], terms[0]) / len(terms)


@dataclasses.dataclass(frozen=True)
class Energy:
    """The negative distance, k(x, y) = -|x - y|^power: the energy score.

    Args:
        power: In (0, 2).

    Raises:
        ValueError: for another power; at 2 the score sees means only.
    """

    power: float = 1.0

    def __post_init__(self):
        if not 0 < self.power < 2:
            raise ValueError(
                f"`power` is {self.power}; it is between 0 and 2, such as Energy(1.0)."
            )

    def __call__(
        self, x: Float[Array, "features ..."], y: Float[Array, "features ..."]
    ) -> Float[Array, "..."]:
        square = _sum(_squared_difference, x, y)
        apart = square > 0  # a root at zero has no derivative, and 0 * inf would be nan
        return jnp.where(apart, -(jnp.where(apart, square, 1.0) ** (self.power / 2)), 0.0)


def _squared_difference(a: Array, b: Array) -> Array:
    return (a - b) ** 2


def _sum(term: Callable, x: Array, y: Array) -> Array:
    """The sum of term(x, y) over the features; of a few one by one, which compilers like best."""
    if x.shape[0] > 16:
        return jnp.sum(term(x, y), axis=0)
    total = term(x[0], y[0])
    for i in range(1, x.shape[0]):
        total = total + term(x[i], y[i])
    return total
