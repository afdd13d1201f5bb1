r"""What a solver says about its own step.

The engine asks, and never looks inside a step: how often it evaluates the vector field, where it stops
being stable, whether it shows its stiffness, how it asks its noise. A solver of ours declares this
itself; a table declares it for those of diffrax. Of any other solver nothing is known, and nothing is
assumed: its solves have no `nfe`, and a Brownian path does not remember where it asked before.
"""

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import numpy as np

from nde.solvers.methods.explicit_rk import tableau_of


class Declared(NamedTuple):
    """What is known of a solver's step.

    A drift and its diffusion count as one evaluation, and so do the two fields of a separable system.
    An implicit stage counts once; what its nonlinear solver evaluates besides is not counted.

    Attributes:
        evaluations: In every attempt, for the next state alone.
        evaluations_with_error: In every attempt, with its error estimate or an output inside it.
        at_start: Once in a solve.
        after_jump: More, in a step behind a jump of the field.
        asks_noise_once: Whether a step asks its control once, about the whole step.
        stability_limit: Where the negative real axis leaves the region of stability; infinite for an
            implicit method.
        stage_difference: If the last two stages share their time, how the difference of the states
            they stand at is made of the stages, one weight each; else None.
    """

    evaluations: int
    evaluations_with_error: int
    at_start: int = 0
    after_jump: int = 0
    asks_noise_once: bool = True
    stability_limit: float = 2.0  # of Euler's and Heun's methods
    stage_difference: Sequence[float] | None = None


# As published; all three have two stages at the end of a step.
_LIMITS = {diffrax.Tsit5: 3.5068, diffrax.Dopri5: 3.3066, diffrax.Dopri8: 5.1667}


class AbstractDeclaring(eqx.Module):
    """A solver that declares what its step does. A subclass with another step declares anew."""

    @property
    @abc.abstractmethod
    def declared(self) -> Declared:
        """What is known of the step."""


def declared_by(solver: diffrax.AbstractSolver) -> Declared | None:
    """What a solver declares; None for one that is not known."""
    kind = type(solver)  # a wrapper is also an instance, as diffrax sees it, of what it wraps
    if issubclass(kind, AbstractDeclaring):
        ours: Any = solver
        return ours.declared
    for known, declare in _DIFFRAX.items():
        if (
            issubclass(kind, known) and kind.step is known.step
        ):  # one with its own step is not known
            return declare(solver)
    return None


def _runge_kutta(solver: diffrax.AbstractRungeKutta) -> Declared:
    tableau = solver.tableau
    if isinstance(tableau, diffrax.MultiButcherTableau):
        tableau = tableau.tableaus[0]
    stages, fsal = tableau.num_stages, int(tableau.fsal)
    out = Declared(stages - fsal, stages - fsal, at_start=fsal, after_jump=fsal)
    explicit = tableau_of(solver)
    if explicit is None:
        return out._replace(stability_limit=math.inf)
    limit = _LIMITS.get(type(solver))
    if limit is None:
        return out
    weights = np.array(explicit.a_lower[-1])  # the last two stages share their time
    weights[:-1] -= explicit.a_lower[-2]
    return out._replace(stability_limit=limit, stage_difference=weights.tolist())


def _stochastic_runge_kutta(solver: diffrax.AbstractSRK) -> Declared:
    skipped = solver.tableau.ignore_stage_f
    stages = len(solver.tableau.b_sol) - (0 if skipped is None else int(sum(skipped)))
    return Declared(stages, stages)


def _half_steps(solver: diffrax.HalfSolver) -> Declared | None:
    """Three steps, of which two begin at the start or at a jump, where `init` has not evaluated."""
    inner = declared_by(solver.solver)
    if inner is None:
        return None
    runge_kutta = issubclass(type(solver.solver), diffrax.AbstractRungeKutta)
    return inner._replace(
        evaluations=3 * inner.evaluations,
        evaluations_with_error=2 * inner.evaluations + inner.evaluations_with_error,
        at_start=(2 if runge_kutta else 1) * inner.at_start,
        after_jump=2 * inner.after_jump,
        asks_noise_once=False,
        stage_difference=None,
    )


def _always(
    step: int, at_start: int = 0, after_jump: int = 0, **known: Any
) -> Callable[[diffrax.AbstractSolver], Declared]:
    """The same for every solver of a class."""
    declared = Declared(step, step, at_start, after_jump, **known)
    return lambda solver: declared


_DIFFRAX = {
    diffrax.AbstractRungeKutta: _runge_kutta,
    diffrax.AbstractSRK: _stochastic_runge_kutta,
    diffrax.HalfSolver: _half_steps,
    diffrax.Euler: _always(1),
    diffrax.EulerHeun: _always(1),
    diffrax.ItoMilstein: _always(1),
    diffrax.StratonovichMilstein: _always(1),
    diffrax.SemiImplicitEuler: _always(1),
    diffrax.LeapfrogMidpoint: _always(1, asks_noise_once=False),  # about two steps
    diffrax.ImplicitEuler: _always(2, stability_limit=math.inf),
    diffrax.ReversibleHeun: _always(1, 1, 1),
    diffrax.ALIGN: _always(1, 1),
    diffrax.ShOULD: _always(2, 1),
    diffrax.QUICSORT: _always(2),
}
