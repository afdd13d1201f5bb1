"""A stepper for a solver that leaves the stages of its step in its dense output, as `SOSRI2` does.

They are what the stiffness estimate of `heuristics` is made of.
"""

from nde.solvers.heuristics import stages
from nde.solvers.stepper import Advance, Attempt, SolverStepper


class StagedStepper(SolverStepper):
    """Takes steps through the solver's own `step`, and passes its stages on."""

    def attempt(self, t0, t1, y0, state, cache, made_jump) -> Attempt:
        tried = super().attempt(t0, t1, y0, state, cache, made_jump)
        return tried._replace(ks=stages(tried.dense_info))

    def advance(self, t0, t1, y0, state, made_jump, whole: bool) -> Advance:
        out = super().advance(t0, t1, y0, state, made_jump, whole)
        return out._replace(ks=stages(out.dense_info)) if whole else out
