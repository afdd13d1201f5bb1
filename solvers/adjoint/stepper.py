"""What the loop needs of a solver: a step to try, and a step to differentiate.

`attempt` is the step with its error estimate. `advance` is the part of it that the solution depends on;
the backward pass repeats and transposes this one. Between steps two things travel:

    state   the solver's own, part of the solution: stored and differentiated (reversible Heun's copy)
    cache   a value that only saves work, as the last stage of an FSAL method: neither stored nor
            differentiated, recomputed where the backward pass needs it; unless the backward pass
            needs that stage anyway (`hands_over`), which is then stored with the state instead of
            being evaluated, and transposed, at the end of one step and at the start of the next
"""

import dataclasses
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from nde.solvers import trees
from nde.solvers.estimates import estimates
from nde.solvers.lanes.held import Held
from nde.solvers.methods import explicit_rk
from nde.solvers.methods.declared import Declared, declared_by
from nde.solvers.reversible.coupling import StepInput
from nde.solvers.reversible.solver import AbstractReversibleSolver, ReversibleState

Jump = Array | bool  # whether the field jumped at t0; False where it never does


class Attempt(NamedTuple):
    """One tried step. `y_error` is None where the solver has no estimate, `ks` (the stages, times the
    length of the step) where it does not show them."""

    y1: PyTree[Array]
    y_error: PyTree[Array] | None
    ks: list[PyTree[Array]] | None
    dense_info: PyTree[Array]
    state: PyTree[Array]
    cache: PyTree[Array]
    result: diffrax.RESULTS = diffrax.RESULTS.successful


class Advance(NamedTuple):
    """The part of a step to differentiate: what depends on it, each None where it is not asked for."""

    y1: PyTree[Array]
    state: PyTree[Array]
    y_error: PyTree[Array] | None = None
    ks: list[PyTree[Array]] | None = None
    dense_info: PyTree[Array] = None
    cache: PyTree[Array] = None


class AbstractStepper(eqx.Module):
    """A solver and the terms it is applied to."""

    solver: eqx.AbstractVar[diffrax.AbstractSolver]
    terms: eqx.AbstractVar[PyTree[diffrax.AbstractTerm]]
    args: eqx.AbstractVar[Any]

    def without_error(self) -> "AbstractStepper":
        """The stepper for a solve that uses no error estimate, stages or dense output."""
        return self

    def hands_over(self) -> bool:
        """Whether `advance` takes a cache, and returns the next one."""
        return False

    def state(self, passed: PyTree[Array]) -> PyTree[Array]:
        """The state to start from, given the one that diffrax has prepared."""
        raise NotImplementedError

    def init(self, t0: Array, t1: Array, y0: PyTree[Array]) -> PyTree[Array]:
        """The state to start from, where the user has passed none."""
        state = self.state(self.solver.init(self.terms, t0, t1, y0, self.args))
        return self.with_first_stage(t0, y0, state)

    def with_first_stage(self, t0: Array, y0: PyTree[Array], state: PyTree[Array]) -> PyTree[Array]:
        """A solver's state, its first stage evaluated at (t0, y0) if it holds one."""
        del t0, y0
        return state

    def cache(self, t: Array, y: PyTree[Array], state: PyTree[Array]) -> PyTree[Array]:
        """The cache at (t, y, state)."""
        raise NotImplementedError

    def attempt(
        self,
        t0: Array,
        t1: Array,
        y0: PyTree[Array],
        state: PyTree[Array],
        cache: PyTree[Array],
        made_jump: Jump,
    ) -> Attempt:
        """Tries a step from t0 to t1."""
        raise NotImplementedError

    def advance(
        self,
        t0: Array,
        t1: Array,
        y0: PyTree[Array],
        state: PyTree[Array],
        made_jump: Jump,
        with_error: bool,
        cache: PyTree[Array] = None,
    ) -> Advance:
        """Recomputes one accepted step for differentiation: y1 and the solver's state; `with_error` also
        the error estimate, the stages and the dense output.
        """
        raise NotImplementedError

    def final_state(self, t: Array, y: PyTree[Array], state: PyTree[Array]) -> PyTree[Array]:
        """The state in diffrax's form, for `SaveAt(solver_state=True)`."""
        raise NotImplementedError

    def declared(self) -> Declared | None:
        """What is known of a step; None for a solver that does not say."""
        return declared_by(self.solver)


