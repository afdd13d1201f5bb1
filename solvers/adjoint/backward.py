r"""The backward loop: replay a chunk of steps from its stored state, then pull back step by step.

With stride m between stored states and n accepted steps, chunk c holds the steps c m .. c m + m - 1:

    for c = last .. 0:
        y = stored state c m;  replay the chunk, keeping every state          (at most 1 F per step)
        for k = last of the chunk .. first:
            add the cotangents of what was saved at or inside step k
            (ct_y, ct_consts) += transposed derivative of step k              (1 F + 1 B per step)

A lane with fewer steps waits until its own last step comes by. While it waits it evaluates its first
step, with cotangent zero. (Not just any state with any step: zero times what overflows is nan.) A lane
that failed has no step that is safe to evaluate: it borrows one (`donors`), and contributes exactly
nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from nde.solvers.adjoint import tape as tapes
from nde.solvers.adjoint.forward import Moving, choose, masked
from nde.solvers.adjoint.solve import Cotangents
from nde.solvers.adjoint.tape import Doubling, Tape
from nde.solvers.adjoint.traced import Save, Traced
from nde.solvers.estimates.estimates import Judged
from nde.solvers.lanes.closures import Hoisted
from nde.solvers.lanes.donors import donors
from nde.solvers.lanes.primitives import Batch

Row = Callable[[Array], Array]  # from a step to where its state stands


class Trail(NamedTuple):
    """What the forward loop left behind."""

    tape: Tape
    steps: Int[Array, " lanes"]  # accepted steps; -1 where the solve failed
    ts_index: tuple[Int[Array, " lanes"], ...]  # how many save times were reached, per `SubSaveAt`


def kept_trail(out: Moving) -> Trail:
    """The trail of a forward loop, with a row axis as kept arrays have it."""
    steps = jnp.where(out.result == 0, out.accepted, -1)
    return Trail(cast(Tape, out.tape), steps[None], tuple(i[None] for i in out.ts_index))


def opened(trail: Trail) -> Trail:
    """The inverse."""
    return trail._replace(steps=trail.steps[0], ts_index=tuple(i[0] for i in trail.ts_index))


class Loaded(NamedTuple):
    """One step of every lane, ready to be evaluated."""

    y: PyTree[Array]
    state: PyTree[Array]
    t0: Array
    t1: Array
    made_jump: Array


class Running(NamedTuple):
    """The cotangents at the present step, going backwards."""

    y: PyTree[Array]
    state: PyTree[Array]
    consts: dict[int, Array]
    ts_index: tuple[Array, ...]
    memory: PyTree[Array]  # of the noise


def run(
    traced: Traced,
    consts: list[Array],
    ts: tuple[Array, ...],
    batch: Batch,
    trail: Trail,
    cotangents: Cotangents,
    wanted: dict[int, Array],
    keep: Doubling,
) -> Running:
    """Pulls cotangents back to the initial value and to the constants in `wanted` (zeros to add to).

    `keep`: which states the forward loop has kept.
    """
    pull = Pull(traced, consts, ts, batch, trail, cotangents, wanted)
    # Nothing depends on the last cache.
    cache = jax.tree.map(jnp.zeros_like, pull.first.state[1]) if traced.hands_over else None
    inner = traced.inner(pull.alive(cotangents.state), cache)
    ct = Running(pull.alive(cotangents.y), inner, wanted, trail.ts_index, pull.memory)
    ct = _to_start(pull, trail, keep, ct)
    if not traced.hands_over:
        return ct
    # Where no lane took a step there is none to borrow, and the field may be undefined.
    none = lambda: ct._replace(state=ct.state[0])
    return jax.lax.cond(jnp.any(trail.steps > 0), lambda: pull.first_cache(ct), none)


def _to_start(pull: "Pull", trail: Trail, keep: Doubling, ct: Running) -> Running:
    """Pulls back to the first step."""
    most, states = jnp.max(trail.steps), trail.tape.states
    kept = lambda k: tapes.slot(k, keep.rows)
    if not keep.spare:  # every state is there
        return steps_back(pull, jnp.zeros_like(most), most, states, kept, ct)[0]
    last = tapes.stride(most, keep.rows) - 1  # of a chunk; a mask, as the stride is a power of two

    def row(k: Array) -> Array:
        place = k & last
        return jnp.where(place == 0, kept(k), keep.rows + place)

    def first(k: Array) -> Array:
        place = k & last
        return jnp.where((place == last) | (k == most - 1), k - place, k)

    return steps_back(pull, jnp.zeros_like(most), most, states, row, ct, first)[0]


def replay(
    pull: "Pull", k0: Array, k1: Array, states: PyTree[Array], row: Row, memory: PyTree[Array]
) -> tuple[Loaded, PyTree[Array], PyTree[Array]]:
    """From the state at step k0 to step k1, writing down every state on the way.

    A step is loaded ahead and handed on by the loop: so it is read once, and not by each of its stages.
    """

    def step(k, carry):
        loaded, states, memory = carry
        k = jnp.asarray(k, jnp.int32)  # a number under `jax.disable_jit`
        (y, inner), memory = pull.advance(loaded, memory)
        after = choose(k + 1 < pull.steps, (y, inner), (loaded.y, loaded.state))
        return pull.load(k + 1, after), tapes.put(states, row(k + 1), after), memory

    carry = (pull.load(k0, tapes.get(states, row(k0))), states, memory)
    return jax.lax.fori_loop(k0, k1, step, carry)


def steps_back(
    pull: "Pull",
    k0: Array,
    count: Array,
    states: PyTree[Array],
    row: Row,
    ct: Running,
    first: Callable[[Array], Array] | None = None,
) -> tuple[Running, PyTree[Array]]:
    """Pulls back through `count` steps from step k0 on; returns the rows as well.

    `row(k)`: the row of `states` for the state before step k. `first(k)`: the step whose state is
    there, to replay from before step k can be pulled back; None: every state is there.
    """

    def step(i: Array, carry: tuple[Running, PyTree[Array]]):
        ct, states = carry
        k = k0 + count - 1 - i
        if first is None:
            loaded = pull.load(k, tapes.get(states, row(k)))
        else:
            loaded, states, memory = replay(pull, first(k), k, states, row, ct.memory)
            ct = ct._replace(memory=memory)
        return pull.step(k, loaded, ct), states

    return jax.lax.fori_loop(0, count, step, (ct, states))


def chunk(
    pull: "Pull", k0: Array, length: Array, state: PyTree[Array], ct: Running, kept: PyTree[Array]
) -> tuple[Running, PyTree[Array]]:
    """Replays `length` steps from the state at step k0, then pulls back through them.

    `kept`: rows for at least `length` states, to be overwritten.
    """
    kept = tapes.put(kept, jnp.zeros_like(k0), state)
    first = lambda k: jnp.where(k == k0 + length - 1, k0, k)
    return steps_back(pull, k0, length, kept, lambda k: k - k0, ct, first)


class Pull:
    """One step of the backward pass. Holds what does not change from step to step."""

    def __init__(
        self,
        traced: Traced,
        consts: list[Array],
        ts: tuple[Array, ...],
        batch: Batch,
        trail: Trail,
        cotangents: Cotangents,
        wanted: dict[int, Array],
    ):
        self.traced, self.ts, self.batch = traced, ts, batch
        self.tape, self.steps, self.wanted = trail.tape, trail.steps, wanted
        self.saved, self.judged = cotangents.saved_ys, cotangents.judged
        self.donors = donors(trail.steps, batch, consts)
        self.consts = self.donors.lend_consts(consts, batch)
        start = jnp.zeros((), jnp.int32)
        self.memory = traced.memory_of(self.consts, batch, tapes.get(trail.tape.knots, start))
        self.draw = traced.drawing(self.consts, batch)
        self._advance = batch.per_lane(traced.advance)
        y, state = tapes.get(trail.tape.states, start) or (None, None)
        self.first = Loaded(y, state, *tapes.times(trail.tape, start))

    def alive(self, ct: PyTree[Array]) -> PyTree[Array]:
        """Cotangents, without those of lanes that failed."""
        return masked(self.steps >= 0, ct)

    def load(self, k: Array, state: PyTree[Array]) -> Loaded:
        """Step k from `state` in every lane that has one, else a harmless one."""
        y, inner = state
        loaded = Loaded(y, inner, *tapes.times(self.tape, k))
        if not self.traced.uniform:
            loaded = choose(k < self.steps, loaded, self.first)
        return cast(Loaded, self.donors.lend(loaded))

    def advance(self, loaded: Loaded, memory: PyTree[Array]):
        """The state behind a step, and the memory of the noise."""
        y, inner, t0, t1, jump = loaded
        increments, memory = self.draw(t0, t1, memory)
        return self._advance(self.consts, y, inner, t0, t1, jump, increments)[:2], memory

    def step(self, k: Array, loaded: Loaded, ct: Running) -> Running:
        """From the cotangents behind step k to those before it."""
        active = k < self.steps
        y, inner, t0, t1, jump = loaded
        moving, fixed = eqx.partition(inner, eqx.is_inexact_array)
        increments, memory = self.draw(t0, t1, ct.memory)
        ct = ct._replace(memory=memory)
        ct, ct_dense = self._outputs(k, active, y, inner, t0, t1, jump, increments, ct)

        def advance(consts, x, aux):
            (y, moving), (fixed, *rest) = x, aux
            out = self.traced.advance(consts, y, eqx.combine(moving, fixed), *rest)
            y1, inner, dense, judged = out
            return y1, _inexact(inner), dense, _asked(judged, self.judged)

        behind = masked(active, (ct.y, ct.state))
        aux = (fixed, t0, t1, jump, increments)
        ct_out = (*behind, ct_dense, self._judgement(k, active))
        return self._pulled(advance, (y, moving), aux, ct_out, active, ct)

    def first_cache(self, ct: Running) -> Running:
        """From the cotangents of the first cache to those of what it was evaluated from."""
        loaded, (ct_state, ct_cache) = self.donors.lend(self.first), ct.state
        evaluate = lambda consts, y, aux: self.traced.cache(consts, aux[0], y, aux[1])
        aux = (loaded.t0, loaded.state[0])
        _, ct_consts, ct_y = self.transpose(
            evaluate, self.traced.cache.uses, loaded.y, aux, self.alive(ct_cache)
        )
        y = jax.tree.map(jnp.add, ct.y, self.alive(ct_y))
        return ct._replace(y=y, state=ct_state, consts=added(ct.consts, ct_consts))

    def _judgement(self, k: Array, active: Array) -> Judged | None:
        """The cotangents of the estimates of step k, where anything depends on them."""
        return None if self.judged is None else masked(active, tapes.get(self.judged, k))

    def _pulled(self, fn, x, aux, ct_out, active, ct: Running) -> Running:
        uses = self.traced.advance.uses
        _, ct_consts, (ct_y, ct_state) = self.transpose(fn, uses, x, aux, ct_out)
        y, state = choose(active, (ct_y, ct_state), (ct.y, ct.state))
        return ct._replace(y=y, state=state, consts=added(ct.consts, ct_consts))

    def transpose(self, fn, uses, x, aux, ct_out, consts=None):
        """The value, and the cotangents of the wanted constants (by number) and of `x`."""
        consts = self.consts if consts is None else consts
        numbers = [i for i in range(len(consts)) if i in self.wanted and i in uses]
        wrt = [i in numbers for i in range(len(consts))]
        pull = self.batch.pull(fn, wrt)
        value, ct_consts, ct_x = pull(consts, x, aux, ct_out)
        return value, dict(zip(numbers, ct_consts, strict=True)), ct_x

    def output(self, fn, save: Save, uses, due: Array, x, aux, ct_out):
        """The cotangents of an output that is due in some lanes: of the constants, and of `x`.

        It may have no derivative where it is not saved: there a lane borrows from one that is due, the
        constants included, as they belong to the point.
        """
        consts = self.consts
        if not save.plain:
            who = donors(due.astype(jnp.int32), self.batch, consts)
            consts = who.lend_consts(consts, self.batch)
            x, aux = who.lend((x, aux))
        _, ct_consts, ct_x = self.transpose(fn, uses, x, aux, masked(due, ct_out), consts)
        return ct_consts, masked(due, ct_x)

    def filled(self, ct_consts: dict[int, Array]) -> dict[int, Array]:
        """With zeros for the wanted constants that are missing."""
        return {i: ct_consts.get(i, jnp.zeros_like(x)) for i, x in self.wanted.items()}

    def _outputs(self, k, active, y, inner, t0, t1, jump, increments, ct: Running):
        """Adds the cotangents of what was saved in step k, and returns those of its dense output."""
        if all(save.at_time is None and save.at_step is None for save in self.traced.saves):
            return ct, None
        y1, _, dense, _ = self._advance(self.consts, y, inner, t0, t1, jump, increments)
        ct_dense = jax.tree.map(jnp.zeros_like, dense)
        before = jnp.where(k == 0, -jnp.inf, tapes.get(self.tape.knots, k))
        for j, save in enumerate(self.traced.saves):
            if self.saved[j] is None:
                continue
            if save.at_step is not None:
                ct = self.at_step(j, save, save.at_step, k, active, t1, y1, ct)
            if save.at_time is not None and save.times:
                ct, ct_dense = self._at_times(
                    j, save, save.at_time, k, active, before, t0, t1, dense, ct, ct_dense
                )
        return ct, ct_dense

    def at_step(self, j, save: Save, fn: Hoisted, k, active, t1, y1, ct: Running) -> Running:
        due = active & ((k + 1) % save.every == 0)
        row = jnp.where(due, save.row(ct.ts_index[j], k + 1) - 1, 0)
        ct_out = tapes.get(self.saved[j], row)
        at_step = lambda consts, y, t: _inexact(fn(consts, t, y))

        def pulled() -> Running:
            ct_consts, ct_y = self.output(at_step, save, fn.uses, due, y1, t1, ct_out)
            y = jax.tree.map(jnp.add, ct.y, ct_y)
            return ct._replace(y=y, consts=added(ct.consts, ct_consts))

        return pulled() if save.plain else jax.lax.cond(jnp.any(due), pulled, lambda: ct)

    def _at_times(
        self, j, save: Save, fn: Hoisted, k, active, before, t0, t1, dense, ct: Running, ct_dense
    ) -> tuple[Running, PyTree[Array]]:
        def at_time(consts, dense, aux):
            t0, t1, t = aux
            return _inexact(fn(consts, t0, t1, dense, t))

        def last_time(index):
            t = tapes.get(self.ts[j], jnp.maximum(index - 1, 0))
            return t, active & (index > 0) & (t > before)

        def cond(carry):
            return jnp.any(last_time(carry[0])[1])

        def body(carry: tuple[Array, PyTree, dict[int, Array]]):
            index, ct_dense, ct_all = carry
            t, due = last_time(index)
            row = jnp.where(due, save.row(index - 1, jnp.broadcast_to(k, due.shape)), 0)
            ct_out, aux = tapes.get(self.saved[j], row), (t0, t1, jnp.where(due, t, t1))
            ct_consts, ct_here = self.output(at_time, save, fn.uses, due, dense, aux, ct_out)
            ct_dense = jax.tree.map(jnp.add, ct_dense, ct_here)
            return index - due.astype(jnp.int32), ct_dense, added(ct_all, ct_consts)

        index, ct_dense, ct_consts = jax.lax.while_loop(
            cond, body, (ct.ts_index[j], ct_dense, ct.consts)
        )
        ts_index = tuple(index if i == j else n for i, n in enumerate(ct.ts_index))
        return ct._replace(consts=ct_consts, ts_index=ts_index), ct_dense


def _asked(judged: Judged | None, cts: Judged | None) -> Judged | None:
    """The estimates that have cotangents: the others cost nothing on the way back."""
    if judged is None or cts is None:
        return None
    kept: list[Any] = [None if ct is None else x for x, ct in zip(judged, cts, strict=True)]
    return Judged(*kept)


def _inexact(tree: PyTree) -> PyTree:
    return eqx.filter(tree, eqx.is_inexact_array)


def added(total: dict[int, Array], part: dict[int, Array]) -> dict[int, Array]:
    return {i: total[i] + part[i] if i in part else total[i] for i in total}
