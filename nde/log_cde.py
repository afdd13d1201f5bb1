r"""The log-ODE method for neural controlled differential equations: a long series in few steps.

Over a window of the path X the solution of dz = F(z) dX is, up to an error of the next order of the
size of the window, that of an autonomous equation made from the log-signature L of the window:

    depth 1    dz/ds = sum_i F_i(z) L_i,                           s from 0 to 1
    depth 2            + sum_{i<j} [F_i, F_j](z) L_ij,    [V, W] = DW V - DV W

with F_i the columns of F. The brackets are computed from F (log-neural CDE), one Jacobian-vector
product per channel: depth 2 has no more parameters than depth 1. Or a network has a column of its
own for each coordinate of the log-signature (neural rough differential equation).

In code:    L -> the increments of a `nde.paths.LogSignaturePath`; F -> vector_field
Needs:      a field that is twice differentiable (silu, softplus, tanh), for the brackets.
Error:      of one window of size e: e^2 at depth 1, e^3 at depth 2.
Reference:  Log neural controlled differential equations (2024) | arXiv:2402.18512
            Neural rough differential equations for long time series (2021) | arXiv:2009.08295
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from nde._controlled import AbstractCDE, initial_of
from nde._inputs import check_callable
from nde.paths import AbstractControl, LogSignaturePath, lyndon_words

__all__ = ["LogNeuralCDE"]


class LogNeuralCDE(AbstractCDE):
    """One path of log-signatures in, one output out; `jax.vmap` over paths is the batch. See the
    module for the equation.

    Args:
        vector_field: `vector_field(t, z, args) -> (hidden, channels)`, such as
            `nde.fields.MatrixField`; without `brackets`, (hidden, coordinates).
        initial: `initial(x) -> z`, from the first value of the data, time included, shape
            (channels,), to shape (hidden,).
        readout: `readout(z) -> output`, of any shape.
        brackets: Whether depth 2 is computed from the field, by its brackets. If not, the field has
            a column for each of the `len(nde.paths.lyndon_words(channels, depth))` coordinates, and
            any depth will do.
        causal: Whether to refuse paths that look ahead. Inside a window every path does.
        steps_per_interval: Steps of equal length per window; `None` leaves the steps to
            `stepsize_controller`, and ends one at each end of a window.
        solver: How one step is taken, a `diffrax` solver.
        stepsize_controller: How long a step is, a `diffrax` step-size controller.
        adjoint: How gradients are taken.
        dt0: First step, in the unit of the times; `None` lets the controller choose.
        max_steps: Largest number of attempted steps of one solve, for steps that the controller
            chooses.

    Raises:
        ValueError: for numerics that can never work, and, at a call, for a path that does not fit
            the model.

    Example:
        >>> field = nde.fields.MatrixField(8, 3, width=64, depth=2, activation=jax.nn.silu, key=key)
        >>> model = nde.LogNeuralCDE(field, initial, readout)
        >>> control = nde.paths.log_signature(nde.paths.linear(ts, ys), window=32, depth=2)
        >>> output = model(control)
    """

    vector_field: Callable
    initial: Callable
    readout: Callable = lambda z: z
    brackets: bool = eqx.field(default=True, kw_only=True, static=True)
    solver: diffrax.AbstractSolver = eqx.field(default=diffrax.Bosh3(), kw_only=True)

    def __check_init__(self):
        check_callable("vector_field", self.vector_field, "(t, z, args)")
        check_callable("initial", self.initial, "(x)")
        check_callable("readout", self.readout, "(z)")

    def matrix(self, control: AbstractControl) -> Callable:
        """The columns of the field, with their brackets where the path has them."""
        if not isinstance(control, LogSignaturePath):
            raise ValueError(
                f"`control` is a {type(control).__name__}; make log-signatures of the path first: "
                "nde.paths.log_signature(path, window=32, depth=2)."
            )
        if not self.brackets or control.depth == 1:
            return self.vector_field
        if control.depth > 2:
            raise ValueError(
                f"`control` has log-signatures of depth {control.depth}, but brackets are computed "
                "up to depth 2. Use log_signature(..., depth=2), or brackets=False."
            )
        return Bracketed(self.vector_field)

    def initial_state(self, x: Float[Array, " channels"]) -> Float[Array, " hidden"]:
        """The hidden state at the first value of the data, `path.start`."""
        return initial_of(self.initial, x)

    def read(self, z: Float[Array, " hidden"], control: AbstractControl) -> PyTree[Array]:
        """The output of a hidden state."""
        return self.readout(z)


class Bracketed(eqx.Module):
    """The columns F_i of a field, then [F_i, F_j] for i < j in the order of `lyndon_words`."""

    vector_field: Callable

    def __call__(
        self, t: Float[Array, ""], z: Float[Array, " hidden"], args: PyTree[Any]
    ) -> Float[Array, "hidden coordinates"]:
        """One Jacobian-vector product per channel moves all columns."""
        columns, push = jax.linearize(lambda z: self.vector_field(t, z, args), z)
        along = jax.vmap(push, in_axes=1)(columns)  # along[i, :, j] = DF_j F_i
        pairs = [word for word in lyndon_words(columns.shape[1], 2) if len(word) == 2]
        if not pairs:  # one channel commutes with itself
            return columns
        first, second = (jnp.array(side) for side in zip(*pairs, strict=True))
        brackets = along[first, :, second] - along[second, :, first]
        return jnp.concatenate([columns, brackets.T], axis=1)
