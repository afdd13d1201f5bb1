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

import functools
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from nde._controlled import check_control, check_steps, initial_of, solve_cde
from nde._protocol import AbstractODE, check_callable
from nde.paths import LogSignaturePath, lyndon_words

__all__ = ["LogNeuralCDE"]


class LogNeuralCDE(AbstractODE):
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
    causal: bool = eqx.field(default=False, kw_only=True, static=True)
    steps_per_interval: int | None = eqx.field(default=1, kw_only=True, static=True)
    solver: diffrax.AbstractSolver = eqx.field(default=diffrax.Bosh3(), kw_only=True)

    def __check_init__(self):
        check_steps(self.steps_per_interval)
        check_callable("vector_field", self.vector_field, "(t, z, args)")
        check_callable("initial", self.initial, "(x)")
        check_callable("readout", self.readout, "(z)")

    def __call__(self, control: LogSignaturePath, args: PyTree[Any] = None) -> PyTree[Array]:
        """The output at the end of the path."""
        states: Any = self.solve(control, args=args).ys
        return self.readout(states[-1])

    def trajectory(
        self,
        control: LogSignaturePath,
        ts: Float[Array, " times"] | None = None,
        args: PyTree[Any] = None,
    ) -> PyTree[Array]:
        """The outputs at `ts`, shape (times, ...); `None`: at the ends of the windows."""
        check_log_signatures(control)
        states = self.solve(control, control.times if ts is None else ts, args).ys
        return jax.vmap(self.readout)(states)

    def solve(
        self,
        control: LogSignaturePath,
        ts: Float[Array, " times"] | None = None,
        args: PyTree[Any] = None,
        *,
        throw: bool = True,
    ) -> diffrax.Solution:
        """The same solve with its `.stats` and `.result`; `.ys` are the hidden states.

        Args:
            control: Log-signatures of the data, from `nde.paths.log_signature`.
            ts: Times, shape (times,), inside the path and ordered; `None`: the end alone. The
                equation follows the data at the ends of the windows.
            args: Passed to the vector field.
            throw: Whether a failed solve raises. If not, look at `.result`: `.ys` is inf at `ts`
                that were not reached, and with `ts=None` the state where the solve stopped.

        Raises:
            ValueError: if the path does not fit the model, `ts` is outside the data, or the last step
                is too short for the precision of the times (inside `jax.jit`, a RuntimeError).
        """
        check_log_signatures(control)
        check_control(control, self.causal)
        z0 = initial_of(self.initial, control.start)
        matrix = self.vector_field
        if self.brackets and control.depth == 2:
            matrix = functools.partial(_with_brackets, self.vector_field)
        elif self.brackets and control.depth > 2:
            raise ValueError(
                f"`control` has log-signatures of depth {control.depth}, but brackets are computed "
                "up to depth 2. Use log_signature(..., depth=2), or brackets=False."
            )
        return solve_cde(self, matrix, control, z0, ts, args, throw=throw)


def check_log_signatures(control: Any) -> None:
    """`control` is made by `log_signature`."""
    if not isinstance(control, LogSignaturePath):
        raise ValueError(
            f"`control` is a {type(control).__name__}; make log-signatures of the path first: "
            "nde.paths.log_signature(path, window=32, depth=2)."
        )


def _with_brackets(
    vector_field: Callable, t: Float[Array, ""], z: Float[Array, " hidden"], args: PyTree[Any]
) -> Float[Array, "hidden coordinates"]:
    """The columns F_i, then [F_i, F_j] for i < j in the order of `lyndon_words`."""
    columns, push = jax.linearize(lambda z: vector_field(t, z, args), z)
    # along[i, :, j] = DF_j F_i: one product per channel moves all columns.
    along = jax.vmap(push, in_axes=1)(columns)
    channels = columns.shape[1]
    pairs = [word for word in lyndon_words(channels, 2) if len(word) == 2]
    if not pairs:  # one channel commutes with itself
        return columns
    first, second = (jnp.array(side) for side in zip(*pairs, strict=True))
    brackets = along[first, :, second] - along[second, :, first]
    return jnp.concatenate([columns, brackets.T], axis=1)
