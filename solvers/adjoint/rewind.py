r"""The backward loop of a reversible solver: un-step, and pull back with the same evaluation.

The solver's `rewind` asks for values and transposes of functions it writes for one trajectory. What it
asks for is the same at every step, so it is asked once while the solve is traced (`rehearse`), each
answer becoming a closed function of one lane; at every step of the loop the answers are given in the
same order, over all lanes, with parameter cotangents summed (`_Answers`).

With a state stored every K accepted steps the loop goes chunk by chunk:

    for chunk = last .. 0:
        rewind K steps from the chunk's end, pulling back                      (`rewind`)
        compare the state that comes out with the stored one                   (_missed)
        if some lane has missed it: replay the chunk from the stored state     (`replay.chunk`)
        go on from the stored state

so a gradient is either that of a reversal which is known to have held, or that of the stored steps.
Where more of a step must be known to pull it back (a nonlinear `SaveAt(fn=...)`, its error estimate), it
is undone first and then pulled back as a stored one would be.
"""

import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from nde.solvers.adjoint import backward as replay
from nde.solvers.adjoint import tape as tapes
from nde.solvers.adjoint.backward import Loaded, Pull, Running, Trail, added
from nde.solvers.adjoint.forward import choose, masked
from nde.solvers.adjoint.traced import Start, Traced
from nde.solvers.lanes.closures import Hoisted, Pool
from nde.solvers.lanes.primitives import Batch
from nde.solvers.reversible.coupling import Rewind, Step
from nde.solvers.reversible.solver import AbstractReversibleSolver


class Rehearsed(NamedTuple):
    """A reversible solver's steps, traced."""

    solver: AbstractReversibleSolver  # its structure; the arrays are in the pool
    control: Hoisted  # (t0, t1, increments) -> control
    retreat: Hoisted  # (members, t0, t1, made_jump, increments) -> members
    rewind: tuple[Hoisted, ...]  # what `solver.rewind` asks for, in order
    finish: tuple[Hoisted, ...]  # what `solver.finish_rewind` asks for


class When(NamedTuple):
    """The times of a step, whether the field jumped at its start, and the control over it.

    In the loop every array has a lane axis in front; while the solve is traced, none.
    """

    t0: Array
    t1: Array
    made_jump: Array
    control: PyTree[Array]
    increments: PyTree[Array] = ()  # of the remembering paths


def rehearse(
    traced: Traced, solver: AbstractReversibleSolver, terms: Any, args: Any, start: Start
) -> Rehearsed:
    """Traces what the backward loop needs, at the shapes of `start`."""
    pool, jumps = traced.pool, traced.jumps

    def step_of(when: When) -> Step:
        jump = when.made_jump if jumps else False
        return Step(terms, when.t0, when.t1, args, when.control, jump)

    def control(t0, t1, increments):
        return Step.over(traced.knowing(increments).terms, t0, t1, args).control

    def retreat(members, t0, t1, made_jump, increments):
        when = When(t0, t1, made_jump, control(t0, t1, increments))
        return solver.retreat(step_of(when), members)[0]

    times = (start.tprev, start.tnext)
    asks = (*times, traced.increments)
    when = When(*times, start.made_jump, jax.eval_shape(control, *asks))
    members = solver.members(start.y, start.state)
    asked = []
    for ask in (solver.rewind, solver.finish_rewind):
        questions = _Questions(pool, step_of, when)
        jax.eval_shape(lambda m, ask=ask, q=questions: ask(q, solver.start_rewind(m, m)), members)
        asked.append(tuple(questions.asked))
    hoisted_retreat = pool.hoist(retreat, members, *times, start.made_jump, traced.increments)
    return Rehearsed(solver, pool.hoist(control, *asks), hoisted_retreat, *asked)


class _Questions:
    """A `coupling.Pull` that writes down what it is asked for, and answers with zeros."""

    def __init__(self, pool: Pool, step_of, when: When):
        self.pool, self.step_of, self.when, self.asked = pool, step_of, when, []

    def value(self, fn, x):
        asked = lambda step, following, x: fn(self.step_of(step), self.step_of(following), x)
        self.asked.append(self.pool.hoist(asked, self.when, self.when, jax.eval_shape(lambda: x)))
        out = jax.eval_shape(asked, self.when, self.when, x)
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), out)

    def pull(self, fn, x, ct):
        return self.value(fn, x), {}, jax.tree.map(jnp.zeros_like, x)


