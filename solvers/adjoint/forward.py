"""The forward loop: every lane tries its own step, all lanes at the same time.

Each iteration tries a step in every lane, writes its start to the tape (if gradients are wanted),
writes the outputs that fall into it, and moves the lanes that accept it to its end. A lane that has
reached its own end, or failed, is frozen: it is still computed, and the result thrown away.
"""

from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from nde.solvers import trees
from nde.solvers.adjoint import tape as tapes
from nde.solvers.adjoint.tape import Plan, Row, Tape
from nde.solvers.adjoint.traced import LaneFunctions, Outcome, Save, Start, code, end_floor
from nde.solvers.estimates.estimates import Judged
from nde.solvers.lanes.batch import masked


class ForwardCarry(NamedTuple):
    """What the loop carries; arrays have the lane axis first, saved rows have it second."""

    y: PyTree[Array]
    state: PyTree[Array]
    cache: PyTree[Array]
    made_jump: Array
    tprev: Array
    tnext: Array
    controller_state: PyTree[Array]
    result: Array
    accepted: Array
    rejected: Array
    restarts: Array  # attempts behind a jump; with a cache, how often it was evaluated anew
    ts_index: tuple[Array, ...]
    saved_ts: tuple[Array, ...]
    saved_ys: tuple[PyTree[Array], ...]
    judged: Judged | None  # the estimates of every accepted step, in rows
    memory: PyTree[Array]  # of the noise
    extra: PyTree[Array]  # what an adjoint finds out besides, lane by lane
    before: Array | None  # where the last step ended, if the field may jump
    last: Row | None  # the times of the last step, if there is a tape
    tape: Tape | None


class Standing(NamedTuple):
    """Where the lanes stand between two attempts: what a replay goes on with."""

    y: PyTree[Array]
    state: PyTree[Array]
    cache: PyTree[Array]
    made_jump: Array
    tprev: Array
    tnext: Array
    controller_state: PyTree[Array]
    before: Array | None


def row_of(functions: LaneFunctions, c: Any, plan: Plan) -> Row:
    """What the tape keeps of where the lanes stand."""
    traced = functions.traced
    return Row(
        y=None if plan.rows is None else c.y,
        inner=None if plan.rows is None else traced.inner(c.state, c.cache),
        t0=c.tprev,
        t1=c.tnext,
        jump=c.made_jump if traced.jumps else None,
        before=c.before,
        controller=c.controller_state if plan.replays else None,
    )


def initial_carry(
    functions: LaneFunctions, start: Start, max_steps: int, plan: Plan | None
) -> ForwardCarry:
    """What the loop begins with. `plan`: which rows to write down for the way back; None: no tape."""
    traced, count = functions.traced, functions.lanes.count
    zeros = jnp.zeros(count, jnp.int32)
    cache = functions(traced.cache, start.tprev, start.y, start.state)
    blank = lambda rows, x: jnp.full((rows, count, *x.shape), jnp.inf, x.dtype)
    outputs = lambda save: jax.tree.map(lambda x: blank(save.rows, x), save.out)
    times = lambda rows: jnp.full((rows, count), jnp.inf, start.t1.dtype)
    begin = ForwardCarry(
        y=start.y,
        state=start.state,
        cache=cache,
        made_jump=start.made_jump,
        tprev=start.tprev,
        tnext=start.tnext,
        controller_state=start.controller_state,
        result=start.result,
        accepted=zeros,
        rejected=zeros,
        restarts=zeros,
        ts_index=tuple(zeros for _ in traced.saves),
        saved_ts=tuple(times(save.rows) for save in traced.saves),
        saved_ys=tuple(outputs(save) for save in traced.saves),
        judged=jax.tree.map(lambda x: jnp.zeros((max_steps, count), x.dtype), traced.judged),
        memory=functions.memory(start.tprev),
        extra=(),
        before=jnp.full_like(start.tprev, -jnp.inf) if traced.jumps else None,
        last=None,
        tape=None,
    )
    if plan is None:
        return begin
    row = row_of(functions, begin, plan)
    last = _end(row) if plan.last else None
    return begin._replace(last=last, tape=tapes.empty(plan, row))


def _end(row: Row) -> Row:
    """The times of a step."""
    return tapes.times(row)._replace(before=None, controller=None)


