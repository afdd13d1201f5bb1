r"""The reversible adjoint: exact gradients of the numerical solution without storing it.

A reversible solver reconstructs step n from step n + 1, and the field value that this needs is the
primal of the transpose that the gradient needs: both together cost one evaluation and one transpose
(`reversal`).

In floating point the reversal amplifies rounding where the field contracts: by exp(|h lambda|) per step
for the flow itself, by 1 / lam for damped couplings. So by default the state is kept every
`checkpoint_every` steps, the reversal restarts there, and a stretch that misses its stored start is
replayed. With 32 steps an amplification of 1.1 per step grows to 21, and rounding stays rounding. At
most 128 states are kept: with more than 4096 steps the stretches have 64 steps, then 128, and so on.

    drift    largest rms of (reconstructed - stored) / (1 + |stored|), over members and restarts
    split    largest rms of (y - z) / (1 + |y|), over the stored states, where z is a second copy of y

A large drift says that the reversal cannot be trusted (without restarts nor can the gradient); a large
split, that the forward solution itself has gone parasitic, which no adjoint can mend.

Cost:       the solver's own evaluations forwards, as many evaluations and transposes backwards; an
            output inside a step, or a stretch to replay, costs one more evaluation. `certify=True`
            costs one more sweep of evaluations in the forward solve.
Memory:     128 states and the rows for a stretch, or none with `checkpoint_every=None`. Times: of steps
            of a constant length up to 8192, for a larger `max_steps` 192 from which the others are found;
            where steps may be rejected 128 `checkpoint_every` (a solve with more is replayed), and
            `max_steps` if there is nothing to replay from or with `certify=True`.
Not for:    stiff fields: use `DiscreteAdjoint`.
Reference:  Efficient and accurate gradients for neural SDEs (2021) | arXiv:2105.13493
"""

from typing import Any, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from nde.solvers import trees
from nde.solvers.adjoint import loop
from nde.solvers.adjoint import tape as tapes
from nde.solvers.adjoint.backward import BackwardCarry, Cotangents
from nde.solvers.adjoint.forward import ForwardCarry, initial_carry, row_of
from nde.solvers.adjoint.reversal import (
    Times,
    TracedReversal,
    every,
    mismatch,
    run_reversed,
    trace_reversal,
    undone,
)
from nde.solvers.adjoint.solve import AbstractSolve
from nde.solvers.adjoint.stepper import ReversibleStepper, holding
from nde.solvers.adjoint.tape import Doubling, Ladder, Plan, keeping, power
from nde.solvers.adjoint.traced import LaneFunctions, Start, Traced
from nde.solvers.estimates.estimates import Estimates
from nde.solvers.inputs import check_count
from nde.solvers.reversible.solver import AbstractReversibleSolver

_STATES = 128  # that are kept, whatever the number of steps
_TIMES = 2**13  # that are kept of steps that are never rejected; more are found again


class ReversibleAdjoint(diffrax.AbstractAdjoint):
    """Exact gradients that un-step the solve instead of storing it; for reversible solvers.

    Use it as `diffrax.diffeqsolve(..., ReversibleHeun(), adjoint=ReversibleAdjoint())`, with adaptive or
    constant steps, forwards or backwards in time, any `SaveAt(t0, t1, ts, steps, fn, subs)`, for ODEs,
    CDEs and Stratonovich SDEs, and under the same transformations as `DiscreteAdjoint`.

    Args:
        checkpoint_every: Keep the state every so many accepted steps, restart the reversal there, and
            replay a stretch that does not come back to it: the gradient is right whether or not the
            reversal holds. None stores no state, and the gradient is right only where the reversal holds;
            with constant steps memory is constant, with adaptive ones a time is kept for each step.
        certify: Whether to un-step the solve once more in the forward pass and report `drift` and
            `split`, one number per trajectory, in `sol.stats`. Both below 1e-3 is a solve to trust, if
            its state is of order one (they are in units of 1 + |x|).
        estimates: As for `DiscreteAdjoint`; their gradient costs one more evaluation per step.

    Raises:
        TypeError: for a solver that cannot be undone.
        ValueError: for `event`, `SaveAt(dense=True)`, a progress meter, ordered callbacks and collectives,
            and as `DiscreteAdjoint`.
        NotImplementedError: for reverse mode of a derivative.
        RuntimeError: as `DiscreteAdjoint`.
    """

    checkpoint_every: int | None = eqx.field(default=32, static=True)
    certify: bool = eqx.field(default=False, static=True)
    estimates: Estimates | None = eqx.field(default=None, static=True)

    def __check_init__(self) -> None:
        if self.checkpoint_every is not None:
            check_count("checkpoint_every", self.checkpoint_every, ", or None to store nothing")

    def loop(self, **options: Any) -> tuple[Any, dict[str, Array]]:
        """Called by `diffrax.diffeqsolve`."""
        solver = options["solver"]
        if not issubclass(type(solver), AbstractReversibleSolver):
            raise TypeError(
                f"`ReversibleAdjoint` cannot undo the steps of {type(solver).__name__}. Use a solver of "
                "`nde.solvers`: ReversibleHeun(), EES27(), EES25(), AsynchronousLeapfrog(), "
                "StormerVerlet(), Yoshida4(), or Reversible(diffrax.Tsit5()) for any explicit "
                "Runge-Kutta method; or use `adjoint=DiscreteAdjoint()`."
            )
        effects = loop.check(options)
        lacking = loop.lacking(options, effects)
        if lacking is not None:
            raise ValueError(
                f"`ReversibleAdjoint` does not support {lacking}. Use `adjoint=DiscreteAdjoint()`."
            )
        stepper = ReversibleStepper(solver, holding(options["terms"]), options["args"])

        def make(traced: Traced, start: Start) -> AbstractSolve:
            reversal = trace_reversal(traced, solver, stepper.terms, stepper.args, start)
            every = self.checkpoint_every
            return _ReversedSolve(
                traced, start, options["max_steps"], reversal, every, self.certify
            )

        final, stats, out = loop.solve_with(
            "ReversibleAdjoint", options, stepper, make, self.estimates
        )
        return final, stats | dict(out.extra)