class _Answers:
    """A `coupling.Pull` over all lanes, for one step."""

    def __init__(self, asked, pull: Pull, control: Hoisted, step: When, following: When):
        self.asked, self.engine, self.control = iter(asked), pull, control
        self.step, self.following = step, following

    def value(self, fn, x):
        del fn
        hoisted, engine = next(self.asked), self.engine
        return engine.batch.per_lane(hoisted)(
            engine.consts,
            self.step._replace(increments=()),
            self.following._replace(increments=()),
            x,
        )

    def pull(self, fn, x, ct):
        del fn
        hoisted, engine = next(self.asked), self.engine
        moving = any(i in engine.wanted for i in self.control.uses)  # the control has a gradient
        controls = (self.step.control, self.following.control)

        def asked(consts, x, aux):
            (x, controls), (step, following) = x if moving else (x, aux[2]), aux[:2]
            step = step._replace(control=controls[0])
            return hoisted(consts, step, following._replace(control=controls[1]), x)

        bare = lambda when: when._replace(control=None, increments=())
        still = (bare(self.step), bare(self.following))
        if not moving:
            value, ct_consts, ct_x = engine.transpose(
                asked, hoisted.uses, x, (*still, controls), ct
            )
            return value, engine.filled(ct_consts), ct_x
        value, ct_consts, (ct_x, ct_controls) = engine.transpose(
            asked, hoisted.uses, (x, controls), still, ct
        )
        total = engine.filled(ct_consts)
        for when, ct_control in zip((self.step, self.following), ct_controls, strict=True):
            over = lambda consts, x, aux: self.control(consts, *aux)
            asks = (when.t0, when.t1, when.increments)
            _, ct_consts, _ = engine.transpose(over, self.control.uses, (), asks, ct_control)
            total = added(total, ct_consts)
        return value, total, ct_x


class Going(NamedTuple):
    """What travels backwards inside a chunk.

    A lane axis is in front of every array but the cotangents of constants: those are summed over the
    lanes that share one, levels in front as in `lanes`.
    """

    back: Rewind
    following: When
    consts: dict[int, Array]
    ts_index: tuple[Array, ...]
    memory: PyTree[Array]


