"""The forward loop: every lane tries its own step, all lanes at the same time.

An iteration is `attempt`, `record` (when gradients are wanted), `save`, `advance`. A lane that has
reached its end, or failed, is frozen: it is still computed, and its result thrown away.
"""

from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from nde.solvers.adjoint import tape as tapes
from nde.solvers.adjoint.tape import Doubling, Every, Tape
from nde.solvers.adjoint.traced import Save, Start, Step, Traced, code, end_floor
from nde.solvers.estimates.estimates import Judged
from nde.solvers.lanes.primitives import Batch


class Moving(NamedTuple):
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
    restarts: (
        Array  # attempts behind a jump; where there is a cache, how often it was evaluated anew
    )
    ts_index: tuple[Array, ...]
    saved_ts: tuple[Array, ...]
    saved_ys: tuple[PyTree[Array], ...]
    judged: Judged | None  # the estimates of every accepted step, in rows
    memory: PyTree[Array]  # of the noise
    extra: PyTree[Array]  # what an adjoint finds out besides, lane by lane
    tape: Tape | None


def first(
    traced: Traced,
    consts: list[Array],
    start: Start,
    batch: Batch,
    max_steps: int,
    keep: Doubling | Every | None,
) -> Moving:
    """What the loop begins with. `keep`: which states to write down for the way back; None: no tape."""
    lanes, zeros = batch.lanes, jnp.zeros(batch.lanes, jnp.int32)
    memory = traced.memory_of(consts, batch, start.tprev)
    cache = batch.per_lane(traced.cache)(consts, start.tprev, start.y, start.state)
    jump = start.made_jump if traced.jumps else None
    return Moving(
        start.y, start.state, cache, start.made_jump, start.tprev, start.tnext,
        start.controller_state, start.result, zeros, zeros, zeros,
        tuple(zeros for _ in traced.saves),
        tuple(jnp.full((s.rows, lanes), jnp.inf, start.tprev.dtype) for s in traced.saves),
        tuple(_blank_rows(s, lanes) for s in traced.saves),
        jax.tree.map(lambda x: jnp.zeros((max_steps, lanes), x.dtype), traced.judged),
        memory,
        (),
        None
        if keep is None
        else tapes.start(
            keep, (start.y, traced.inner(start.state, cache)), start.tprev, jump, max_steps
        ),
    )  # fmt: skip


def run(
    traced: Traced,
    consts: list[Array],
    start: Start,
    batch: Batch,
    max_steps: int,
    keep: Doubling | Every | None,
) -> Moving:
    """Solves in all lanes. `keep`: which states to write down for the way back; None: no tape."""
    floor = end_floor(start.t1)
    attempt = batch.per_lane(traced.attempt)
    draw = traced.drawing(consts, batch)
    refresh = batch.per_lane(traced.cache)

    def is_live(c: Moving) -> Array:
        return (c.tprev < start.t1) & (c.result == 0)

    def cond(carry: tuple[Array, Moving]) -> Array:
        attempts, c = carry
        return jnp.any(is_live(c)) & (attempts < max_steps)

    def body(carry: tuple[Array, Moving]) -> tuple[Array, Moving]:
        attempts, c = carry
        live = is_live(c)
        increments, memory = draw(c.tprev, c.tnext, c.memory)
        step: Step = attempt(
            consts, c.y, c.state, c.cache, c.made_jump, c.tprev, c.tnext, start.t1, floor,
            c.controller_state, increments,
        )  # fmt: skip
        c = c._replace(memory=memory)
        accept = live & step.keep
        index = attempts if traced.uniform else c.accepted
        if keep is not None and c.tape is not None:
            state = (c.y, traced.inner(c.state, c.cache))
            at = (index, accept, state, c.tprev, c.tnext, c.made_jump)
            c = c._replace(tape=tapes.record(keep, c.tape, *at))
        if traced.judged is not None:
            row = jnp.where(accept, index, max_steps)  # past the end: not written
            c = c._replace(judged=tapes.put(c.judged, row, masked(accept, step.judged)))
        c = _save(traced, consts, start, batch, c, step, accept)
        cached = bool(jax.tree.leaves(c.cache))
        if traced.jumps and not cached:  # the solver has evaluated anew by itself
            c = c._replace(restarts=c.restarts + (live & c.made_jump).astype(jnp.int32))
        c = _advance(c, step, live, accept)
        if traced.jumps and cached:
            c = _refresh(refresh, consts, c, accept)
        return attempts + 1, c

    begin = first(traced, consts, start, batch, max_steps, keep)
    _, last = jax.lax.while_loop(cond, body, (jnp.zeros((), jnp.int32), begin))
    stopped = code(diffrax.RESULTS.max_steps_reached)
    return last._replace(result=jnp.where(is_live(last), stopped, last.result))


