r"""The discrete adjoint: exact gradients of the numerical solution, fast under `jax.vmap`.

A solve is a chain of accepted steps y_{n+1} = step(t_n, t_{n+1}, y_n, p). Its gradient is the chain rule
through just these steps, backwards:

    ct_n = (d step / d y)^T ct_{n+1},      ct_p += (d step / d p)^T ct_{n+1},

with the cotangents of saved outputs added where they were saved. The step sizes carry no gradient of the
solution, and rejected steps do not take part. The states y_n come from the tape (`tape`) or from a replay
(`backward`).

Cost:       one gradient is 2 F + 1 B per step up to S = `checkpoints` accepted steps; with up to m times as
            many, m = 2, 4, .., S / 2, all but every m-th step are replayed, 1 - 1/m F more per step, and
            with S = 256 at most 2 F more up to a million steps (F: the vector-field evaluations of a
            step, B: their transpose; the forward solve is 1 F).
Memory:     1.5 S states, whatever `max_steps`; 4 S times, where steps may be rejected (twice that, and a
            flag, if the field may jump). With outputs inside steps, or estimates, an FSAL method adds its
            last stage to each state. Estimates are kept step by step: `max_steps` numbers each.
Reference:  On Neural Differential Equations, Kidger (2022), section 5.1 | arXiv:2202.02435
"""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from nde.solvers import trees
from nde.solvers.adjoint import loop
from nde.solvers.adjoint.backward import (
    BackwardCarry,
    Cotangents,
    StepPullback,
    places_of,
    steps_back,
)
from nde.solvers.adjoint.parallel import chunk_length, steps_back_at_once
from nde.solvers.adjoint.solve import AbstractSolve
from nde.solvers.adjoint.stepper import stepper_for
from nde.solvers.adjoint.tape import Doubling, Plan, Trail, keeping, power
from nde.solvers.adjoint.traced import LaneFunctions, Start, Traced
from nde.solvers.estimates.estimates import Estimates
from nde.solvers.inputs import check_count

_KNOTS = 4  # ends of steps per state, where steps may be rejected


class DiscreteAdjoint(diffrax.AbstractAdjoint):
    """Exact gradients of the discrete solution, with one parameter gradient for a whole batch.

    Use it as `diffrax.diffeqsolve(..., adjoint=DiscreteAdjoint())`. Any diffrax solver, controller and
    `SaveAt` works, under `jax.jit`, `jax.vmap`, `jax.grad` and each other's composition. A solve with an
    `event`, `SaveAt(dense=True)`, a progress meter, an ordered callback or a collective over a mapped axis
    (`jax.lax.pmean`) in the vector field is handed to diffrax's own default adjoint. Under `jax.shard_map`
    pass `check_vma=False`.

    Forward mode (`jax.jvp`, `jax.jacfwd`, `jax.linearize`) is one more pass over the steps, and so is
    forward mode of a gradient (Hessian-vector products, `jax.hessian`). `t0`, `t1`, `dt0`, `ts`, and times
    that the controller steps or jumps to, are differentiated as the steps depend on them; in reverse mode
    that costs one pass for each such number. How long an adaptive step is carries no derivative of the
    solution, as in diffrax, and tolerances have none. States may be complex.

    A trajectory that failed (`sol.result`) has gradient zero, and does not disturb the others.
    `sol.stats` also holds `nfe`, the number of vector-field evaluations of the trajectory, unless the
    solve is handed over.

    Args:
        checkpoints: How many states to keep; with more steps, those between them are replayed once.
            Rounded up to a power of two.
        estimates: Which error and stiffness estimates to put into `sol.stats`, as differentiable
            numbers; None: none, at no cost.
        parallel: Whether the backward pass takes up to 64 steps at once (`parallel.py`), if the state is
            one vector of real numbers; None: where that is faster, for few trajectories of few equations.

    Raises:
        ValueError: for `max_steps=None`, tolerances that cannot be met or are differentiated, a vector
            field of the wrong shape, and `jax.shard_map` with `check_vma=True`.
        NotImplementedError: for reverse mode of a derivative (`jax.grad` of `jax.grad`).
        RuntimeError: at run time with `throw=True`, for times or states that are not finite, and for a
            solve that fails.
    """

    checkpoints: int = eqx.field(default=256, static=True)
    estimates: Estimates | None = eqx.field(default=None, static=True)
    parallel: bool | None = eqx.field(default=None, static=True)

    def __check_init__(self) -> None:
        check_count("checkpoints", self.checkpoints)

    def loop(self, **options: Any) -> tuple[Any, dict[str, Array]]:
        """Called by `diffrax.diffeqsolve`."""
        effects = loop.check(options)
        lacking = loop.lacking(options, effects)
        if lacking is not None and self.estimates is not None:
            raise ValueError(
                f"`DiscreteAdjoint(estimates=...)` does not support {lacking}. Wrap the solver in "
                "`nde.solvers.WithEstimates`, which any adjoint takes."
            )
        if lacking is not None:
            return diffrax.RecursiveCheckpointAdjoint().loop(**options)
        solver = loop.stopped(options["solver"], options["stepsize_controller"])
        problem = [options[name] for name in ("terms", "args", "t0", "t1")]
        stepper = stepper_for(solver, *problem, y0=options["init_state"].y)
        make = lambda traced, start: _StoredSolve(
            traced, start, options["max_steps"], self.checkpoints, self.parallel
        )
        final, stats, _ = loop.solve_with("DiscreteAdjoint", options, stepper, make, self.estimates)
        return final, stats


