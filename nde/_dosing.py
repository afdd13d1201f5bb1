r"""Solves with jumps: of the state, where something is added to it, and of the equation.

    y(t+) = y(t-) + a_k   at the times t = d_k (doses),        f jumps at the times j_k

Between two doses the equation is solved as ever, and the solve starts anew behind each: one compiled
solve in a `lax.scan` over the intervals. Steps end where f jumps, and start anew on its other side.
So neither costs accuracy, whatever the tolerance. What is observed at the time of a dose is the
state before it.

Not for:    an augmented state, whose further channels start at zero behind every dose.
"""

import dataclasses
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from nde._initial_value import AbstractODE
from nde._solve import in_one_precision

Doses = tuple[Float[Array, " doses"], PyTree[Float[Array, "doses ..."]]]


def states_at(
    model: AbstractODE,
    ts: Float[Array, " times"],
    y0: PyTree[Array],
    args: PyTree[Any],
    *,
    t0: Float[Array, ""],
    doses: Doses | None,
    jumps: Float[Array, " jumps"] | None,
    throw: bool,
) -> tuple[PyTree[Float[Array, "times ..."]], Bool[Array, ""]]:
    """The states at `ts` of a solve that starts at `t0` <= ts[0], and whether it failed.

    Args:
        doses: Times in order, and what is added to the state at each, shape (doses, ...) for every
            leaf of it.
        jumps: Where the equation jumps: times in order; those outside the solve do nothing.
    """
    if jumps is not None:
        inner: Any = model.stepsize_controller
        controller = diffrax.ClipStepSizeController(inner, jump_ts=jumps)
        model = dataclasses.replace(model, stepsize_controller=controller)
    if doses is None:
        solution = model.solve(jnp.append(t0, ts), y0, args, throw=throw)
        states = jax.tree.map(lambda x: x[1:], solution.ys)
        return states, solution.result != diffrax.RESULTS.successful
    ts, t0, y0, times, amounts = in_one_precision(ts, t0, y0, *doses)
    edges = jnp.concatenate([t0[None], jnp.clip(times, t0, ts[-1]), ts[-1:]])

    def interval(y: PyTree[Array], inputs: tuple) -> tuple[PyTree[Array], tuple]:
        low, high, amount = inputs
        window = jnp.concatenate([low[None], jnp.clip(ts, low, high), high[None]])
        solution = model.solve(window, y, args, throw=throw)
        end = jax.tree.map(lambda x, a: x[-1] + a, solution.ys, amount)
        failed = solution.result != diffrax.RESULTS.successful
        return end, (jax.tree.map(lambda x: x[1:-1], solution.ys), failed)

    nothing = jax.tree.map(lambda a: jnp.concatenate([a, jnp.zeros_like(a[:1])]), amounts)
    _, (states, failed) = jax.lax.scan(interval, y0, (edges[:-1], edges[1:], nothing))
    number = jnp.sum(times[None] < ts[:, None], axis=1)  # doses before each observation
    chosen = jax.tree.map(lambda x: x[number, jnp.arange(ts.shape[0])], states)
    return chosen, jnp.any(failed)
