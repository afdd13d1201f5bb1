r"""Asynchronous leapfrog: second order, and every step can be undone.

The state is the solution y and a companion v that follows dy/dt, v = f(t0, y0) at the start.
One step is

    y  <-  y + h/2 v
    v  <-  (1 - 2 eta) v + 2 eta f(t0 + h/2, y)
    y  <-  y + h/2 v

with eta = 1 the reflection v <- 2 f - v. The solution that Euler's method would have given is
y0 + h v0, so h (v1 - v0) / 2 estimates the error, to first order.

Damping, eta < 1, pulls v towards f. It makes v lag behind, which leaves a term
-(1 - eta) / (2 eta) h^2 f' per step: *the order drops to one*. And un-stepping amplifies rounding
by 1 / |1 - 2 eta| per step; at eta = 1/2 a step cannot be undone at all.

In code:    y, v -> Y, V (the two members)    h -> the control of the step
Cost:       one evaluation of f per step, in either direction, and one more at the start.
Not for:    dissipative fields with eta = 1: stable on the imaginary axis alone. Use `EES27` there.
            Stochastic equations: v would follow a derivative that does not exist.
Reference:  MALI: a memory efficient and reverse accurate integrator for neural ODEs (2021)
            | arXiv:2102.04668
"""

from jaxtyping import PyTree

from nde.solvers.reversible.coupling import Coupling, Step, total
from nde.solvers.reversible.solver import AbstractKickedSolver, half

Y, V = 0, 1


class AsynchronousLeapfrog(AbstractKickedSolver):
    """Asynchronous leapfrog (MALI): order 2, one evaluation per step.

    `y0` is any pytree, `terms` an `ODETerm` (or a term with a smooth control).
    Output between steps is a quadratic that keeps the order.

    Args:
        eta: Damping, in (0, 1] without 1/2. Below 1 the method is of order 1, and the gradient
            needs restarts: see the module.

    Raises:
        ValueError: if `eta` is outside that range.
    """

    eta: float = 1.0

    shared_ends = False
    twins = False

    def __check_init__(self):
        if not 0.0 < self.eta <= 1.0 or self.eta == 0.5:
            raise ValueError(
                f"`eta` is {self.eta}; a step can be undone for 0 < eta <= 1, eta not 1/2. "
                "Use AsynchronousLeapfrog() for order 2, AsynchronousLeapfrog(eta=0.9) for damping."
            )

    def order(self, terms):
        return 2 if self.eta == 1.0 else 1

    def error_order(self, terms):
        return 2

    def couplings(self, full=False):
        del full  # the error estimate and the output need nothing more

        def follow(step: Step, u: PyTree) -> PyTree:
            return total((2.0 * self.eta, u))

        return (
            Coupling(Y, V, increment=half),
            Coupling(V, Y, a=1.0 - 2.0 * self.eta, field=_field_at_middle, increment=follow),
            Coupling(Y, V, increment=half),
        )

    def start(self, terms, t0, y0, args):
        return y0, terms.vf(t0, y0, args)


def _field_at_middle(step: Step, y: PyTree) -> PyTree:
    return step.terms.vf(step.t0 + 0.5 * (step.t1 - step.t0), y, step.args)
