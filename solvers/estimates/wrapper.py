"""The estimates of `estimates` for any adjoint: a solver that adds them up in its own state.

    sol = diffrax.diffeqsolve(
        terms, WithEstimates(diffrax.Tsit5(), rtol=1e-3, atol=1e-6), t0, t1, dt0, y0,
        stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-6),
        saveat=diffrax.SaveAt(t1=True, solver_state=True),
    )
    sol.solver_state.estimates["error_estimate"]

diffrax carries a solver's state over accepted steps only, and differentiates it with any adjoint.
"""

from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from nde.solvers.estimates.estimates import Judge, finite, judge_for, stages
from nde.solvers.methods.declared import AbstractDeclaring, Declared, declared_by


class EstimatesState(NamedTuple):
    """The wrapped solver's state, and the sums over the accepted steps so far."""

    solver_state: PyTree
    estimates: dict[str, Array]


class WithEstimates(
    AbstractDeclaring, diffrax.AbstractAdaptiveSolver, diffrax.AbstractWrappedSolver
):
    """Another solver, adding up `error_estimate` (E h) and `stiffness_estimate` (S) of its steps.

    They stand in `sol.solver_state.estimates` after a solve with `SaveAt(..., solver_state=True)`, the
    latter for `diffrax.Tsit5`, `Dopri5`, `Dopri8` and `SOSRI2`. `DiscreteAdjoint(estimates=Estimates())`
    gives the same, faster.

    Args:
        solver: A diffrax solver with an error estimate.
        rtol: Tolerances that errors are measured in, those of the controller; both None: raw errors.
        atol: See `rtol`.

    Raises:
        ValueError: for a solver without error estimate, or one tolerance without the other.
    """

    solver: diffrax.AbstractSolver
    rtol: float | None = None
    atol: float | None = None

    def __check_init__(self) -> None:
        if not isinstance(self.solver, diffrax.AbstractAdaptiveSolver):
            raise ValueError(
                f"{type(self.solver).__name__} has no error estimate; use a solver that has one, such as "
                "diffrax.Tsit5()."
            )
        if (self.rtol is None) != (self.atol is None):
            raise ValueError("Give both `rtol` and `atol`, or neither for raw errors.")

    @property
    def term_structure(self):
        return self.solver.term_structure

    @property
    def interpolation_cls(self):
        return self.solver.interpolation_cls

    @property
    def root_finder(self):
        """Of an implicit solver: diffrax gives it the tolerances of the controller."""
        implicit: Any = self.solver
        return implicit.root_finder

    @property
    def scan_kind(self):
        """Of a Runge-Kutta method: `diffrax.DirectAdjoint` sets it."""
        explicit: Any = self.solver
        return explicit.scan_kind

    @property
    def term_compatible_contr_kwargs(self):
        return self.solver.term_compatible_contr_kwargs

    @property
    def declared(self) -> Declared | None:
        inner = declared_by(self.solver)
        return inner and inner._replace(evaluations=inner.evaluations_with_error)

    def _judge(self, terms: PyTree[diffrax.AbstractTerm]) -> Judge:
        judge = judge_for(self.solver, diffrax.ConstantStepSize(), terms, scaled=False)
        return judge._replace(rtol=self.rtol, atol=self.atol)

    def order(self, terms: PyTree):
        return self.solver.order(terms)

    def strong_order(self, terms: PyTree):
        return self.solver.strong_order(terms)

    def error_order(self, terms: PyTree):
        return self.solver.error_order(terms)

    def init(self, terms: PyTree, t0: Any, t1: Any, y0: PyTree, args: Any) -> EstimatesState:
        zero = jnp.zeros((), jnp.result_type(*jax.tree.leaves(y0)))
        shows_stiffness = self._judge(terms).stage_difference is not None
        names = ["error_estimate"] + ["stiffness_estimate"] * shows_stiffness
        state = self.solver.init(terms, t0, t1, y0, args)
        return EstimatesState(state, {name: zero for name in names})

    def step(
        self,
        terms: PyTree,
        t0: Any,
        t1: Any,
        y0: PyTree,
        args: Any,
        solver_state: PyTree,
        made_jump: Any,
    ):
        state, sums = solver_state
        y1, error, info, state, result = self.solver.step(terms, t0, t1, y0, args, state, made_jump)
        judge = self._judge(terms)
        ks = None if judge.stage_difference is None else stages(info)
        # Rejected steps are differentiated too, and the controller may have other tolerances: where
        # these are zero there is no unit.
        error_in_units = jax.tree.map(finite, judge.in_units(error, y0, y1))
        judged = judge(jnp.asarray(t0), jnp.asarray(t1), y0, error_in_units, ks)
        new = {
            "error_estimate": judged.error * judged.length,
            "stiffness_estimate": judged.stiffness,
        }
        sums = {name: total + new[name].astype(total.dtype) for name, total in sums.items()}
        return y1, error, info, EstimatesState(state, sums), result

    def func(self, terms: PyTree, t0: Any, y0: PyTree, args: Any) -> Any:
        return self.solver.func(terms, t0, y0, args)
