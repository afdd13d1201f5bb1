r"""What a reversible solver is: a diffrax solver whose steps can be undone.

The state of a solve is the solution y and what the solver carries beside it. Together they are the
*members* x = (x_1, .., x_m), and a step is an invertible map of them:

    step      x(t0) -> x(t1)
    unstep    x(t1) -> x(t0)                 the exact inverse, in exact arithmetic
    rewind    x(t1), ct(t1) -> x(t0), ct(t0), ct_p       both at once, sharing their evaluations

All three follow from the list of couplings (see `coupling`); for `EES25` and `EES27` the inverse is
the plain step with the control negated.

In code:    x -> members, ct -> cts, ct_p the cotangent of whatever parameters the caller perturbs
Cost:       what the solver declares, the same in either direction (EES: twice that backwards)
Not for:    implicit bases; Ito equations (all converge to the Stratonovich solution, if to any).
Reference:  the solvers' own modules
"""

import abc
from typing import Any, NamedTuple

import diffrax
import jax
from equinox import AbstractClassVar
from jaxtyping import PyTree

from nde.solvers import trees
from nde.solvers.methods.declared import AbstractDeclaring
from nde.solvers.reversible import coupling
from nde.solvers.reversible.coupling import (
    Coupling,
    Members,
    Pullback,
    Record,
    RewindState,
    StepInput,
)


class ReversibleState(NamedTuple):
    """What a reversible solver carries beside the solution.

    Attributes:
        others: The members that are not y, each of the structure of y; None if there are none
            (diffrax's `BacksolveAdjoint` cannot take an empty tuple).
        carried: With shared ends, the field value that ended the last step; otherwise None. It
            saves work and is no member: it is recomputed when the gradient is.
    """

    others: Members | None
    carried: PyTree


class AbstractReversibleSolver(AbstractDeclaring, diffrax.AbstractSolver[ReversibleState]):
    """A solver whose steps can be undone. See the module for the vocabulary.

    `step` and `init` are what diffrax calls, `unstep` undoes a step of it. `forward`, `inverse`,
    `dense_info` and `initial_members` are the same in terms of members, for one trajectory; `rewind`
    and its start and finish act on members and cotangents with any lane axes.
    """

    shared_ends: AbstractClassVar[bool]
    twins: AbstractClassVar[bool]  # whether the second member is another approximation of y

    @abc.abstractmethod
    def initial_members(self, terms: PyTree, t0: Any, y0: PyTree, args: Any) -> Members:
        """The members at `t0`; differentiable. The gradient of a solve ends with its pullback."""

    @abc.abstractmethod
    def forward(
        self, step: StepInput, members0: Members, carried: PyTree = None
    ) -> tuple[Members, list[Record]]:
        """The members after a step, and what the error estimate and the output need of it."""

    @abc.abstractmethod
    def inverse(
        self, step: StepInput, members1: Members, carried: PyTree = None
    ) -> tuple[Members, PyTree]:
        """The members before a step, and the field value to carry there; undoes `forward`."""

    @abc.abstractmethod
    def error(self, records: list[Record]) -> PyTree | None:
        """The error estimate, from the records of `forward`; None if there is none."""

    @abc.abstractmethod
    def dense_info(
        self, step: StepInput, members0: Members, members1: Members, records: list[Record]
    ) -> dict[str, PyTree]:
        """What `interpolation_cls` needs."""

    @abc.abstractmethod
    def refresh(
        self, terms: PyTree, t: Any, y: PyTree, solver_state: ReversibleState, args: Any
    ) -> ReversibleState:
        """The state with its carried field value recomputed at `t`, on that side of a jump."""

    @abc.abstractmethod
    def start_rewind(
        self, members: Members, cts: Members, lanes: tuple[int, ...] = ()
    ) -> RewindState:
        """The `RewindState` at the end of a solve or at a stored state. `lanes`: leading lane axes."""

    @abc.abstractmethod
    def rewind(self, pullback: Pullback, back: RewindState) -> tuple[RewindState, PyTree]:
        """Un-steps one step and pulls back through it. As `coupling.rewind`."""

    @abc.abstractmethod
    def finish_rewind(
        self, pullback: Pullback, back: RewindState
    ) -> tuple[Members, Members, PyTree]:
        """The members, cotangents and parameter cotangent where the rewinding stops.

        As `coupling.finish_rewind`.
        """

    def members(self, y: PyTree, others: Members | None) -> Members:
        """The members, from the solution and `ReversibleState.others`."""
        return (y, *(others or ()))

    def split(self, members: Members) -> tuple[PyTree, Members | None]:
        """The solution and `ReversibleState.others`, from the members."""
        return members[0], members[1:] or None

    def init(self, terms: PyTree, t0: Any, t1: Any, y0: PyTree, args: Any) -> ReversibleState:
        del t1
        y, others = self.split(self.initial_members(terms, t0, y0, args))
        return self.refresh(terms, t0, y, ReversibleState(others, None), args)

    def step(
        self,
        terms: PyTree,
        t0: Any,
        t1: Any,
        y0: PyTree,
        args: Any,
        solver_state: ReversibleState,
        made_jump: Any,
    ):
        if made_jump is not False and self.shared_ends:
            solver_state = jax.lax.cond(
                made_jump,
                lambda: self.refresh(terms, t0, y0, solver_state, args),
                lambda: solver_state,
            )
        step = StepInput.over(terms, t0, t1, args, made_jump)
        members0 = self.members(y0, solver_state.others)
        members1, records = self.forward(step, members0, solver_state.carried)
        dense_info = self.dense_info(step, members0, members1, records)
        y1, others = self.split(members1)
        state1 = ReversibleState(others, records[-1].field if self.shared_ends else None)
        return y1, self.error(records), dense_info, state1, diffrax.RESULTS.successful

    def unstep(
        self,
        terms: PyTree,
        t0: Any,
        t1: Any,
        y1: PyTree,
        solver_state1: ReversibleState,
        args: Any,
        made_jump: Any,
    ) -> tuple[PyTree, ReversibleState]:
        """The exact inverse of `step`.

        Args:
            terms: As in `step`, with the very same control.
            t0: The start of the step, exactly as it was given to `step`.
            t1: The end of the step, exactly as it was given to `step`.
            y1: The solution at `t1`, a pytree of the structure of `y0`.
            solver_state1: The state at `t1`.
            args: As in `step`.
            made_jump: As in `step`. After a jump at `t0` the state that comes back looks at the
                field from this step's side: `refresh` it at the end of the step before.

        Returns:
            The solution and the state at `t0`.
        """
        step = StepInput.over(terms, t0, t1, args, made_jump)
        members1 = self.members(y1, solver_state1.others)
        members0, carried = self.inverse(step, members1, solver_state1.carried)
        y0, others = self.split(members0)
        return y0, ReversibleState(others, carried)

    def func(self, terms: PyTree, t0: Any, y0: PyTree, args: Any):
        return terms.vf(t0, y0, args)


