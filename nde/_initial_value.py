"""What the models of ordinary differential equations share: a state at the first time in, states out.

    dy/dt = f(t, y, args),    y(ts[0]) = y0,    output y(ts)

The solve runs from `t0 = ts[0]` to `t1 = ts[-1]`; `ts` may decrease, and may repeat its last value
(padding).
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
from jaxtyping import Array, Float, PyTree

from nde._inputs import check_first_step, check_state, check_times, check_vector_field
from nde._model import AbstractModel
from nde._solve import in_one_precision, solve
from nde._times import check_spacing

State = PyTree[Float[Array, "..."]]


class AbstractODE(AbstractModel):
    """Anything that is solved as dy/dt = vector_field(t, y, args) from a state at `ts[0]`."""

    vector_field: eqx.AbstractVar[Callable]

    @abstractmethod
    def terms(self) -> PyTree[diffrax.AbstractTerm]:
        """The equation, in the form that the solver takes."""

    @abstractmethod
    def lift(self, t: Array, y0: State, args: PyTree[Any]) -> State:
        """The state that is solved for, from the one that is given."""

    @abstractmethod
    def read(self, t: Array, y: State, args: PyTree[Any]) -> PyTree[Array]:
        """The output, from the state that is solved for."""

    def __call__(
        self, ts: Float[Array, " times"], y0: State, args: PyTree[Any] = None
    ) -> PyTree[Float[Array, "times ..."]]:
        """The states at `ts`, shape (times, ...) for every leaf of `y0`."""
        return self.solve(ts, y0, args).ys

    def solve(
        self,
        ts: Float[Array, " times"],
        y0: State,
        args: PyTree[Any] = None,
        *,
        integrand: Callable | None = None,
        throw: bool = True,
    ) -> diffrax.Solution:
        """The same solve with its `.stats` and `.result`.

        Args:
            ts: Times, shape (times,), ordered; the solve runs from the first to the last.
            y0: State at `ts[0]`, an array or a PyTree of arrays, of any shape. It takes the
                precision of `ts` if that is higher, and keeps it whatever the parameters have.
            args: Passed to the vector field, or to the network in it.
            integrand: `integrand(t, y, args)`, arrays of any shape: an energy, a cost. `.ys` is then a
                pair, of the output and of the integral from `ts[0]`, which takes no part in the choice
                of steps.
            throw: Whether a failed solve raises. If not, look at `.result`: `.ys` is inf where it
                was not reached.

        Raises:
            ValueError: if `ts`, `y0` or what the vector field returns cannot be solved.
            nde.solvers.SolveError: with `throw`, if the solve fails, with the cause; inside `jax.jit`
                and other transformations a RuntimeError without it.
        """
        return solve_from(self, ts, y0, args, integrand=integrand, throw=throw)


def solve_from(
    model: AbstractODE,
    ts: Float[Array, " times"],
    y0: State,
    args: PyTree[Any],
    *,
    throw: bool,
    integrand: Callable | None = None,
    also: diffrax.SubSaveAt | None = None,
) -> diffrax.Solution:
    """Check the input and solve from `ts[0]` to `ts[-1]`.

    `.ys` is the output at `ts`, leaves of shape (times, ...). With `also`, `.ts` and `.ys` are lists:
    that, and what `also` saves.
    """
    ts, y0 = checked(model, ts, y0)
    y0 = model.lift(ts[0], y0, args)
    check_vector_field(model.vector_field, ts[0], y0, args)
    outputs = diffrax.SubSaveAt(ts=ts, fn=model.read)
    return solve(
        model,
        model.terms(),
        y0,
        t0=ts[0],
        t1=ts[-1],
        args=args,
        saveat=outputs if also is None else [outputs, also],
        integrand=integrand,
        throw=throw,
    )


def checked(
    model: AbstractModel, ts: Float[Array, " times"], y0: State
) -> tuple[Float[Array, " times"], State]:
    """`ts` and `y0` that can be solved, in the higher precision of the two."""
    check_times(ts)
    check_first_step(ts, model.dt0)
    check_spacing("ts", ts)
    check_state(y0)
    return in_one_precision(ts, y0)