def choose(where: Array, new: PyTree[Array], old: PyTree[Array]) -> PyTree[Array]:
    """Lane by lane, `new` where it holds, else `old`, in the dtype of `old`."""

    def pick(a: Array, b: Array) -> Array:
        mask = where.reshape(where.shape + (1,) * (b.ndim - where.ndim))
        return jnp.where(mask, a if a.dtype == b.dtype else a.astype(b.dtype), b)

    return jax.tree.map(pick, new, old)


def masked(where: Array, tree: PyTree[Array]) -> PyTree[Array]:
    """Lane by lane, zero where it does not hold."""
    return choose(where, tree, jax.tree.map(jnp.zeros_like, tree))


def _blank_rows(save: Save, lanes: int) -> PyTree[Array]:
    return jax.tree.map(
        lambda x: jnp.full((save.rows, lanes, *x.shape), jnp.inf, x.dtype), save.out
    )


def _advance(c: Moving, step: Step, live: Array, accept: Array) -> Moving:
    y, state, cache, made_jump = choose(
        accept,
        (step.y, step.state, step.cache, step.made_jump),
        (c.y, c.state, c.cache, c.made_jump),
    )
    tprev = choose(accept, step.tprev, c.tprev)
    tnext, controller_state = choose(
        live, (step.tnext, step.controller_state), (c.tnext, c.controller_state)
    )
    return c._replace(
        y=y, state=state, cache=cache, made_jump=made_jump, tprev=tprev, tnext=tnext,
        controller_state=controller_state,
        result=choose(live, step.result, c.result),
        accepted=c.accepted + accept.astype(jnp.int32),
        rejected=c.rejected + (live & ~accept).astype(jnp.int32),
    )  # fmt: skip


def _refresh(refresh, consts: list[Array], c: Moving, accept: Array) -> Moving:
    """Behind a jump of the field the last stage is not the first of the next step."""
    jumped = accept & c.made_jump
    cache = jax.lax.cond(
        jnp.any(jumped),
        lambda: choose(jumped, refresh(consts, c.tprev, c.y, c.state), c.cache),
        lambda: c.cache,
    )
    return c._replace(cache=cache, restarts=c.restarts + jumped.astype(jnp.int32))


def _save(traced, consts, start: Start, batch: Batch, c: Moving, step: Step, accept) -> Moving:
    """Writes the outputs that fall into this step."""
    ts_index, saved_ts, saved_ys = list(c.ts_index), list(c.saved_ts), list(c.saved_ys)
    for j, save in enumerate(traced.saves):
        rows = (ts_index[j], saved_ts[j], saved_ys[j])
        if save.at_time is not None:
            at_time = batch.per_lane(save.at_time)
            rows = _save_at_times(save, at_time, consts, start.ts[j], c, step, accept, rows)
        if save.at_step is not None:
            at_step = batch.per_lane(save.at_step)
            rows = _save_at_step(save, at_step, consts, c, step, accept, rows)
        ts_index[j], saved_ts[j], saved_ys[j] = rows
    return c._replace(ts_index=tuple(ts_index), saved_ts=tuple(saved_ts), saved_ys=tuple(saved_ys))


def _save_at_times(save: Save, at_time, consts, ts, c: Moving, step: Step, accept, rows):
    """Interpolates to every requested time up to the end of the step."""

    def next_time(index):
        t = tapes.get(ts, jnp.minimum(index, save.times - 1))
        return t, accept & (index < save.times) & (t <= c.tnext)

    def cond(rows):
        return jnp.any(next_time(rows[0])[1])

    def body(rows):
        index, saved_ts, saved_ys = rows
        t, due = next_time(index)
        # A lane with nothing due evaluates at the end of its step, where nothing can go wrong.
        out = at_time(consts, c.tprev, c.tnext, step.dense_info, jnp.where(due, t, c.tnext))
        row = jnp.where(due, save.row(index, c.accepted), save.rows)
        return (
            index + due.astype(jnp.int32),
            tapes.put(saved_ts, row, t),
            tapes.put(saved_ys, row, out),
        )

    return jax.lax.while_loop(cond, body, rows) if save.times else rows


def _save_at_step(save: Save, at_step, consts, c: Moving, step: Step, accept, rows):
    """Every n-th accepted step leaves its end."""
    index, saved_ts, saved_ys = rows
    due = accept & ((c.accepted + 1) % save.every == 0)
    row = jnp.where(due, save.row(index, c.accepted + 1) - 1, save.rows)
    out = at_step(consts, step.tprev, step.y)
    return index, tapes.put(saved_ts, row, step.tprev), tapes.put(saved_ys, row, out)
