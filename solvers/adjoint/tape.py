r"""What the forward loop writes down, one row at a time, for the backward loop to read.

Every accepted step leaves its end time; it began where the last one ended, unless the field may jump.
States are kept in S slots (S a power of two): all of them up to S steps, then every second one, every
fourth one, and so on. State k, where it is kept, stands in

    slot(0) = 0,    slot(k) = 1 + (k - 1) mod (S - 1).

So nothing is ever moved: when S slots are full and the stride doubles, the next kept state S 2^(j-1)
+ i 2^j falls on the slot of state (2i + 1) 2^(j-1), which is just the i-th of those no longer wanted
(subtracting S - 1 strides of 2^(j-1) from the one gives the other, and leaves the remainder as it was).

Rows are either common to all lanes (one index) or each lane's own (an index per lane).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree


class Tape(NamedTuple):
    """Accepted steps. Arrays have a row axis, then the lane axis."""

    states: PyTree[Array]  # (rows + 1 + spare, lanes, ...); row `rows` takes what is not kept
    knots: (
        Array  # (max_steps + 2, lanes): step k ends at row k + 1, and starts where the last ended
    )
    starts: Array | None  # unless the field may jump there; then here, a spacing or two later
    jumps: Array | None  # whether it did


def slot(k: Int[Array, "..."], slots: int) -> Int[Array, "..."]:
    """The slot of state k, if it is kept."""
    # `rem` and shifts: the sign that `%` and `//` care for costs kernels of its own.
    return jnp.where(k == 0, 0, 1 + jax.lax.rem(k - 1, jnp.asarray(slots - 1, k.dtype)))


def stride(count: Int[Array, "..."], slots: int) -> Int[Array, "..."]:
    """The distance between kept states once `count` of them have come by."""
    filled = jnp.maximum(count - 1, 0) >> (slots.bit_length() - 1)  # 0, then 1, 2-3, 4-7, ...
    return jnp.left_shift(1, 32 - jax.lax.clz(filled.astype(jnp.int32)))  # the bit length counts


class Doubling(NamedTuple):
    """Keeps states in a fixed number of slots, whatever the number of steps.

    The spare rows are for the states between two kept ones, once they are replayed.
    """

    rows: int  # a power of two
    spare: int = 0  # the longest stride, less one

    def row(self, k: Int[Array, "..."]) -> Int[Array, "..."]:
        """Where state k goes; `rows` if it is not kept."""
        kept = k & (stride(k + 1, self.rows) - 1) == 0
        return jnp.where(kept, slot(k, self.rows), self.rows)


class Every(NamedTuple):
    """Keeps the state at the start of every chunk of `steps` steps."""

    rows: int
    steps: int
    spare: int = 0

    def row(self, k: Int[Array, "..."]) -> Int[Array, "..."]:
        """Where state k goes; `rows` if it is not kept."""
        return jnp.where(k % self.steps == 0, k // self.steps, self.rows)


def doubling(checkpoints: int, max_steps: int) -> Doubling:
    """Slots, and rows for the longest stride that `max_steps` can lead to.

    Both are about sqrt(max_steps) once that is more than `checkpoints`.
    """
    root = 1
    while root * root < max_steps:
        root *= 2
    slots = 2
    while slots < max(min(checkpoints, max_steps), root):
        slots *= 2
    longest = 1
    while slots * longest < max_steps:
        longest *= 2
    return Doubling(slots, longest - 1)


def blank(tree: PyTree[Array], rows: int) -> PyTree[Array]:
    """Rows to be written, every one holding `tree` (a valid value, should it ever be read)."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape)), tree)


def put(rows: PyTree[Array], index: Int[Array, "..."], value: PyTree[Array]) -> PyTree[Array]:
    """Writes `value` to the row `index`; an index per lane writes lane by lane."""

    def write(buffer: Array, x: Array) -> Array:
        x = x if x.dtype == buffer.dtype else x.astype(buffer.dtype)
        if jnp.ndim(index) == 0:
            return jax.lax.dynamic_update_index_in_dim(buffer, x, index, 0)
        return buffer.at[index, jnp.arange(x.shape[0], dtype=index.dtype)].set(
            x, mode="drop", unique_indices=True
        )

    return jax.tree.map(write, rows, value)


def get(rows: PyTree[Array], index: Int[Array, "..."]) -> PyTree[Array]:
    """Reads the row `index`; an index per lane reads lane by lane."""

    def read(buffer: Array) -> Array:
        if jnp.ndim(index) == 0:
            return jax.lax.dynamic_index_in_dim(buffer, index, 0, keepdims=False)
        lanes = jnp.arange(buffer.shape[1], dtype=index.dtype)
        return buffer.at[index, lanes].get(mode="promise_in_bounds", unique_indices=True)

    return jax.tree.map(read, rows)


class Trail(NamedTuple):
    """What the forward loop leaves for the backward loop."""

    tape: Tape
    steps: Int[Array, " lanes"]  # accepted steps; -1 where the solve failed
    ts_index: tuple[Int[Array, " lanes"], ...]  # how many save times were reached, per `SubSaveAt`
    end: PyTree[Array] = None  # the last state, for a reversal to begin with


def empty(
    plan: Doubling | Every, state: PyTree[Array], t0: Array, jump: Array | None, steps: int
) -> Tape:
    """A tape with nothing on it yet. `jump` is None where the field cannot jump."""
    states = blank(state, plan.rows + 1 + plan.spare) if plan.rows else None
    knots = blank(t0, steps + 2)
    if jump is None:
        return Tape(states, knots, None, None)
    return Tape(states, knots, blank(t0, steps + 2), blank(jump, steps + 2))


def record(
    plan: Doubling | Every,
    tape: Tape,
    k: Int[Array, "..."],
    accept: Bool[Array, " lanes"],
    state: PyTree[Array],
    t0: Array,
    t1: Array,
    jump: Array,
) -> Tape:
    """Notes that step k went from `state` at t0 to t1, in the lanes that accept it.

    With an index common to all lanes, lanes that do not accept write a step of length zero.
    """
    last = tape.knots.shape[0] - 1
    state_row, row = plan.row(k), k
    if jnp.ndim(k) > 0:
        state_row, row = jnp.where(accept, state_row, plan.rows), jnp.where(accept, k, last)
    return Tape(
        put(tape.states, state_row, state) if plan.rows else None,
        put(tape.knots, row + 1, jnp.where(accept, t1, t0)),
        None if tape.starts is None else put(tape.starts, row, t0),
        None if tape.jumps is None else put(tape.jumps, row, jump),
    )


def times(tape: Tape, k: Int[Array, "..."]) -> tuple[Array, Array, Array]:
    """Where step k starts and ends, and whether the field jumped at its start."""
    t0 = get(tape.knots if tape.starts is None else tape.starts, k)
    jump = jnp.zeros(t0.shape, bool) if tape.jumps is None else get(tape.jumps, k)
    return t0, get(tape.knots, k + 1), jump
