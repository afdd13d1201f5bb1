r"""The backward loop of a reversible solver: un-step, and pull back with the same evaluation.

The solver's `rewind` evaluates and transposes functions that it writes for one trajectory. These are
the same at every step, so they are recorded once while the solve is traced, as closed functions of one
lane (`trace_reversal`); the loop evaluates them in the same order, over all lanes, with parameter
cotangents summed (`_LanePullback`).

With a state stored every m accepted steps the loop goes stretch by stretch:

    for stretch = last .. 0:
        un-step m steps from the end of the stretch, pulling back              (`solver.rewind`)
        compare the state that comes out with the stored one                   (`_missed`)
        if some lane has missed it: replay from the stored state               (`replayed_stretch`)
        go on from the stored state

m is `checkpoint_every`, twice that once there are more stored states than slots, and so on.

so a gradient is either that of a reversal which is known to have held, or that of the stored steps.
Where more of a step must be known to pull it back (a nonlinear `SaveAt(fn=...)`, its error estimate), it
is undone first and then pulled back as a stored one would be.

The times of a step are looked up. Steps of a constant length (or to given times) are found again by the
controller alone, from a few of its states (the `clock`); where steps may be rejected, the times of all
are on the tape (`knots`), and if they are too many, a stretch has to be replayed.

A lane whose turn has not come waits at the end of its last step. A lane that failed waits all the time,
at the end of its donor (`donors`).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from nde.solvers import trees
from nde.solvers.adjoint import tape as tapes
from nde.solvers.adjoint.backward import (
    BackwardCarry,
    Cotangents,
    StepPullback,
    added,
    clock_places,
    jumped,
    replayed_stretch,
)
from nde.solvers.adjoint.tape import Plan, Row, Rows, Tape, Trail
from nde.solvers.adjoint.traced import LaneFunctions, Start, Traced, end_floor
from nde.solvers.lanes.batch import masked
from nde.solvers.lanes.closures import ClosedFunction, Pool
from nde.solvers.reversible.coupling import RewindState, StepInput
from nde.solvers.reversible.solver import AbstractReversibleSolver


class TracedReversal(NamedTuple):
    """A reversible solver's steps, traced."""

    solver: AbstractReversibleSolver  # its structure; the arrays are in the pool
    control: ClosedFunction  # (t0, t1, increments) -> control
    retreat: ClosedFunction  # (members, t0, t1, made_jump, increments) -> members
    rewind: tuple[ClosedFunction, ...]  # what `solver.rewind` evaluates, in order
    finish: tuple[ClosedFunction, ...]  # what `solver.finish_rewind` evaluates


class When(NamedTuple):
    """The times of a step, whether the field jumped at its start, and the control over it.

    In the loop every array has a lane axis in front; while the solve is traced, none.
    """

    t0: Array
    t1: Array
    made_jump: Array
    control: PyTree[Array]
    increments: PyTree[Array] = ()  # of the remembering paths


def trace_reversal(
    traced: Traced, solver: AbstractReversibleSolver, terms: Any, args: Any, start: Start
) -> TracedReversal:
    """Traces what the backward loop needs, at the shapes of `start`."""
    pool, jumps = traced.pool, traced.jumps

    def step_of(when: When) -> StepInput:
        jump = when.made_jump if jumps else False
        return StepInput(terms, when.t0, when.t1, args, when.control, jump)

    def control(t0: Array, t1: Array, increments: PyTree[Array]):
        assert traced.knowing is not None
        return StepInput.over(traced.knowing(increments).terms, t0, t1, args).control

    def retreat(
        members: PyTree[Array], t0: Array, t1: Array, made_jump: Any, increments: PyTree[Array]
    ):
        when = When(t0, t1, made_jump, control(t0, t1, increments))
        return solver.inverse(step_of(when), members)[0]

    times, members = (start.tprev, start.tnext), solver.members(start.y, start.state)
    when = When(*times, start.made_jump, jax.eval_shape(control, *times, traced.increments))

    def evaluated(method: Callable[..., Any]) -> tuple[ClosedFunction, ...]:
        recorder = _Recorder(pool, step_of, when)
        jax.eval_shape(
            lambda members: method(recorder, solver.start_rewind(members, members)), members
        )
        return tuple(recorder.functions)

    return TracedReversal(
        solver=solver,
        control=pool.convert(control, *times, traced.increments),
        retreat=pool.convert(retreat, members, *times, start.made_jump, traced.increments),
        rewind=evaluated(solver.rewind),
        finish=evaluated(solver.finish_rewind),
    )


