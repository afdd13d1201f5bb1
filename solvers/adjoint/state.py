"""From the state that diffrax has prepared to where the loop starts, and back to diffrax's final state.

What is evaluated here, the solver's first state and outputs at t0 and t1, is evaluated once in every
lane, and has no derivative in a lane that failed (`outside_loop`).
"""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from nde.solvers.adjoint.forward import ForwardCarry
from nde.solvers.adjoint.stepper import AbstractStepper
from nde.solvers.adjoint.traced import (
    Start,
    Traced,
    all_finite,
    code,
    from_code,
    inner_saves,
    is_inner,
    saves,
)
from nde.solvers.lanes.outside_loop import differentiated


def begin(
    stepper: AbstractStepper, saveat: diffrax.SaveAt, t1: Array, init_state: Any, passed: bool
) -> Start:
    """Where the loop starts, from what diffrax has prepared. `passed`: the solver's state is the user's."""
    subs = [sub for sub, _ in inner_saves(saveat, init_state)]
    no_times = jnp.zeros((0,), t1.dtype)
    state = stepper.state(init_state.solver_state)
    if jax.tree.leaves(state) and not passed:
        times = (init_state.tprev, init_state.tnext)
        state = stepper.with_first_stage(init_state.tprev, init_state.y, state)
        healthy = all_finite((init_state.y, state))
        if not saveat.solver_state:  # without a step nothing else depends on it
            healthy &= init_state.tprev < t1
        state = differentiated(stepper.init, state, healthy, *times, init_state.y)
    return Start(
        y=init_state.y,
        state=state,
        made_jump=jnp.asarray(init_state.made_jump),
        tprev=jnp.asarray(init_state.tprev, t1.dtype),
        tnext=jnp.asarray(init_state.tnext, t1.dtype),
        t1=t1,
        controller_state=jax.tree.map(jnp.asarray, init_state.controller_state),
        result=code(init_state.result),
        ts=tuple(no_times if sub.ts is None else sub.ts for sub in subs),
    )


def finish(
    stepper: AbstractStepper,
    saveat: diffrax.SaveAt,
    args: Any,
    t0: Array,
    t1: Array,
    init_state: Any,
    traced: Traced,
    out: ForwardCarry,
) -> Any:
    """diffrax's final state. Outputs at t0 and t1 are added here, where they cost nothing."""
    saved = iter(zip(traced.saves, out.saved_ts, out.saved_ys, out.ts_index, strict=True))
    buffers = []
    for sub, blank in saves(saveat, init_state):
        inner = next(saved) if is_inner(sub) else None
        buffers.append(_outputs(sub, blank, inner, args, t0, t1, init_state.y, out))
    final = eqx.tree_at(
        lambda s: [x for _, b in saves(saveat, s) for x in (b.ts, b.ys)],
        init_state,
        [x for pair in buffers for x in pair],
    )
    fields = {
        "y": out.y,
        "tprev": out.tprev,
        "tnext": out.tnext,
        "controller_state": out.controller_state,
        "made_jump": out.made_jump if traced.jumps else init_state.made_jump,
        "num_steps": out.accepted + out.rejected,
        "num_accepted_steps": out.accepted,
        "num_rejected_steps": out.rejected,
        "result": from_code(out.result),
    }
    if saveat.solver_state:
        at = (out.tprev, out.y, out.state)
        state = stepper.final_state(*at)
        fields["solver_state"] = differentiated(stepper.final_state, state, out.result == 0, *at)
    return eqx.tree_at(
        lambda s: [getattr(s, name) for name in fields],
        final,
        list(fields.values()),
        is_leaf=lambda x: x is None,
    )


def _outputs(
    sub: diffrax.SubSaveAt, blank, inner: tuple | None, args, t0, t1, y0, out: ForwardCarry
) -> tuple[Array, PyTree[Array]]:
    """The rows of one `SubSaveAt`: those of the loop, and those at its two ends."""
    ts, ys = blank.ts, blank.ys
    last_row, at_end = int(sub.t0), bool(sub.t1)

    def output(t, y):
        """What is saved of a state; nothing depends on it where the solve failed."""
        fn = lambda t, y: jax.tree.map(jnp.asarray, sub.fn(t, y, args))
        return differentiated(fn, fn(t, y), out.result == 0, t, y)

    if inner is not None:
        save, ts, ys, index = inner
        ts = jnp.where(jnp.isinf(ts), blank.ts, ts)
        last_row = save.output_row(index, out.accepted)
        if save.times:
            rows = slice(save.offset, save.offset + save.times)
            fill = lambda ts, ys: _write(ts, ys, rows, t0, output(t0, out.y))
            ts, ys = jax.lax.cond(t0 == t1, fill, lambda ts, ys: (ts, ys), ts, ys)
            last_row = jnp.where(t0 == t1, rows.stop, last_row)
        if save.every:
            there = out.accepted % save.every == 0
            last_row = jnp.where(there, save.rows, last_row)
            at_end = at_end and save.every > 1
    if sub.t0:
        ts, ys = _write(ts, ys, 0, t0, output(t0, y0))
    if at_end:
        ts, ys = _write(ts, ys, last_row, out.tprev, output(out.tprev, out.y))
    return ts, ys


def _write(ts: Array, ys: PyTree[Array], row, t: Array, y: PyTree[Array]):
    """Puts an output into a row, or the same one into several."""
    put = lambda rows, x: rows.at[row].set(jnp.asarray(x, rows.dtype), mode="drop")
    return put(ts, t), jax.tree.map(put, ys, y)