class _StoredSolve(AbstractSolve):
    adjoint = "DiscreteAdjoint"
    keeps_end = False

    def __init__(
        self,
        traced: Traced,
        start: Start,
        max_steps: int,
        checkpoints: int,
        parallel: bool | None,
    ):
        self._parallel = parallel
        rows, ladder = keeping(checkpoints, max_steps)
        knots = None
        if ladder.most and not traced.uniform:
            knots = Doubling(power(min(_KNOTS * rows.slots, max_steps)))
        self._plan = Plan(rows, knots=knots, ladder=ladder)
        super().__init__(traced, start, max_steps)

    def plan(self) -> Plan:
        return self._plan

    def pull_back(
        self,
        functions: LaneFunctions,
        start: Start,
        trail: Trail,
        cts: Cotangents,
        wanted: dict[int, Array],
    ) -> BackwardCarry:
        pullback = StepPullback(functions, start, trail, cts, wanted, self._plan)
        ct, most, first = pullback.final(cts), jnp.max(trail.steps), pullback.first
        if self.traced.hands_over:  # nothing depends on the last cache
            ct = ct._replace(inner=(ct.inner, trees.zeros_like(first.inner[1])))
        ct = self._to_start(pullback, most, trail, ct)
        if not self.traced.hands_over:
            return ct
        # Where no lane took a step there is none to copy, and the field may be undefined.
        none = lambda: ct._replace(inner=ct.inner[0])
        return jax.lax.cond(most > 0, lambda: pullback.first_cache(ct), none)

    def _to_start(
        self, pullback: StepPullback, most: Array, trail: Trail, ct: BackwardCarry
    ) -> BackwardCarry:
        """Through all steps: at once where that is faster, else step by step."""
        rows, keep, lanes = trail.tape.rows, self._plan.rows, pullback.lanes.count
        assert rows is not None and keep is not None
        x = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), (ct.y, ct.inner)
        )
        length = chunk_length(self._parallel, self.traced, x, lanes, keep.slots)
        if length is not None:
            return steps_back_at_once(pullback, most, rows, ct, length)
        places = places_of(most, self._plan)
        return steps_back(pullback, jnp.zeros_like(most), most, rows, places, ct)[0]