class UnrolledStepper(AbstractStepper):
    """An explicit Runge-Kutta method, written out."""

    solver: diffrax.AbstractSolver
    terms: diffrax.AbstractTerm
    args: Any
    tableau: diffrax.ButcherTableau = eqx.field(static=True)
    carries_last_stage: bool = eqx.field(static=True)
    with_error: bool = eqx.field(default=True, static=True)  # of an attempt

    def without_error(self):
        # As many evaluations a step, and none to begin with: the last stage is not carried over.
        return dataclasses.replace(self, carries_last_stage=False, with_error=False)

    def hands_over(self):
        return self.carries_last_stage

    def state(self, passed: PyTree[Array]):
        del passed  # what diffrax would hand over is the vector field at y0, and is evaluated again
        return None

    def cache(self, t: Array, y: PyTree[Array], state: PyTree[Array]):
        del state
        return self.terms.vf(t, y, self.args) if self.carries_last_stage else None

    def attempt(
        self,
        t0: Array,
        t1: Array,
        y0: PyTree[Array],
        state: PyTree[Array],
        cache: PyTree[Array],
        made_jump: Any,
    ):
        del state, made_jump  # after a jump the loop has refreshed the cache
        out = self.advance(t0, t1, y0, None, False, self.with_error, cache)
        return Attempt(
            y1=out.y1,
            y_error=out.y_error,
            ks=out.ks,
            dense_info=out.dense_info,
            state=None,
            cache=out.cache,
        )

    def advance(
        self,
        t0: Array,
        t1: Array,
        y0: PyTree[Array],
        state: PyTree[Array],
        made_jump: Any,
        with_error: bool,
        cache: PyTree[Array] = None,
    ):
        del state, made_jump
        tableau, control = self.tableau, self.terms.contr(t0, t1)
        count = tableau.num_stages if with_error else explicit_rk.needed_stages(tableau)
        ks, y_last, f_last = explicit_rk.stages(
            tableau, self.terms, t0, t1, control, y0, self.args, count, cache
        )
        y1 = explicit_rk.solution(tableau, y0, ks, y_last)
        if not with_error:
            return Advance(y1, None)
        y_error = trees.combine(tableau.b_error, ks)
        cache = f_last if self.carries_last_stage else None
        return Advance(y1, None, y_error, ks, _dense(y0, y1, ks), cache)

    def final_state(self, t: Array, y: PyTree[Array], state: PyTree[Array]):
        del state
        if self.carries_last_stage:
            return jnp.array(False), self.terms.vf(t, y, self.args)
        return None

    def declared(self):
        known = declared_by(self.solver)
        if known is None or self.carries_last_stage:
            return known
        tableau = self.tableau
        stages = tableau.num_stages if self.with_error else explicit_rk.needed_stages(tableau)
        counts = dict(evaluations=stages, evaluations_with_error=stages, at_start=0, after_jump=0)
        return known._replace(**counts)


class ReversibleStepper(AbstractStepper):
    """A reversible solver: the other members are its state, a shared field value its cache."""

    solver: AbstractReversibleSolver
    terms: PyTree[diffrax.AbstractTerm]
    args: Any

    def state(self, passed: PyTree[Array]):
        return jax.tree.map(jnp.asarray, passed.others)

    def cache(self, t: Array, y: PyTree[Array], state: PyTree[Array]):
        return self.solver.refresh(
            self.terms, t, y, ReversibleState(state, None), self.args
        ).carried

    def _step(self, t0, t1, y0, state, cache, made_jump):
        step = StepInput.over(self.terms, t0, t1, self.args, made_jump)
        members0 = self.solver.members(y0, state)
        members1, records = self.solver.forward(step, members0, cache)
        info = self.solver.dense_info(step, members0, members1, records)
        return *self.solver.split(members1), records, info

    def attempt(
        self,
        t0: Array,
        t1: Array,
        y0: PyTree[Array],
        state: PyTree[Array],
        cache: PyTree[Array],
        made_jump: Any,
    ):
        y1, others, records, info = self._step(t0, t1, y0, state, cache, made_jump)
        cache = records[-1].field if self.solver.shared_ends else None
        return Attempt(
            y1=y1,
            y_error=self.solver.error(records),
            ks=None,
            dense_info=info,
            state=others,
            cache=cache,
        )

    def advance(
        self,
        t0: Array,
        t1: Array,
        y0: PyTree[Array],
        state: PyTree[Array],
        made_jump: Any,
        with_error: bool,
        cache: PyTree[Array] = None,
    ):
        y1, others, records, info = self._step(t0, t1, y0, state, None, made_jump)
        if not with_error:
            return Advance(y1, others)
        return Advance(y1, others, self.solver.error(records), None, info)

    def final_state(self, t: Array, y: PyTree[Array], state: PyTree[Array]):
        return self.solver.refresh(self.terms, t, y, ReversibleState(state, None), self.args)


