r"""The backward loop of a reversible solver: un-step, and pull back with the same evaluation.

The solver's `rewind` evaluates and transposes functions that it writes for one trajectory. These are
the same at every step, so they are recorded once while the solve is traced, as closed functions of one
lane (`trace_reversal`); the loop evaluates them in the same order, over all lanes, with parameter
cotangents summed (`_LanePullback`).

With a state stored every K accepted steps the loop goes chunk by chunk:

    for chunk = last .. 0:
        un-step K steps from the chunk's end, pulling back                     (`solver.rewind`)
        compare the state that comes out with the stored one                   (`_missed`)
        if some lane has missed it: replay the chunk from the stored state     (`replayed_chunk`)
        go on from the stored state

so a gradient is either that of a reversal which is known to have held, or that of the stored steps.
Where more of a step must be known to pull it back (a nonlinear `SaveAt(fn=...)`, its error estimate), it
is undone first and then pulled back as a stored one would be.

A lane whose turn has not come waits at the end of its last step. A lane that failed waits all the time,
at the end of its donor (`donors`).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from nde.solvers import trees
from nde.solvers.adjoint import tape as tapes
from nde.solvers.adjoint.backward import (
    BackwardCarry,
    Cotangents,
    RecordedStep,
    StepPullback,
    added,
    replayed_chunk,
)
from nde.solvers.adjoint.tape import Trail
from nde.solvers.adjoint.traced import LaneFunctions, Start, Traced
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


class ChunkCarry(NamedTuple):
    """What travels backwards inside a chunk.

    A lane axis is in front of every array but the cotangents of constants: those are summed over the
    lanes that share one, levels in front.
    """

    back: RewindState
    following: When
    consts: dict[int, Array]
    ts_index: tuple[Array, ...]
    memory: PyTree[Array]


def run_reversed(
    functions: LaneFunctions,
    reversal: TracedReversal,
    ts: tuple[Array, ...],
    trail: Trail,
    cotangents: Cotangents,
    wanted: dict[int, Array],
    every: int | None,
) -> BackwardCarry:
    """Pulls cotangents back to the start. `every`: how many steps lie between stored states."""
    pullback = StepPullback(functions, ts, trail, cotangents, wanted)
    reverse = _ChunkReversal(pullback, reversal)
    most, end = jnp.max(trail.steps), pullback.donors.copied(trail.end)
    ct = pullback.final(cotangents)
    if every is None:
        undone = lambda: reverse.chunk(jnp.zeros_like(most), most, end, ct)[1]
        return jax.lax.cond(most > 0, undone, lambda: ct)

    def pull_chunk(i: Array, carry: Any):
        end, ct, rows = carry
        k0 = every * ((most - 1) // every - i)
        length, here = jnp.minimum(every, most - k0), trail.steps > k0
        stored = trees.where(here, tapes.get(trail.tape.states, k0 // every), end)
        found, undone = reverse.chunk(k0, length, end, ct)
        missed = here & _missed(found, stored, end)
        redo = lambda rows: replayed_chunk(pullback, k0, length, stored, ct, rows)
        ct, rows = jax.lax.cond(jnp.any(missed), redo, lambda rows: (undone, rows), rows)
        return stored, ct, rows

    chunks = jnp.where(most > 0, (most - 1) // every + 1, 0)
    carry = (end, ct, tapes.blank(end, every))
    return jax.lax.fori_loop(0, chunks, pull_chunk, carry)[1]


def mismatch(found: PyTree[Array], stored: PyTree[Array]) -> Array:
    """The drift of a reconstruction in each lane: the largest rms over the members, relative to
    1 + |x|; infinite where it is not a number."""
    drift = lambda a, b: _rms((a - b) / (1 + jnp.abs(b)))
    worst = functools.reduce(jnp.maximum, jax.tree.leaves(jax.tree.map(drift, found, stored)))
    return jnp.where(jnp.isnan(worst), jnp.inf, worst)


def _missed(found: PyTree[Array], stored: PyTree[Array], end: PyTree[Array]) -> Array:
    """Whether a reversal from `end` did not hold: one that does is rounding and little more, 256 units
    of it, whatever the size of an entry."""

    def holds(a: Array, b: Array, end: Array) -> Array:
        size = jnp.maximum(jnp.abs(b) + jnp.abs(end), jnp.finfo(b.dtype).tiny)
        return _rms((a - b) / size) <= 256 * float(jnp.finfo(b.dtype).eps)

    held = jax.tree.leaves(jax.tree.map(holds, found, stored, end))
    return ~functools.reduce(jnp.logical_and, held)


def _rms(x: Array) -> Array:
    """Over the entries of each lane."""
    entries = max(1, math.prod(x.shape[1:]))
    return jnp.sqrt(jnp.sum(x**2, axis=tuple(range(1, x.ndim))) / entries)


class _ChunkReversal:
    """One chunk of the backward pass."""

    def __init__(self, pullback: StepPullback, reversal: TracedReversal):
        self.pullback, self.reversal, self.solver = pullback, reversal, reversal.solver
        last = jnp.maximum(pullback.steps - 1, 0)
        self.last = pullback.donors.copied(tapes.times(pullback.tape, last))
        linear = all(save.is_linear for save in pullback.traced.saves)
        self.fused = linear and pullback.judged is None

    def times(self, k: Array) -> tuple[Array, Array, Array]:
        """Where step k starts and ends in every lane that has one, else its last step."""
        times = tapes.times(self.pullback.tape, k)
        return cast(Any, trees.where(k < self.pullback.steps, times, self.last))

    def when(self, k: Array, memory: PyTree[Array]) -> tuple[When, PyTree[Array]]:
        """Step k of every lane, and the memory of the noise."""
        t0, t1, jump = self.times(k)
        increments, memory = self.pullback.functions.draw(t0, t1, memory)
        control = self.pullback.functions(self.reversal.control, t0, t1, increments)
        return When(t0, t1, jump, control, increments), memory

    def chunk(
        self, k0: Array, length: Array, end: PyTree[Array], ct: BackwardCarry
    ) -> tuple[PyTree[Array], BackwardCarry]:
        """The state at step k0 as the reversal finds it, and the cotangents there."""
        return (self._fused if self.fused else self._undone)(k0, length, end, ct)

    def _undone(self, k0: Array, length: Array, end: PyTree[Array], ct: BackwardCarry):
        """Undoes a step, then pulls back through it as if it had been stored."""

        def step(j: Any, carry: Any):
            (y, others), ct = carry
            k = k0 + length - 1 - j
            t0, t1, jump = self.times(k)
            increments, memory = self.pullback.functions.draw(t0, t1, ct.memory)
            ct, members = ct._replace(memory=memory), self.solver.members(y, others)
            at = (members, t0, t1, jump, increments)
            members = self.pullback.functions(self.reversal.retreat, *at)
            # A lane that waits undoes its last step again and again, and is pulled back through it.
            undone = self.solver.split(members)
            ct = self.pullback.step(k, RecordedStep(*undone, t0, t1, jump), ct)
            return trees.where(k < self.pullback.steps, undone, (y, others)), ct

        return jax.lax.fori_loop(0, length, step, (end, ct))

    def _fused(self, k0: Array, length: Array, end: PyTree[Array], ct: BackwardCarry):
        """Undoes a step and pulls back through it with the same evaluations."""
        solver, pullback = self.solver, self.pullback
        members, cts = solver.members(*end), solver.members(ct.y, ct.inner)
        back = solver.start_rewind(members, cts, pullback.steps.shape)
        following, memory = self.when(k0 + length - 1, ct.memory)
        # Nothing is pending there, so there is no jump to look at from its other side.
        following = following._replace(made_jump=jnp.zeros_like(following.made_jump))

        def step(j: Any, c: ChunkCarry) -> ChunkCarry:
            k = k0 + length - 1 - j
            active = k < pullback.steps
            when, memory = self.when(k, c.memory)
            c = self._with_outputs(k, active, when, c)
            cts, ct_first = masked(active, (c.back.cts, c.back.ct_first))
            lane_pullback = self._lane_pullback(self.reversal.rewind, when, c.following)
            back, ct_consts = solver.rewind(
                lane_pullback, c.back._replace(cts=cts, ct_first=ct_first)
            )
            return ChunkCarry(
                trees.where(active, back, c.back),
                trees.where(active, when, c.following),
                added(c.consts, ct_consts or {}),
                c.ts_index,
                memory,
            )

        c = ChunkCarry(back, following, ct.consts, ct.ts_index, memory)
        c = jax.lax.fori_loop(0, length, step, c)
        # A lane with nothing pending stands at the end of its last step, where the field is good.
        last = c.following
        last = last._replace(t0=jnp.where(c.back.pending, last.t0, last.t1))
        lane_pullback = self._lane_pullback(self.reversal.finish, last, last)
        members, cts, ct_consts = solver.finish_rewind(lane_pullback, c.back)
        # Lanes without a step ran on the donor's data; their result is discarded.
        y, inner = trees.where(pullback.steps > 0, solver.split(cts), (ct.y, ct.inner))
        consts = added(c.consts, ct_consts or {})
        return solver.split(members), BackwardCarry(y, inner, consts, c.ts_index, c.memory)

    def _lane_pullback(self, functions, step: When, following: When) -> _LanePullback:
        return _LanePullback(functions, self.pullback, self.reversal.control, step, following)

    def _with_outputs(self, k: Array, active: Array, when: When, c: ChunkCarry) -> ChunkCarry:
        """Adds the cotangents of outputs saved at the end of step k."""
        y, others = self.solver.split(c.back.cts)
        ct = BackwardCarry(y, others, c.consts, c.ts_index, c.memory)
        for j, save in enumerate(self.pullback.traced.saves):
            if self.pullback.saved[j] is not None and save.at_step is not None:
                at = (k, active, when.t1, self.solver.split(c.back.members)[0])
                ct = self.pullback.at_step(j, save, save.at_step, *at, ct)
        back = c.back._replace(cts=self.solver.members(ct.y, ct.inner))
        return c._replace(back=back, consts=ct.consts)
