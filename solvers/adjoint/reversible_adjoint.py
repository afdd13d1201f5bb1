r"""The reversible adjoint: exact gradients of the numerical solution without storing it.

A reversible solver reconstructs step n from step n + 1, and the field value that this needs is the
primal of the transpose that the gradient needs: both together cost one evaluation and one transpose
(`reversal`). Nothing is stored but the accepted step times.

In floating point the reversal amplifies rounding where the field contracts: by exp(|h lambda|) per step
for the flow itself, by 1 / lam for damped couplings. So by default the state is kept every
`checkpoint_every` steps, the reversal restarts there, and a stretch that misses its stored start is
replayed. With 32 steps an amplification of 1.1 per step grows to 21, rounding stays rounding, and the
stored states are one in 32.

    drift    largest rms of (reconstructed - stored) / (1 + |stored|), over members and restarts
    split    largest rms of (y - z) / (1 + |y|), over the stored states, where z is a second copy of y

A large drift says that the reversal cannot be trusted (without restarts nor can the gradient); a large
split, that the forward solution itself has gone parasitic, which no adjoint can mend.

Cost:       the solver's own evaluations forwards, as many evaluations and transposes backwards; an
            output inside a step, or a stretch to replay, costs one more evaluation. `certify=True`
            costs one more sweep of evaluations in the forward solve.
Memory:     max_steps times; and max_steps / `checkpoint_every` states, if there are restarts.
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
from nde.solvers.adjoint.forward import ForwardCarry
from nde.solvers.adjoint.reversal import TracedReversal, mismatch, run_reversed, trace_reversal
from nde.solvers.adjoint.solve import AbstractSolve
from nde.solvers.adjoint.stepper import ReversibleStepper
from nde.solvers.adjoint.traced import LaneFunctions, Start, Traced
from nde.solvers.estimates.estimates import Estimates
from nde.solvers.inputs import check_count
from nde.solvers.reversible.solver import AbstractReversibleSolver


class ReversibleAdjoint(diffrax.AbstractAdjoint):
    """Exact gradients that un-step the solve instead of storing it; for reversible solvers.

    Use it as `diffrax.diffeqsolve(..., ReversibleHeun(), adjoint=ReversibleAdjoint())`, with adaptive or
    constant steps, forwards or backwards in time, any `SaveAt(t0, t1, ts, steps, fn, subs)`, for ODEs,
    CDEs and Stratonovich SDEs, and under the same transformations as `DiscreteAdjoint`.

    Args:
        checkpoint_every: Keep the state every so many accepted steps, restart the reversal there, and
            replay a stretch that does not come back to it: the gradient is right whether or not the
            reversal holds. None stores nothing: constant memory, and right only where it holds.
        certify: Whether to un-step the solve once more in the forward pass and report `drift` and
            `split`, one number per trajectory, in `sol.stats`. Both below 1e-3 is a solve to trust, if
            its state is of order one (they are in units of 1 + |x|).
        estimates: As for `DiscreteAdjoint`; their gradient costs one more evaluation per step.

    Raises:
        TypeError: for a solver that cannot be undone.
        ValueError: for `event`, `SaveAt(dense=True)`, a progress meter, and as `DiscreteAdjoint`.
        NotImplementedError: for forward mode and second derivatives.
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
        loop.check(options)
        lacking = loop.lacking(options)
        if lacking is not None:
            raise ValueError(
                f"`ReversibleAdjoint` does not support {lacking}. Use `adjoint=DiscreteAdjoint()`."
            )
        stepper = ReversibleStepper(solver, options["terms"], options["args"])

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
        every = None if every is None else min(every, max_steps)
        self._reversal, self._every = reversal, every
        self.examine = self._certify if certify else None
        super().__init__(traced, start, max_steps)

    def plan(self) -> tapes.Every:
        every = self._every or self.max_steps
        return tapes.Every(0 if self._every is None else -(-self.max_steps // every), every)

    def pull_back(
        self,
        functions: LaneFunctions,
        ts: tuple[Array, ...],
        trail: tapes.Trail,
        cts: Cotangents,
        wanted: dict[int, Array],
    ) -> BackwardCarry:
        return run_reversed(functions, self._reversal, ts, trail, cts, wanted, self._every)

    def _certify(
        self, functions: LaneFunctions, start: Start, out: ForwardCarry
    ) -> dict[str, Array]:
        drift, split = certificate(functions, self._reversal, start, out, self._every)
        return {"drift": drift, "split": split}


def certificate(
    functions: LaneFunctions,
    reversal: TracedReversal,
    start: Start,
    out: ForwardCarry,
    every: int | None,
) -> tuple[Array, Array]:
    """Drift and split of a solve, by un-stepping it from its end (or from every stored state)."""
    solver, tape, steps = reversal.solver, cast(tapes.Tape, out.tape), out.accepted
    zero = jnp.zeros(steps.shape, jnp.result_type(*jax.tree.leaves((out.y, out.state))))

    def gap(y: PyTree[Array], state: PyTree[Array]) -> Array:
        if not solver.twins:
            return zero
        y, z = solver.members(y, state)
        return mismatch(z, y)

    def undo(i: Array, carry):
        (y, state), drift, split, memory = carry
        k = jnp.max(steps) - 1 - i
        own = jnp.clip(jnp.broadcast_to(k, steps.shape), 0, jnp.maximum(steps - 1, 0))
        t0, t1, jump = tapes.times(tape, own)
        increments, memory = functions.draw(t0, t1, memory)
        at = (solver.members(y, state), t0, t1, jump, increments)
        members = functions(reversal.retreat, *at)
        y, state = trees.where(k < steps, solver.split(members), (y, state))
        if every is None:
            here, stored = (k < steps) & (k == 0), (start.y, start.state)
        else:
            here, stored = (k < steps) & (k % every == 0), tapes.get(tape.states, k // every)
        drift = jnp.where(here, jnp.maximum(drift, mismatch((y, state), stored)), drift)
        split = jnp.where(here, jnp.maximum(split, gap(*stored)), split)
        return trees.where(here, stored, (y, state)), drift, split, memory

    memory = functions.memory(start.tprev)
    end = ((out.y, out.state), zero, gap(out.y, out.state), memory)
    _, drift, split, _ = jax.lax.fori_loop(0, jnp.max(steps), undo, end)
    return drift, split