class SolverStepper(AbstractStepper):
    """Any other diffrax solver, through its own `step`."""

    solver: diffrax.AbstractSolver
    terms: PyTree[diffrax.AbstractTerm]
    args: Any

    def state(self, passed: PyTree[Array]):
        return jax.tree.map(jnp.asarray, passed)

    def with_first_stage(self, t0: Array, y0: PyTree[Array], state: PyTree[Array]):
        if not self._has_last_stage(state):
            return state
        # Where one lane begins, or begins anew, diffrax evaluates the first stage in all. In the others
        # that is not the value handed over: an implicit stage knows it to a tolerance only.
        _, f0 = state
        cast = lambda f, like: jnp.asarray(f, like.dtype)
        f0 = jax.tree.map(cast, self.solver.func(self.terms, t0, y0, self.args), f0)
        return jnp.array(False), f0

    def _has_last_stage(self, state: PyTree[Array]) -> bool:
        """Whether the state is the last, implicit stage of a step (or says that there is none yet)."""
        # A wrapper is also an instance, as diffrax sees it, of what it wraps.
        kind = type(self.solver)
        implicit = issubclass(kind, diffrax.AbstractImplicitSolver)
        return implicit and issubclass(kind, diffrax.AbstractRungeKutta) and state is not None

    def cache(self, t: Array, y: PyTree[Array], state: PyTree[Array]):
        return None

    def _step(self, t0, t1, y0, state, made_jump):
        if made_jump is not False and self._has_last_stage(state):
            fresh = self.with_first_stage(t0, y0, state)
            state = jax.tree.map(lambda a, b: jnp.where(made_jump, a, b), fresh, state)
            made_jump = False
        return self.solver.step(self.terms, t0, t1, y0, self.args, state, made_jump)

    def attempt(
        self,
        t0: Array,
        t1: Array,
        y0: PyTree[Array],
        state: PyTree[Array],
        cache: PyTree[Array],
        made_jump: Any,
    ):
        y1, y_error, dense_info, state, result = self._step(t0, t1, y0, state, made_jump)
        return Attempt(
            y1=y1,
            y_error=y_error,
            ks=estimates.stages(dense_info),
            dense_info=dense_info,
            state=state,
            cache=None,
            result=result,
        )

    def advance(
        self,
        t0: Array,
        t1: Array,
        y0: PyTree[Array],
        state: PyTree[Array],
        made_jump: Any,
        with_error: bool,
        cache: PyTree[Array] = None,
    ):
        y1, y_error, dense_info, state, _ = self._step(t0, t1, y0, state, made_jump)
        if not with_error:
            return Advance(y1, state)
        return Advance(y1, state, y_error, estimates.stages(dense_info), dense_info)

    def final_state(self, t: Array, y: PyTree[Array], state: PyTree[Array]):
        return state


def stepper_for(
    solver: diffrax.AbstractSolver,
    terms: PyTree[diffrax.AbstractTerm],
    args: Any,
    t0: Array,
    t1: Array,
    y0: PyTree[Array],
) -> AbstractStepper:
    """Chooses how the solver is run."""
    terms = holding(terms)
    tableau = explicit_rk.tableau_of(solver)
    if tableau is None:
        if getattr(solver, "scan_kind", "none") is None:
            # A loop over stages that is differentiated both forwards and backwards.
            kind = lambda solver: solver.scan_kind
            solver = eqx.tree_at(kind, solver, "bounded", is_leaf=lambda x: x is None)
        return SolverStepper(solver, terms, args)
    carries = tableau.fsal and not terms.is_vf_expensive(t0, t1, y0, args)
    return UnrolledStepper(solver, terms, args, tableau, carries)


def holding(terms: PyTree[diffrax.AbstractTerm]) -> PyTree[diffrax.AbstractTerm]:
    """The same terms; the cotangents of their fields are computed once."""
    is_ode = lambda x: type(x) is diffrax.ODETerm
    held = lambda x: diffrax.ODETerm(Held(x.vector_field)) if is_ode(x) else x
    return jax.tree.map(held, terms, is_leaf=is_ode)


def _dense(y0, y1, ks):
    return dict(y0=y0, y1=y1, k=trees.stack(ks))