def run_forward(
    functions: LaneFunctions, start: Start, max_steps: int, plan: Plan | None
) -> ForwardCarry:
    """Solves in all lanes. `plan`: which rows to write down for the way back; None: no tape."""
    traced, floor = functions.traced, end_floor(start.t1)

    def is_live(c: ForwardCarry) -> Array:
        return (c.tprev < start.t1) & (c.result == 0)

    def cond(carry: tuple[Array, ForwardCarry]) -> Array:
        attempts, c = carry
        return jnp.any(is_live(c)) & (attempts < max_steps)

    def body(carry: tuple[Array, ForwardCarry]) -> tuple[Array, ForwardCarry]:
        attempts, c = carry
        live = is_live(c)
        step, memory = tried(functions, c, start.t1, floor, c.memory)
        c = c._replace(memory=memory)
        accept = live & step.accept
        index = attempts if traced.uniform else c.accepted
        if plan is not None and c.tape is not None:
            row = row_of(functions, c, plan)
            last = trees.where(accept, _end(row), c.last) if plan.last else None
            c = c._replace(last=last, tape=tapes.record(plan, c.tape, index, accept, row))
        if traced.judged is not None:
            step_row = jnp.where(accept, index, max_steps)  # past the end: not written
            c = c._replace(judged=tapes.put(c.judged, step_row, masked(accept, step.judged)))
        c = _save(functions, start, c, step, accept)
        cached = bool(jax.tree.leaves(c.cache))
        if traced.jumps and not cached:  # the solver has evaluated anew by itself
            c = c._replace(restarts=c.restarts + (live & c.made_jump).astype(jnp.int32))
        c = c._replace(
            result=trees.where(live, step.result, c.result),
            accepted=c.accepted + accept.astype(jnp.int32),
            rejected=c.rejected + (live & ~accept).astype(jnp.int32),
        )
        c = moved(c, step, live, accept)
        if traced.jumps and cached:
            c = c._replace(restarts=c.restarts + (accept & c.made_jump).astype(jnp.int32))
            c = refreshed(functions, c, accept)
        return attempts + 1, c

    begin = initial_carry(functions, start, max_steps, plan)
    _, last = jax.lax.while_loop(cond, body, (jnp.zeros((), jnp.int32), begin))
    stopped = code(diffrax.RESULTS.max_steps_reached)
    return last._replace(result=jnp.where(is_live(last), stopped, last.result))


def tried(
    functions: LaneFunctions, c: Any, t1: Array, floor: Array, memory: PyTree[Array]
) -> tuple[Outcome, PyTree[Array]]:
    """One attempt in every lane, and the memory of the noise behind it."""
    increments, memory = functions.draw(c.tprev, c.tnext, memory)
    at = (c.y, c.state, c.cache, c.made_jump, c.tprev, c.tnext, t1, floor, c.controller_state)
    return functions(functions.traced.attempt, *at, increments), memory


def moved(c: Any, step: Outcome, live: Array, accept: Array) -> Any:
    """Lanes that accept the step move to its end; all live ones do what the controller says."""
    return c._replace(
        y=trees.where(accept, step.y, c.y),
        state=trees.where(accept, step.state, c.state),
        cache=trees.where(accept, step.cache, c.cache),
        made_jump=trees.where(accept, step.made_jump, c.made_jump),
        tprev=trees.where(accept, step.tprev, c.tprev),
        tnext=trees.where(live, step.tnext, c.tnext),
        controller_state=trees.where(live, step.controller_state, c.controller_state),
        before=None if c.before is None else trees.where(accept, c.tnext, c.before),
    )


def refreshed(functions: LaneFunctions, c: Any, accept: Array) -> Any:
    """Behind a jump of the field the last stage is not the first of the next step."""
    jumped = accept & c.made_jump
    anew = lambda: functions(functions.traced.cache, c.tprev, c.y, c.state)
    cache = jax.lax.cond(
        jnp.any(jumped), lambda: trees.where(jumped, anew(), c.cache), lambda: c.cache
    )
    return c._replace(cache=cache)


def _save(functions, start, c: ForwardCarry, step: Outcome, accept) -> ForwardCarry:
    """Writes the outputs that fall into this step."""
    ts_index, saved_ts, saved_ys = list(c.ts_index), list(c.saved_ts), list(c.saved_ys)
    for j, save in enumerate(functions.traced.saves):
        rows = (ts_index[j], saved_ts[j], saved_ys[j])
        if save.at_time is not None:
            rows = _save_at_times(functions, save, start.ts[j], c, step, accept, rows)
        if save.at_step is not None:
            rows = _save_at_step(functions, save, c, step, accept, rows)
        ts_index[j], saved_ts[j], saved_ys[j] = rows
    return c._replace(ts_index=tuple(ts_index), saved_ts=tuple(saved_ts), saved_ys=tuple(saved_ys))


def _save_at_times(functions, save: Save, ts, c: ForwardCarry, step: Outcome, accept, rows):
    """Interpolates to every requested time up to the end of the step."""

    def next_time(index: Array):
        t = tapes.get(ts, jnp.minimum(index, save.times - 1))
        return t, accept & (index < save.times) & (t <= c.tnext)

    def cond(rows: Any):
        return jnp.any(next_time(rows[0])[1])

    def body(rows: Any):
        index, saved_ts, saved_ys = rows
        t, due = next_time(index)
        # A lane with nothing due evaluates at the end of its step, where nothing can go wrong.
        at = (c.tprev, c.tnext, step.dense_info, jnp.where(due, t, c.tnext))
        out = functions(save.at_time, *at)
        row = jnp.where(due, save.output_row(index, c.accepted), save.rows)
        index = index + due.astype(jnp.int32)
        return index, tapes.put(saved_ts, row, t), tapes.put(saved_ys, row, out)

    return jax.lax.while_loop(cond, body, rows) if save.times else rows


def _save_at_step(functions, save: Save, c: ForwardCarry, step: Outcome, accept, rows):
    """Every n-th accepted step leaves its end."""
    index, saved_ts, saved_ys = rows
    due = accept & ((c.accepted + 1) % save.every == 0)
    row = jnp.where(due, save.output_row(index, c.accepted + 1) - 1, save.rows)
    out = functions(save.at_step, step.tprev, step.y)
    return index, tapes.put(saved_ts, row, step.tprev), tapes.put(saved_ys, row, out)