class _Recorder:
    """A `coupling.Pullback` that writes down the functions it is given, and answers with zeros."""

    def __init__(self, pool: Pool, step_of: Callable[[When], StepInput], when: When):
        self.pool, self.step_of, self.when = pool, step_of, when
        self.functions: list[ClosedFunction] = []

    def value(self, fn: Callable, x: Array):
        of_leaves = lambda step, following, x: fn(self.step_of(step), self.step_of(following), x)
        closed = self.pool.convert(of_leaves, self.when, self.when, jax.eval_shape(lambda: x))
        self.functions.append(closed)
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), closed.out)

    def pull(self, fn: Callable, x: Array, ct: PyTree[Array]):
        return self.value(fn, x), {}, trees.zeros_like(x)


class _LanePullback:
    """A `coupling.Pullback` over all lanes, for one step: the recorded functions, in the same order."""

    def __init__(
        self,
        functions: tuple[ClosedFunction, ...],
        pullback: StepPullback,
        control: ClosedFunction,
        step: When,
        following: When,
    ):
        self.functions, self.pullback, self.control = iter(functions), pullback, control
        self.step, self.following = step, following

    def value(self, fn: Callable, x: Array):
        del fn
        step, following = (w._replace(increments=()) for w in (self.step, self.following))
        return self.pullback.functions(next(self.functions), step, following, x)

    def pull(self, fn: Callable, x: Array, ct: PyTree[Array]):
        del fn
        closed, pullback = next(self.functions), self.pullback
        moving = any(i in pullback.wanted for i in self.control.uses)  # the control has a gradient
        controls = (self.step.control, self.following.control)

        def evaluate(consts: list[Array], x: Array, aux: PyTree[Array]):
            (x, controls), (step, following) = x if moving else (x, aux[2]), aux[:2]
            step = step._replace(control=controls[0])
            return closed(consts, step, following._replace(control=controls[1]), x)

        without = lambda when: when._replace(control=None, increments=())
        fixed = (without(self.step), without(self.following))
        if not moving:
            fixed = (*fixed, controls)
            value, ct_consts, ct_x = pullback.transpose(evaluate, closed.uses, x, fixed, ct)
            return value, pullback.filled(ct_consts), ct_x
        out = pullback.transpose(evaluate, closed.uses, (x, controls), fixed, ct)
        value, ct_consts, (ct_x, ct_controls) = out
        total = pullback.filled(ct_consts)
        for when, ct_control in zip((self.step, self.following), ct_controls, strict=True):
            over = lambda consts, x, aux: self.control(consts, *aux)
            aux = (when.t0, when.t1, when.increments)
            _, ct_consts, _ = pullback.transpose(over, self.control.uses, (), aux, ct_control)
            total = added(total, ct_consts)
        return value, total, ct_x


class StretchCarry(NamedTuple):
    """What travels backwards inside a stretch.

    A lane axis is in front of every array but the cotangents of constants: those are summed over the
    lanes that share one, levels in front.
    """

    back: RewindState
    following: When
    consts: dict[int, Array]
    ts_index: tuple[Array, ...]
    memory: PyTree[Array]
    clock: Rows | None


