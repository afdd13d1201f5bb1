r"""A pull to the data: prediction-error control.

    y' = f(t, y) + rate (x(t) - y),        x the data, straight between observations

With a large rate the solution is the data, whatever f; as the rate falls to zero f has to do it. In
between the solution stays near the data even where f would lead it astray, and the loss has few minima.
In the language of observers this is a Luenberger observer (a nudging term) with a fading gain.

Reference:  Parameter estimation: the prediction error approach for chaotic and oscillating systems
            (Abarbanel et al., 2009) | doi:10.1137/090749761
"""

import dataclasses
from typing import Any

import diffrax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from nde._initial_value import AbstractODE
from nde._model import AbstractModel
from nde._solve import Rates
from nde.paths import ControlPath, linear


class Pulled(AbstractODE):
    """A model whose solution is pulled to a path; made by `pulled`."""

    ode: AbstractODE
    path: ControlPath
    rate: Float[Array, ""]

    def vector_field(self, t: Array, y: Array, args: PyTree[Any]) -> Array:
        """f, and the pull."""
        x = self.ode.lift(t, self.path.evaluate(t), args)
        return self.ode.vector_field(t, y, args) + self.rate * (x - y)

    def terms(self) -> diffrax.ODETerm:
        """dy/dt = vector_field(t, y, args)."""
        return diffrax.ODETerm(Rates(self.vector_field))

    def lift(self, t: Array, y0: Array, args: PyTree[Any]) -> Array:
        """As the model."""
        return self.ode.lift(t, y0, args)

    def read(self, t: Array, y: Array, args: PyTree[Any]) -> Array:
        """As the model."""
        return self.ode.read(t, y, args)


def through(
    ts: Float[Array, " times"],
    ys: Float[Array, "times channels"],
    observed: Bool[Array, "times channels"],
) -> ControlPath:
    """The data of one series as a path."""
    length = 1 + jnp.sum(jnp.diff(ts) != 0)
    return linear(ts, jnp.where(observed, ys, jnp.nan), length, time=False)


def pulled(ode: AbstractODE, path: ControlPath, rate: Float[Array, ""]) -> Pulled:
    """The model, pulled to one series."""
    numerics = {f.name: getattr(ode, f.name) for f in dataclasses.fields(AbstractModel)}
    return Pulled(ode, path, jnp.asarray(rate, path.ts.dtype), **numerics)
