r"""Explicit, effectively symmetric Runge-Kutta methods: the plain step back all but undoes a step.

Methods of order 2 whose defect Phi_{-h}(Phi_h(y)) - y is O(h^6) (EES25) or O(h^8) (EES27), instead
of O(h^3). One state, no companion: nothing parasitic can grow, and decaying modes stay stable. Both
have a low-storage form with two registers. With dX the control over the step and S = 0,

    S  <-  A_i S + f(t0 + c_i h, Y) dX
    Y  <-  Y + B_i S                            for each stage i

and with r = sqrt 2

    EES25    A = (0, -7/15, -35/32)                                    B = (1/3, 15/16, 2/5)
             c = (0, 1/3, 5/6)
    EES27    A = (0, (-7+4r)/3, -(4+5r)/12, 3(-31+8r)/49)
             B = ((2-r)/3, (4+r)/8, 3(3-r)/7, (9-4r)/14)
             c = (0, (2-r)/3, (2+r)/6, (4+r)/6)

Euler's method is the first stage, so e = y1 - y0 - f(t0, y0) dX estimates the error, to first
order, and y0 + theta f(t0, y0) dX + theta^2 e is a quadratic that keeps the order between steps.

Stability, s = h lambda: R = 1 + s + s^2/2 + s^3/8 on [-3.087, 0]; EES27, on [-3.916, 0],
R = 1 + s + s^2/2 + (1/2 - r/4) s^3 + (3/8 - r/4) s^4. Backwards the defect, s^6/64 and 4.6e-4 s^8,
accumulates on top of the growth exp(|s|) of the true flow run backwards.

In code:    A, B, c -> the same; f dX -> `k`
Cost:       3 (EES25), 4 (EES27) evaluations of f per step; backwards twice that, since the step
            back and the transpose stand at different points.
Not for:    reversal to rounding error with large steps: the defect is small, not zero.
Reference:  Explicit and effectively symmetric Runge-Kutta methods (2025) | arXiv:2507.21006
            Explicit and effectively symmetric schemes for neural SDEs (2025) | arXiv:2509.20599
"""

import math
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
from equinox import AbstractClassVar
from jaxtyping import PyTree

from nde.solvers.reversible.coupling import Record, Rewind, Step, total
from nde.solvers.reversible.solver import AbstractReversibleSolver, difference, doubled

_r = math.sqrt(2.0)


class AbstractEES(
    AbstractReversibleSolver, diffrax.AbstractAdaptiveSolver, diffrax.AbstractStratonovichSolver
):
    """An effectively symmetric method in low-storage form. See the module for the equations."""

    A: AbstractClassVar[tuple[float, ...]]
    B: AbstractClassVar[tuple[float, ...]]
    c: AbstractClassVar[tuple[float, ...]]

    term_structure = diffrax.AbstractTerm
    interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation
    shared_ends = False
    twins = False

    @property
    def evaluations_per_step(self):
        return len(self.B)

    def order(self, terms):
        return 2

    def strong_order(self, terms):
        return 0.5

    def start(self, terms, t0, y0, args):
        return (y0,)

    def advance(self, step, members0, carried=None):
        (y0,) = members0
        record = self._stages(step, step.t0, step.t1, step.control, y0)
        return (total((1.0, y0), (1.0, record.increment)),), [record]

    def retreat(self, step, members1, carried=None):
        (y1,) = members1
        return (total((1.0, y1), (1.0, self._back(step, y1))),), None

    def error(self, records):
        return difference(records[0].increment, records[0].field)

    def refresh(self, terms, t, y, solver_state, args):
        return solver_state

    def start_rewind(self, members, cts, lanes=()):
        return Rewind(members, cts, None, jnp.zeros(lanes, bool))

    def rewind(self, pull, back, ct_records=None):
        (y1,), (ct,) = back.members, back.cts
        increment = pull.value(lambda step, following, y: self._back(step, y), y1)
        y0 = total((1.0, y1), (1.0, increment))
        ct_record = Record(jax.tree.map(jnp.zeros_like, ct), ct)
        if ct_records is not None and ct_records[0] is not None:
            ct_record = total((1.0, ct_record), (1.0, ct_records[0]))
        _, ct_params, u = pull.pull(
            lambda step, following, y: self.advance(step, (y,))[1][0], y0, ct_record
        )
        return Rewind((y0,), (total((1.0, ct), (1.0, u)),), None, back.pending), ct_params

    def finish_rewind(self, pull, back):
        return back.members, back.cts, None

    def dense_info(self, step, members0, members1, records):
        (y0,), (y1,) = members0, members1
        k0 = records[0].field
        k1 = difference(doubled(difference(y1, y0)), k0)  # leaves the cubic a quadratic
        return dict(y0=y0, y1=y1, k0=k0, k1=k1)

    def _back(self, step: Step, y: PyTree) -> PyTree:
        """The increment of the plain step from `t1` to `t0`, the control negated."""
        control = jax.tree.map(lambda dX: -dX, step.control)
        return self._stages(step, step.t1, step.t0, control, y).increment

    def _stages(self, step: Step, start: Any, end: Any, control: PyTree, y: PyTree) -> Record:
        euler = register = change = None
        for a, b, c in zip(self.A, self.B, self.c, strict=True):
            stage = y if change is None else total((1.0, y), (1.0, change))
            k = step.terms.vf_prod(start + c * (end - start), stage, step.args, control)
            euler = k if euler is None else euler
            register = total((a, register), (1.0, k))
            change = total((1.0, change), (b, register))
        return Record(euler, change)


class EES25(AbstractEES):
    """EES(2, 5): order 2, reverse defect O(h^6), three evaluations per step, strong order 1/2.

    `y0` is any pytree, `terms` any single term; a Brownian control is read in the Stratonovich
    sense.
    """

    A = (0.0, -7 / 15, -35 / 32)
    B = (1 / 3, 15 / 16, 2 / 5)
    c = (0.0, 1 / 3, 5 / 6)


class EES27(AbstractEES):
    """EES(2, 7): order 2, reverse defect O(h^8), four evaluations per step, strong order 1/2.

    The choice for decaying fields: stable for real h lambda down to -3.9. `y0` is any pytree,
    `terms` any single term; a Brownian control is read in the Stratonovich sense.
    """

    A = (0.0, (-7 + 4 * _r) / 3, -(4 + 5 * _r) / 12, 3 * (-31 + 8 * _r) / 49)
    B = ((2 - _r) / 3, (4 + _r) / 8, 3 * (3 - _r) / 7, (9 - 4 * _r) / 14)
    c = (0.0, (2 - _r) / 3, (2 + _r) / 6, (4 + _r) / 6)
