"""A stepper for a solver that leaves the stages of its step in its dense output, as `SOSRI2` does.

They are what the stiffness estimate of `heuristics` is made of.
"""

from typing import Any

from nde.solvers.heuristics import stages
from nde.solvers.stepper import Advance, Attempt, SolverStepper


class StagedStepper(SolverStepper):
    """Takes steps through the solver's own `step`, and passes its stages on."""

    def attempt(self, *at: Any) -> Attempt:
        tried = super().attempt(*at)
        return tried._replace(ks=stages(tried.dense_info))

    def advance(self, *at: Any) -> Advance:
        out = super().advance(*at)
        return out if out.dense_info is None else out._replace(ks=stages(out.dense_info))
