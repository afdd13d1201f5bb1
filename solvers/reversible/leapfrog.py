r"""Asynchronous leapfrog: second order, and every step can be undone.

The state is the solution y and a companion v that follows dy/dt, v = f(t0, y0) at the start.
One step is

    y  <-  y + h/2 v
    v  <-  2 f(t0 + h/2, y) - v
    y  <-  y + h/2 v

The solution that Euler's method would have given is y0 + h v0, so h (v1 - v0) / 2 estimates the
error, to first order.

In code:    y, v -> Y, V (the two members)    h -> the control of the step
Cost:       one evaluation of f per step, in either direction, and one more at the start.
Not for:    dissipative fields: stable on the imaginary axis alone. Use `EES27` there.
            Stochastic equations: v would follow a derivative that does not exist.
Reference:  MALI: a memory efficient and reverse accurate integrator for neural ODEs (2021)
            | arXiv:2102.04668
"""

from typing import Any

from jaxtyping import PyTree

from nde.solvers import trees
from nde.solvers.methods.declared import Declared
from nde.solvers.reversible.coupling import Coupling, StepInput
from nde.solvers.reversible.solver import AbstractKickedSolver, half

Y, V = 0, 1


class AsynchronousLeapfrog(AbstractKickedSolver):
    """Asynchronous leapfrog (MALI): order 2, one evaluation per step.

    `y0` is any pytree, `terms` an `ODETerm` (or a term with a smooth control).
    Output between steps is a quadratic that keeps the order.
    """

    shared_ends = False
    twins = False

    @property
    def declared(self):
        return Declared(1, 1, at_start=1)

    def order(self, terms: PyTree):
        return 2

    def error_order(self, terms: PyTree):
        return 2

    def couplings(self, with_error: bool = False):
        del with_error  # the error estimate and the output need nothing more
        return (
            Coupling(Y, V, increment=half),
            Coupling(V, Y, a=-1.0, field=_field_at_middle, increment=_twice),
            Coupling(Y, V, increment=half),
        )

    def initial_members(self, terms: PyTree, t0: Any, y0: PyTree, args: Any):
        return y0, terms.vf(t0, y0, args)


def _field_at_middle(step: StepInput, y: PyTree) -> PyTree:
    return step.terms.vf(step.t0 + 0.5 * (step.t1 - step.t0), y, step.args)


def _twice(step: StepInput, u: PyTree) -> PyTree:
    del step
    return trees.scale(2.0, u)
