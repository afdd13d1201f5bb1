r"""What the forward loop writes down, in rows whose number does not depend on `max_steps`.

A row holds where a step starts: the state, the times of the step, and what the controller knows. Rows
stand in S slots (S a power of two): all of them up to S steps, then every second one, every fourth one,
and so on. Row k, where it is kept, stands in

    slot(0) = 0,    slot(k) = 1 + (k - 1) mod (S - 1).

So nothing is ever moved: when S slots are full and the stride doubles, the next kept row S 2^(j-1)
+ i 2^j falls on the slot of row (2i + 1) 2^(j-1), which is just the i-th of those no longer wanted
(subtracting S - 1 strides of 2^(j-1) from the one gives the other, and leaves the remainder as it was).

On the way back the 2^q rows of a stretch, from one kept row to the next, are found again by a replay.
They stand on a ladder of L levels with b bits each, L b >= q: place j of the stretch goes to the level
of its trailing zeros, floor(zeros(j) / b). A level holds the 2^b - 1 rows of the stretch of the level
above that the backward loop is in; so L (2^b - 1) rows serve 2^q steps, each replayed at most L times.
The fewest levels are taken for which there are rows: with 127 one up to 128 steps, two up to 4096.

Where steps may be rejected, the times of all accepted steps are kept as well, in more slots of their own
(`knots`): a step whose end is known is replayed at once, and is the very step that was taken.

Rows are either common to all lanes (one index) or each lane's own (an index per lane).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree


class Row(NamedTuple):
    """Where a step starts, in every lane. None: what is not needed, or nowhere the case."""

    y: PyTree[Array]
    inner: PyTree[Array]
    t0: Array
    t1: Array  # where it ends
    jump: Array | None = None  # whether the field jumped at t0
    before: Array | None = None  # where the last step ended: not at t0, if the field jumped there
    controller: PyTree[Array] = None


class Rows(NamedTuple):
    """Many of them, packed; the row axis in front, then the lane axis. Times apart: where nothing that
    moves them is differentiated, they have no tangent."""

    states: list[Array]
    times: list[Array]


class Tape(NamedTuple):
    """Row `slots` takes what is not kept; behind it are those of the ladder."""

    rows: Rows | None  # states, with their times
    clock: Rows | None  # times alone
    knots: Rows | None  # the times of every step, or of every second, fourth, ..


def slot(k: Int[Array, "..."], slots: int) -> Int[Array, "..."]:
    """The slot of row k, if it is kept."""
    # `rem` and shifts: the sign that `%` and `//` care for costs kernels of its own.
    return jnp.where(k == 0, 0, 1 + jax.lax.rem(k - 1, jnp.asarray(slots - 1, k.dtype)))


def doublings(count: Int[Array, "..."], slots: int) -> Int[Array, "..."]:
    """How often the distance between kept rows has doubled once `count` of them have come by."""
    filled = jnp.maximum(count - 1, 0) >> (slots.bit_length() - 1)  # 0, then 1, 2-3, 4-7, ...
    return (32 - jax.lax.clz(filled.astype(jnp.int32))).astype(jnp.int32)  # the bit length counts


class Doubling(NamedTuple):
    """Keeps every `unit`-th row in a fixed number of slots, whatever the number of steps."""

    slots: int  # a power of two
    unit: int = 1

    def row(self, k: Int[Array, "..."]) -> Int[Array, "..."]:
        """Where row k goes; `slots` if it is not kept."""
        c = k // self.unit if self.unit > 1 else k
        kept = c & (jnp.left_shift(1, doublings(c + 1, self.slots)) - 1) == 0
        kept &= (c * self.unit == k) if self.unit > 1 else True
        return jnp.where(kept, slot(c, self.slots), self.slots)


class Ladder(NamedTuple):
    """Rows for the stretch of 2^q steps between two kept ones. Place 0 is the kept one's."""

    rows: int
    most: int  # the largest q

    def _bits(self, q: Int[Array, ""]) -> Int[Array, ""]:
        """How many bits a level has, if there are q in all."""
        widest = lambda q: max(b for b in range(1, 32) if -(-q // b) * (2**b - 1) <= self.rows)
        bits = [1] + [min(q, widest(q)) for q in range(1, self.most + 1)]
        return jnp.asarray(np.array(bits, np.int32))[q]

    def place(self, j: Int[Array, ""], q: Int[Array, ""]) -> Int[Array, ""]:
        """Where step j of the stretch stands, from 1 on; 0 for j = 0."""
        bits = self._bits(q)
        level = _zeros(j) // bits
        width = jnp.left_shift(1, bits) - 1
        return jnp.where(j == 0, 0, level * width + ((j >> (level * bits)) & width))

    def origin(self, j: Int[Array, ""], last: Bool[Array, ""], q: Int[Array, ""]):
        """The step to replay from before step j is pulled back: j itself, if its row is there. `last`:
        whether j is the last step of its stretch, and so the first to be pulled back."""
        bits = self._bits(q)
        rung = _zeros(j + 1) // bits * bits
        return jnp.where(last, 0, (j >> rung) << rung)


def _zeros(j: Int[Array, ""]) -> Int[Array, ""]:
    """How many trailing zeros j has."""
    return jax.lax.population_count((j & -j) - 1)


class Plan(NamedTuple):
    """Which rows are kept; None: none."""

    rows: Doubling | None
    clock: Doubling | None = None  # where only times must be found again
    knots: Doubling | None = None  # where steps may be rejected
    ladder: Ladder = Ladder(0, 0)  # for the states of a stretch
    ticks: Ladder = Ladder(0, 0)  # for its times, on the clock
    last: bool = False  # whether the times of the last step are wanted

    @property
    def replays(self) -> bool:
        """Whether steps are found again by the controller."""
        return max(self.ladder.most, self.ticks.most) > 0


def power(least: int) -> int:
    """The least power of two that is at least 2, and `least`."""
    return 1 << max(1, (least - 1).bit_length())


def keeping(count: int, max_steps: int, unit: int = 1) -> tuple[Doubling, Ladder]:
    """`count` rows, one in `unit`, and a ladder for the steps between them: with half as many (for few
    steps a 32nd of these), or for those of a unit."""
    units = -(-max_steps // unit)
    slots = power(min(count, units))
    q = max(0, (units - 1).bit_length() - (slots.bit_length() - 1)) + (unit - 1).bit_length()
    rows = power(unit if unit > 1 else min(slots // 2, max_steps // 32)) - 1
    return Doubling(slots, unit), Ladder(max(rows, q) if q else 0, q)


def pack(row: Row) -> Rows:
    """A row as few arrays: those with one number per lane become one array per dtype."""
    return Rows(_packed((row.y, row.inner)), _packed(times(row)))


def unpack(rows: Rows, like: Row) -> Row:
    """The row again; `like` has its structure."""
    y, inner = _unpacked(rows.states, (like.y, like.inner))
    return _unpacked(rows.times, times(like))._replace(y=y, inner=inner)


def _packed(tree: PyTree[Array]) -> list[Array]:
    groups: dict[Any, list[Array]] = {}
    for x in jax.tree.leaves(tree):
        groups.setdefault(x.dtype if x.ndim == 1 else len(groups), []).append(x)
    stacked = lambda group: jnp.stack(group, axis=1) if group[0].ndim == 1 else group[0]
    return [stacked(group) for group in groups.values()]


def _unpacked(arrays: list[Array], like: PyTree[Array]) -> Any:
    leaves, tree = jax.tree.flatten(like)
    groups: dict[Any, int] = {}
    used: dict[int, int] = {}
    out = []
    for x in leaves:
        key = x.dtype if x.ndim == 1 else len(groups)
        which = groups.setdefault(key, len(groups))
        column = used.get(which, 0)
        used[which] = column + 1
        out.append(arrays[which][:, column] if x.ndim == 1 else arrays[which])
    return jax.tree.unflatten(tree, out)


def blank(row: PyTree[Array], rows: int) -> PyTree[Array]:
    """Rows to be written, every one holding `row` (a valid value, should it ever be read)."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape)), row)


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
    first: Row  # where the solve starts
    last: Row | None  # the times of the last step, if the plan wants them
    end: PyTree[Array] = None  # the last state, for a reversal to begin with


def times(row: Row) -> Row:
    """What a row says of time alone, and what that goes on with."""
    return row._replace(y=None, inner=None)


def ends(row: Row) -> Row:
    """What is known of a step that may be rejected: where it ends; and, if the field may jump, whether
    it did so at its start, and where that is."""
    t0 = None if row.jump is None else row.t0
    return row._replace(y=None, inner=None, t0=t0, before=None, controller=None)


def empty(plan: Plan, row: Row) -> Tape:
    """A tape with nothing on it yet. `row`: where the first step starts."""
    rows = clock = knots = None
    if plan.rows is not None:
        rows = blank(pack(row), plan.rows.slots + 1 + plan.ladder.rows)
    if plan.clock is not None:
        clock = blank(pack(times(row)), plan.clock.slots + 1 + plan.ticks.rows)
    if plan.knots is not None:
        knots = blank(pack(ends(row)), plan.knots.slots + 1)
    return Tape(rows, clock, knots)


def record(
    plan: Plan, tape: Tape, k: Int[Array, "..."], accept: Bool[Array, " lanes"], row: Row
) -> Tape:
    """Notes where step k starts and ends, in the lanes that accept it.

    With an index common to all lanes, one that does not accept has ended, and writes behind its last.
    """

    def noted(keep: Doubling | None, rows: Rows | None, row: Row) -> Rows | None:
        if keep is None or rows is None:
            return None
        place = keep.row(k)
        if jnp.ndim(k) > 0:
            place = jnp.where(accept, place, keep.slots)
        return put(rows, place, pack(row))

    return Tape(
        noted(plan.rows, tape.rows, row),
        noted(plan.clock, tape.clock, times(row)),
        noted(plan.knots, tape.knots, ends(row)),
    )