def run_reversed(
    functions: LaneFunctions,
    reversal: TracedReversal,
    start: Start,
    trail: Trail,
    cotangents: Cotangents,
    wanted: dict[int, Array],
    plan: Plan,
) -> BackwardCarry:
    """Pulls cotangents back to the start. `plan`: which states and times are kept."""
    pullback = StepPullback(functions, start, trail, cotangents, wanted, plan)
    reverse = _StretchReversal(pullback, reversal)
    most, end = jnp.max(trail.steps), pullback.donors.copied(trail.end)
    ct = pullback.final(cotangents)._replace(clock=trail.tape.clock)
    if plan.rows is None:
        undone = lambda: reverse.stretch(jnp.zeros_like(most), most, end, ct)[1]
        return jax.lax.cond(most > 0, undone, lambda: ct)
    keep, timeless = plan.rows, thinned(most, plan)
    m = every(most, keep)

    def pull_stretch(i: Array, carry: Any):
        end, ct, rows = carry
        k0 = m * ((most - 1) // m - i)
        length, here = jnp.minimum(m, most - k0), trail.steps > k0
        kept = tapes.get(trail.tape.rows, tapes.slot(k0 // keep.unit, keep.slots))
        row = pullback.load(k0, kept)
        stored = trees.where(here, (row.y, row.inner), end)
        found, undone = reverse.stretch(k0, length, end, ct)
        missed = here & (_missed(found, stored, end) | timeless)
        redo = lambda rows: replayed_stretch(pullback, k0, length, row, ct, rows)
        ct, rows = jax.lax.cond(jnp.any(missed), redo, lambda rows: (undone, rows), rows)
        return stored, ct, rows

    stretches = jnp.where(most > 0, (most - 1) // m + 1, 0)
    carry = (end, ct, tapes.blank(tapes.pack(pullback.first), plan.ladder.rows + 1))
    return jax.lax.fori_loop(0, stretches, pull_stretch, carry)[1]


def every(most: Array, keep: tapes.Doubling) -> Array:
    """How many steps lie between kept rows, behind `most` of them."""
    units = jnp.maximum(most - 1, 0) // keep.unit + 1
    return jnp.left_shift(keep.unit, tapes.doublings(units, keep.slots))


def thinned(most: Array, plan: Plan) -> Array:
    """Whether there were too many steps for the times of all to be on the tape."""
    return jnp.array(False) if plan.knots is None else most > plan.knots.slots


def mismatch(found: PyTree[Array], stored: PyTree[Array]) -> Array:
    """The drift of a reconstruction in each lane: the largest rms over the members, relative to
    1 + |x|; infinite where it is not a number."""
    drift = lambda a, b: _rms(jnp.abs(a - b) / (1 + jnp.abs(b)))
    worst = functools.reduce(jnp.maximum, jax.tree.leaves(jax.tree.map(drift, found, stored)))
    return jnp.where(jnp.isnan(worst), jnp.inf, worst)


def _missed(found: PyTree[Array], stored: PyTree[Array], end: PyTree[Array]) -> Array:
    """Whether a reversal from `end` did not hold: one that does is rounding and little more, 256 units
    of it, whatever the size of an entry."""

    def holds(a: Array, b: Array, end: Array) -> Array:
        size = jnp.maximum(jnp.abs(b) + jnp.abs(end), jnp.finfo(b.dtype).tiny)
        return _rms(jnp.abs(a - b) / size) <= 256 * float(jnp.finfo(b.dtype).eps)

    held = jax.tree.leaves(jax.tree.map(holds, found, stored, end))
    return ~functools.reduce(jnp.logical_and, held)


def _rms(x: Array) -> Array:
    """Over the entries of each lane."""
    entries = max(1, math.prod(x.shape[1:]))
    return jnp.sqrt(jnp.sum(jnp.abs(x) ** 2, axis=tuple(range(1, x.ndim))) / entries)


class Times:
    """When a step started and ended, and whether the field jumped at its start. `first`, `last`: the
    steps of these names in every lane, of `steps`."""

    def __init__(
        self,
        functions: LaneFunctions,
        plan: Plan,
        tape: Tape,
        first: Row,
        last: Row,
        steps: Int[Array, " lanes"],
        t1: Array,
    ):
        self.functions, self.plan, self.tape = functions, plan, tape
        self.first, self.last, self.steps = first, last, steps
        self.t1, self.floor, self.like = t1, end_floor(t1), tapes.times(first)
        if plan.clock is not None:
            self.places = clock_places(jnp.max(steps), plan)

    def look_up(self, k: Array, clock: Rows | None) -> tuple[Row, Rows | None]:
        """Step k of every lane that has one, else its last; and the rows of the clock."""
        row, clock = self._found(k, clock)
        row = row._replace(before=None, controller=None)
        return trees.where(k < self.steps, row, self.last), clock  # type: ignore[return-value]

    def _found(self, k: Array, clock: Rows | None) -> tuple[Row, Rows | None]:
        """The same, but anything in a lane that has no such step."""
        if self.plan.clock is not None and clock is not None:
            if self.places.origin is not None:
                clock = self._wound(self.places.origin(k), k, clock)
            return tapes.unpack(tapes.get(clock, self.places.row(k)), self.like), clock
        assert self.tape.knots is not None
        like = tapes.ends(self.first)
        end = tapes.unpack(tapes.get(self.tape.knots, k), like)
        if end.jump is not None:
            return end, clock
        last = tapes.unpack(tapes.get(self.tape.knots, jnp.maximum(k - 1, 0)), like)
        return end._replace(t0=jnp.where(k == 0, self.first.t0, last.t1)), clock

    def _wound(self, k0: Array, k1: Array, clock: Rows) -> Rows:
        """The clock, run from step k0 to step k1."""
        tick = self.functions.traced.tick

        def one(k: Any, carry: tuple[Row, Rows]) -> tuple[Row, Rows]:
            row, clock = carry
            k = jnp.asarray(k, jnp.int32)
            at = (row.t0, row.t1, self.t1, self.floor, row.controller)
            t0, t1, jump, controller = self.functions(tick, *at)
            before = None if row.before is None else row.t1
            jump = None if row.jump is None else jump
            row = Row(None, None, t0, t1, jump, before, controller)
            return row, tapes.put(clock, self.places.row(k + 1), tapes.pack(row))

        begin = tapes.unpack(tapes.get(clock, self.places.row(k0)), self.like)
        return jax.lax.fori_loop(k0, k1, one, (begin, clock))[1]


def undone(
    functions: LaneFunctions,
    reversal: TracedReversal,
    row: Row,
    end: tuple[PyTree[Array], PyTree[Array]],
    memory: PyTree[Array],
) -> tuple[tuple[PyTree[Array], PyTree[Array]], PyTree[Array]]:
    """The state before the step of `row`, in every lane, from the one behind it; and the memory of the
    noise."""
    increments, memory = functions.draw(row.t0, row.t1, memory)
    at = (reversal.solver.members(*end), row.t0, row.t1, jumped(row), increments)
    return reversal.solver.split(functions(reversal.retreat, *at)), memory


class _StretchReversal:
    """One stretch of the backward pass."""

    def __init__(self, pullback: StepPullback, reversal: TracedReversal):
        self.pullback, self.reversal, self.solver = pullback, reversal, reversal.solver
        last: Row = pullback.donors.copied(pullback.last)
        ends = (pullback.first, last, pullback.steps, pullback.t1)
        self.times = Times(pullback.functions, pullback.plan, pullback.tape, *ends)
        linear = all(save.is_linear for save in pullback.traced.saves)
        self.fused = linear and pullback.judged is None

    def when(
        self, k: Array, memory: PyTree[Array], clock: Rows | None
    ) -> tuple[When, PyTree[Array], Rows | None]:
        """Step k of every lane, the memory of the noise, and the clock."""
        row, clock = self.times.look_up(k, clock)
        increments, memory = self.pullback.functions.draw(row.t0, row.t1, memory)
        control = self.pullback.functions(self.reversal.control, row.t0, row.t1, increments)
        return When(row.t0, row.t1, jumped(row), control, increments), memory, clock

    def stretch(
        self, k0: Array, length: Array, end: PyTree[Array], ct: BackwardCarry
    ) -> tuple[PyTree[Array], BackwardCarry]:
        """The state at step k0 as the reversal finds it, and the cotangents there."""
        return (self._fused if self.fused else self._undone)(k0, length, end, ct)

    def _undone(self, k0: Array, length: Array, end: PyTree[Array], ct: BackwardCarry):
        """Undoes a step, then pulls back through it as if it had been stored."""

        def step(j: Any, carry: Any):
            (y, others), ct = carry
            k = k0 + length - 1 - j
            row, clock = self.times.look_up(k, ct.clock)
            functions = self.pullback.functions
            # A lane that waits undoes its last step again and again, and is pulled back through it.
            before, memory = undone(functions, self.reversal, row, (y, others), ct.memory)
            ct = ct._replace(memory=memory, clock=clock)
            ct = self.pullback.step(k, row._replace(y=before[0], inner=before[1]), ct)
            return trees.where(k < self.pullback.steps, before, (y, others)), ct

        return jax.lax.fori_loop(0, length, step, (end, ct))

    def _fused(self, k0: Array, length: Array, end: PyTree[Array], ct: BackwardCarry):
        """Undoes a step and pulls back through it with the same evaluations."""
        solver, pullback = self.solver, self.pullback
        members, cts = solver.members(*end), solver.members(ct.y, ct.inner)
        back = solver.start_rewind(members, cts, pullback.steps.shape)
        following, memory, clock = self.when(k0 + length - 1, ct.memory, ct.clock)
        # Nothing is pending there, so there is no jump to look at from its other side.
        following = following._replace(made_jump=jnp.zeros_like(following.made_jump))

        def step(j: Any, c: StretchCarry) -> StretchCarry:
            k = k0 + length - 1 - j
            active = k < pullback.steps
            when, memory, clock = self.when(k, c.memory, c.clock)
            c = self._with_outputs(k, active, when, c)
            cts, ct_first = masked(active, (c.back.cts, c.back.ct_first))
            lane_pullback = self._lane_pullback(self.reversal.rewind, when, c.following)
            back, ct_consts = solver.rewind(
                lane_pullback, c.back._replace(cts=cts, ct_first=ct_first)
            )
            return StretchCarry(
                trees.where(active, back, c.back),
                trees.where(active, when, c.following),
                added(c.consts, ct_consts or {}),
                c.ts_index,
                memory,
                clock,
            )

        c = StretchCarry(back, following, ct.consts, ct.ts_index, memory, clock)
        c = jax.lax.fori_loop(0, length, step, c)
        # A lane with nothing pending stands at the end of its last step, where the field is good.
        last = c.following
        last = last._replace(t0=jnp.where(c.back.pending, last.t0, last.t1))
        lane_pullback = self._lane_pullback(self.reversal.finish, last, last)
        members, cts, ct_consts = solver.finish_rewind(lane_pullback, c.back)
        # Lanes without a step ran on the donor's data; their result is discarded.
        y, inner = trees.where(pullback.steps > 0, solver.split(cts), (ct.y, ct.inner))
        consts = added(c.consts, ct_consts or {})
        ct = BackwardCarry(y, inner, consts, c.ts_index, c.memory, c.clock)
        return solver.split(members), ct

    def _lane_pullback(self, functions, step: When, following: When) -> _LanePullback:
        return _LanePullback(functions, self.pullback, self.reversal.control, step, following)

    def _with_outputs(self, k: Array, active: Array, when: When, c: StretchCarry) -> StretchCarry:
        """Adds the cotangents of outputs saved at the end of step k."""
        y, others = self.solver.split(c.back.cts)
        ct = BackwardCarry(y, others, c.consts, c.ts_index, c.memory, c.clock)
        for j, save in enumerate(self.pullback.traced.saves):
            if self.pullback.saved[j] is not None and save.at_step is not None:
                at = (k, active, when.t1, self.solver.split(c.back.members)[0])
                ct = self.pullback.at_step(j, save, save.at_step, *at, ct)
        back = c.back._replace(cts=self.solver.members(ct.y, ct.inner))
        return c._replace(back=back, consts=ct.consts)
