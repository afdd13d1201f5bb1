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

from nde.solvers import trees
from nde.solvers.methods.declared import Declared
from nde.solvers.reversible.coupling import Members, Pullback, Record, RewindState, StepInput
from nde.solvers.reversible.solver import AbstractReversibleSolver, ReversibleState

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
    def declared(self):
        return Declared(len(self.B), len(self.B))

    def order(self, terms: PyTree):
        return 2

    def strong_order(self, terms: PyTree):
        return 0.5

    def initial_members(self, terms: PyTree, t0: Any, y0: PyTree, args: Any):
        return (y0,)

    def forward(self, step: StepInput, members0: Members, carried: PyTree = None):
        (y0,) = members0
        record = self._forth(step, y0)
        return (trees.add(y0, record.increment),), [record]

    def inverse(self, step: StepInput, members1: Members, carried: PyTree = None):
        (y1,) = members1
        return (trees.add(y1, self._back(step, y1)),), None

    def error(self, records: list[Record]):
        return trees.subtract(records[0].increment, records[0].field)

    def refresh(self, terms: PyTree, t: Any, y: PyTree, solver_state: ReversibleState, args: Any):
        return solver_state

    def start_rewind(self, members: Members, cts: Members, lanes: tuple[int, ...] = ()):
        return RewindState(members, cts, None, jnp.zeros(lanes, bool))

    def rewind(self, pullback: Pullback, back: RewindState):
        (y1,), (ct,) = back.members, back.cts

        def increment(step: StepInput, following: StepInput, y: PyTree) -> PyTree:
            del following
            return self._forth(step, y).increment

        def back_increment(step: StepInput, following: StepInput, y: PyTree) -> PyTree:
            del following
            return self._back(step, y)

        y0 = trees.add(y1, pullback.value(back_increment, y1))
        _, ct_params, u = pullback.pull(increment, y0, ct)
        return RewindState((y0,), (trees.add(ct, u),), None, back.pending), ct_params

    def finish_rewind(self, pullback: Pullback, back: RewindState):
        return back.members, back.cts, None

    def dense_info(
        self, step: StepInput, members0: Members, members1: Members, records: list[Record]
    ):
        (y0,), (y1,) = members0, members1
        k0 = records[0].field
        twice = trees.scale(2.0, trees.subtract(y1, y0))
        k1 = trees.subtract(twice, k0)  # leaves the cubic a quadratic
        return dict(y0=y0, y1=y1, k0=k0, k1=k1)

    def _forth(self, step: StepInput, y: PyTree) -> Record:
        return self._stages(step, step.t0, step.t1, step.control, y)

    def _back(self, step: StepInput, y: PyTree) -> PyTree:
        """The increment of the plain step from `t1` to `t0`, the control negated."""
        control = jax.tree.map(lambda dX: -dX, step.control)
        return self._stages(step, step.t1, step.t0, control, y).increment

    def _stages(self, step: StepInput, start: Any, end: Any, control: PyTree, y: PyTree) -> Record:
        euler = register = change = None
        for a, b, c in zip(self.A, self.B, self.c, strict=True):
            stage = trees.add(y, change)
            k = step.terms.vf_prod(start + c * (end - start), stage, step.args, control)
            euler = k if euler is None else euler
            register = trees.combine((a, 1.0), (register, k))
            change = trees.combine((1.0, b), (change, register))
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
