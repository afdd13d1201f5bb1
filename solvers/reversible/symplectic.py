r"""Symplectic splitting for separable systems: no parasitic mode, no damping, exactly reversible.

For dq/dt = T'(t, p), dp/dt = -V'(t, q) (any pair of fields, each of the other variable alone), the
Stormer-Verlet step of length h is

    p  <-  p - h/2 V'(t0, q)             kick
    q  <-  q + h T'(t0 + h/2, p)         drift
    p  <-  p - h/2 V'(t1, q)             kick

Yoshida's fourth-order method is Verlet with w1 h, w0 h, w1 h one after the other,

    w1 = 1 / (2 - 2^(1/3)),    w0 = 1 - 2 w1;

neighboring kicks are one. Its middle step goes back in time, so the fields are evaluated outside
[t0, t1], up to a distance of 0.36 h. The last kick of a step and the first of the next share V'.

In code:    q, p -> Q, P (the two members, y = (q, p))    T', -V' -> the fields of the two terms
Cost:       one evaluation of each field per step, Yoshida three, in either direction; output
            between steps evaluates T' at both ends of the step as well.
Not for:    systems that are not separable; steps that change with the error (no estimate: changing
            the step spoils the long-time behavior, which is the reason to be here). Stable for
            h omega < 2 (Verlet), 1.57 (Yoshida).
Reference:  Construction of higher order symplectic integrators (1990)
            | doi:10.1016/0375-9601(90)90092-3
"""

from typing import Any

import diffrax
from equinox import AbstractClassVar
from jaxtyping import PyTree

from nde.solvers import trees
from nde.solvers.methods.declared import Declared
from nde.solvers.reversible.coupling import Coupling, Members, Record, StepInput
from nde.solvers.reversible.solver import AbstractCoupledSolver

Q, P = 0, 1


class AbstractSymplecticSolver(AbstractCoupledSolver):
    """A symmetric composition of Stormer-Verlet steps. See the module for the equations."""

    weights: AbstractClassVar[tuple[float, ...]]

    term_structure = (diffrax.AbstractTerm, diffrax.AbstractTerm)
    interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation
    shared_ends = True
    twins = False

    @property
    def declared(self):
        drifts = len(self.weights)
        return Declared(drifts, drifts + 2)

    def members(self, y: PyTree, others: Members | None):
        return tuple(y)

    def split(self, members: Members):
        return members, None

    def couplings(self, with_error: bool = False):
        del with_error
        at, weight = 0.0, 0.0
        out = []
        for w in self.weights:
            out += [_kick(at, (weight + w) / 2), _drift(at + w / 2, w)]
            at, weight = at + w, w
        return (*out, _kick(1.0, weight / 2))

    def initial_members(self, terms: PyTree, t0: Any, y0: PyTree, args: Any):
        if not (isinstance(y0, tuple) and len(y0) == 2):
            raise ValueError(
                f"`y0` is a {type(y0).__name__}; a separable system has two halves. Pass "
                "y0=(q0, p0) and terms=(ODETerm(dq), ODETerm(dp)), dq a field of p and dp of q."
            )
        return y0

    def error(self, records: list[Record]):
        return None

    def dense_info(
        self, step: StepInput, members0: Members, members1: Members, records: list[Record]
    ):
        k0 = _slope(step, step.t0, members0[P], records[0].field)
        k1 = _slope(step, step.t1, members1[P], records[-1].field)
        return dict(y0=members0, y1=members1, k0=k0, k1=k1)

    def func(self, terms: PyTree, t0: Any, y0: PyTree, args: Any):
        return terms[Q].vf(t0, y0[P], args), terms[P].vf(t0, y0[Q], args)


class StormerVerlet(AbstractSymplecticSolver):
    """Stormer-Verlet: order 2, symplectic, one evaluation of each field per step.

    `terms` is a pair `(ODETerm(dq), ODETerm(dp))`, `dq` a field of p and `dp` a field of q, and
    `y0 = (q0, p0)` a pair of pytrees of equal structure: as diffrax's `SemiImplicitEuler`.
    Output between steps is a cubic.
    """

    weights = (1.0,)

    def order(self, terms: PyTree):
        return 2


_W1 = 1.3512071919596578


class Yoshida4(AbstractSymplecticSolver):
    """Yoshida's composition of three Stormer-Verlet steps: order 4, symplectic.

    Terms and state are those of `StormerVerlet`. Three evaluations of each field per step, some up
    to 0.36 h outside of it. Output between steps is a cubic that keeps the order.
    """

    weights = (_W1, 1.0 - 2.0 * _W1, _W1)

    def order(self, terms: PyTree):
        return 4


def _time(step: StepInput, fraction: float):
    # The ends exactly as given: the next step stands at the same number.
    if fraction == 0.0 or fraction == 1.0:
        return step.t1 if fraction else step.t0
    return step.t0 + fraction * (step.t1 - step.t0)


def _kick(fraction: float, weight: float) -> Coupling:
    """p <- p + weight h dp(t, q)."""
    return _coupling(P, Q, fraction, weight)


def _drift(fraction: float, weight: float) -> Coupling:
    """q <- q + weight h dq(t, p)."""
    return _coupling(Q, P, fraction, weight)


def _coupling(target: int, source: int, fraction: float, weight: float) -> Coupling:
    def field(step: StepInput, other: PyTree) -> PyTree:
        return step.terms[target].vf(_time(step, fraction), other, step.args)

    def increment(step: StepInput, v: PyTree) -> PyTree:
        return trees.scale(weight, step.terms[target].prod(v, step.control[target]))

    return Coupling(target, source, field=field, increment=increment)


def _slope(step: StepInput, t, p: PyTree, dp: PyTree) -> tuple[PyTree, PyTree]:
    """The increments that (q, p) would make at the rate of one end of the step."""
    dq = step.terms[Q].vf(t, p, step.args)
    return step.terms[Q].prod(dq, step.control[Q]), step.terms[P].prod(dp, step.control[P])