class _ReversedSolve(AbstractSolve):
    adjoint = "ReversibleAdjoint"
    keeps_end = True

    def __init__(
        self,
        traced: Traced,
        start: Start,
        max_steps: int,
        reversal: TracedReversal,
        every: int | None,
        certify: bool,
    ):
        self._reversal = reversal
        self._plan = _plan(traced.uniform, max_steps, every, certify)
        self.examine = self._certify if certify else None
        super().__init__(traced, start, max_steps)

    def plan(self) -> Plan:
        return self._plan

    def pull_back(
        self,
        functions: LaneFunctions,
        start: Start,
        trail: tapes.Trail,
        cts: Cotangents,
        wanted: dict[int, Array],
    ) -> BackwardCarry:
        return run_reversed(functions, self._reversal, start, trail, cts, wanted, self._plan)

    def _certify(
        self, functions: LaneFunctions, start: Start, out: ForwardCarry
    ) -> dict[str, Array]:
        drift, split = certificate(functions, self._reversal, start, out, self._plan)
        return {"drift": drift, "split": split}


def _plan(uniform: bool, max_steps: int, every: int | None, certify: bool) -> Plan:
    """Which states are kept, and which times."""
    rows, ladder, clock, knots, ticks = None, Ladder(0, 0), None, None, Ladder(0, 0)
    if every is not None:
        rows, ladder = keeping(_STATES, max_steps, min(every, max_steps))
    if uniform and max_steps > _TIMES:
        # Found again a time may differ in its last digit, which in single precision a short step feels.
        clock, ticks = keeping(_STATES, max_steps)
    elif uniform or rows is None or certify:
        knots = Doubling(power(max_steps))  # nothing else to find them with
    else:
        knots = Doubling(power(min(_STATES * rows.unit, max_steps)))
    return Plan(rows, clock, knots, ladder, ticks, last=True)


def certificate(
    functions: LaneFunctions,
    reversal: TracedReversal,
    start: Start,
    out: ForwardCarry,
    plan: Plan,
) -> tuple[Array, Array]:
    """Drift and split of a solve, by un-stepping it from its end (or from every stored state)."""
    solver, tape, steps = reversal.solver, cast(tapes.Tape, out.tape), out.accepted
    begin = initial_carry(functions, start, 0, None)
    most, first = jnp.max(steps), row_of(functions, begin, plan)
    times = Times(functions, plan, tape, first, cast(tapes.Row, out.last), steps, start.t1)
    m = None if plan.rows is None else every(most, plan.rows)
    zero = jnp.zeros(steps.shape, jnp.result_type(*jax.tree.leaves((out.y, out.state))))

    def gap(y: PyTree[Array], state: PyTree[Array]) -> Array:
        if not solver.twins:
            return zero
        y, z = solver.members(y, state)
        return mismatch(z, y)

    def undo(i: Array, carry):
        end, drift, split, memory, clock = carry
        k = most - 1 - i
        row, clock = times.look_up(k, clock)
        before, memory = undone(functions, reversal, row, end, memory)
        y, state = trees.where(k < steps, before, end)
        if plan.rows is None or m is None or tape.rows is None:
            here, stored = (k < steps) & (k == 0), (start.y, start.state)
        else:
            here, place = (k < steps) & (k % m == 0), k // plan.rows.unit
            kept = tapes.get(tape.rows, tapes.slot(place, plan.rows.slots))
            kept = tapes.unpack(kept, first)
            stored = (kept.y, kept.inner)
        drift = jnp.where(here, jnp.maximum(drift, mismatch((y, state), stored)), drift)
        split = jnp.where(here, jnp.maximum(split, gap(*stored)), split)
        return trees.where(here, stored, (y, state)), drift, split, memory, clock

    memory = functions.memory(start.tprev)
    end = ((out.y, out.state), zero, gap(out.y, out.state), memory, tape.clock)
    _, drift, split, *_ = jax.lax.fori_loop(0, most, undo, end)
    return drift, split
