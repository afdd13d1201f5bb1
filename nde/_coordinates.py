r"""Coordinates in which a state cannot leave where it belongs.

    Logarithms    y = exp(u),                        u' = f(y) / y
    Shares        y = T p,  p = exp(u) / sum exp(u), u' = f(y) / y,  T' = 0

In shares y' = T p (u' - sum p u') = f - p sum f: the equation itself where the rates add up to zero,
and its projection to a constant total where a network does not quite. A Runge-Kutta step keeps T, so
the total is kept to rounding, whatever the tolerance; in logarithms it is kept to the tolerance.

`Conserving` projects rates along the weights w, f - w (w . f) / (w . w). Runge-Kutta methods keep the
linear invariant w . y.

Not for:    states that reach zero: start at a small positive value.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from nde._inputs import check_callable
from nde.solvers.inputs import is_traced


class AbstractCoordinates(eqx.Module):
    """What is solved for in place of a state of shape (n,)."""

    @abstractmethod
    def encode(self, y: Float[Array, " n"]) -> Float[Array, " coordinates"]:
        """The coordinates of a state."""

    @abstractmethod
    def decode(self, u: Float[Array, " coordinates"]) -> Float[Array, " n"]:
        """The state."""

    @abstractmethod
    def rate(self, u: Array, y: Float[Array, " n"], dy: Float[Array, " n"]) -> Array:
        """The rate of the coordinates, from that of the state."""


class Logarithms(AbstractCoordinates):
    """States that stay positive."""

    def encode(self, y: Float[Array, " n"]) -> Float[Array, " n"]:
        """log y."""
        return jnp.log(_positive(y))

    def decode(self, u: Float[Array, " n"]) -> Float[Array, " n"]:
        """exp u."""
        return jnp.exp(u)

    def rate(
        self, u: Float[Array, " n"], y: Float[Array, " n"], dy: Float[Array, " n"]
    ) -> Float[Array, " n"]:
        """y' / y."""
        return dy / y


class Shares(AbstractCoordinates):
    """Positive states of a constant total: compartments, concentrations of a closed system."""

    def encode(self, y: Float[Array, " n"]) -> Float[Array, " n+1"]:
        """The logarithms, and the total behind them."""
        return jnp.append(jnp.log(_positive(y)), jnp.sum(y))

    def decode(self, u: Float[Array, " n+1"]) -> Float[Array, " n"]:
        """The total, divided up."""
        share = jnp.exp(u[:-1] - jnp.max(u[:-1]))
        return u[-1] * share / jnp.sum(share)

    def rate(
        self, u: Float[Array, " n+1"], y: Float[Array, " n"], dy: Float[Array, " n"]
    ) -> Float[Array, " n+1"]:
        """y' / y, and zero."""
        return jnp.append(dy / y, jnp.zeros_like(y[0]))


class Conserving(eqx.Module):
    """A field, such as a network, that does not change the total `weights . y`.

    Args:
        field: `field(t, y, args)`, shape (n,).
        weights: One of each entry of the state.
    """

    field: Callable
    weights: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, field: Callable, weights: ArrayLike):
        check_callable("field", field, "(t, y, args)")
        self.field = field
        self.weights = tuple(np.asarray(weights, dtype=float).ravel().tolist())
        if not any(self.weights):
            raise ValueError(f"`weights` is {weights}; one of them is not zero.")

    def __call__(
        self, t: Float[Array, ""], y: Float[Array, " n"], args: PyTree[Any]
    ) -> Float[Array, " n"]:
        """The rates without what would change the total."""
        dy = self.field(t, y, args)
        w = jnp.asarray(self.weights, dy.dtype)
        return dy - w * (jnp.dot(w, dy) / jnp.dot(w, w))


def _positive(y: Float[Array, " n"]) -> Float[Array, " n"]:
    if not eqx.is_array(y) or y.ndim != 1:
        raise ValueError("`y0` is not one array of shape (n,), which `coordinates` are for.")
    if not is_traced(y) and not (np.asarray(y) > 0).all():
        raise ValueError(
            f"`y0` is {np.asarray(y).tolist()}; in these `coordinates` every entry is positive. Start "
            "what is absent at a small value, far below what is measured."
        )
    return y