def run(
    traced: Traced,
    rehearsed: Rehearsed,
    consts: list[Array],
    ts: tuple[Array, ...],
    batch: Batch,
    trail: Trail,
    end: tuple[PyTree[Array], PyTree[Array]],
    cotangents: Any,
    wanted: dict[int, Array],
    every: int | None,
) -> Running:
    """Pulls cotangents back to the start. `end`: the last state. `every`: steps between stored ones."""
    pull = Pull(traced, consts, ts, batch, trail, cotangents, wanted)
    backward = _Backward(pull, rehearsed)
    most = jnp.max(trail.steps)
    ct = Running(
        pull.alive(cotangents.y), pull.alive(cotangents.state), wanted, trail.ts_index, pull.memory
    )
    if every is None:
        return jax.lax.cond(
            most > 0, lambda: backward.chunk(jnp.zeros_like(most), most, end, ct)[1], lambda: ct
        )

    def pull_chunk(i: Array, carry):
        end, ct, kept = carry
        k0 = every * ((most - 1) // every - i)
        length, here = jnp.minimum(every, most - k0), trail.steps > k0
        stored = choose(here, tapes.get(trail.tape.states, k0 // every), end)
        found, rewound = backward.chunk(k0, length, end, ct)
        missed = here & _missed(found, stored, end)
        redo = lambda kept: replay.chunk(pull, k0, length, stored, ct, kept)
        ct, kept = jax.lax.cond(jnp.any(missed), redo, lambda kept: (rewound, kept), kept)
        return stored, ct, kept

    chunks = jnp.where(most > 0, (most - 1) // every + 1, 0)
    kept = tapes.blank(end, every)
    return jax.lax.fori_loop(0, chunks, pull_chunk, (end, ct, kept))[1]


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


class _Backward:
    """One chunk of the backward pass."""

    def __init__(self, pull: Pull, rehearsed: Rehearsed):
        self.pull, self.rehearsed, self.solver = pull, rehearsed, rehearsed.solver
        self.steps = pull.donors.lend(pull.steps)  # a lane that failed goes with its donor
        self.last = tapes.times(pull.tape, jnp.maximum(pull.steps - 1, 0))
        self.control = pull.batch.per_lane(rehearsed.control)
        self.retreat = pull.batch.per_lane(rehearsed.retreat)
        self.fused = all(save.is_linear for save in pull.traced.saves) and pull.judged is None

    def times(self, k: Array) -> tuple[Array, Array, Array]:
        """Where step k starts and ends in every lane that has one, else its last step."""
        times = tapes.times(self.pull.tape, k)
        if not self.pull.traced.uniform:
            times = choose(k < self.pull.steps, times, self.last)
        return cast(Any, self.pull.donors.lend(times))

    def when(self, k: Array, memory: PyTree[Array]) -> tuple[When, PyTree[Array]]:
        """Step k of every lane, and the memory of the noise."""
        t0, t1, jump = self.times(k)
        increments, memory = self.pull.draw(t0, t1, memory)
        control = self.control(self.pull.consts, t0, t1, increments)
        return When(t0, t1, jump, control, increments), memory

    def chunk(self, k0: Array, length: Array, end, ct: Running):
        """The state at step k0 as the reversal finds it, and the cotangents there."""
        end = self.pull.donors.lend(end)
        return (self._fused if self.fused else self._undone)(k0, length, end, ct)

    def _undone(self, k0, length, end, ct: Running):
        """Undoes a step, then pulls back through it as if it had been stored."""

        def step(j, carry):
            (y, others), ct = carry
            k = k0 + length - 1 - j
            t0, t1, jump = self.times(k)
            increments, memory = self.pull.draw(t0, t1, ct.memory)
            ct, members = ct._replace(memory=memory), self.solver.members(y, others)
            members = self.retreat(self.pull.consts, members, t0, t1, jump, increments)
            # A lane that waits undoes its last step again and again, and is pulled back through it.
            undone = self.solver.split(members)
            ct = self.pull.step(k, Loaded(*undone, t0, t1, jump), ct)
            return choose(k < self.steps, undone, (y, others)), ct

        return jax.lax.fori_loop(0, length, step, (end, ct))

    def _fused(self, k0, length, end, ct: Running):
        solver, pull = self.solver, self.pull
        members, cts = solver.members(*end), solver.members(ct.y, ct.state)
        back = solver.start_rewind(members, cts, pull.steps.shape)
        following, memory = self.when(k0 + length - 1, ct.memory)
        # Nothing is pending there, so there is no jump to look at from its other side.
        following = following._replace(made_jump=jnp.zeros_like(following.made_jump))

        def step(j, going: Going) -> Going:
            k = k0 + length - 1 - j
            active, moves = k < pull.steps, k < self.steps
            when, memory = self.when(k, going.memory)
            going = self._with_steps(k, active, when, going)
            hidden = going.back._replace(
                cts=masked(active, going.back.cts), ct_first=masked(active, going.back.ct_first)
            )
            answers = self._answers(self.rehearsed.rewind, when, going.following)
            back, ct_consts = solver.rewind(answers, hidden)
            return Going(
                choose(moves, back, going.back),
                choose(moves, when, going.following),
                added(going.consts, ct_consts or {}),
                going.ts_index,
                memory,
            )

        going = Going(back, following, ct.consts, ct.ts_index, memory)
        going = jax.lax.fori_loop(0, length, step, going)
        # A lane with nothing pending stands at the end of its last step, where the field is good.
        last = going.following
        last = last._replace(t0=jnp.where(going.back.pending, last.t0, last.t1))
        answers = self._answers(self.rehearsed.finish, last, last)
        members, cts, ct_consts = solver.finish_rewind(answers, going.back)
        # A lane without a step of its own has gone with its donor, and has nothing to show for it.
        y, state = choose(pull.steps > 0, solver.split(cts), (ct.y, ct.state))
        consts = added(going.consts, ct_consts or {})
        return solver.split(members), Running(y, state, consts, going.ts_index, going.memory)

    def _answers(self, asked, step: When, following: When) -> _Answers:
        return _Answers(asked, self.pull, self.rehearsed.control, step, following)

    def _with_steps(self, k, active, when: When, going: Going) -> Going:
        """Adds the cotangents of outputs saved at the end of step k."""
        y, others = self.solver.split(going.back.cts)
        running = Running(y, others, going.consts, going.ts_index, going.memory)
        for j, save in enumerate(self.pull.traced.saves):
            if self.pull.saved[j] is not None and save.at_step is not None:
                at = (k, active, when.t1, self.solver.split(going.back.members)[0])
                running = self.pull.at_step(j, save, save.at_step, *at, running)
        back = going.back._replace(cts=self.solver.members(running.y, running.state))
        return going._replace(back=back, consts=running.consts)
