r"""Reversible Heun: second order, one evaluation per step, for ODEs, CDEs and Stratonovich SDEs.

The state is the solution y and a copy z, with z = y at the start. With dX the increment of the
control over the step (h for an ODE),

    y  <-  y + 1/2 f(t0, z) dX
    z  <-  2 y - z
    y  <-  y + 1/2 f(t1, z) dX

The last evaluation of a step is the first of the next. The solution that Euler's method would have
given is y0 + f(t0, z0) dX, so (f(t1, z1) - f(t0, z0)) dX / 2 estimates the error, to first order.

In code:    y, z -> Y, Z (the two members)    f dX / 2 -> `half`
Cost:       one evaluation of f per step, in either direction.
Not for:    dissipative fields: stable on the imaginary segment h lambda in [-i, i] alone, unstable
            for every negative real h lambda. Use `EES27` there.
Reference:  Efficient and accurate gradients for neural SDEs (2021) | arXiv:2105.13493
"""

from typing import Any

import diffrax
from jaxtyping import PyTree

from nde.solvers.methods.declared import Declared
from nde.solvers.reversible.coupling import Coupling, StepInput
from nde.solvers.reversible.solver import AbstractKickedSolver, half

Y, Z = 0, 1


class ReversibleHeun(AbstractKickedSolver, diffrax.AbstractStratonovichSolver):
    """Reversible Heun: order 2, strong order 1/2 (1 for additive noise), one evaluation per step.

    `y0` is any pytree, `terms` any single term. See the module for the equations and the stability.
    Output between steps is a quadratic that keeps the order.
    """

    shared_ends = True
    twins = True

    @property
    def declared(self):
        return Declared(1, 1, at_start=1, after_jump=1)

    def order(self, terms: PyTree):
        return 2

    def strong_order(self, terms: PyTree):
        return 0.5

    def couplings(self, with_error: bool = False):
        del with_error  # the error estimate and the output need nothing more
        return (
            Coupling(Y, Z, field=_field_at_start, increment=half),
            Coupling(Z, Y, a=-1.0, b=2.0),
            Coupling(Y, Z, field=_field_at_end, increment=half),
        )

    def initial_members(self, terms: PyTree, t0: Any, y0: PyTree, args: Any):
        return y0, y0


def _field_at_start(step: StepInput, z: PyTree) -> PyTree:
    return step.terms.vf(step.t0, z, step.args)


def _field_at_end(step: StepInput, z: PyTree) -> PyTree:
    return step.terms.vf(step.t1, z, step.args)
