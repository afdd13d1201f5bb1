r"""McCallum and Foster's construction: any explicit Runge-Kutta method, made reversible.

The state is the solution y and a copy z, with z = y at the start. Let Psi_h(t, x) be the increment
of the base method over a step h from (t, x), and 0 < lam <= 1 the coupling. One step is

    y  <-  lam y + (1 - lam) z + Psi_h(t0, z)
    z  <-  z - Psi_{-h}(t1, y)

The second line goes back from t1 with the increments of the control negated, the same realization.
The order is that of the base.
Output between steps is the base method's own, started from lam y0 + (1 - lam) z0, plus the part of
y0 - z0 that the coupling removes, fading linearly: it meets y0 and y1 exactly.

Linear stability: eigenvalues close to R(s) and lam / R(s), s = h lambda, R the polynomial of the
base. A decaying mode needs about R(s) >= lam: the more damping, the more decay the pair can follow,
and the faster rounding grows when a step is undone, by 1 / lam. lam <= exp(-max |s|) is a good
choice.

In code:    y, z -> Y, Z (the two members)    lam -> `coupling`    Psi -> weighted `_stages`
Cost:       twice the stages that the solution needs, in either direction (Tsit5: 12).
Not for:    bases that converge to the Ito solution; stiff fields.
Reference:  Efficient, accurate and stable gradients for neural ODEs (2024) | arXiv:2410.11648
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Real

from nde.solvers import trees
from nde.solvers.methods.declared import Declared
from nde.solvers.methods.explicit_rk import needed_stages, stages
from nde.solvers.reversible.coupling import Coupling, Members, Record, StepInput
from nde.solvers.reversible.solver import AbstractCoupledSolver

Y, Z = 0, 1


class Reversible(
    AbstractCoupledSolver, diffrax.AbstractAdaptiveSolver, diffrax.AbstractStratonovichSolver
):
    """Makes an explicit Runge-Kutta method reversible, at the order of the base.

    Example: `Reversible(diffrax.Tsit5())`. `y0` is any pytree, `terms` any single term; a Brownian
    control is read in the Stratonovich sense. The error estimate is the base method's, from the
    step that starts at z0.

    Args:
        base: Any solver with a Butcher tableau and explicit stages.
        coupling: lam in (0, 1]; 1 is undamped. See the module for how to choose it.

    Raises:
        TypeError: if the base is not an explicit Runge-Kutta method.
        ValueError: if the coupling is outside (0, 1].
    """

    base: diffrax.AbstractERK
    coupling: float = 0.9

    term_structure = diffrax.AbstractTerm
    shared_ends = False
    twins = True

    def __check_init__(self):
        if not issubclass(type(self.base), diffrax.AbstractERK):
            raise TypeError(
                f"`base` is {type(self.base).__name__}, which is not an explicit Runge-Kutta "
                "method with one Butcher tableau. Use Reversible(diffrax.Tsit5()), or "
                "diffrax.Bosh3(), Dopri5(), Dopri8(), Heun(), Midpoint(), Ralston()."
            )
        if not 0.0 < self.coupling <= 1.0:
            raise ValueError(
                f"`coupling` is {self.coupling}, needed: 0 < coupling <= 1. "
                "Use Reversible(base, coupling=0.9); nearer to 1 damps less and undoes better."
            )

    @property
    def interpolation_cls(self):
        return _InterpolationOf(self.base.interpolation_cls)

    @property
    def declared(self):
        needed = needed_stages(self._tableau)
        return Declared(2 * needed, needed + self._tableau.num_stages)

    def order(self, terms: PyTree):
        return self.base.order(terms)

    def strong_order(self, terms: PyTree):
        return self.base.strong_order(terms)

    def error_order(self, terms: PyTree):
        return self.base.error_order(terms)

    def couplings(self, with_error: bool = False):
        tableau = self._tableau
        needed = needed_stages(tableau)
        count = tableau.num_stages if with_error else needed

        def there(step: StepInput, z: PyTree) -> list[PyTree]:
            at = (step.t0, step.t1, step.control, z, step.args)
            return stages(tableau, step.terms, *at, count)[0]

        def back(step: StepInput, y: PyTree) -> list[PyTree]:
            control = jax.tree.map(lambda dX: -dX, step.control)
            at = (step.t1, step.t0, control, y, step.args)
            return stages(tableau, step.terms, *at, needed)[0]

        def plus(step: StepInput, ks: list[PyTree]) -> PyTree:
            return trees.combine(tableau.b_sol, ks)

        def minus(step: StepInput, ks: list[PyTree]) -> PyTree:
            return trees.combine(-tableau.b_sol, ks)

        return (
            Coupling(Y, Z, a=self.coupling, b=1.0 - self.coupling, field=there, increment=plus),
            Coupling(Z, Y, field=back, increment=minus),
        )

    def initial_members(self, terms: PyTree, t0: Any, y0: PyTree, args: Any):
        return y0, y0

    def error(self, records: list[Record]):
        return trees.combine(self._tableau.b_error, records[0].field)

    def dense_info(
        self, step: StepInput, members0: Members, members1: Members, records: list[Record]
    ):
        y0, z0 = members0
        gap = trees.combine((1.0 - self.coupling,), (trees.subtract(y0, z0),))
        k = trees.stack(records[0].field)
        return dict(y0=trees.subtract(y0, gap), y1=members1[Y], k=k, gap=gap)

    @property
    def _tableau(self) -> diffrax.ButcherTableau:
        tableau = self.base.tableau
        assert isinstance(tableau, diffrax.ButcherTableau)  # narrows; an explicit method has one
        return tableau


@dataclasses.dataclass(frozen=True)
class _InterpolationOf:
    """The base method's interpolation plus a gap that closes linearly; equal if the base's is."""

    base: Callable[..., diffrax.AbstractPath]

    def __call__(self, *, t0: Any, t1: Any, gap: PyTree, **dense_info) -> "_Interpolation":
        return _Interpolation(t0, t1, gap, self.base(t0=t0, t1=t1, **dense_info))


class _Interpolation(diffrax.AbstractPath):
    t0: Any
    t1: Any
    gap: PyTree[Array]
    path: diffrax.AbstractPath

    def evaluate(self, t0: Real, t1: Real | None = None, left: bool = True) -> PyTree[Array]:
        if t1 is not None:
            return trees.subtract(self.evaluate(t1), self.evaluate(t0))
        # As diffrax rescales: an empty step has no inside, and must not divide by zero.
        empty = self.t0 == self.t1
        left_of_t1 = (self.t1 - t0) / jnp.where(empty, jnp.ones_like(self.t1), self.t1 - self.t0)
        return jax.tree.map(
            lambda y, gap: y + left_of_t1.astype(gap.dtype) * gap,
            self.path.evaluate(t0),
            self.gap,
        )