class AbstractCoupledSolver(AbstractReversibleSolver):
    """A reversible solver that is a list of couplings."""

    @abc.abstractmethod
    def couplings(self, with_error: bool = False) -> tuple[Coupling, ...]:
        """The couplings of one step, in order.

        Args:
            with_error: Whether to evaluate also what only the error estimate and `dense_info` need.
        """

    def forward(self, step: StepInput, members0: Members, carried: PyTree = None):
        return coupling.forward(self.couplings(with_error=True), step, members0, carried)

    def inverse(self, step: StepInput, members1: Members, carried: PyTree = None):
        members0, records = coupling.inverse(self.couplings(), step, members1, carried)
        return members0, records[0].field if self.shared_ends else None

    def refresh(self, terms: PyTree, t: Any, y: PyTree, solver_state: ReversibleState, args: Any):
        if not self.shared_ends:
            return solver_state
        first = self.couplings()[0]
        other = self.members(y, solver_state.others)[first.source]
        at_t = StepInput(terms, t, t, args, None)
        return ReversibleState(solver_state.others, first.evaluate(at_t, other))

    def start_rewind(self, members: Members, cts: Members, lanes: tuple[int, ...] = ()):
        return coupling.start_rewind(self.couplings(), self.shared_ends, members, cts, lanes)

    def rewind(self, pullback: Pullback, back: RewindState):
        return coupling.rewind(self.couplings(), self.shared_ends, pullback, back)

    def finish_rewind(self, pullback: Pullback, back: RewindState):
        return coupling.finish_rewind(self.couplings(), self.shared_ends, pullback, back)


class AbstractKickedSolver(AbstractCoupledSolver, diffrax.AbstractAdaptiveSolver):
    """A reversible solver whose first and last coupling move y by half an increment each: they differ by
    the error of a step of first order, and make a quadratic between its ends."""

    term_structure = diffrax.AbstractTerm
    interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation

    def error(self, records: list[Record]):
        return trees.subtract(records[-1].increment, records[0].increment)

    def dense_info(
        self, step: StepInput, members0: Members, members1: Members, records: list[Record]
    ):
        k0, k1 = (trees.scale(2.0, records[i].increment) for i in (0, -1))
        return dict(y0=members0[0], y1=members1[0], k0=k0, k1=k1)


def half(step: StepInput, v: PyTree) -> PyTree:
    """Half the increment that the field value makes over the step."""
    return trees.scale(0.5, step.terms.prod(v, step.control))
